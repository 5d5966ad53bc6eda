"""How large the vectors of a tensor are, and their largest elements: rounding in steps of these
makes so much more noise."""

from dataclasses import dataclass

import numpy as np

from qvtrace.metrics.elements import Array, Floats, format_of, reader

_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True, slots=True)
class Sizes:
    """Squares of elements of vectors along the last dimension, medians over those that are not
    zero."""

    mean: float
    largest: float
    largest_of_all: float  # of all vectors, no median


def sizes_of(array: Array) -> Sizes | None:
    """Those of a tensor; None where it has no vectors of finite floats that are not zero."""
    if not array.ndim or not array.size or format_of(array.dtype).kind != "float":
        return None
    channels = array.shape[-1]
    read, step = reader(array), channels * max(1, _AT_ONCE // channels)
    pieces = (read(start, min(start + step, array.size)) for start in range(0, array.size, step))
    with np.errstate(all="ignore"):
        each = [_mean_and_largest(piece.reshape(-1, channels)) for piece in pieces]
    mean, largest = (np.concatenate(part) for part in zip(*each, strict=True))
    counted = np.isfinite(mean) & (mean > 0)
    if not counted.any():
        return None
    mean, largest = mean[counted], largest[counted]
    return Sizes(*(float(size) for size in (np.median(mean), np.median(largest), largest.max())))


def _mean_and_largest(vectors: Array) -> tuple[Floats, Floats]:
    """Of the squares of each vector."""
    squares = np.square(vectors.astype(np.float64))
    return squares.mean(axis=1), squares.max(axis=1)
