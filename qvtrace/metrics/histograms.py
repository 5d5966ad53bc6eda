"""Histograms of a pair of arrays, from elements that are evenly strided over them."""

import math
from dataclasses import dataclass

import numpy as np

from qvtrace.metrics.blocks import BLOCK, scratch
from qvtrace.metrics.elements import (
    Array,
    Flags,
    Floats,
    Format,
    Readable,
    format_of,
    reader,
    upcast,
)

BINS = 32
SAMPLE = 8 * 1024  # elements that are looked at, at most


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
    formats = format_of(reference.dtype), format_of(candidate.dtype)
    is_complex = [side.kind == "complex" for side in formats]
    if reference.shape != candidate.shape or is_complex[0] != is_complex[1]:
        return None
    step = _step(reference)
    with np.errstate(all="ignore"):
        values = _values(_parts(reference, step), _parts(candidate, step))
        lows, highs = _ends(values)
        looked_at = values.shape[1]
        limits = [side.sentinel for side in formats]
        if looked_at and not _all_count(lows, highs, limits):
            values = values[:, _countable(values, formats[0])]
            lows, highs = _ends(values)
        counted = values.shape[1]
        left_out = looked_at - counted
        if not counted:
            return Histograms(None, None, None, 0, left_out, step)
        three = _counts(values, _bins(lows, highs, counted, formats))
        return Histograms(three[0], three[1], three[2], counted, left_out, step)


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


def _parts(side: Readable, step: int) -> Array:
    """Every `step`th element; of complex ones both parts."""
    elements = _strided(side, step)
    if elements.dtype.kind not in "biuf":  # these are looked at as bytes or as parts
        elements = np.ascontiguousarray(elements)
    if elements.dtype.kind == "c":
        elements = elements.view(f"f{elements.dtype.itemsize // 2}")
    return elements


def _values(reference: Array, candidate: Array) -> Floats:
    """Rows of float64: of the reference, of the candidate, and of the error.

    Three rows together need few calls into numpy, in each of which threads may wait for another.
    """
    values = scratch.error64[: 3 * reference.size].reshape(3, -1)
    upcast(reference, values[0])
    upcast(candidate, values[1])
    np.subtract(values[1], values[0], out=values[2])
    return values


def _ends(values: Floats) -> tuple[list[float], list[float]]:
    """The smallest and the largest value of each row; NaN where one of them is."""
    if not values.shape[1]:
        return [], []
    lows: list[float] = np.minimum.reduce(values, axis=1).tolist()
    highs: list[float] = np.maximum.reduce(values, axis=1).tolist()
    return lows, highs


def _all_count(lows: list[float], highs: list[float], limits: list[float]) -> bool:
    """Whether no value of a side is NaN, infinite or as large as the side's limit."""
    sides = zip(lows, highs, limits, strict=False)
    return all(-low < limit and high < limit for low, high, limit in sides)  # false for NaN


def _countable(values: Floats, reference: Format) -> Flags:
    valid: Flags = np.isfinite(values[0]) & np.isfinite(values[1])
    valid &= ~reference.sentinels(values[0])
    return valid


@dataclass(frozen=True, slots=True)
class _Bins:
    low: float
    high: float
    number: int


def _bins(
    lows: list[float], highs: list[float], counted: int, formats: tuple[Format, Format]
) -> list[_Bins]:
    """As many as there is something to see in; of few elements, none is told apart."""
    count = min(BINS, math.isqrt(counted - 1) + 1)
    peak = max(-lows[2], highs[2])
    errors = _Bins(-peak, peak, count | 1)  # zero is in the middle of a bin
    low, high = min(lows[:2]), max(highs[:2])
    if formats[0].kind == formats[1].kind == "integer":
        count = min(count, int(high - low) + 1)
    return [_Bins(low, high, count), _Bins(low, high, count), errors]


def _counts(values: Floats, bins: list[_Bins]) -> list[Histogram | None]:
    """The histogram of each row."""
    scales = [_scale(own) for own in bins]
    scaled = values
    np.subtract(scaled, _column([own.low for own in bins]), out=scaled)
    np.multiply(scaled, _column([scale or 0.0 for scale in scales]), out=scaled)
    positions = scratch.wide[0][: values.size].view(np.intp).reshape(values.shape)
    np.copyto(positions, scaled, casting="unsafe")
    room = BINS + 2  # each row's bins, and its upper end
    positions += np.arange(0, len(bins) * room, room).reshape(-1, 1)
    found = np.bincount(positions.reshape(-1), minlength=len(bins) * room).tolist()
    rows = [found[start : start + room] for start in range(0, len(found), room)]
    return [_histogram(*row, values.shape[1]) for row in zip(bins, scales, rows, strict=True)]


def _column(numbers: list[float]) -> Floats:
    return np.array(numbers).reshape(-1, 1)


def _scale(bins: _Bins) -> float | None:
    """Bins for a unit; 0 where all values are as good as one, None for a range too large."""
    width = bins.high - bins.low
    if not math.isfinite(width):
        return None
    scale = bins.number / width if width else math.inf
    return scale if scale < math.inf else 0.0


def _histogram(
    bins: _Bins, scale: float | None, counts: list[int], counted: int
) -> Histogram | None:
    if scale is None:
        return None
    if not scale:
        return Histogram(bins.low, bins.high, (counted,))
    last = bins.number - 1
    counts[last] += sum(counts[bins.number :])  # the upper end belongs to the last bin
    return Histogram(bins.low, bins.high, tuple(counts[: bins.number]))
