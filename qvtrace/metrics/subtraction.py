"""Candidate minus reference, element by element, as JSON."""

import math
from typing import Any

import numpy as np

from qvtrace.metrics.elements import Array, ElementsJson, Readable, format_of, nested_json, reader

_ZERO = {"integer": np.int64, "float": np.float64, "complex": np.complex128}


def difference_json(
    reference: Array, candidate: Readable, limit: int | None = None
) -> ElementsJson:
    """The elements of `candidate - reference`, at most `limit` of them.

    Both have the same shape. Integers are subtracted exactly, everything else in float64, complex
    numbers part by part. Equal elements differ by 0, infinities too; where a side is NaN, so is
    the difference.
    """
    count = _count(reference.size, limit)
    sides = reader(reference)(0, count), reader(candidate)(0, count)
    return _written(_subtracted(*sides), reference.shape)


def no_difference_json(
    dtype: np.dtype[Any], shape: tuple[int, ...], limit: int | None = None
) -> ElementsJson:
    """What two arrays of equal contents, NaN included, differ by."""
    zeros: Array = np.zeros(_count(math.prod(shape), limit), _ZERO[format_of(dtype).kind])
    return _written(zeros, shape)


def _count(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)


def _written(elements: Array, shape: tuple[int, ...]) -> ElementsJson:
    cut = math.prod(shape) - elements.size
    return ElementsJson(nested_json((elements if cut else elements.reshape(shape)).tolist()), cut)


def _subtracted(reference: Array, candidate: Array) -> Array:
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    if kinds == {"integer"}:
        return _exact(candidate) - _exact(reference)
    if "complex" in kinds:
        one, other = (
            side.astype(np.complex128).view(np.float64) for side in (reference, candidate)
        )
        return _subtracted(one, other).view(np.complex128)
    one, other = reference.astype(np.float64), candidate.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.where(one == other, 0.0, other - one)


def _exact(integers: Array) -> Array:
    """As integers whose difference is exact: Python's own, where 64 bits may not hold it."""
    return integers.astype(object if integers.dtype.itemsize == 8 else np.int64)
