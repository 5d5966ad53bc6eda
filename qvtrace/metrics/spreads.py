"""Where in a tensor its error is: squared errors by token, by channel and by head.

A channel lies along one axis, the last unless another is named; what all other axes number is a
token. A head is an axis of its own among those, or some channels one after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.elements import Array, Readable, format_of, reader
from qvtrace.metrics.square_sums import Counts, SquareSums, Sums

MOST = 0.9  # of the error, which few channels may carry
FEW = 0.1  # of the channels
OUTLYING = 6.0  # times the median channel
WORST = 8  # tokens, channels, heads that are named
BINS = 64
SAMPLE = 8 * 1024  # elements of which `some_tokens` consist
_GOLDEN = (5**0.5 - 1) / 2  # whose multiples are all over what is between two whole numbers
_FEWEST = 8  # channels, from which on their median says something

Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Axes:
    """Where in a tensor its channels are, and its heads, if it is known to have any."""

    channels: int = -1
    heads: int | None = None  # before channels along the last axis
    of_a_head: int | None = None  # so many channels, one after the other, are a head

    @property
    def has_heads(self) -> bool:
        """Whether any are known."""
        return self.heads is not None or self.of_a_head is not None

    def sampled(self) -> "Axes":
        """The same where vectors along the last axis stand one after the other."""
        return Axes(of_a_head=self.of_a_head)


_LAST_AXIS = Axes()


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


def spread(reference: Readable, candidate: Readable, axes: Axes = _LAST_AXIS) -> Spread | None:
    """How the error of the candidate is spread; both are floats of one shape.

    None for arrays that have no elements or no axis, that hold no floats, or whose squares leave
    the range of float64.
    """
    if not _has_a_spread(reference, candidate):
        return None
    if axes.channels % len(reference.shape) != len(reference.shape) - 1:
        reference, candidate = (
            np.moveaxis(_whole(side), axes.channels, -1) for side in (reference, candidate)
        )
    sums = SquareSums.of(reference, candidate)
    leading = reference.shape[:-1]
    (found,) = _spreads(sums, leading, np.arange(math.prod(leading)), axes)
    return found


@dataclass(frozen=True, slots=True)
class SomeTokens:
    """Some vectors of a pair along an axis."""

    reference: Array  # of tokens and channels
    candidate: Array
    leading: tuple[int, ...]  # the shape of all tokens
    chosen: Places  # which of them these are, counted through
    axes: Axes

    @property
    def form(self) -> tuple[object, ...]:
        """What those have in common that are looked at together."""
        sides = self.reference, self.candidate
        dtypes = (side.dtype for side in sides)
        return self.leading, self.reference.shape, self.axes, *dtypes


def some_tokens(
    reference: Readable, candidate: Readable, axes: Axes = _LAST_AXIS
) -> SomeTokens | None:
    """Tokens from all over a pair, at most about `SAMPLE` elements: what a report can have of every
    pair without another look at all of it. None for what has no spread."""
    if not _has_a_spread(reference, candidate):
        return None
    shape = reference.shape
    axis = axes.channels % len(shape)
    leading, channels = shape[:axis] + shape[axis + 1 :], shape[axis]
    tokens = reference.size // channels
    count = min(tokens, max(_FEWEST, SAMPLE // channels))
    chosen = _all_over(tokens, count)
    one, other = (_tokens(side, chosen, leading, axis) for side in (reference, candidate))
    return SomeTokens(one, other, leading, chosen, axes)


def spreads(samples: Sequence[SomeTokens]) -> list[Spread | None]:
    """How the error of each pair is spread over its tokens; all are of one form."""
    first = samples[0]
    if len(samples) == 1:  # which may be large: block by block
        sums = SquareSums.of(first.reference, first.candidate)
    else:
        sums = SquareSums(len(samples), *first.reference.shape)
        sums.add(
            np.stack([sample.reference for sample in samples]),
            np.stack([sample.candidate for sample in samples]),
        )
    return _spreads(sums, first.leading, first.chosen, first.axes)


def _has_a_spread(reference: Readable, candidate: Readable) -> bool:
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    return bool(reference.size and reference.shape) and "integer" not in kinds


@lru_cache
def _all_over(tokens: int, count: int) -> Places:
    """So many of all tokens: one of each run, nowhere at the same place in it, for a regular step
    might meet one head alone."""
    starts = np.arange(count + 1) * tokens // count
    within = np.arange(1, count + 1) * _GOLDEN % 1.0
    places: Places = starts[:-1] + (within * np.diff(starts)).astype(np.intp)
    return places


def _tokens(side: Readable, chosen: Places, leading: tuple[int, ...], axis: int) -> Array:
    """Some vectors along an axis, one after the other."""
    vectors: Array
    channels, is_last = side.shape[axis], axis == len(side.shape) - 1
    if isinstance(side, np.ndarray) and is_last and side.flags.c_contiguous:
        vectors = side.reshape(-1, channels)[chosen]
    elif isinstance(side, np.ndarray) or not is_last:
        places = np.unravel_index(chosen, leading) if leading else np.newaxis
        vectors = np.moveaxis(_whole(side), axis, -1)[places]
    else:
        read = reader(side)
        vectors = np.stack([read(at * channels, (at + 1) * channels) for at in chosen.tolist()])
    return vectors


def _whole(array: Readable) -> Array:
    if isinstance(array, np.ndarray):
        return array
    return array.read(0, array.size).reshape(array.shape)


def _spreads(
    sums: SquareSums, leading: tuple[int, ...], chosen: Places, axes: Axes
) -> list[Spread | None]:
    """Of each pair of `sums`, of whose tokens only those `chosen` were looked at."""
    count, channels = sums.token.shape[1], sums.channel.shape[1]
    tokens = math.prod(leading)
    found = zip(
        sums.is_finite().tolist(),
        _alongs(sums.token, sums.token_signal, sums.token_broken, leading, chosen),
        _alongs(sums.channel, sums.channel_signal, sums.channel_broken, (channels,)),
        _heads(sums, leading, chosen, axes),
        _outliers(sums),
        sums.left_out.tolist(),
        strict=True,
    )
    sampled = None if count == tokens else (count, tokens)
    return [
        Spread(
            by_token, by_channel, by_head, tuple(outliers[:WORST]), len(outliers), left_out, sampled
        )
        if is_finite
        else None
        for is_finite, by_token, by_channel, by_head, outliers, left_out in found
    ]


def _heads(
    sums: SquareSums, leading: tuple[int, ...], chosen: Places, axes: Axes
) -> Sequence[Along | None]:
    """Of each pair; None where heads are not known, or not all of them were looked at."""
    by_channel = sums.channel, sums.channel_signal, sums.channel_broken
    by_token = sums.token, sums.token_signal, sums.token_broken
    pairs = len(sums.channel)
    if axes.of_a_head is not None:
        parts = tuple(of.reshape(pairs, -1, axes.of_a_head).sum(axis=2) for of in by_channel)
    elif axes.heads is not None:
        heads = np.unravel_index(chosen, leading)[axes.heads]
        if not np.bincount(heads, minlength=leading[axes.heads]).all():
            return [None] * pairs
        parts = tuple(_summed(of, heads, leading[axes.heads]) for of in by_token)
    else:
        return [None] * pairs
    error, signal, broken = parts
    return _alongs(error, signal, broken, error.shape[1:])


def _summed(sums: NDArray[Any], groups: Places, count: int) -> NDArray[Any]:
    """Columns of one group, added up."""
    totals = np.zeros((count, len(sums)), dtype=sums.dtype)
    np.add.at(totals, groups, sums.T)
    return totals.T


def _alongs(
    error: Sums,
    signal: Sums,
    broken: Counts,
    shape: tuple[int, ...],
    chosen: Places | None = None,
) -> list[Along]:
    """Of each pair, which is a row of the sums; `shape` is of what they are sums of."""
    with np.errstate(all="ignore"):
        wholes = error.sum(axis=1, keepdims=True)
        by_size = np.argsort(-error, axis=1, kind="stable")  # the first of equal ones first
        ordered = np.take_along_axis(error, by_size, axis=1)
        carrying = 1 + (ordered.cumsum(axis=1) < MOST * wholes).sum(axis=1)
        worst = np.lexsort((-error, -broken), axis=1) if broken.any() else by_size
        worst = worst[:, :WORST]
        errors, signals = (np.take_along_axis(of, worst, axis=1) for of in (error, signal))
        numbers = errors / wholes, errors / signals
    profiles = _profiles(error, wholes).tolist()
    counts = np.take_along_axis(broken, worst, axis=1)
    at = worst if chosen is None else chosen[worst]
    indices = np.moveaxis(np.array(np.unravel_index(at, shape or 1)), 0, -1)[..., : len(shape)]
    parts = zip(*(of.tolist() for of in (indices, errors, *numbers, counts)), strict=True)
    found = zip(wholes[:, 0].tolist(), carrying.tolist(), parts, profiles, strict=True)
    count = error.shape[1]
    return [
        Along(
            count,
            tuple(_parts(*of_pair)),
            min(most, count) if whole else 0,
            tuple(profile) if whole else (),
        )
        for whole, most, of_pair, profile in found
    ]


def _parts(
    indices: list[list[int]],
    errors: list[float],
    shares: list[float],
    ratios: list[float],
    broken: list[int],
) -> Iterator[Part]:
    for index, error, share, ratio, count in zip(
        indices, errors, shares, ratios, broken, strict=True
    ):
        if error > 0 or count > 0:
            nsr = ratio if math.isfinite(ratio) else None
            yield Part(tuple(index), None if math.isnan(share) else share, nsr, count)


def _profiles(error: Sums, wholes: Sums) -> Sums:
    """Shares of equal runs, which are one token or channel each where there are few."""
    count = error.shape[1]
    bins = min(BINS, count)
    starts = np.arange(bins) * count // bins
    with np.errstate(all="ignore"):
        profiles: Sums = np.add.reduceat(error, starts, axis=1) / wholes
    return profiles


def _outliers(sums: SquareSums) -> list[list[Outlier]]:
    """Channels whose largest magnitude or root mean square is many times the median channel's."""
    pairs, channels = sums.channel_peak.shape
    found: list[list[Outlier]] = [[] for _ in range(pairs)]
    if channels < _FEWEST:
        return found
    mean_square = sums.channel_signal / np.maximum(sums.channel_counted, 1)
    times = [_times_median(of) for of in (sums.channel_peak, np.sqrt(mean_square))]
    larger = np.maximum(*times)
    for pair in np.flatnonzero((larger >= OUTLYING).any(axis=1)).tolist():
        outlying = np.flatnonzero(larger[pair] >= OUTLYING)
        places = outlying[np.argsort(-larger[pair, outlying], kind="stable")].tolist()
        found[pair] = [
            Outlier(place, *(float(of[pair, place]) for of in (larger, *times))) for place in places
        ]
    return found


def _times_median(values: Sums) -> Sums:
    """Each value over the median of its row; 0 where that is 0."""
    lower, upper = (values.shape[1] - 1) // 2, values.shape[1] // 2
    ordered = np.partition(values, (lower, upper), axis=1)  # np.median takes three times as long
    medians = (ordered[:, lower] + ordered[:, upper])[:, np.newaxis] / 2
    return np.divide(values, medians, out=np.zeros_like(values), where=medians != 0)
