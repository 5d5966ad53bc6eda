"""Constants that an array is another's multiple by: one for all of it, or one for each channel.

Folding a scale from one layer into the next (SmoothQuant, AWQ, an attention's scale in its keys)
leaves such outputs behind: `candidate = factor * reference`, by channels of the last dimension. The
factors are least squares fits, taken only where little is left of the error after them.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qvtrace.metrics.elements import Array, Computed, Floats, Readable, format_of, reader

_FEWEST_TOKENS = 4  # from which on a channel's own factor can be told from its errors
_FEWEST_SHARING_TOKENS = 2.0  # the error of one token alone is any channel's own factor
_FEWEST_SHARING_ELEMENTS = 4.0  # and that of a single element is everybody's
_FEWEST_ELEMENTS = 16  # of all channels, for one factor
_GLANCE = 8  # tokens that are looked at first
_PROMISING = 0.25  # share of the error's energy that is left, in these
_EXPLAINED = 0.2  # the same, in all tokens: 7 dB
_EXPLAINED_AS_EXPECTED = 0.4  # the same, where a factor is likely for another reason
_HALVED = 0.5  # the same, of the reference and the candidate over its factors
_AS_GOOD = 2.0  # a simpler form may leave so many times what the finest one leaves
_ROUNDING = 1e-12  # of a channel's energy: errors that mean nothing
_MOST_BLOCKS = 64
_NARROWEST_BLOCK = 4  # channels
_SIGMA_OF_MEDIAN = 1.4826 / math.sqrt(2.0)  # of the difference of two normal deviates
_FEW_SIGMAS = 4.0  # from 1, within which a factor is noise
_SIGMAS = 5.0  # within which a channel's factor is that of its block
_SAME_FACTOR = 0.02  # relative
_RANGES_NAMED = 3
_BLOCK = 128 * 1024  # elements in memory at once
_MOST_CHANNELS = 4 * _BLOCK
_IMAGE_DIMENSIONS = 4  # with the batch
_POSITIONS = 64
_MOST_OF_IMAGES = 64 * _BLOCK  # elements, which are in memory at once


@dataclass(frozen=True, eq=False, slots=True)
class ChannelFactors:
    """One factor for each channel; neighbours of one block have the same."""

    values: Floats
    inner: int = 1  # elements of one channel in a row: as many as an image's channel has

    def ranges(self) -> list[tuple[int, int, float]]:
        """Channels with a factor other than 1: the first, one past the last, their factor."""
        edges = np.flatnonzero(np.diff(self.values)) + 1
        starts, stops = [0, *edges.tolist()], [*edges.tolist(), self.values.size]
        runs = zip(starts, stops, self.values[starts].tolist(), strict=True)
        return [run for run in runs if run[2] != 1.0]


@dataclass(frozen=True, slots=True)
class ListedFactors:
    """What a result says of one factor for each channel: not all of them, where there are many."""

    listed: tuple[tuple[int, int, float], ...]  # as `ChannelFactors.ranges` has them
    not_listed: int = 0
    smallest: float | None = None  # of all
    largest: float | None = None

    def ranges(self) -> list[tuple[int, int, float]]:
        """Those that are listed."""
        return list(self.listed)


ScaleFactor: TypeAlias = float | ChannelFactors


def factor_text(factor: ScaleFactor | ListedFactors) -> str:
    """`0.25`, `0.25 in channels 64 to 127`, `0.12 to 5.9 in 96 channels`."""
    if isinstance(factor, float):
        return f"{factor:.3g}"
    ranges = factor.ranges()
    if len(ranges) <= _RANGES_NAMED:
        return ", ".join(f"{value:.3g} in {_channels(*ends)}" for *ends, value in ranges)
    values = [value for _, _, value in ranges]
    count = sum(stop - start for start, stop, _ in ranges)
    return f"{min(values):.3g} to {max(values):.3g} in {count} channels"


def _channels(start: int, stop: int) -> str:
    return f"channel {start}" if stop == start + 1 else f"channels {start} to {stop - 1}"


@dataclass(frozen=True, slots=True)
class Unscaled(Computed):
    """An array divided by its factors, read without a copy of the whole."""

    factor: ScaleFactor

    @property
    def dtype(self) -> np.dtype[np.float64]:
        """Of what is read."""
        return np.dtype(np.float64)

    def read(self, start: int, stop: int) -> Floats:
        """The elements from one flat index to another."""
        elements = reader(self.array)(start, stop).astype(np.float64)
        if isinstance(self.factor, float):
            return elements / self.factor
        values = self.factor.values
        return elements / values[np.arange(start, stop) // self.factor.inner % values.size]


def are_one(factor: object, other: object) -> bool:
    """Whether both are one number for all elements, and about the same."""
    if not (isinstance(factor, float) and isinstance(other, float)):
        return False
    return math.isclose(factor, other, rel_tol=_SAME_FACTOR)


def find_factor(
    reference: Readable, candidate: Readable, *, is_expected: bool = False
) -> ScaleFactor | None:
    """What the candidate is the reference times, in the simplest form that explains it; None where
    nothing does. Both are real, and of one shape; one that is expected may leave more."""
    channels = reference.shape[-1] if reference.shape else 1
    if not 0 < channels <= _MOST_CHANNELS or reference.size < _FEWEST_ELEMENTS:
        return None
    tokens = reference.size // channels
    matrix = _Matrix(reference, candidate, tokens, channels)
    with np.errstate(all="ignore"):
        if tokens > 2 * _GLANCE and not is_expected and not matrix.glance().is_promising():
            return None
        return matrix.sums().factor(_EXPLAINED_AS_EXPECTED if is_expected else _EXPLAINED)


def find_factor_of_images(reference: Readable, candidate: Readable) -> ChannelFactors | None:
    """The same by the channels of images [batch, channels, ...], which are not their last axis;
    None for what is none, too."""
    shape = reference.shape
    if len(shape) < _IMAGE_DIMENSIONS or reference.size > _MOST_OF_IMAGES or shape[1] < 2:
        return None
    inner = math.prod(shape[2:])
    # Some positions of each channel tell most of what has no factor, without a copy of the whole.
    steps = dict.fromkeys((max(1, inner // _POSITIONS), 1))
    found: ScaleFactor | None = None
    for step in steps:
        found = find_factor(*(_channels_last(side, step) for side in (reference, candidate)))
        if not isinstance(found, ChannelFactors):
            return None
    assert isinstance(found, ChannelFactors)
    return ChannelFactors(found.values, inner)


def _channels_last(images: Readable, step: int) -> Array:
    """Every so many-th position of images, each with its channels."""
    elements = reader(images)(0, images.size).reshape(*images.shape[:2], -1)
    return np.ascontiguousarray(np.moveaxis(elements[..., ::step], 1, -1))


def nearest_factor(reference: Readable, candidate: Readable) -> ScaleFactor | None:
    """For each channel the factor over which the candidate leaves least of the reference, where
    there is known to be one, however noisy both are; None where that explains less than half."""
    channels = reference.shape[-1]
    if channels > _MOST_CHANNELS:
        return None
    matrix = _Matrix(reference, candidate, reference.size // channels, channels)
    with np.errstate(all="ignore"):
        return matrix.sums().nearest()


def fits(reference: Readable, candidate: Readable, factor: ScaleFactor) -> bool:
    """Whether known factors explain the candidate, however few its tokens are."""
    channels = reference.shape[-1] if reference.shape else 1
    if isinstance(factor, ChannelFactors) and (factor.values.size, factor.inner) != (channels, 1):
        return False
    matrix = _Matrix(reference, candidate, reference.size // channels, channels)
    values = factor if isinstance(factor, float) else factor.values
    with np.errstate(all="ignore"):
        sums = matrix.sums()
        is_explained = sums.left_by(values) <= _EXPLAINED * sums.error() < math.inf
        return is_explained and sums.is_better_without(values)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Two arrays as tokens times channels."""

    reference: Readable
    candidate: Readable
    tokens: int
    channels: int

    def sums(self) -> "_Sums":
        """The sums over all tokens, as many at a time as fit into memory."""
        sums = _Sums.zero(self.channels)
        step = max(1, _BLOCK // self.channels)
        for start in range(0, self.tokens, step):
            self._add(sums, [(start, min(start + step, self.tokens))])
        return sums

    def glance(self) -> "_Sums":
        """The sums over a few tokens from all over the array."""
        sums = _Sums.zero(self.channels)
        middles = [(2 * number + 1) * self.tokens // (2 * _GLANCE) for number in range(_GLANCE)]
        self._add(sums, [(token, token + 1) for token in middles])
        return sums

    def _add(self, sums: "_Sums", ranges: list[tuple[int, int]]) -> None:
        values = []
        for side in (self.reference, self.candidate):
            read = reader(side)
            pieces = [read(start * self.channels, stop * self.channels) for start, stop in ranges]
            tokens = np.concatenate(pieces).astype(np.float64).reshape(-1, self.channels)
            values.append((tokens, format_of(side.dtype).sentinel))
        sums.add(*values)


@dataclass(slots=True)
class _Sums:
    """Sums of products over tokens, by channel, and what fits leave of the error's energy."""

    tokens: int
    references: Floats  # r^2
    products: Floats  # r c
    candidates: Floats  # c^2
    errors: Floats  # (c - r)^2
    offsets: Floats  # c - r
    by_token: float = 0.0  # squares of the error's energy in each token
    by_element: float = 0.0  # the same in each element

    @classmethod
    def zero(cls, channels: int) -> "_Sums":
        """Of no token."""
        references, products, candidates, errors, offsets = np.zeros((5, channels))
        return cls(0, references, products, candidates, errors, offsets)

    def add(self, one: tuple[Floats, float], other: tuple[Floats, float]) -> None:
        """Take in tokens of both sides, each with the size of its masking constants.

        What is not finite or a mask counts as 0 on both sides.
        """
        (reference, limit), (candidate, other_limit) = one, other
        valid = (np.abs(reference) < limit) & (np.abs(candidate) < other_limit)
        if not valid.all():
            reference, candidate = np.where(valid, reference, 0), np.where(valid, candidate, 0)
        error = candidate - reference
        self.tokens += len(reference)
        self.references += np.einsum("ij,ij->j", reference, reference)
        self.products += np.einsum("ij,ij->j", reference, candidate)
        self.candidates += np.einsum("ij,ij->j", candidate, candidate)
        energy = error * error
        self.errors += energy.sum(axis=0)
        self.by_token += float(np.square(energy.sum(axis=1)).sum())
        self.by_element += float(np.square(energy).sum())
        self.offsets += error.sum(axis=0)

    def error(self) -> float:
        """The energy of the error as it is."""
        return float(self.errors.sum())

    def left_by(self, factors: Floats | float) -> float:
        """The energy of the error after these factors."""
        return float(self._left(factors).sum())

    def is_better_without(self, factors: Floats | float) -> bool:
        """Whether the candidate over these factors is nearer to the reference than as it is.

        Next to a reference that is lost, anything is little, and little of it is left after a
        factor of about 0: over that it is a large error.
        """
        return float((self._left(factors) / np.square(factors)).sum()) <= _HALVED * self.error()

    def _left(self, factors: Floats | float) -> Floats:
        left = self.candidates - factors * (2.0 * self.products - factors * self.references)
        return np.maximum(left, 0.0)

    def left_by_channel(self) -> float:
        """The same after each channel's own factor; infinite where tokens are too few to tell.

        Each fit takes away the error of one token even where there is nothing to fit, and where one
        token has most of the error, as an attention sink has, that is most of it.
        """
        sharing = self._sharing(self.by_token)
        if self.tokens < _FEWEST_TOKENS or not sharing >= _FEWEST_SHARING_TOKENS:
            return math.inf
        return self.left_by(self.by_channel()) * sharing / (sharing - 1)

    def _sharing(self, squares: float) -> float:
        """How many tokens or elements share the error's energy: all where they have as much of it,
        1 where one has it all (the inverse participation ratio); `squares` are of their parts."""
        error = self.error()
        return error * error / squares if squares else math.inf

    def common(self) -> float:
        """The one factor that leaves least; 1 where there is none."""
        references = float(self.references.sum())
        return (float(self.products.sum()) / references if references else 0.0) or 1.0

    def by_channel(self) -> Floats:
        """The factor of each channel that leaves least; 1 where there is none."""
        factors = np.ones_like(self.products)
        has_factor = (self.references > 0) & (self.products != 0)
        np.divide(self.products, self.references, out=factors, where=has_factor)
        return factors

    def is_promising(self) -> bool:
        """Whether so few tokens do not rule factors out."""
        left = min(self.left_by_channel(), self.left_by(self.common()))
        return left <= _PROMISING * self.error()

    def factor(self, share: float) -> ScaleFactor | None:
        """The simplest form that explains the error, but for this share: one factor, one by block,
        one by channel."""
        found = self._simplest(share)
        values = found.values if isinstance(found, ChannelFactors) else found
        return found if values is not None and self.is_better_without(values) else None

    def nearest(self) -> ScaleFactor | None:
        """Each channel's own factor, by what the candidate over it leaves of the reference."""
        factors = np.ones_like(self.products)
        np.divide(self.candidates, self.products, out=factors, where=self.products != 0)
        left = self._left(factors) / np.square(factors)
        most = _HALVED * min(float(self.references.sum()), self.error())
        is_told = self.tokens >= _FEWEST_TOKENS and float(left.sum()) <= most
        return ChannelFactors(factors) if is_told else None

    def _simplest(self, share: float) -> ScaleFactor | None:
        if not math.isfinite(self._rounding()):
            return None
        common, finest = self.common(), self.left_by_channel()
        most = share * self.error()
        enough = min(most, _AS_GOOD * finest + self._rounding())
        left = self.left_by(common)
        is_shared = self._sharing(self.by_element) >= _FEWEST_SHARING_ELEMENTS
        if left <= enough and is_shared and not self._is_offset(left):
            return common
        if finest > most:
            return None
        blocks = self._by_block()
        if blocks is not None and self.left_by(blocks) <= enough:
            return ChannelFactors(blocks)
        if self._are_offsets(finest):
            return None
        factors = self._by_channel_but_noise()
        return ChannelFactors(factors if self.left_by(factors) <= enough else self.by_channel())

    def _rounding(self) -> float:
        return _ROUNDING * float(self.candidates.sum())

    def _is_offset(self, left: float) -> bool:
        """Whether one constant that is added leaves about as little as one factor does."""
        count = self.tokens * self.offsets.size
        total = float(self.offsets.sum())
        by_offset = self.error() - total * total / count  # a power would raise where this is inf
        return by_offset + self._rounding() < _AS_GOOD * left

    def _are_offsets(self, left: float) -> bool:
        """The same for a constant in each channel.

        Where a channel is about the same for all tokens, both explain the same.
        """
        by_offsets = float((self.errors - self.offsets**2 / self.tokens).sum())
        return by_offsets < _AS_GOOD * left - self._rounding()

    def _noise(self) -> Floats:
        """The energy that each channel's own factor leaves of a token's error, at least the median
        of all channels."""
        factors = self.by_channel()
        left = np.maximum(self.candidates - factors * self.products, _ROUNDING * self.candidates)
        left /= max(self.tokens - 1, 1)
        noise: Floats = np.maximum(left, np.median(left))
        return noise

    def _deviations(self) -> Floats:
        """The standard deviation of each channel's factor, infinite where there is none."""
        safe = np.where(self.references > 0, self.references, 1.0)
        deviations: Floats = np.where(self.references > 0, np.sqrt(self._noise() / safe), math.inf)
        return deviations

    def _by_channel_but_noise(self) -> Floats:
        factors = self.by_channel()
        factors[np.abs(factors - 1.0) <= _FEW_SIGMAS * self._deviations()] = 1.0
        return factors

    def _by_block(self) -> Floats | None:
        """Factors of blocks of neighbouring channels; None where there are hardly any blocks.

        Rounded weights move the factor of a channel more than the noise of its tokens tells, so
        that what neighbours usually differ by counts as noise too.
        """
        factors = self.by_channel()
        usual = (
            _SIGMA_OF_MEDIAN * float(np.median(np.abs(np.diff(factors))))
            if factors.size > 1
            else 0.0
        )
        deviations = np.hypot(self._deviations(), usual)
        starts = _block_starts(factors, deviations)
        if starts is None or len(starts) < 2:
            return None
        products = np.add.reduceat(self.products, starts)
        references = np.add.reduceat(self.references, starts)
        fitted = np.ones_like(products)
        np.divide(products, references, out=fitted, where=references > 0)
        widths = np.diff([*starts, factors.size])
        smallest = np.minimum.reduceat(deviations, starts) / np.sqrt(widths)
        fitted[np.abs(fitted - 1.0) <= _FEW_SIGMAS * smallest] = 1.0
        blocks: Floats = np.repeat(fitted, widths)
        return blocks


def _block_starts(factors: Floats, deviations: Floats) -> list[int] | None:
    """Where blocks of equal factors begin; None where they are too many to be blocks.

    A block begins where several channels in a row are none of the block before.
    """
    most = min(_MOST_BLOCKS, factors.size // (2 * _NARROWEST_BLOCK))
    weights = 1.0 / (deviations * deviations + 1e-300)  # 0 where a channel says nothing
    starts = [0]
    mean, weight = 0.0, 0.0  # of the block
    strangers: list[tuple[float, float]] = []
    for channel, own in enumerate(zip(factors.tolist(), weights.tolist(), strict=True)):
        if not own[1]:
            continue
        if not weight or abs(own[0] - mean) <= _SIGMAS * math.sqrt(1.0 / own[1] + 1.0 / weight):
            weight += own[1]
            mean += (own[0] - mean) * own[1] / weight
            strangers.clear()
            continue
        strangers.append(own)
        if len(strangers) == _NARROWEST_BLOCK:
            starts.append(channel + 1 - _NARROWEST_BLOCK)
            weight = sum(of for _, of in strangers)
            mean = sum(value * of for value, of in strangers) / weight
            strangers.clear()
            if len(starts) > most:
                return None
    return starts
