"""How a weight says that it is quantized: tensor subclasses of torchao, quanto and bitsandbytes,
and torch's own quantized dtypes."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qvtrace.qparams.found import Found, dtype_name, integer_range
from qvtrace.qparams.parameters import INPUT

_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_SCALES = ("scale", "_scale", "scales")
_ZERO_POINTS = ("zero_point", "_zero_point", "_zeropoint", "_shift", "zero_points")
_DATA = ("qdata", "_data", "int_data", "packed_weight")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing about the tensor needs explaining."""
    return type(tensor) in _PLAIN_TENSORS and not tensor.is_quantized


def read_tensor(of: str, tensor: Any) -> Iterator[Found]:
    """What a quantized tensor says of itself, and of the inputs that it is to be used with."""
    if tensor.is_quantized:
        yield _native(of, tensor)
    elif type(tensor).__name__ == "Int8Params":
        yield from _int8_params(of, tensor, getattr(tensor, "SCB", None))
    elif getattr(tensor, "quant_state", None) is not None:
        yield _four_bits(of, tensor, tensor.quant_state)
    elif hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "placements"):
        yield from _subclass(of, tensor)


def _int8_params(of: str, tensor: torch.Tensor, scb: torch.Tensor | None) -> Iterator[Found]:
    """bitsandbytes: the largest magnitude of each row, which 127 stands for."""
    if tensor.dtype == torch.int8:
        scale = None if scb is None else scb / 127
        yield _symmetric(of, "Int8Params", "int8", "channel", scale=scale, axis=0)


def read_int8_state(of: str, tensor: torch.Tensor, state: Any) -> Iterator[Found]:
    """bitsandbytes moves the scales from the weight to the module when it first runs."""
    return _int8_params(of, tensor, getattr(state, "SCB", None))


def _four_bits(of: str, tensor: torch.Tensor, state: Any) -> Found:
    """bitsandbytes: an index into a table of values from -1 to 1, times a scale for each block."""
    absmax = state.absmax
    if getattr(state, "packing_format_for_cpu", False):  # its first forward has repacked it
        absmax = absmax.T
    elif state.nested:
        # Whoever made such a weight has loaded the library.
        functions: Any = sys.modules["bitsandbytes.functional"]
        absmax = functions.dequantize_blockwise(absmax, state.state2) + state.offset
    return Found(
        of,
        type(tensor).__name__,
        dtype=state.quant_type,
        scheme="codebook",
        granularity="block",
        group_size=state.blocksize,
        quant_min=-1,
        quant_max=1,
        scale=absmax,
    )


def _native(of: str, tensor: torch.Tensor) -> Found:
    dtype = dtype_name(tensor.dtype).removeprefix("q")  # what quint8 holds is uint8
    per_tensor = tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    scale: Any = tensor.q_scale() if per_tensor else tensor.q_per_channel_scales()
    zero_point: Any = tensor.q_zero_point() if per_tensor else tensor.q_per_channel_zero_points()
    return _found(
        of,
        type(tensor).__name__,
        dtype,
        "tensor" if per_tensor else "channel",
        scale=scale,
        zero_point=zero_point,
        axis=None if per_tensor else tensor.q_per_channel_axis(),
    )


def _subclass(of: str, tensor: Any) -> Iterator[Found]:
    scale, zero_point = _part(tensor, _SCALES), _part(tensor, _ZERO_POINTS)
    if scale is None:
        return
    granularity, group_size, axis = _granularity(tensor, scale)
    if zero_point is not None and zero_point.is_floating_point():
        zero_point = zero_point / scale  # taken off after scaling
    yield _found(
        of,
        type(tensor).__name__,
        _quantized_dtype(tensor),
        granularity,
        scale=scale,
        zero_point=zero_point,
        group_size=group_size,
        axis=axis,
    )
    yield from _activations(tensor)


def _granularity(tensor: Any, scale: torch.Tensor) -> tuple[str, int | None, int | None]:
    """`tensor`, `channel` or `group`; the size of a group; the axis of the channels."""
    blocks = getattr(tensor, "block_size", None)
    if isinstance(blocks, list | tuple) and len(blocks) == tensor.dim():
        return _of_blocks(tuple(tensor.shape), blocks)
    axis, group_size = getattr(tensor, "axis", None), getattr(tensor, "_group_size", None)
    if isinstance(group_size, int) and group_size:
        return "group", group_size, None
    if scale.numel() == 1 or axis is None:
        return ("tensor" if scale.numel() == 1 else "block"), None, None
    return "channel", None, axis


def _of_blocks(shape: Sequence[int], blocks: Sequence[int]) -> tuple[str, int | None, int | None]:
    divided = [axis for axis, size in enumerate(shape) if blocks[axis] < size]
    if not divided:
        return "tensor", None, None
    if len(divided) == 1 and divided[0] < len(shape) - 1 and blocks[divided[0]] == 1:
        return "channel", None, divided[0]
    if all(block == 1 for block in blocks[:-1]):
        return "group", blocks[-1], None
    return "block", None, None


def _quantized_dtype(tensor: Any) -> str:
    """What the elements are, which may be less than what they are stored in."""
    qtype = getattr(tensor, "qtype", None)
    if qtype is not None:
        name = str(getattr(qtype, "name", qtype)).removeprefix("q")
        # quanto counts from 0 where it shifts, whatever it calls the type.
        return f"u{name}" if name.startswith("int") and hasattr(tensor, "_shift") else name
    target = getattr(tensor, "target_dtype", None)
    data = _part(tensor, _DATA)
    return dtype_name(target or (tensor if data is None else data).dtype)


def _activations(tensor: Any) -> Iterator[Found]:
    """torchao: what is to become of the inputs, anew in each call."""
    words = getattr(tensor, "activation_quantization", None)
    if isinstance(words, str):
        affine, tokens = "asym" in words, "token" in words
        yield Found(
            INPUT,
            "dynamic",
            dtype=words.partition("_")[0],
            scheme="affine" if affine else "symmetric",
            granularity="token" if tokens else "tensor",
            dynamic=True,
        )
    arguments = getattr(tensor, "act_quant_kwargs", None)
    if arguments is not None:
        tokens = type(getattr(arguments, "granularity", None)).__name__ != "PerTensor"
        mapping = getattr(getattr(arguments, "mapping_type", None), "name", "SYMMETRIC")
        is_float = "Float8" in type(arguments).__name__
        yield Found(
            INPUT,
            type(arguments).__name__,
            dtype="float8_e4m3fn" if is_float else "int8",
            scheme="affine" if mapping == "ASYMMETRIC" else "symmetric",
            granularity="token" if tokens else "tensor",
            dynamic=True,
        )


def _symmetric(of: str, class_name: str, dtype: str, granularity: str, **known: Any) -> Found:
    return _found(of, class_name, dtype, granularity, zero_point=None, **known)


def _found(
    of: str, class_name: str, dtype: str, granularity: str, *, zero_point: Any, **known: Any
) -> Found:
    """With the range of the dtype, and the scheme that the zero points show."""
    quant_min, quant_max = integer_range(dtype)
    return Found(
        of,
        class_name,
        dtype,
        scheme_of(zero_point),
        granularity,
        quant_min=quant_min,
        quant_max=quant_max,
        zero_point=zero_point,
        **known,
    )


def scheme_of(zero_point: Any) -> str | None:
    """`symmetric` where zero stands for zero everywhere; None where that is not at hand."""
    if zero_point is None:
        return "symmetric"
    if isinstance(zero_point, torch.Tensor):
        if zero_point.is_meta:
            return None
        if zero_point.is_floating_point():
            zero_point = zero_point.float()  # float8 has no comparison
        return "affine" if bool((zero_point != 0).any()) else "symmetric"
    return "affine" if zero_point else "symmetric"


def _part(tensor: Any, names: Sequence[str]) -> torch.Tensor | None:
    for name in names:
        part = getattr(tensor, name, None)
        if isinstance(part, torch.Tensor):
            return part
    return None
