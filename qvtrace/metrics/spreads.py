"""Where in a tensor its error is: squared errors by token, by channel and by head.

A channel lies along one axis, the last unless another is named; what all other axes number is a
token. A head is an axis of its own among those, or some channels one after the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import run
from qvtrace.metrics.elements import Array, Flags, Readable, format_of
from qvtrace.metrics.square_sums import Counts, SquareSums, SquareSumsJob, Sums

MOST = 0.9  # of the error, which few channels may carry
FEW = 0.1  # of the channels
OUTLYING = 6.0  # times the median channel
WORST = 8  # tokens, channels, heads that are named
BINS = 64
SMALL = 8 * 1024  # elements of pairs that are looked at together
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
    padding: int = 0  # tokens that are left out of everything else
    sampled: tuple[int, int] | None = None  # tokens that both sides hold, and that there are

    @property
    def is_exact(self) -> bool:
        """Whether there is no error at all."""
        return not self.channels.worst

    def placed(
        self, index: Callable[[tuple[int, ...]], tuple[int, ...]], counts: tuple[int, int]
    ) -> "Spread":
        """The same with tokens where `index` says that those of a sample stand; so many are in the
        sample, and in the whole."""
        worst = tuple(replace(part, index=index(part.index)) for part in self.tokens.worst)
        return replace(self, tokens=replace(self.tokens, worst=worst), sampled=counts)


def spread(
    reference: Readable, candidate: Readable, axes: Axes = _LAST_AXIS, kept: Flags | None = None
) -> Spread | None:
    """How the error of the candidate is spread; both are floats of one shape. Of the vectors along
    the last axis, only those that are `kept` count, a flag for each.

    None for arrays that have no elements or no axis, that hold no floats, or whose squares leave
    the range of float64, and where no token is kept.
    """
    if not has_a_spread(reference, candidate):
        return None
    tokens = PairTokens(reference, candidate, axes, kept)
    if not tokens.chosen.size:
        return None
    (found,) = run([tokens.job])
    (told,) = spreads([tokens.looked_at(found)])
    return told


class PairTokens:
    """The tokens of a pair: those that are looked at."""

    def __init__(
        self, reference: Readable, candidate: Readable, axes: Axes, kept: Flags | None
    ) -> None:
        shape = reference.shape
        axis = axes.channels % len(shape)
        self._sides = reference, candidate
        self._axes = axes
        self._leading = shape[:axis] + shape[axis + 1 :]
        tokens = math.prod(self._leading)
        # Flags are of vectors along the last axis.
        self._kept = kept if axis == len(shape) - 1 and kept is not None else None
        chosen = np.arange(tokens) if self._kept is None else np.flatnonzero(self._kept)
        self.chosen: Places = chosen
        self.is_small = reference.size <= SMALL
        self.job = SquareSumsJob(reference, candidate, axis, self._kept)

    def looked_at(self, sums: SquareSums) -> "LookedAt":
        """What was found."""
        return LookedAt(sums, self._leading, self.chosen, self._axes)

    def copied(self) -> "LookedAt":
        """A small pair, to be looked at together with others."""
        shape = self._sides[0].shape
        axis = self._axes.channels % len(shape)
        one, other = (
            np.moveaxis(_whole(side), axis, -1).reshape(-1, shape[axis])[self.chosen]
            for side in self._sides
        )
        return LookedAt((one, other), self._leading, self.chosen, self._axes)


@dataclass(frozen=True, slots=True)
class LookedAt:
    """What was taken of a pair: sums, or of a small one its tokens and channels."""

    found: SquareSums | tuple[Array, Array]
    leading: tuple[int, ...]  # the shape of all tokens
    chosen: Places  # which of them these are, counted through
    axes: Axes

    @property
    def form(self) -> tuple[object, ...]:
        """What those have in common that are worked on together."""
        shapes: tuple[object, ...]
        if isinstance(self.found, SquareSums):
            shapes = self.found.channel.shape
        else:
            shapes = tuple((side.shape, side.dtype) for side in self.found)
        return self.leading, shapes, self.axes, self.chosen.size, self._padding_key

    @property
    def size(self) -> int:
        """How much there is to work on."""
        if isinstance(self.found, SquareSums):
            return self.found.token.size + self.found.channel.size
        return self.found[0].size

    @property
    def _padding_key(self) -> bytes:
        """Tells which tokens are left out, if any are."""
        is_whole = self.chosen.size == math.prod(self.leading)
        return b"" if is_whole else self.chosen.tobytes()


def spreads(pairs: Sequence[LookedAt]) -> list[Spread | None]:
    """How the error of each pair is spread over its tokens; all are of one form."""
    first = pairs[0]
    found = [pair.found for pair in pairs if isinstance(pair.found, SquareSums)]
    if found:
        sums = found[0] if len(found) == 1 else SquareSums.together(found)
    else:
        sides = [pair.found for pair in pairs if not isinstance(pair.found, SquareSums)]
        one, other = (np.stack(of_all) for of_all in zip(*sides, strict=True))
        sums = SquareSums(*one.shape)
        sums.add(one, other)
    return _spreads(sums, first.leading, first.chosen, first.axes)


def has_a_spread(reference: Readable, candidate: Readable) -> bool:
    """Whether both are floats, and have elements along an axis."""
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    return bool(reference.size and reference.shape) and "integer" not in kinds


def _whole(array: Readable) -> Array:
    if isinstance(array, np.ndarray):
        return array
    return array.read(0, array.size).reshape(array.shape)


def _spreads(
    sums: SquareSums, leading: tuple[int, ...], chosen: Places, axes: Axes
) -> list[Spread | None]:
    """Of each pair of `sums`, of whose tokens only those `chosen` count."""
    channels = sums.channel.shape[1]
    padding = math.prod(leading) - chosen.size
    found = zip(
        sums.is_finite().tolist(),
        _alongs(sums.token, sums.token_signal, sums.token_broken, leading, chosen),
        _alongs(sums.channel, sums.channel_signal, sums.channel_broken, (channels,)),
        _heads(sums, leading, chosen, axes),
        _outliers(sums),
        sums.left_out.tolist(),
        strict=True,
    )
    return [
        Spread(
            by_token, by_channel, by_head, tuple(outliers[:WORST]), len(outliers), left_out, padding
        )
        if is_finite
        else None
        for is_finite, by_token, by_channel, by_head, outliers, left_out in found
    ]


def _heads(
    sums: SquareSums, leading: tuple[int, ...], chosen: Places, axes: Axes
) -> Sequence[Along | None]:
    """Of each pair; None where heads are not known, or of one no token counts."""
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
