"""A tiny GGUF file, as llama.cpp's converter writes one."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models


def write_llama(file: Path, kind: str = "Q8_0") -> Path:
    """The tiny Llama; its Linear weights of type `kind` (`F32`: a float file), the rest F32."""
    import gguf

    model: Any
    model, _ = tiny_models.build("llama")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, weight in model.state_dict().items():
        values = _interleaved(name, weight.numpy(), config)
        tensor = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2 and "embed" not in name:
            packed = gguf.quants.quantize(np.ascontiguousarray(values), quantized)
            writer.add_tensor(tensor, packed, raw_dtype=quantized)
        else:
            writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(name: str, values: Any, config: Any) -> Any:
    """Rows of queries and keys in the order of llama.cpp's rotary embedding."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in heads if part in name), None)
    if count is None:
        return values
    rows = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)
