"""How many bytes weights take as floats, and how many quantized."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvtrace.patterns import above
from qvtrace.qparams.found import Found
from qvtrace.qparams.modules import own_tensors, read_module
from qvtrace.qparams.parameters import WEIGHT
from qvtrace.recording.module_tree import walk_modules
from qvtrace.replayer import by_reference_name

_BITS = re.compile(r"(?:u?int|nf|fp|float)(\d+)")


@dataclass(frozen=True)
class FloatWeights:
    """The tensors of one module that holds no others."""

    weight_elements: int
    weight_bytes: int
    other_bytes: int  # of biases and buffers


def float_weights(model: nn.Module) -> dict[str, FloatWeights]:
    """The modules of a float model that hold tensors and no other modules, by name."""
    found = {}
    for each in walk_modules(model):
        held = own_tensors(each.module)
        if held and next(each.module.children(), None) is None:
            weight = held.pop(WEIGHT, torch.empty(0))
            others = sum(map(_bytes, held.values()))
            found[each.name] = FloatWeights(weight.numel(), _bytes(weight), others)
    return found


@dataclass(frozen=True)
class QuantizedWeights:
    """What is known of a quantized module's weight."""

    bits: int | None  # of an element, by its tensor class or the scheme that is imitated in float
    beside: int  # bytes of its scales and, where it is not symmetric, its zero points
    stored: int  # bytes of all tensors in the module, as they are


def quantized_weights(model: nn.Module, names: Iterable[str]) -> dict[str, QuantizedWeights]:
    """What is known of the weights of these modules; names are the float model's."""
    modules = by_reference_name(model)
    return {name: _quantized(modules[name]) for name in names if name in modules}


def extra_bytes(
    floats: Mapping[str, FloatWeights], quantized: Mapping[str, QuantizedWeights]
) -> dict[str, int]:
    """What each module takes as float beyond what it takes quantized; none that takes no more.

    A weight of which the bits are known counts packed; any other as it is stored.
    """
    found = {}
    for name, weights in floats.items():
        if name in quantized:
            extra = weights.weight_bytes - _quantized_bytes(weights, quantized[name])
            if extra > 0:
                found[name] = extra
    return found


class Sizes:
    """Extra bytes of sets of modules; one within another is counted once."""

    def __init__(self, extra: Mapping[str, int]) -> None:
        self._extra = extra

    def __call__(self, kept: Iterable[str]) -> int:
        """Of these modules and of all that is in them."""
        chosen = set(kept)
        return sum(
            extra
            for name, extra in self._extra.items()
            if name in chosen or not chosen.isdisjoint(above(name))
        )


def _quantized_bytes(weights: FloatWeights, quantized: QuantizedWeights) -> int:
    """Of the weight with what belongs to it."""
    if quantized.bits is None:
        return quantized.stored - weights.other_bytes
    return math.ceil(weights.weight_elements * quantized.bits / 8) + quantized.beside


def _quantized(module: nn.Module) -> QuantizedWeights:
    found = [
        one
        for name, inner in module.named_modules()
        for one in read_module(name, inner)
        if one.of == WEIGHT
    ]
    tensors = (tensor for each in module.modules() for tensor in own_tensors(each).values())
    held = {id(tensor): tensor for tensor in tensors}
    return QuantizedWeights(
        bits=next((bits for one in found if (bits := _bits(one)) is not None), None),
        beside=sum(_bytes(values) for one in found for values in _stored_beside(one)),
        stored=sum(map(_bytes, held.values())),
    )


def _bits(found: Found) -> int | None:
    matched = _BITS.match(found.dtype or "")
    return None if matched is None else int(matched[1])


def _stored_beside(found: Found) -> Iterable[torch.Tensor]:
    values = [found.scale, *([found.zero_point] if found.scheme == "affine" else [])]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _bytes(tensor: Any) -> int:
    """What a tensor takes: of one that is put together from others, what these take."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())
