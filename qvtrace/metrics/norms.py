"""Products, norms and means of vectors, with digits enough and within range, and parts pooled.

Vectors are contiguous and of float64; of float32, 256 terms at a time are added up as such.
"""

import math
from collections.abc import Sequence

import numpy as np

from qvtrace.metrics.elements import Floats

# From 10 000 elements on BLAS starts threads of its own, and numpy holds the interpreter's lock in
# a call of fewer than 500 vectors: so vectors are short.
_SEGMENT = 256
_ONES = {np.dtype(kind): np.ones(_SEGMENT, kind) for kind in (np.float32, np.float64)}
_SAFE_SQUARES = 2.0**-900, 2.0**1000  # a sum of squares outside may have lost digits
CANCELLED = 0.05  # a sum that is a smaller share of its terms needs more digits than they have


def total(vector: Floats) -> float:
    """The sum of all elements."""
    whole = vector.size - vector.size % _SEGMENT
    if not whole:
        return float(np.add.reduce(vector, dtype=np.float64))
    segments = np.vecdot(vector[:whole].reshape(-1, _SEGMENT), _ONES[vector.dtype])
    summed = float(np.add.reduce(segments, dtype=np.float64))
    return summed if whole == vector.size else summed + total(vector[whole:])


def exact_total(vector: Floats) -> float:
    """The sum of all elements, one after the other, for sums whose terms cancel."""
    return float(np.einsum("i->", vector, dtype=np.float64))


def mean(summed: float, vector: Floats, count: int) -> float:
    """`summed` over `count`, also where the sum of the vector was too large; 0 for a count of 0."""
    if math.isinf(summed):
        return exact_total(vector / count)
    return summed / count if count else 0.0


def product(left: Floats, right: Floats) -> float:
    """The scalar product of two vectors."""
    whole = left.size - left.size % _SEGMENT
    if not whole:
        return float(np.vecdot(left, right))
    segments = np.vecdot(left[:whole].reshape(-1, _SEGMENT), right[:whole].reshape(-1, _SEGMENT))
    summed = float(np.add.reduce(segments, dtype=np.float64))
    return summed if whole == left.size else summed + product(left[whole:], right[whole:])


def row_products(left: Floats, right: Floats) -> Floats:
    """The scalar product of each row of two 2-d arrays."""
    count, length = left.shape
    if length <= _SEGMENT:
        products: Floats = np.vecdot(left, right)
        return products.astype(np.float64, copy=False)
    whole = length - length % _SEGMENT
    shape = (count, -1, _SEGMENT)
    segments = np.vecdot(left[:, :whole].reshape(shape), right[:, :whole].reshape(shape))
    # Four times as fast as a reduction along a short axis.
    products = segments.astype(np.float64, copy=False) @ np.ones(whole // _SEGMENT)
    if whole < length:
        products += np.vecdot(left[:, whole:], right[:, whole:])
    return products


def row_sums(rows: Floats) -> Floats:
    """The sum of each row of a 2-d array."""
    count, length = rows.shape
    whole = length - length % _SEGMENT
    segments = np.vecdot(rows[:, :whole].reshape(count, -1, _SEGMENT), _ONES[rows.dtype])
    sums: Floats = segments.astype(np.float64, copy=False) @ np.ones(whole // _SEGMENT)
    sums += np.add.reduce(rows[:, whole:], axis=1, dtype=np.float64)
    return sums


def row_norms(rows: Floats, *, wide: bool = False) -> tuple[Floats, float]:
    """The Euclidean norm of each row and of all; `wide` where squares may leave float64's range."""
    squares = row_products(rows, rows)
    if wide:
        return _wide_norms(rows, squares)
    return np.sqrt(squares), math.sqrt(np.add.reduce(squares))


def _wide_norms(rows: Floats, squares: Floats) -> tuple[Floats, float]:
    norms = np.sqrt(squares)
    doubtful = ~((squares >= _SAFE_SQUARES[0]) & (squares <= _SAFE_SQUARES[1]))
    if doubtful.any():
        exponents = np.frexp(np.abs(rows[doubtful]).max(axis=1))[1]
        units = np.ldexp(rows[doubtful], -exponents[:, np.newaxis])
        norms[doubtful] = np.ldexp(np.sqrt(row_products(units, units)), exponents)
    return norms, math.hypot(*norms) if norms.size > 1 else float(norms[0])


def norm(vector: Floats, *, wide: bool = False) -> float:
    """The Euclidean norm of a vector; `wide` where squares may leave the range of float64."""
    if wide:
        return row_norms(vector.reshape(1, -1), wide=wide)[1]
    return math.sqrt(product(vector, vector))


def cosine_of(
    left: Floats, right: Floats, norms: tuple[float, float], *, wide: bool = False
) -> float:
    """The scalar product over the product of both norms; 0 when one of them is 0."""
    scale = norms[0] * norms[1]
    if wide and not _SAFE_SQUARES[0] <= scale <= _SAFE_SQUARES[1]:
        exponents = [math.frexp(size)[1] for size in norms]
        left = np.ldexp(left, -exponents[0])
        right = np.ldexp(right, -exponents[1])
        scale = math.ldexp(norms[0], -exponents[0]) * math.ldexp(norms[1], -exponents[1])
    return product(left, right) / scale if scale else 0.0


def pooled_mean(means: Sequence[float], counts: Sequence[int]) -> float:
    """The mean of the union of groups; 0 when all of them are empty."""
    everything = sum(counts)
    return math.fsum(
        own * (count / everything) for own, count in zip(means, counts, strict=True) if count
    )


def pooled_deviation_norm(
    norms: Sequence[float], means: Sequence[float], counts: Sequence[int]
) -> float:
    """The norm of the deviations from the common mean, from those from each group's own mean."""
    center = pooled_mean(means, counts)
    shifts = (math.sqrt(count) * (own - center) for own, count in zip(means, counts, strict=True))
    return math.hypot(*norms, *shifts)


def pooled_cosine(parts: Sequence[tuple[float, float, float]], norms: tuple[float, float]) -> float:
    """The cosine of the whole, from each part's cosine and norms; 0 when a side is 0."""
    if not (norms[0] and norms[1]):
        return 0.0
    return math.fsum(part[0] * (part[1] / norms[0]) * (part[2] / norms[1]) for part in parts)
