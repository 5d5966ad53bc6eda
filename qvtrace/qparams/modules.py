"""How a module says that it is quantized: compressed-tensors' schemes, quanto's activations,
observers of TICO and torch, packed weights, and whatever is named scale and zero point."""

import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from qvtrace.qparams.found import Found, Values, dtype_name, integer_range
from qvtrace.qparams.parameters import INPUT, OUTPUT, WEIGHT
from qvtrace.qparams.weights import is_plain, read_int8_state, read_tensor, scheme_of

GGUF_TYPE = "gguf_type"  # attribute of a module: what its weight was in a file of that format

_SMALL_DTYPES = frozenset(
    {torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}
)
_ZERO_POINT = "zero_point"
_ROLES = (("weight", WEIGHT), ("act_in", INPUT), ("input", INPUT))
_OUTPUT_NAMES = ("act_out", "output", "activation_post_process")
_ACTIVATIONS = ("input_scale", "output_scale")


# A step of a graph by itself: a number says nothing of the module that holds it.
_NUMBERED = re.compile(r"\d+|.*activation_post_process_\d+")


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters and buffers, by name."""
    held: dict[str, torch.Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.__dict__.get(kind, {}).items():
            if isinstance(tensor, torch.Tensor):
                held[name] = tensor
    return held


def read_module(name: str, module: nn.Module) -> list[Found]:
    """Everything that a module says of how it is quantized; `name` is its own in the model."""
    held = own_tensors(module)
    component = name.rpartition(".")[2]
    for reader in _READERS:
        found = list(reader(component, module, held))
        if found:
            return found
    return []


def may_be_quantized(module: nn.Module) -> bool:
    """A quick look: a float module is told by its tensors and the names of what it has."""
    held = own_tensors(module)
    if any(not is_plain(tensor) or tensor.dtype in _SMALL_DTYPES for tensor in held.values()):
        return True
    return any(map(_is_telling, [*held, *module.__dict__])) or is_torch_quantized(module)


@lru_cache(maxsize=4096)
def _is_telling(name: str) -> bool:
    return not _TELLING.isdisjoint([name, *name.split("_")])


_TELLING = frozenset(
    {
        "quantization_scheme",
        "weight_qtype",
        "min_val",
        "scale",
        "scales",
        "zero",
        "zeros",
        "qweight",
        GGUF_TYPE,
    }
)


def is_torch_quantized(module: nn.Module) -> bool:
    """Whether it is one of torch's own quantized modules, or of those that stand for several."""
    return ".ao.nn." in type(module).__module__ and ".quantized" in type(module).__module__


def _compressed(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """compressed-tensors: a scheme with arguments for weights, inputs and outputs."""
    scheme = getattr(module, "quantization_scheme", None)
    sides = ((WEIGHT, "weights"), (INPUT, "input_activations"), (OUTPUT, "output_activations"))
    for of, name in sides:
        arguments = getattr(scheme, name, None)
        if arguments is not None and hasattr(arguments, "num_bits"):
            yield _by_arguments(of, arguments, held)


def _by_arguments(of: str, arguments: Any, held: dict[str, torch.Tensor]) -> Found:
    kind = str(getattr(arguments.type, "value", arguments.type))
    bits = arguments.num_bits
    dtype = f"int{bits}" if kind == "int" else {8: "float8_e4m3fn", 4: "float4_e2m1fn"}.get(bits)
    weight = held.get("weight", held.get("weight_packed")) if of == WEIGHT else None
    strategy = getattr(arguments, "strategy", None)
    dynamic = getattr(arguments, "dynamic", False) is not False
    quant_min, quant_max = integer_range(dtype)
    return Found(
        of,
        "QuantizationArgs" if weight is None else type(weight).__name__,
        dtype=dtype,
        scheme="symmetric" if arguments.symmetric else "affine",
        granularity=None if strategy is None else str(getattr(strategy, "value", strategy)),
        group_size=getattr(arguments, "group_size", None),
        axis=0 if str(getattr(strategy, "value", strategy)) == "channel" else None,
        dynamic=dynamic,
        quant_min=quant_min,
        quant_max=quant_max,
        scale=None if dynamic else held.get(f"{of}_scale"),
        zero_point=None if dynamic else held.get(f"{of}_zero_point"),
    )


def _weights(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """Weights that are quantized tensors, and quanto's and bitsandbytes' modules around them."""
    for name, tensor in held.items():
        if is_plain(tensor):
            continue
        if type(tensor).__name__ == "Int8Params" and getattr(tensor, "SCB", None) is None:
            yield from read_int8_state(name, tensor, getattr(module, "state", None))
        else:
            yield from read_tensor(name, tensor)
    if getattr(module, "weight_qtype", None) is not None and is_plain(held.get("weight", _NONE)):
        yield _quanto(WEIGHT, module.weight_qtype, None)  # not frozen: quantized in each call
    activations = getattr(module, "activation_qtype", None)
    if activations is not None:
        for name in _ACTIVATIONS:
            of = name.removesuffix("_scale")
            if _is_hooked(module, of):
                yield _quanto(of, activations, held.get(name))


_NONE = torch.empty(0)


def _is_hooked(module: Any, of: str) -> bool:
    """Whether quanto quantizes this side: a calibration takes its hook off where none is needed."""
    hook = getattr(module, "_quantize_hooks", {}).get(of)
    return hook is not None and hook.id in (hook.hooks_dict_ref() or {})


def _quanto(of: str, qtype: Any, scale: torch.Tensor | None) -> Found:
    return Found(
        of,
        type(qtype).__name__,
        dtype=str(qtype.name).removeprefix("q"),
        scheme="symmetric",
        granularity=None if scale is None else "tensor",
        dynamic=scale is None,
        quant_min=float(qtype.qmin),
        quant_max=float(qtype.qmax),
        scale=scale,
    )


def _packed(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """torch's own quantized modules, whose weights are no parameters."""
    if not is_torch_quantized(module):
        return
    weight = getattr(module, "weight", None)
    if callable(weight) and not isinstance(weight, torch.Tensor):
        yield from read_tensor(WEIGHT, weight())
    scale, zero_point = getattr(module, "scale", None), getattr(module, _ZERO_POINT, None)
    if ".dynamic" in type(module).__module__:
        yield Found(INPUT, "dynamic", "uint8", "affine", "tensor", dynamic=True)
    elif isinstance(scale, int | float | torch.Tensor) and zero_point is not None:
        yield _affine(OUTPUT, module, "uint8", scale, zero_point)


def _observer(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """What watches or imitates a quantization: minimum, maximum, and what follows from them."""
    minimum, maximum = held.get("min_val"), held.get("max_val")
    inner = getattr(module, "activation_post_process", None)  # torch's FakeQuantize has one
    if minimum is None and isinstance(inner, nn.Module):
        within = own_tensors(inner)
        minimum, maximum = within.get("min_val"), within.get("max_val")
    if minimum is None or maximum is None:
        return
    seen = not minimum.is_meta and minimum.numel() > 0 and bool(torch.isfinite(minimum).all())
    scale, zero_point = _observed_scale(module, held, seen)
    if _saw_nothing(minimum, maximum) and not _is_finite(scale):
        scale = zero_point = None  # computed from no value
    dtype = _observer_dtype(module)
    axis = _axis(module)
    limits = integer_range(dtype)
    yield Found(
        _role(component),
        type(module).__name__,
        dtype=dtype,
        scheme=_observer_scheme(module, zero_point),
        granularity="channel" if axis is not None else "tensor",
        axis=axis,
        quant_min=_limit(module, ("quant_min", "qmin"), limits[0]),
        quant_max=_limit(module, ("quant_max", "qmax"), limits[1]),
        scale=scale,
        zero_point=zero_point,
        minimum=minimum if seen else None,
        maximum=maximum if seen else None,
        observer=bool(component) and not _NUMBERED.fullmatch(component),
    )


def _saw_nothing(minimum: torch.Tensor, maximum: torch.Tensor) -> bool:
    """Whether an observer is as it was made: what it is fed will lie between infinities."""
    if minimum.is_meta or maximum.is_meta:
        return False
    return bool((minimum == torch.inf).all() and (maximum == -torch.inf).all())


def _is_finite(scale: Values) -> bool:
    return scale is None or bool(torch.isfinite(torch.as_tensor(scale)).all())


def _observed_scale(
    module: Any, held: dict[str, torch.Tensor], seen: bool
) -> tuple[Values, Values]:
    for names in (("scale", _ZERO_POINT), ("_cached_scale", "_cached_zp")):
        scale = held.get(names[0])
        if scale is not None and scale.numel():
            return scale, held.get(names[1])
    calculate = getattr(module, "calculate_qparams", None)
    if calculate is None or not seen:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale, zero_point = calculate()
    return scale, zero_point


def _observer_dtype(module: Any) -> str | None:
    dtype = getattr(module, "dtype", None)
    if dtype is None:
        return None
    return dtype_name(dtype).removeprefix("q")  # what quint8 holds is uint8


def _observer_scheme(module: Any, zero_point: Values) -> str | None:
    words = str(getattr(module, "qscheme", "")).lower()
    if "asym" in words or "affine" in words:
        return "affine"
    return "symmetric" if "sym" in words else scheme_of(zero_point)


def _axis(module: Any) -> int | None:
    """Of the channels; an axis that the scheme does not use says nothing."""
    scheme = str(getattr(module, "qscheme", "channel")).lower()
    axis = getattr(module, "channel_axis", getattr(module, "ch_axis", None))
    return axis if isinstance(axis, int) and axis >= 0 and "channel" in scheme else None


def _limit(module: Any, names: tuple[str, str], default: float | None) -> float | None:
    for holder in (module, getattr(module, "dtype", None)):
        for name in names:
            limit = getattr(holder, name, None)
            if isinstance(limit, int | float):
                return limit
    return default


def _role(component: str) -> str:
    """What an observer is for, as far as its name says it."""
    if any(name in component for name in _OUTPUT_NAMES):
        return OUTPUT
    for part, role in _ROLES:
        if part in component:
            return role
    return component.removeprefix("obs_").removesuffix("_obs") or OUTPUT


# dtype, scheme and weights that share a scale, which lies within the blocks of the file.
_GGUF_TYPES = {
    "Q2_K": ("uint2", "affine", 16),
    "Q3_K": ("int3", "symmetric", 16),
    "Q4_0": ("int4", "symmetric", 32),
    "Q4_1": ("uint4", "affine", 32),
    "Q4_K": ("uint4", "affine", 32),
    "Q5_0": ("int5", "symmetric", 32),
    "Q5_1": ("uint5", "affine", 32),
    "Q5_K": ("uint5", "affine", 32),
    "Q6_K": ("int6", "symmetric", 16),
    "Q8_0": ("int8", "symmetric", 32),
    "IQ4_NL": ("uint4", "codebook", 32),
    "MXFP4": ("float4_e2m1fn", "float", 32),
}


def _gguf(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """A float that was something else in a GGUF file; of a type that is not known here only the
    name."""
    name = module.__dict__.get(GGUF_TYPE)
    if isinstance(name, str):
        dtype, scheme, size = _GGUF_TYPES.get(name, (None, None, None))
        granularity = None if size is None else "group"
        yield Found(WEIGHT, name, dtype, scheme, granularity, group_size=size)


def _gptq(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """GPTQ and AWQ: packed integers with a scale for each group; zero points are packed too."""
    if "qweight" not in held or "scales" not in held:
        return
    bits = getattr(module, "bits", getattr(module, "w_bit", None))
    size = getattr(module, "group_size", None)
    groups = isinstance(size, int) and size > 0
    yield Found(
        WEIGHT,
        type(module).__name__,
        dtype=f"uint{bits}" if isinstance(bits, int) else None,
        granularity="group" if groups else "channel",
        group_size=size if groups else None,
        scale=held["scales"],
    )


def _named(component: str, module: Any, held: dict[str, torch.Tensor]) -> Iterator[Found]:
    """Any module with a scale and a zero point, or with a scale beside integers."""
    values = {
        name: value
        for name, value in (*module.__dict__.items(), *held.items())
        if isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    }
    for name, scale in values.items():
        stem = _stem(name)
        if stem is None:
            continue
        beside = (values.get(f"{stem}{ending}") for ending in ("zero_point", "zero", "zeros"))
        zero_point = next((value for value in beside if value is not None), None)
        integers = _integers(stem, held)
        if zero_point is not None or (isinstance(scale, torch.Tensor) and integers is not None):
            of = WEIGHT if integers is not None else _role(stem.rstrip("_"))
            dtype = None if integers is None else dtype_name(integers.dtype)
            yield _affine(of, module, dtype, scale, zero_point)


def _integers(stem: str, held: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The weight that a scale is of: integers or float8 beside `weight_scale`, or `scale`."""
    names = (stem.rstrip("_"),) if stem else ("weight", "qweight", "weight_packed")
    found = (held[name] for name in names if name in held and held[name].dtype in _SMALL_DTYPES)
    return next(found, None)


def _stem(name: str) -> str | None:
    """What stands before `scale` in a name."""
    for ending in ("scale", "scale_inv", "scales"):
        if name == ending or name.endswith(f"_{ending}"):
            return name.removesuffix(ending)
    return None


def _affine(
    of: str, module: nn.Module, dtype: str | None, scale: Values, zero_point: Values
) -> Found:
    count = scale.numel() if isinstance(scale, torch.Tensor) else 1
    limits = integer_range(dtype)
    return Found(
        of,
        type(module).__name__,
        dtype=dtype,
        scheme=scheme_of(zero_point),
        granularity="tensor" if count == 1 else None,
        quant_min=_limit(module, ("quant_min", "qmin"), limits[0]),
        quant_max=_limit(module, ("quant_max", "qmax"), limits[1]),
        scale=scale,
        zero_point=zero_point,
    )


_Reader = Callable[[str, Any, dict[str, torch.Tensor]], Iterator[Found]]
_READERS: tuple[_Reader, ...] = (_gguf, _compressed, _observer, _packed, _weights, _gptq, _named)
