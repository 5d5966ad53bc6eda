"""The stored bytes of a tensor as an array."""

import math
from mmap import mmap
from typing import Any

import numpy as np

from qvtrace.archive.layout import DTYPES
from qvtrace.trees import TensorLeaf


def array_of(leaf: TensorLeaf, stored: mmap | memoryview, offset: int = 0) -> np.ndarray[Any, Any]:
    """The elements of a leaf that begin at `offset` of what is stored, in its dtype and shape.

    A view of the bytes where possible. What is stored in another form comes back in the nearest
    one that numpy has: complex128 as complex128, complex32 as complex64, float4 with each element
    apart, packed integers as stored.

    Raises `ValueError` or `OverflowError` for a shape that numpy cannot have.
    """
    elements = _elements(leaf.file_dtype, leaf.file_shape, stored, offset)
    form = leaf.dtype, leaf.file_dtype
    if form == ("complex32", "float16"):
        return elements.astype(np.float32).view(np.complex64).reshape(leaf.shape)
    if form == ("complex128", "float64"):
        return np.ascontiguousarray(elements).view(np.complex128).reshape(leaf.shape)
    return elements


def form_of(leaf: TensorLeaf) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """The dtype and shape of what `array_of` gives."""
    if (leaf.dtype, leaf.file_dtype) == ("complex32", "float16"):
        return np.dtype(np.complex64), leaf.shape
    if (leaf.dtype, leaf.file_dtype) == ("complex128", "float64"):
        return np.dtype(np.complex128), leaf.shape
    return DTYPES[leaf.file_dtype].numpy, leaf.file_shape


def _elements(
    dtype: str, shape: tuple[int, ...], stored: mmap | memoryview, offset: int
) -> np.ndarray[Any, Any]:
    known = DTYPES[dtype]
    count = math.prod(shape)
    if known.bits == 4:
        packed = np.frombuffer(stored, np.uint8, (count + 1) // 2, offset)
        halves = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)[:count]
        return halves.view(known.numpy).reshape(shape)
    if count == 0:
        return np.empty(shape, known.numpy)
    return np.frombuffer(stored, known.numpy, count, offset).reshape(shape)
