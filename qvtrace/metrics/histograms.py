"""Histograms of a pair of arrays, from elements that are evenly strided over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
SAMPLE = 4 * 1024  # elements that are looked at, at most: over a hundred to a bin


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


@dataclass(frozen=True, slots=True)
class SomeElements:
    """Every `step`th element of a pair, of complex ones both parts."""

    reference: Array
    candidate: Array
    step: int
    formats: tuple[Format, Format]

    @property
    def form(self) -> tuple[object, ...]:
        """What those have in common that are looked at together."""
        return self.reference.size, *(side.name for side in self.formats)


def some_elements(reference: Readable, candidate: Readable) -> SomeElements | None:
    """At most `SAMPLE` elements of a pair; None where they do not face each other: of arrays of
    different shapes, or of which one only is complex."""
    formats = format_of(reference.dtype), format_of(candidate.dtype)
    is_complex = [side.kind == "complex" for side in formats]
    if reference.shape != candidate.shape or is_complex[0] != is_complex[1]:
        return None
    step = _step(reference)
    return SomeElements(_parts(reference, step), _parts(candidate, step), step, formats)


def histograms(samples: Sequence[SomeElements]) -> list[Histograms]:
    """Those of each pair; all are of one form.

    Rows together need few calls into numpy, in each of which threads may wait for another.
    """
    formats = samples[0].formats
    with np.errstate(all="ignore"):
        values = _values(samples)
        lows, highs = _ends(values)
        limits = [side.sentinel for side in formats]
        whole: list[int] = []
        cut: list[int] = []
        for pair, ends in enumerate(zip(lows, highs, strict=True)):
            is_whole = values.shape[2] and _all_count(*ends, limits)
            (whole if is_whole else cut).append(pair)
        found = {pair: _of_countable(samples[pair], values[pair]) for pair in cut}
        if whole:
            bins = [_bins(lows[pair], highs[pair], values.shape[2], formats) for pair in whole]
            counted = _counts(values if not cut else values[whole], bins)
            for pair, three in zip(whole, counted, strict=True):
                found[pair] = Histograms(*three, values.shape[2], 0, samples[pair].step)
    return [found[pair] for pair in range(len(samples))]


def _of_countable(sample: SomeElements, values: Floats) -> Histograms:
    """Of one pair, some of whose elements do not count."""
    looked_at = values.shape[1]
    values = values[:, _countable(values, sample.formats[0])]
    counted = values.shape[1]
    left_out = looked_at - counted
    if not counted:
        return Histograms(None, None, None, 0, left_out, sample.step)
    (lows,), (highs,) = _ends(values[np.newaxis])
    bins = _bins(lows, highs, counted, sample.formats)
    (three,) = _counts(values[np.newaxis], [bins])
    return Histograms(*three, counted, left_out, sample.step)


def _strided(side: Readable, step: int) -> Array:
    """Every `step`th element."""
    if isinstance(side, np.ndarray | np.generic):
        flat = side.reshape(-1) if side.flags.c_contiguous else side.flat
        return flat[::step].copy()  # while it is in the cache
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


def _values(samples: Sequence[SomeElements]) -> Floats:
    """Three rows of float64 for each pair: of the reference, of the candidate, and of the error."""
    size = samples[0].reference.size
    values = scratch.error64[: 3 * len(samples) * size].reshape(len(samples), 3, size)
    for sample, (reference, candidate, _) in zip(samples, values, strict=True):
        upcast(sample.reference, reference)
        upcast(sample.candidate, candidate)
    np.subtract(values[:, 1], values[:, 0], out=values[:, 2])
    return values


def _ends(values: Floats) -> tuple[list[list[float]], list[list[float]]]:
    """The smallest and the largest value of each row; NaN where one of them is."""
    if not values.shape[2]:
        nothing: list[list[float]] = [[] for _ in values]
        return nothing, nothing
    lows: list[list[float]] = np.minimum.reduce(values, axis=2).tolist()
    highs: list[list[float]] = np.maximum.reduce(values, axis=2).tolist()
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


_Three: TypeAlias = tuple[Histogram | None, Histogram | None, Histogram | None]


def _counts(values: Floats, bins: Sequence[Sequence[_Bins]]) -> list[_Three]:
    """The histograms of the rows of each pair; `values` are written to."""
    own = [each for of_pair in bins for each in of_pair]
    scales = [_scale(each) for each in own]
    scaled = values
    np.subtract(scaled, _column([each.low for each in own]), out=scaled)
    np.multiply(scaled, _column([scale or 0.0 for scale in scales]), out=scaled)
    positions = scratch.wide[0][: values.size].view(np.intp).reshape(values.shape)
    np.copyto(positions, scaled, casting="unsafe")
    room = BINS + 2  # each row's bins, and its upper end
    positions += np.arange(0, len(own) * room, room).reshape(-1, 3, 1)
    found = np.bincount(positions.reshape(-1), minlength=len(own) * room).tolist()
    counts = [found[start : start + room] for start in range(0, len(found), room)]
    rows = [_histogram(*row, values.shape[2]) for row in zip(own, scales, counts, strict=True)]
    return list(zip(rows[::3], rows[1::3], rows[2::3], strict=True))


def _column(numbers: list[float]) -> Floats:
    """A number for each row, three of them to a pair."""
    return np.array(numbers).reshape(-1, 3, 1)


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
