"""Histograms of a pair of arrays, from elements that are evenly strided over them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvtrace.blocks import BLOCK, scratch
from qvtrace.elements import Array, Flags, Floats, Format, Readable, format_of, reader, upcast

BINS = 32
SAMPLE = 16 * 1024  # elements that are looked at, at most
_MOST = 2 * SAMPLE  # values: a complex element has two


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each of equally wide bins from `low` to `high`; both ends count."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Histograms:
    """Both sides in the same bins, and the error (candidate - reference) in bins around zero.

    Of every `step`th element, where both sides are finite and the reference is no masking constant;
    the parts of a complex element are two. None where there is no such element, or where the range
    is beyond that of float64.
    """

    reference: Histogram | None
    candidate: Histogram | None
    error: Histogram | None
    counted: int  # elements in each histogram
    left_out: int  # of those that were looked at
    step: int


def histograms(reference: Readable, candidate: Readable) -> Histograms | None:
    """The histograms of a pair; None where elements do not face each other: of arrays of different
    shapes, or of which one only is complex."""
    kinds = [format_of(side.dtype).kind for side in (reference, candidate)]
    if reference.shape != candidate.shape or (kinds[0] == "complex") != (kinds[1] == "complex"):
        return None
    step = _step(reference)
    with np.errstate(all="ignore"):
        return _histograms(
            _Sample(reference, step, scratch.wide[0]),
            _Sample(candidate, step, scratch.wide[1]),
            step,
        )


class _Sample:
    """Elements of one array, as float64."""

    def __init__(self, side: Readable, step: int, into: Floats) -> None:
        elements = _strided(side, step)
        self.format: Format = format_of(side.dtype)
        if elements.dtype.kind not in "biuf":  # these are looked at as bytes or as parts
            elements = np.ascontiguousarray(elements)
        if self.format.kind == "complex":
            elements = elements.view(f"f{elements.dtype.itemsize // 2}")
        self.values = into[: elements.size]
        upcast(elements, self.values)

    @property
    def all_count(self) -> bool:
        """Whether no value is NaN, infinite or a masking constant."""
        low, high = _range(self.values)
        return -low < self.format.sentinel and high < self.format.sentinel  # false for NaN

    @property
    def countable(self) -> Flags:
        """Which values are finite and no masking constant."""
        return np.isfinite(self.values) & ~self.format.sentinels(self.values)


def _strided(side: Readable, step: int) -> Array:
    """Every `step`th element."""
    if isinstance(side, np.ndarray | np.generic):
        flat = side.reshape(-1) if side.flags.c_contiguous else side.flat
        return flat[::step]
    read, together = reader(side), step * max(1, BLOCK // step)
    starts = range(0, side.size, together)
    pieces = [read(start, min(start + together, side.size))[::step] for start in starts]
    return np.concatenate(pieces) if pieces else np.empty(0, side.dtype)


def _step(array: Readable) -> int:
    """The smallest stride that meets every channel and leaves few enough elements."""
    step = max(1, -(-array.size // SAMPLE))
    channels = array.shape[-1] if array.shape else 1
    while math.gcd(step, channels) > 1:
        step += 1
    return step


def _histograms(reference: _Sample, candidate: _Sample, step: int) -> Histograms:
    values = reference.values, candidate.values
    left_out = 0
    if values[0].size and not (reference.all_count and candidate.all_count):
        valid = reference.countable & np.isfinite(candidate.values)
        left_out = valid.size - int(np.count_nonzero(valid))
        values = values[0][valid], values[1][valid]
    counted = values[0].size
    if not counted:
        return Histograms(None, None, None, 0, left_out, step)
    bins = _bins(counted)
    low, high = _range(*values)
    error = np.subtract(values[1], values[0], out=scratch.error64[:counted])
    peak = max(abs(end) for end in _range(error))
    is_integer = reference.format.kind == candidate.format.kind == "integer"
    fitting = min(bins, int(high - low) + 1) if is_integer else bins
    return Histograms(
        _histogram(values[0], low, high, fitting),
        _histogram(values[1], low, high, fitting),
        _histogram(error, -peak, peak, bins | 1),  # zero is in the middle of a bin
        counted,
        left_out,
        step,
    )


def _bins(count: int) -> int:
    """As many as there is something to see in; of few elements, none is told apart."""
    return min(BINS, math.isqrt(count - 1) + 1)


def _range(*sides: Floats) -> tuple[float, float]:
    low = min(float(np.minimum.reduce(side)) for side in sides)
    return low, max(float(np.maximum.reduce(side)) for side in sides)


def _working_memory(size: int) -> tuple[Floats, NDArray[np.intp]]:
    """Two arrays of this thread, behind that of the error."""
    scaled, positions = scratch.error64[_MOST:].reshape(-1, _MOST)[:2, :size]
    return scaled, positions.view(np.intp)


def _histogram(values: Floats, low: float, high: float, bins: int) -> Histogram | None:
    if not math.isfinite(high - low):
        return None
    scale = bins / (high - low) if high > low else math.inf
    if scale == math.inf:  # all values are as good as one
        return Histogram(low, high, (values.size,))
    scaled, positions = _working_memory(values.size)
    np.multiply(np.subtract(values, low, out=scaled), scale, out=scaled)
    np.copyto(positions, scaled, casting="unsafe")
    counts = np.bincount(positions, minlength=bins + 1).tolist()
    counts[bins - 1] += sum(counts[bins:])  # the upper end belongs to the last bin
    return Histogram(low, high, tuple(counts[:bins]))
