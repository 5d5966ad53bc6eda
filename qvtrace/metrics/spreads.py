"""Where in a tensor its error is: squared errors by token, by channel and by head.

A channel lies along one axis, the last unless another is named; what all other axes number is a
token. A head is an axis of its own among those.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import cut
from qvtrace.metrics.differences import position
from qvtrace.metrics.elements import Array, Readable, Reader, format_of, reader

MOST = 0.9  # of the error, which few channels may carry
FEW = 0.1  # of the channels
OUTLYING = 6.0  # times the median channel
WORST = 8  # tokens, channels, heads that are named
BINS = 64
SAMPLE = 8 * 1024  # elements that `spread_of_some` looks at
_FEWEST = 8  # channels, from which on their median says something

Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """One token, channel or head."""

    index: tuple[int, ...]  # of a token, that of its vector; else one number
    share: float | None  # of the squared error of the whole; None where that has none
    nsr: float | None  # sum (r-c)^2 / sum r^2 of its own; None where its reference is zero
    nonfinite: int  # places where one side alone is finite


@dataclass(frozen=True, slots=True)
class Along:
    """The error along one axis."""

    count: int
    worst: tuple[Part, ...]  # at most `WORST`: first what is not finite, then by share
    carrying: int  # how many of them, at the least, hold `MOST` of the error
    profile: tuple[float, ...]  # shares of at most `BINS` equal runs, in order

    @property
    def is_concentrated(self) -> bool:
        """Whether few carry most of the error."""
        return 0 < self.carrying <= FEW * self.count


@dataclass(frozen=True, slots=True)
class Outlier:
    """A channel of the reference that is many times the median one."""

    channel: int
    times: float  # the larger of the two
    times_peak: float  # largest magnitude over the channels' median of that
    times_rms: float


@dataclass(frozen=True, slots=True)
class Spread:
    """How the error of one tensor is spread. Squares are summed in float64 over the positions where
    both sides are finite and the reference is no mask."""

    tokens: Along
    channels: Along
    heads: Along | None
    outliers: tuple[Outlier, ...]  # at most `WORST`, the largest first
    outlying: int  # how many there are
    left_out: int  # positions
    sampled: tuple[int, int] | None = None  # tokens that were looked at, and that there are

    @property
    def is_exact(self) -> bool:
        """Whether there is no error at all."""
        return not self.channels.worst

    def placed(self, index: Callable[[tuple[int, ...]], tuple[int, ...]]) -> "Spread":
        """The same with tokens where `index` says that those of a sample stand."""
        worst = tuple(replace(part, index=index(part.index)) for part in self.tokens.worst)
        return replace(self, tokens=replace(self.tokens, worst=worst))


def spread(
    reference: Readable,
    candidate: Readable,
    *,
    channel_axis: int = -1,
    head_axis: int | None = None,
) -> Spread | None:
    """How the error of the candidate is spread; both are floats of one shape.

    None for arrays that have no elements or no axis, that hold no floats, or whose squares leave
    the range of float64.
    """
    if not reference.size or not reference.shape:
        return None
    if any(format_of(side.dtype).kind == "integer" for side in (reference, candidate)):
        return None
    if channel_axis % len(reference.shape) != len(reference.shape) - 1:
        reference, candidate = (
            np.moveaxis(_whole(side), channel_axis, -1) for side in (reference, candidate)
        )
    sums = _sums(reference, candidate)
    if not all(np.isfinite(total).all() for total in (sums.token, sums.channel)):
        return None
    leading = reference.shape[:-1]
    outliers = _outliers(sums)
    return Spread(
        _along(sums.token, sums.token_signal, sums.token_broken, leading),
        _along(sums.channel, sums.channel_signal, sums.channel_broken, reference.shape[-1:]),
        None if head_axis is None else _heads(sums, leading, head_axis),
        tuple(outliers[:WORST]),
        len(outliers),
        sums.left_out,
    )


def spread_of_some(
    reference: Readable, candidate: Readable, *, channel_axis: int = -1
) -> Spread | None:
    """`spread` over tokens from all over the tensor, at most about `SAMPLE` elements: what a report
    can have of every pair without another look at all of it."""
    shape = reference.shape
    if not reference.size or not shape:
        return None
    axis = channel_axis % len(shape)
    leading, channels = shape[:axis] + shape[axis + 1 :], shape[axis]
    tokens = reference.size // channels
    count = max(_FEWEST, SAMPLE // channels)
    if tokens <= count:
        return spread(reference, candidate, channel_axis=channel_axis)
    chosen = (2 * np.arange(count) + 1) * tokens // (2 * count)
    places = np.unravel_index(chosen, leading)
    sides = (_tokens(side, chosen, places, axis) for side in (reference, candidate))
    found = spread(*sides)
    if found is None:
        return None
    indices = np.stack(places, axis=-1).tolist()
    return replace(found.placed(lambda index: tuple(indices[index[0]])), sampled=(count, tokens))


def _tokens(
    side: Readable, chosen: NDArray[np.intp], places: tuple[NDArray[np.intp], ...], axis: int
) -> Array:
    """Some vectors along an axis, one after the other."""
    if isinstance(side, np.ndarray) or axis < len(side.shape) - 1:
        return np.moveaxis(_whole(side), axis, -1)[places]
    channels, read = side.shape[-1], reader(side)
    return np.stack([read(at * channels, (at + 1) * channels) for at in chosen.tolist()])


class _Sums:
    """Of one pair of arrays, by token and by channel."""

    def __init__(self, tokens: int, channels: int) -> None:
        self.token, self.token_signal = np.zeros(tokens), np.zeros(tokens)
        self.token_broken = np.zeros(tokens, dtype=np.int64)
        self.channel, self.channel_signal = np.zeros(channels), np.zeros(channels)
        self.channel_broken = np.zeros(channels, dtype=np.int64)
        self.channel_peak = np.zeros(channels)
        self.channel_counted = np.zeros(channels, dtype=np.int64)
        self.left_out = 0

    def add(self, rows: slice, columns: slice, reference: Array, candidate: Array) -> None:
        """A block: whole tokens, or a piece of one."""
        if _is_plain(reference) and _is_plain(candidate):
            one = reference.astype(np.float64)
            self._add(rows, columns, one, one - candidate)
            self.channel_counted[columns] += len(one)
            return
        finite = np.isfinite(reference), np.isfinite(candidate)
        valid = finite[0] & finite[1]
        valid &= np.abs(reference) < format_of(reference.dtype).sentinel
        broken = finite[0] != finite[1]
        wide = np.complex128 if "c" in (reference.dtype.kind, candidate.dtype.kind) else np.float64
        one, other = (np.where(valid, side.astype(wide), 0) for side in (reference, candidate))
        self._add(rows, columns, np.abs(one), np.abs(one - other))
        self.token_broken[rows] += broken.sum(axis=1)
        self.channel_broken[columns] += broken.sum(axis=0)
        self.channel_counted[columns] += valid.sum(axis=0)
        self.left_out += int(valid.size - valid.sum())

    def _add(self, rows: slice, columns: slice, reference: Sums, error: Sums) -> None:
        peak = self.channel_peak[columns]
        np.maximum(peak, reference.max(axis=0), out=peak)
        np.maximum(peak, -reference.min(axis=0), out=peak)
        for values, token, channel in (
            (error, self.token, self.channel),
            (reference, self.token_signal, self.channel_signal),
        ):
            token[rows] += np.einsum("ij,ij->i", values, values)
            channel[columns] += np.einsum("ij,ij->j", values, values)


def _is_plain(array: Array) -> bool:
    """Whether every element is a real number that counts."""
    if array.dtype not in (np.float32, np.float64):
        return False
    limit = format_of(array.dtype).sentinel
    return bool(-limit < array.min() and array.max() < limit)  # neither holds of NaN


def _sums(reference: Readable, candidate: Readable) -> _Sums:
    channels = reference.shape[-1]
    sums = _Sums(reference.size // channels, channels)
    sides: tuple[Reader, Reader] = reader(reference), reader(candidate)
    with np.errstate(all="ignore"):
        for block in cut(reference.size // channels, channels):
            first, column = divmod(block.start, channels)
            width = block.size // block.rows
            pieces = (
                _floats(read(block.start, block.stop)).reshape(block.rows, width) for read in sides
            )
            rows, columns = slice(first, first + block.rows), slice(column, column + width)
            sums.add(rows, columns, *pieces)
    return sums


def _floats(elements: Array) -> Array:
    """Eight-bit floats, of which numpy knows little, as float64."""
    return elements.astype(np.float64) if elements.dtype.itemsize == 1 else elements


def _whole(array: Readable) -> Array:
    if isinstance(array, np.ndarray):
        return array
    return array.read(0, array.size).reshape(array.shape)


def _heads(sums: _Sums, leading: tuple[int, ...], axis: int) -> Along:
    others = tuple(other for other in range(len(leading)) if other != axis)
    error, signal = (
        totals.reshape(leading).sum(axis=others) for totals in (sums.token, sums.token_signal)
    )
    broken = sums.token_broken.reshape(leading).sum(axis=others)
    return _along(error, signal, broken, leading[axis : axis + 1])


def _along(error: Sums, signal: Sums, broken: NDArray[np.int64], shape: tuple[int, ...]) -> Along:
    whole = float(error.sum())
    ordered = np.sort(error)[::-1]
    carrying = int(ordered.cumsum().searchsorted(MOST * whole)) + 1 if whole else 0
    is_broken = bool(broken.any())
    by_worst = np.lexsort((-error, -broken))[:WORST] if is_broken else _largest(error)
    found = zip(
        by_worst.tolist(),
        *(values[by_worst].tolist() for values in (error, signal, broken)),
        strict=True,
    )
    worst = []
    for place, noise, own, count in found:
        if noise > 0 or count > 0:
            nsr = noise / own if own else None
            usable = nsr if nsr is None or math.isfinite(nsr) else None
            share = noise / whole if whole else None
            worst.append(Part(position(place, shape), share, usable, count))
    return Along(error.size, tuple(worst), min(carrying, error.size), _profile(error, whole))


def _largest(error: Sums) -> NDArray[np.intp]:
    """Where the largest are, the first of equal ones first."""
    return np.argsort(-error, kind="stable")[:WORST]


def _profile(error: Sums, whole: float) -> tuple[float, ...]:
    """Shares of equal runs, which are one token or channel each where there are few."""
    if not whole:
        return ()
    bins = min(BINS, error.size)
    if bins == error.size:
        return tuple((error / whole).tolist())
    starts = np.arange(bins) * error.size // bins
    return tuple((np.add.reduceat(error, starts) / whole).tolist())


def _outliers(sums: _Sums) -> list[Outlier]:
    """Channels whose largest magnitude or root mean square is many times the median channel's."""
    if sums.channel_peak.size < _FEWEST:
        return []
    mean_square = sums.channel_signal / np.maximum(sums.channel_counted, 1)
    times = [_times_median(of) for of in (sums.channel_peak, np.sqrt(mean_square))]
    larger = np.maximum(*times)
    outlying = np.flatnonzero(larger >= OUTLYING)
    places = outlying[np.argsort(-larger[outlying], kind="stable")].tolist()
    return [
        Outlier(place, *(float(found[place]) for found in (larger, *times))) for place in places
    ]


def _times_median(values: Sums) -> Sums:
    lower, upper = (values.size - 1) // 2, values.size // 2
    ordered = np.partition(values, (lower, upper))  # np.median takes three times as long
    median = float(ordered[lower] + ordered[upper]) / 2
    return values / median if median else np.zeros_like(values)
