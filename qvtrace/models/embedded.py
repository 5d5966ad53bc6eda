"""`qwen3-vl-tiny`: a reduced Qwen3-VL with random weights, and its sample, without a download."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qvtrace.models.origins import relative
from qvtrace.models.pictures import CRAFTED_SIZE, crafted_picture, open_pictures
from qvtrace.models.request import ModelRequest, Sample
from qvtrace.models.signatures import takes

PROMPT = "Describe the image."
_VOCABULARY = 1000
_IMAGE = 998
_VISION_START, _VISION_END = 652, 653
# The ids that Qwen3-VL's tokenizer gives, modulo the vocabulary: <|im_start|>user\n, the prompt,
# <|im_end|>\n<|im_start|>assistant\n.
_BEFORE = [644, 872, 198]
_PROMPT_IDS = [785, 279, 168, 13]
_AFTER = [645, 198, 644, 91, 198]
_FIRST_BYTE = 256  # ids of another prompt: its bytes, away from the ids above
_PATCH = 16
_MERGE = 2
_MOST_IMAGE_TOKENS = 256
_THETA = 10000.0


def embedded_config() -> Any:
    """The configuration: two vision and two text layers, hidden size 64, vocabulary 1000."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "out_hidden_size": 64,
            "num_heads": 4,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": 1024,
            **_rope(),
        },
        image_token_id=_IMAGE,
        video_token_id=_IMAGE + 1,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
        architectures=["Qwen3VLForConditionalGeneration"],
    )


def embedded_sample(model: nn.Module, request: ModelRequest) -> Sample:
    """One picture and the prompt; 84 tokens and 280 patches of 1536 values unless asked otherwise.

    There is no tokenizer: the ids of the default prompt are those of Qwen3-VL's modulo the
    vocabulary, another prompt's are made from its bytes.
    """
    prompt = PROMPT if request.prompt is None else request.prompt
    pictures = open_pictures(request.images) or [crafted_picture()]
    patches = _image_processor()(images=pictures, return_tensors="pt")
    grid = patches["image_grid_thw"]
    ids = torch.tensor([_token_ids(prompt, (grid.prod(dim=1) // _MERGE**2).tolist())])
    kwargs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches["pixel_values"],
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == _IMAGE).long(),
    }
    source = {
        "kind": "crafted",
        "prompt": prompt,
        "images": [*map(relative, request.images)]
        or [f"gradient {CRAFTED_SIZE[0]}x{CRAFTED_SIZE[1]}"],
        "tokens": "of the prompt's bytes" if prompt != PROMPT else "of Qwen3-VL",
    }
    warnings = (
        ()
        if prompt == PROMPT
        else ("the embedded model has no tokenizer: the ids of the prompt are made from its bytes",)
    )
    return Sample((), {n: v for n, v in kwargs.items() if takes(model, n)}, source, warnings)


def _rope() -> dict[str, Any]:
    """Of the rotary embedding; transformers 5 gave the settings another name."""
    import transformers

    settings = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    if transformers.__version__.startswith("4."):
        return {"rope_scaling": settings, "rope_theta": _THETA}
    return {"rope_parameters": {**settings, "rope_theta": _THETA}}


def _token_ids(prompt: str, image_tokens: Sequence[int]) -> list[int]:
    ids = list(_BEFORE)
    for tokens in image_tokens:
        ids += [_VISION_START, *[_IMAGE] * tokens, _VISION_END]
    if prompt == PROMPT:
        return ids + _PROMPT_IDS + _AFTER
    return ids + [_FIRST_BYTE + byte for byte in prompt.encode()] + _AFTER


def _image_processor() -> Any:
    import transformers

    # The one on Pillow needs no torchvision; older versions call it by the plain name.
    name = "Qwen2VLImageProcessorPil"
    name = name if hasattr(transformers, name) else "Qwen2VLImageProcessor"
    pixels_per_token = (_PATCH * _MERGE) ** 2
    return getattr(transformers, name)(
        patch_size=_PATCH,
        merge_size=_MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        size={
            "shortest_edge": 4 * pixels_per_token,
            "longest_edge": _MOST_IMAGE_TOKENS * pixels_per_token,
        },
    )
