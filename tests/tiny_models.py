"""Tiny transformers models with random weights, each a family of its own, in milliseconds."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports behind it, which are not ours to mend
    import transformers

VOCABULARY = 256
HIDDEN = 64
Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

_LAYERS = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_LAYERS, "intermediate_size": 128}
_DECODER = {
    **_ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_IMAGES = {"image_size": 32, "patch_size": 8}


def build(name: str, seed: int = 0) -> Built:
    """The model of that family in eval mode, and inputs that it takes; the same for each seed."""
    torch.manual_seed(seed)
    model, inputs = FAMILIES[name]()
    return model.eval(), inputs


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _text(length: int = 16) -> Inputs:
    ids = torch.randint(3, VOCABULARY, (1, length), generator=_generator())
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image() -> Inputs:
    return {"pixel_values": torch.randn(1, 3, 32, 32, generator=_generator())}


def _decoder_ids() -> Inputs:
    return {"decoder_input_ids": torch.tensor([[1, 5, 7, 9]])}


def _llama() -> Built:
    config = transformers.LlamaConfig(**_DECODER)
    return transformers.LlamaForCausalLM(config), _text()


def _qwen3() -> Built:
    config = transformers.Qwen3Config(**_DECODER)
    return transformers.Qwen3ForCausalLM(config), _text()


def _qwen3_moe() -> Built:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = transformers.Qwen3MoeConfig(**_DECODER, **experts)
    return transformers.Qwen3MoeForCausalLM(config), _text()


def _gemma3() -> Built:
    """Sliding and full attention, and one rotary embedding that is called for each."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    settings = {**_DECODER, "num_hidden_layers": 3, "layer_types": layers, "sliding_window": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**settings)), _text()


def _gemma3_image() -> Built:
    """An image that becomes 4 of the tokens."""
    image = 250
    config = transformers.Gemma3Config(
        text_config={**_DECODER, "model_type": "gemma3_text"},
        vision_config={**_ENCODER, **_IMAGES, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=image + 1,
        eoi_token_index=image + 2,
    )
    inputs = {**_text(), **_image()}
    inputs["input_ids"].clamp_(max=image - 1)[0, 4:8] = image
    return transformers.Gemma3ForConditionalGeneration(config), inputs


def _gpt2() -> Built:
    """Conv1D in place of Linear."""
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, vocab_size=VOCABULARY
    )
    return transformers.GPT2LMHeadModel(config), _text()


def _mamba() -> Built:
    """A state space model, which uses the weights of one Linear without calling it."""
    config = transformers.MambaConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, state_size=8, vocab_size=VOCABULARY
    )
    return transformers.MambaForCausalLM(config), _text()


def _bert() -> Built:
    config = transformers.BertConfig(**_ENCODER, vocab_size=VOCABULARY)
    return transformers.BertForSequenceClassification(config), _text()


def _vit() -> Built:
    config = transformers.ViTConfig(**_ENCODER, **_IMAGES)
    return transformers.ViTForImageClassification(config), _image()


def _clip() -> Built:
    config = transformers.CLIPConfig(
        text_config={**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 32},
        vision_config={**_ENCODER, **_IMAGES},
        projection_dim=32,
    )
    return transformers.CLIPModel(config), {**_text(), **_image()}


def _whisper() -> Built:
    config = transformers.WhisperConfig(
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=VOCABULARY,
        num_mel_bins=80,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    features = torch.randn(1, 80, 100, generator=_generator())
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": features, **_decoder_ids()}


def _t5() -> Built:
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config), {**_text(), **_decoder_ids()}


def _qwen3_vl() -> Built:
    """Two vision and two text layers; 48 patches that become 12 tokens of a text of 24."""
    vocabulary, image = 1000, 998
    config = transformers.Qwen3VLConfig(
        vision_config=_qwen3_vl_vision(),
        text_config=_qwen3_vl_text(vocabulary),
        image_token_id=image,
        video_token_id=999,
        vision_start_token_id=997,
        vision_end_token_id=996,
    )
    generator = _generator()
    ids = torch.randint(3, 990, (1, 24), generator=generator)
    ids[0, 4], ids[0, 5:17], ids[0, 17] = 997, image, 996
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(48, 3 * 2 * 16 * 16, generator=generator),
        "image_grid_thw": torch.tensor([[1, 6, 8]]),
        "mm_token_type_ids": (ids == image).long(),
    }
    model = transformers.Qwen3VLForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model, inputs


def _qwen3_vl_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "out_hidden_size": HIDDEN,
        "num_heads": 4,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0, 1],
    }


def _qwen3_vl_text(vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "use_cache": False,
        **_multimodal_rope(),
    }


def _multimodal_rope() -> dict[str, Any]:
    """Transformers 5 gave the settings another name."""
    settings = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    if transformers.__version__.startswith("4."):
        return {"rope_scaling": settings, "rope_theta": 10000.0}
    return {"rope_parameters": {**settings, "rope_theta": 10000.0}}


FAMILIES: dict[str, Callable[[], Built]] = {
    "qwen3_vl": _qwen3_vl,
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma3_image": _gemma3_image,
    "bert": _bert,
    "vit": _vit,
    "whisper": _whisper,
    "t5": _t5,
    "gpt2": _gpt2,
    "clip": _clip,
    "mamba": _mamba,
    "qwen3_moe": _qwen3_moe,
}
