"""Orthogonal matrices that turn the vectors of one array into those of another.

Turning a residual stream, as QuaRot and SpinQuant do, leaves what a model computes as it is:
`candidate = reference @ rotation` for every vector of the stream. Inner products of vectors tell
whether there is one; which it is, the vectors of all arrays together do (the orthogonal Procrustes
problem: Schoenemann, Psychometrika 31, 1966).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from qvtrace.metrics.elements import Computed, Floats, Readable, format_of, reader

Sides: TypeAlias = tuple[Readable, Readable]

FEWEST_CHANNELS = 8
_MOST_CHANNELS = 8192  # beyond, finding one takes too long
_GLANCE = 64  # tokens of one array whose inner products are looked at
_FEWEST_TOKENS = 8
_UNEXPLAINED = 0.25  # share of the variance of inner products, and of the energy of held-out tokens
# Share of the energy of tokens that it was found by. Of those held out it may be more: they have
# directions of their own, as long as not all tokens together have as many as there are channels.
_LEFT = 0.1
_PER_CHANNEL = 8  # tokens that a rotation is found by, where there are so many
_HELD_OUT = 5  # one token in so many is held out
_ROUNDS = 4  # of weighting arrays by how well they fit
_ALIKE = 4.0  # times the noise of the best array: no reason to weight
_LOOKED_AT_ALONE = 8  # arrays, in order of execution
_CLEANER = 10.0  # times less noise, for which one array is believed alone
_UNSURE = 4.0  # times that noise, which other arrays may have by it
_ROUNDING = 1e-11  # noise that is none
_BLOCK = 128 * 1024  # elements in memory at once
_ONE_NORM = 1.1  # times the shortest vector, that the longest is at most


@dataclass(frozen=True, eq=False)
class Rotation:
    """`candidate = reference @ matrix`, for vectors of so many channels."""

    matrix: Floats = field(repr=False)  # [channels, channels], float64
    tokens: int = 0  # that it was found by; 0: it was declared
    held_out: int = 0  # that it was verified on
    noise: float = 0.0  # of the vectors that it was found by: it is known no better than these
    # Whether the candidate's vectors are those of the reference without their means, which no
    # LayerNorm sees (Ashkboos et al., arXiv 2401.15024).
    is_centered: bool = False
    # A norm's weight and bias [2, channels], which these vectors lack: the next layers have them.
    folded: Floats | None = field(default=None, repr=False)

    @property
    def channels(self) -> int:
        """The length of a vector."""
        return len(self.matrix)

    @property
    def turned(self) -> "Rotation":
        """The other way round."""
        return replace(self, matrix=self._back)

    def sides(self, reference: Readable, candidate: Readable) -> Sides:
        """Both as they are compared: the candidate turned back; none is copied."""
        fits_float32 = format_of(candidate.dtype).fits_float32
        back = self._back_in_float32 if fits_float32 else self._back
        turned = OfVectors(candidate, self.channels, back.dtype, lambda tokens: tokens @ back)
        if self.folded is not None:
            weight, bias = self.folded.astype(back.dtype)
            turned = replace(turned, make=lambda tokens: tokens @ back * weight + bias)
        return centered(reference) if self.is_centered else reference, turned

    def of_norm(self, reference: Readable, candidate: Readable) -> "Rotation | None":
        """The same for what a LayerNorm may have given whose weight and bias went into the next
        layers' weights: vectors of one norm. None for others."""
        if not (self.is_centered and are_of_one_norm(candidate)):
            return None
        with_means = replace(self, is_centered=False)
        folded = _weight_and_bias(*with_means.sides(reference, candidate))
        return None if folded is None else replace(with_means, folded=folded)

    @cached_property
    def _back(self) -> Floats:
        return np.ascontiguousarray(self.matrix.T)

    @cached_property
    def _back_in_float32(self) -> Floats:
        return np.ascontiguousarray(self.matrix.T, np.float32)


@dataclass(frozen=True, slots=True)
class TooFewTokens:
    """Vectors that are turned, and that are too few to tell how."""

    channels: int
    tokens: int


@dataclass(frozen=True, eq=False, slots=True)
class OfVectors(Computed):
    """An array of which others are made vector by vector, read without a copy of the whole."""

    channels: int
    read_as: np.dtype[Any]
    make: Callable[[Floats], Floats]  # of vectors [tokens, channels]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read."""
        return self.read_as

    def read(self, start: int, stop: int) -> Floats:
        """The elements from one flat index to another."""
        channels = self.channels
        first = start // channels * channels
        last = -(-stop // channels) * channels
        tokens = reader(self.array)(first, last).astype(self.dtype).reshape(-1, channels)
        made: Floats = self.make(tokens).reshape(-1)[start - first : stop - first]
        return made


def centered(array: Readable) -> OfVectors:
    """An array of vectors without their means."""
    dtype = np.dtype(np.float32 if format_of(array.dtype).fits_float32 else np.float64)
    return OfVectors(
        array, array.shape[-1], dtype, lambda tokens: tokens - tokens.mean(axis=1, keepdims=True)
    )


def is_turned(arrays: Sequence[Sides]) -> bool:
    """Whether the vectors of these arrays have the inner products of the other side's: then an
    orthogonal matrix makes the one of the other, whichever it is. False where they are too few."""
    share = -(-_GLANCE // len(arrays))
    tokens = [unit_tokens(sides, share) for sides in arrays]
    one, other = (np.concatenate(side) for side in zip(*tokens, strict=True))
    if len(one) < _FEWEST_TOKENS:
        return False
    pairs = np.triu_indices(len(one), 1)
    products, its = (one @ one.T)[pairs], (other @ other.T)[pairs]
    variance = float(np.square(products - products.mean()).sum())
    return float(np.square(its - products).sum()) <= _UNEXPLAINED * variance


def find_rotation(arrays: Sequence[Sides]) -> Rotation | TooFewTokens | None:
    """The one rotation of all these arrays, of vectors of one length.

    Every vector counts as much as any other (its norm is made 1): an attention sink would decide
    alone. Arrays with rotations of their own are left out where they are few. It is found by four
    tokens in five and verified on the others; None where it does not explain these, `TooFewTokens`
    where it does but for directions that only these have. Where the candidate has lost means, those
    of the reference are left out if the rotation is known better then.
    """
    found = _found(arrays)
    without = _without_means(arrays) if _has_lost_means(arrays) else None
    if without is None or (isinstance(found, Rotation) and found.noise <= without.noise):
        return found
    return without


def _without_means(arrays: Sequence[Sides]) -> Rotation | None:
    found = _found([(centered(one), other) for one, other in arrays])
    return replace(found, is_centered=True) if isinstance(found, Rotation) else None


def _has_lost_means(arrays: Sequence[Sides]) -> bool:
    """Whether vectors of the candidate are as long as those of the reference without their means,
    in more arrays than they are as long as these are with them."""
    with_means = without = 0
    for sides in arrays:
        one, other = _vectors(sides, _GLANCE)
        energy = np.square(one).sum(axis=1)
        lost = float(np.mean(1.0 - np.square(other).sum(axis=1) / energy))
        of_means = float(np.mean(np.square(one.mean(axis=1)) * one.shape[1] / energy))
        without += abs(lost - of_means) < _UNEXPLAINED * abs(lost)
        with_means += abs(lost) < _UNEXPLAINED * abs(lost - of_means)
    return without > with_means


def _found(arrays: Sequence[Sides]) -> Rotation | TooFewTokens | None:
    channels = arrays[0][0].shape[-1]
    if channels > _MOST_CHANNELS:
        return None
    share = max(_FEWEST_TOKENS, -(-_PER_CHANNEL * channels // len(arrays)))
    parts = [_Part.of(sides, share, number) for number, sides in enumerate(arrays)]
    found_by = sum(len(part.one) for part in parts)
    if found_by < channels:
        return TooFewTokens(channels, found_by)
    matrix = _nearest(_products(parts))
    kept = _of_one_rotation(parts, matrix)
    if len(kept) < len(parts):
        return _found([arrays[at] for at in kept])
    noise, errors = _judged(parts, matrix)
    if noise > _LEFT or not errors.size:
        return None
    if float(np.median(errors)) > _UNEXPLAINED:
        return _known_in_part(parts, matrix)
    held_out = parts
    parts = [part.whole for part in parts]
    matrix, noise = _refined(parts, _nearest(_products(parts)))
    found = Rotation(matrix, found_by, errors.size, _UNSURE * noise)
    if noise <= _ROUNDING:
        return found
    looked_at = arrays[:_LOOKED_AT_ALONE]
    alone = filter(None, (_of_one(sides, held_out) for sides in looked_at))
    cleanest = min(alone, key=lambda one: one.noise, default=found)
    return cleanest if cleanest.noise * _CLEANER <= found.noise else found


def _of_one(sides: Sides, others: Sequence["_Part"]) -> Rotation | None:
    """The rotation by one array alone, where that has tokens enough: what comes before a fault
    knows better than all that comes behind it. It is verified on tokens that are held out of it, or
    where all are needed, on those of other arrays."""
    channels = sides[0].shape[-1]
    part = _Part.of(sides, _PER_CHANNEL * channels, 0)
    whole = part.whole
    matrix = _nearest(_products([whole])) if len(whole.one) >= channels else None
    if matrix is None or not len(part.held_out[0]):
        return None
    if len(part.one) >= channels:
        errors = part.held_out_errors(_nearest(_products([part])))
        return Rotation(matrix, len(part.one), errors.size, _UNSURE * float(np.median(errors)))
    errors = np.concatenate([part.held_out_errors(matrix) for part in others])
    if float(np.median(errors)) > _UNEXPLAINED:
        return None
    # An orthogonal matrix has half as many numbers to choose as it has elements: so much of the
    # noise it makes up for.
    noise = whole.noise(matrix) / (1.0 - channels / (2 * len(whole.one)))
    return Rotation(matrix, len(whole.one), errors.size, _UNSURE * noise)


def _known_in_part(parts: Sequence["_Part"], matrix: Floats) -> TooFewTokens | None:
    """Whether a rotation explains what tokens held out have of directions of which the others,
    all together, have the energy of one token at least."""
    found_by = np.concatenate([part.one for part in parts])
    energies, directions = np.linalg.eigh(found_by.T @ found_by)
    known = directions[:, energies >= 1.0]
    one, other = (
        np.concatenate([part.held_out[side] for part in parts]) @ turn @ known
        for side, turn in enumerate((np.eye(len(matrix)), matrix.T))
    )
    energy = np.square(one).sum(axis=1)
    left = np.square(other - one).sum(axis=1) / np.maximum(energy, _ROUNDING)
    is_part = 0 < known.shape[1] < len(matrix)
    explains = is_part and float(np.median(left)) <= _UNEXPLAINED
    return TooFewTokens(len(matrix), known.shape[1]) if explains else None


@dataclass(frozen=True, eq=False, slots=True)
class _Part:
    """The vectors of one array on both sides, of norm 1."""

    one: Floats
    other: Floats
    held_out: tuple[Floats, Floats]

    @classmethod
    def of(cls, sides: Sides, most: int, number: int) -> "_Part":
        """One in five is held out by its position: what a token is in one layer, it is in the
        next. Of shorter arrays, such as those of a generation's steps, it is one array in five."""
        one, other = unit_tokens(sides, most)
        positions = np.arange(len(one)) if len(one) >= _HELD_OUT else np.full(len(one), number)
        is_held_out = positions % _HELD_OUT == _HELD_OUT - 1
        kept = ~is_held_out
        return cls(one[kept], other[kept], (one[is_held_out], other[is_held_out]))

    @property
    def whole(self) -> "_Part":
        """With those that were held out: directions that only these have are known then as well."""
        one, other = (
            np.concatenate(both) for both in zip((self.one, self.other), self.held_out, strict=True)
        )
        return _Part(one, other, (one[:0], other[:0]))

    def held_out_errors(self, matrix: Floats) -> Floats:
        """The energy that a rotation leaves of each vector held out."""
        return _errors(*self.held_out, matrix)

    def noise(self, matrix: Floats) -> float:
        """What a rotation leaves of a vector, the median."""
        return float(np.median(_errors(self.one, self.other, matrix))) if len(self.one) else 0.0


def _refined(parts: Sequence[_Part], matrix: Floats) -> tuple[Floats, float]:
    """The rotation with each array weighted by how well it fits, and the noise it is found in.

    Behind a fault all vectors are noisy: those before it know better.
    """
    noises = [part.noise(matrix) for part in parts]
    for _ in range(_ROUNDS):
        if max(noises) <= _ALIKE * max(min(noises), _ROUNDING):
            break
        weights = [1.0 / max(noise, _ROUNDING) for noise in noises]
        matrix = _nearest(_products(parts, weights))
        noises = [part.noise(matrix) for part in parts]
    return matrix, 1.0 / float(np.mean([1.0 / max(noise, _ROUNDING) for noise in noises]))


def _judged(parts: Sequence[_Part], matrix: Floats) -> tuple[float, Floats]:
    """The noise of most arrays, and what is left of each vector held out."""
    noise = float(np.median([part.noise(matrix) for part in parts]))
    return noise, np.concatenate([part.held_out_errors(matrix) for part in parts])


def _of_one_rotation(parts: Sequence[_Part], matrix: Floats) -> Sequence[int]:
    """The arrays that one rotation turns, where these are most and the others have their own, as
    values have that are turned head by head; all of them where it is not told which these are."""
    noises = np.array([part.noise(matrix) for part in parts])
    for _ in range(_ROUNDS):
        are_apart = not ((noises > _LEFT) & (noises <= _UNEXPLAINED)).any()
        if noises.max() <= _UNEXPLAINED or (np.median(noises) <= _LEFT and are_apart):
            break
        weights = 1.0 / np.maximum(noises + np.median(noises), _ROUNDING)
        matrix = _nearest(_products(parts, weights.tolist()))
        noises = np.array([part.noise(matrix) for part in parts])
    kept = np.flatnonzero(noises <= _UNEXPLAINED).tolist()
    return kept if 2 * len(kept) > len(parts) else range(len(parts))


def _products(parts: Sequence[_Part], weights: Sequence[float] | None = None) -> Floats:
    channels = parts[0].one.shape[-1]
    products = np.zeros((channels, channels))
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        products += weight * (part.one.T @ part.other)
    return products


def _nearest(products: Floats) -> Floats:
    """The orthogonal matrix that makes the most of the one side's vectors the other's."""
    left, _, right = np.linalg.svd(products)
    nearest: Floats = left @ right
    return nearest


def _errors(one: Floats, other: Floats, matrix: Floats) -> Floats:
    errors: Floats = np.square(other @ matrix.T - one).sum(axis=1)
    return errors


def best_turned(rotation: Rotation, arrays: Sequence[Sides]) -> Rotation:
    """A rotation or its inverse, whichever leaves less of these arrays' differences; with means
    left out where the candidate has none."""
    ways = [rotation, rotation.turned]
    ways += [replace(way, is_centered=True) for way in ways]
    left = [0.0] * len(ways)
    for sides in arrays:
        for at, way in enumerate(ways):
            seen = (centered(sides[0]), sides[1]) if way.is_centered else sides
            one, other = unit_tokens(seen, _GLANCE)
            left[at] += float(np.square(other @ way.matrix.T - one).sum())
    return ways[int(np.argmin(left))]


def are_of_one_norm(array: Readable) -> bool:
    """Whether all vectors of an array are as long, as those are that a norm without a weight gave;
    some of them are looked at."""
    channels = array.shape[-1]
    tokens = array.size // channels
    count = min(tokens, _GLANCE)
    places = [(2 * number + 1) * tokens // (2 * count) for number in range(count)]
    norms = np.linalg.norm(_tokens(array, places, channels), axis=1)
    return bool(norms.max() <= _ONE_NORM * norms.min())


def _weight_and_bias(reference: Readable, candidate: Readable) -> Floats | None:
    """The factor and the offset of each channel that make the most of the candidate the reference
    [2, channels], by least squares; None where tokens are too few to tell."""
    channels = reference.shape[-1]
    tokens = reference.size // channels
    step = max(1, _BLOCK // channels)
    sums = np.zeros((4, channels))
    counted = 0
    for start in range(0, tokens, step):
        places = start * channels, min(start + step, tokens) * channels
        one, other = (
            reader(side)(*places).astype(np.float64).reshape(-1, channels)
            for side in (reference, candidate)
        )
        is_finite = np.isfinite(one).all(axis=1) & np.isfinite(other).all(axis=1)
        one, other = one[is_finite], other[is_finite]
        counted += len(one)
        sums += [part.sum(axis=0) for part in (one, other, one * other, other * other)]
    if counted < _FEWEST_TOKENS:
        return None
    of_one, of_other, products, squares = sums / counted
    variance = np.maximum(squares - of_other**2, _ROUNDING * squares)
    weight = (products - of_one * of_other) / np.where(variance > 0, variance, 1.0)
    found: Floats = np.stack([weight, of_one - weight * of_other])
    return found


def unit_tokens(sides: Sides, most: int) -> tuple[Floats, Floats]:
    """At most so many vectors from all over two arrays, as float64 of norm 1; those that are zero
    or not finite are left out, and so are repeated ones, which say nothing new."""
    one, other = _vectors(sides, most)
    return _of_norm_one(one), _of_norm_one(other)


def _of_norm_one(vectors: Floats) -> Floats:
    units: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units


def _vectors(sides: Sides, most: int) -> tuple[Floats, Floats]:
    """The same, as long as they are."""
    channels = sides[0].shape[-1]
    tokens = sides[0].size // channels
    count = min(tokens, most)
    places = [(2 * number + 1) * tokens // (2 * count) for number in range(count)]
    one, other = (_tokens(side, places, channels) for side in sides)
    norms = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    counted = (norms[0] > 0) & (norms[1] > 0) & np.isfinite(norms[0]) & np.isfinite(norms[1])
    kept = np.flatnonzero(counted)
    _, first = np.unique(one[kept] @ np.sqrt(np.arange(1.0, channels + 1.0)), return_index=True)
    kept = kept[np.sort(first)]
    return one[kept], other[kept]


def _tokens(side: Readable, places: Sequence[int], channels: int) -> Floats:
    read = reader(side)
    if len(places) * channels == side.size:
        joined = read(0, side.size)
    else:
        joined = np.concatenate([read(at * channels, (at + 1) * channels) for at in places])
    with np.errstate(all="ignore"):
        tokens: Floats = joined.astype(np.float64).reshape(-1, channels)
    return tokens


def deviation(matrix: Floats) -> float:
    """By how much a square matrix is not orthogonal: the largest element of |M^T M - 1|."""
    if not np.isfinite(matrix).all():
        return math.inf
    return float(np.abs(matrix.T @ matrix - np.eye(len(matrix))).max())
