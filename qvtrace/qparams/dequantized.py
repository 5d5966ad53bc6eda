"""The weights of a module as it computes with them: what is quantized is brought back to floats.

Nothing here changes a module: a packed weight is unpacked into a tensor of its own.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch import nn

from qvtrace.qparams.found import Found
from qvtrace.qparams.modules import is_torch_quantized, own_tensors, read_module
from qvtrace.qparams.parameters import WEIGHT
from qvtrace.qparams.weights import is_plain

_QUANTIZED_DTYPES = frozenset(
    {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32}
)


class NoWeightError(Exception):
    """A weight is not at hand in a form that can be read."""


Values: TypeAlias = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class ModuleWeight:
    """One weight of a module."""

    name: str  # `weight`, `bias`
    class_name: str  # of the tensor that the module holds
    sources: tuple[torch.Tensor, ...]  # the tensors that it stands for
    values: Values
    is_plain: bool = False  # it is the one tensor itself


def module_weights(module: nn.Module) -> list[ModuleWeight]:
    """The weights that a module holds itself, each with a way to get its values.

    The way raises where there is none at the moment; a weight may stand for a tensor of a child
    that is only used through this module.
    """
    held = own_tensors(module)
    special = {weight.name: weight for reader in _READERS for weight in reader(module, held)}
    used = {id(source) for weight in special.values() for source in weight.sources}
    plain = [
        ModuleWeight(name, type(tensor).__name__, (tensor,), _itself(tensor), is_plain=True)
        for name, tensor in module.__dict__.get("_parameters", {}).items()
        if isinstance(tensor, torch.Tensor) and name not in special and id(tensor) not in used
    ]
    return [*special.values(), *plain]


def _itself(tensor: torch.Tensor) -> Values:
    return lambda: tensor


def _compressed(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """compressed-tensors: packed, or a float that is rounded in each call, or unpacked again."""
    scheme = getattr(module, "quantization_scheme", None)
    arguments = getattr(scheme, "weights", None)
    if arguments is None:
        return
    status = str(getattr(getattr(module, "quantization_status", None), "value", ""))
    parts = tuple(tensor for name, tensor in held.items() if name.startswith("weight_"))
    weight = held.get("weight")
    if weight is not None and status in ("", "initialized", "decompressed"):
        yield ModuleWeight(WEIGHT, type(weight).__name__, (weight, *parts), _itself(weight))
        return
    name = "weight" if weight is not None else "weight_packed"
    sources = (*parts, *(() if weight is None else (weight,)))

    def values() -> torch.Tensor:
        if status == "compressed":
            return _unpacked(scheme, held)
        return _rounded_as(arguments, held)

    yield ModuleWeight(WEIGHT, type(held.get(name)).__name__, sources, values)


def _unpacked(scheme: Any, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
    kind = str(getattr(scheme.format, "value", scheme.format))
    base = import_module("compressed_tensors.compressors.base").BaseCompressor
    state = base.get_value_from_registry(kind).decompress(dict(held), scheme)
    weight: torch.Tensor = state["weight"]
    return weight


def _rounded_as(arguments: Any, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
    fake_quantize: Callable[..., torch.Tensor] = import_module(
        "compressed_tensors.quantization.lifecycle.forward"
    ).fake_quantize
    scale, zero_point = held["weight_scale"], held.get("weight_zero_point")
    return fake_quantize(held["weight"], scale, zero_point, arguments)


def _fake_quantized(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """TICO's wrappers hold the float module, whose weights they round in each call."""
    inner = module.__dict__.get("_modules", {}).get("module")
    observer = getattr(module, "obs_weight", getattr(module, "weight_obs", None))
    if not isinstance(inner, nn.Module) or not hasattr(module, "_fq"):
        return
    for name, tensor in own_tensors(inner).items():
        values = _itself(tensor)
        if name == WEIGHT and observer is not None and _is_quantizing(module):
            values = _rounded(observer, tensor)
        yield ModuleWeight(name, type(tensor).__name__, (tensor,), values)


def _is_quantizing(module: Any) -> bool:
    return getattr(getattr(module, "_mode", None), "name", "") == "QUANT"


def _rounded(observer: Any, tensor: torch.Tensor) -> Values:
    fake_quant: Callable[[torch.Tensor], torch.Tensor] = observer.fake_quant
    return lambda: fake_quant(tensor)


def _trained(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """torch's quantization-aware training rounds the weight in each call by a module of its own,
    which is not called here: it would take in what it sees."""
    weight, fake = held.get("weight"), module.__dict__.get("_modules", {}).get("weight_fake_quant")
    if weight is None or fake is None or not _is_switched_on(fake):
        return
    limits = fake.quant_min, fake.quant_max

    def values() -> torch.Tensor:
        scale, zero_point = fake.scale, fake.zero_point.to(torch.int32)
        if scale.numel() > 1:
            return torch.fake_quantize_per_channel_affine(
                weight, scale, zero_point, fake.ch_axis, *limits
            )
        return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, *limits)

    yield ModuleWeight(WEIGHT, type(weight).__name__, (weight,), values)


def _is_switched_on(fake: Any) -> bool:
    enabled = getattr(fake, "fake_quant_enabled", None)
    return isinstance(enabled, torch.Tensor) and bool(enabled.all())


def _quanto(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """quanto rounds a weight that is not frozen in each call."""
    weight = held.get("weight")
    if weight is not None and is_plain(weight) and getattr(module, "weight_qtype", None):
        yield ModuleWeight(WEIGHT, type(weight).__name__, (weight,), lambda: module.qweight)


def _bitsandbytes(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    weight: Any = held.get("weight")
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        state = getattr(module, "state", None)
        scales = next((s for s in (weight.SCB, getattr(state, "SCB", None)) if s is not None), None)
        yield ModuleWeight(WEIGHT, "Int8Params", (weight,), _times_rows(weight, scales))
    elif getattr(weight, "quant_state", None) is not None:
        yield ModuleWeight(WEIGHT, type(weight).__name__, (weight,), _four_bits(weight))


def _four_bits(weight: Any) -> Values:
    functions: Any = sys.modules["bitsandbytes.functional"]

    def values() -> torch.Tensor:
        data, state = weight.data, copy(weight.quant_state)
        if getattr(state, "packing_format_for_cpu", False):  # its first forward has repacked it
            data, state = functions._convert_weight_packed_for_cpu_inverse(data, state)
        floats: torch.Tensor = functions.dequantize_4bit(data, state)
        return floats

    return values


def _times_rows(weight: torch.Tensor, scales: torch.Tensor | None) -> Values:
    def values() -> torch.Tensor:
        if scales is None:
            raise NoWeightError("its scales are not at hand")
        return weight.data.as_subclass(torch.Tensor).float() * (scales / 127)[:, None]

    return values


def _methods(module: Any, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """torch's quantized modules give weight and bias when asked; HQQ's dequantizes itself."""
    for name in ("weight", "bias"):
        method = getattr(type(module), name, None)
        if callable(method) and is_torch_quantized(module):
            value = getattr(module, name)()
            if value is not None:
                yield ModuleWeight(name, type(value).__name__, (), _itself(value))
    if "W_q" in held and callable(getattr(module, "dequantize", None)):
        yield ModuleWeight(WEIGHT, type(module).__name__, (held["W_q"],), module.dequantize)


def _scaled(module: nn.Module, held: Mapping[str, torch.Tensor]) -> Iterator[ModuleWeight]:
    """Integers or float8 beside a scale; packed integers that only their own kernels read."""
    packed = next((held[name] for name in ("qweight", "weight") if name in held), None)
    if packed is None or not is_plain(packed) or packed.dtype not in _QUANTIZED_DTYPES:
        return
    found = next((one for one in read_module("", module) if one.of == WEIGHT), None)
    scales = tuple(tensor for name, tensor in held.items() if "scale" in name or "zero" in name)
    sources = (packed, *scales)
    yield ModuleWeight(WEIGHT, type(packed).__name__, sources, _product(packed, found))


def _product(packed: torch.Tensor, found: Found | None) -> Values:
    def values() -> torch.Tensor:
        if found is None or found.scale is None or packed.dtype == torch.int32:
            raise NoWeightError("packed in a form that is not known")
        floats = packed.float()
        if found.zero_point is not None:
            floats = floats - _aligned(found.zero_point, floats)
        scaled: torch.Tensor = floats * _aligned(found.scale, floats)
        return scaled

    return values


def _aligned(part: Any, floats: torch.Tensor) -> Any:
    """A scale for each row stands before the columns; groups of columns are repeated."""
    if not isinstance(part, torch.Tensor) or part.numel() == 1:
        return part
    part = part.float()
    if part.dim() == 1 and part.numel() == floats.shape[0]:
        return part.reshape(-1, *[1] * (floats.dim() - 1))
    if part.dim() == floats.dim() and floats.shape[-1] % part.shape[-1] == 0:
        return part.repeat_interleave(floats.shape[-1] // part.shape[-1], -1)
    raise NoWeightError("its scales have a shape that is not known")


_Reader = Callable[[Any, Mapping[str, torch.Tensor]], Iterator[ModuleWeight]]
# The last that knows a name decides.
_READERS: tuple[_Reader, ...] = (
    _scaled,
    _methods,
    _bitsandbytes,
    _quanto,
    _trained,
    _fake_quantized,
    _compressed,
)
