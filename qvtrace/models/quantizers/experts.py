"""Fused experts: all experts of a layer in one three-dimensional parameter, which is no module."""

from collections.abc import Iterator

from torch import Tensor, nn

from qvtrace.models.quantizers.checkpoint import is_quantized
from qvtrace.trees import Json


def float_experts(model: nn.Module) -> Json | None:
    """The modules that hold fused experts as plain floats, and their share of all elements of the
    model's parameters; None where there are none."""
    held = {
        name: weights
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts") and (weights := list(_fused(module)))
    }
    if not held:
        return None
    fused = sum(weight.numel() for weights in held.values() for weight in weights)
    every = sum(parameter.numel() for parameter in model.parameters())
    return {"modules": list(held), "share": round(fused / every, 4)}


def _fused(module: nn.Module) -> Iterator[Tensor]:
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 3 and not is_quantized(parameter):
            yield parameter
