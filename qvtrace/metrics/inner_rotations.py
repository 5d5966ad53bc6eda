"""Rotations within a layer: what one call gives is turned, and the weights that take it undo that.

SpinQuant and QuaRot turn the values of each attention head (R2), and what a projection takes by a
Hadamard transform (R4). Vectors are turned block by block of their channels, a head each, or by a
Kronecker product of a small matrix and a Hadamard matrix, which few tokens tell (Ashkboos et al.,
arXiv 2404.00456; Liu et al., arXiv 2405.16406).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import TypeAlias

import numpy as np

from qvtrace.metrics.elements import Floats, Readable, format_of
from qvtrace.metrics.permutations import Permutation
from qvtrace.metrics.rotations import FEWEST_CHANNELS, OfVectors, Rotation, Sides, unit_tokens

_LARGEST_HEAD = 256  # channels
_MOST_CHANNELS = 2048  # of which one matrix is looked for
_MOST_OUTER = 256  # rows of what a Hadamard matrix is multiplied by
_PER_CHANNEL = 8  # tokens that a rotation is found by, where there are so many
_MOST_TOKENS = 2048
_HELD_OUT = 5  # one token in so many is held out
_UNEXPLAINED = 0.25  # share of the energy of vectors that may be left
_ALIKE = 4.0  # times the noise by a matrix of each head, that one of all heads may leave
_ROUNDS = 4  # of weighting heads by how well they fit
_ROUNDING = 1e-9  # share of energy that is none


@dataclass(frozen=True, eq=False)
class InnerRotation:
    """What turns the vectors of a reference into those of a candidate, block by block.

    Blocks are heads; with `is_hadamard` there is one, and each of its elements stands for so many
    channels as a Hadamard matrix turns besides.
    """

    blocks: Floats = field(repr=False)  # [blocks, size, size], float64
    channels: int
    is_hadamard: bool = False
    tokens: int = 0  # that it was found by; 0: it was declared
    noise: float = 0.0  # that it leaves of the vectors that are taken
    is_sure: bool = False  # whether it is told by more vectors than one head has, or of a kind

    @property
    def size(self) -> int:
        """Channels that are turned together."""
        return self.channels // (1 if self.is_hadamard else len(self.blocks))

    @property
    def turned(self) -> "InnerRotation":
        """The other way round."""
        return replace(self, blocks=self.blocks.swapaxes(1, 2))

    def sides(self, reference: Readable, candidate: Readable) -> Sides:
        """Both as they are compared: the candidate turned back; it is not copied."""
        is_narrow = format_of(candidate.dtype).fits_float32
        dtype = np.dtype(np.float32 if is_narrow else np.float64)
        blocks = self.blocks.astype(dtype)
        how = replace(self, blocks=blocks)
        return reference, OfVectors(candidate, self.channels, dtype, how.back)

    def back(self, tokens: Floats) -> Floats:
        """Vectors of the candidate [tokens, channels] as those of the reference."""
        if self.is_hadamard:
            parts = hadamard(tokens.reshape(len(tokens), self.blocks.shape[-1], -1))
            whole: Floats = (self.blocks[0] @ parts).reshape(len(tokens), -1)
            return whole
        heads = tokens.reshape(len(tokens), len(self.blocks), -1).swapaxes(0, 1)
        return (heads @ self.blocks.swapaxes(1, 2)).swapaxes(0, 1).reshape(len(tokens), -1)

    def for_channels(self, channels: int) -> "InnerRotation":
        """The same for vectors of more heads, several of which follow one of these."""
        times = channels // self.channels
        return replace(self, blocks=np.repeat(self.blocks, times, axis=0), channels=channels)


Vectors: TypeAlias = tuple[Floats, Floats]  # of both sides, [tokens, channels], of norm 1
AnyRotation: TypeAlias = Rotation | InnerRotation | Permutation


def head_rotations(given: Sequence[Sides], taken: Sequence[Sides]) -> list[InnerRotation]:
    """The matrices of heads that turn what is given, and what is taken of it, likely ones first:
    one for all heads or one for each.

    They are found by four in five of the vectors given and verified on the others and on all that
    are taken, where several heads in a row may be mixed of one (grouped queries). Of sizes that
    serve the smallest is a head's. Of fewer tokens than a head has channels all heads together may
    tell one matrix; there is none where these are too few as well.
    """
    channels, wide = (arrays[0][0].shape[-1] for arrays in (given, taken))
    for size in _head_sizes(gcd(channels, wide)):
        if (wide // size) % (channels // size) == 0:
            vectors = _vectors(taken, size)
            found = _of_heads(_vectors(given, size), vectors, size)
            if found:
                return [replace(one, noise=_left(one, vectors)) for one in found]
    return []


def taken_rotations(taken: Sequence[Sides]) -> list[InnerRotation]:
    """The same of vectors that no call gave turned, as a Hadamard transform makes them that is
    computed between two calls."""
    channels = taken[0][0].shape[-1]
    outer = channels // (channels & -channels)
    if outer <= _MOST_OUTER:
        found_by, held_out = _split(_vectors(taken, 2 * outer))
        mixed = _with_hadamard(found_by, channels, outer)
        if mixed is not None and _is_explained(mixed, held_out):
            return [replace(mixed, noise=_left(mixed, held_out), is_sure=True)]
    found_by, held_out = _split(_vectors(taken, channels))
    if channels <= len(found_by[0]) and channels <= _MOST_CHANNELS:
        one = InnerRotation(
            _nearest(_products(found_by, channels)), channels, tokens=len(found_by[0])
        )
        found = replace(one, noise=_left(one, held_out))
        return [found] if _is_explained(one, held_out) else []
    return []


def fits(blocks: Floats, given: Sequence[Sides]) -> bool:
    """Whether matrices [heads, size, size] are as large and as many as vectors need."""
    count, left = divmod(given[0][0].shape[-1], blocks.shape[-1])
    return not left and len(blocks) in (1, count)


def declared_rotation(blocks: Floats, given: Sequence[Sides]) -> InnerRotation:
    """Matrices that are known, one for all heads or one for each [heads, size, size], the way round
    that leaves less."""
    channels, size = given[0][0].shape[-1], blocks.shape[-1]
    each = np.broadcast_to(blocks, (channels // size, size, size))
    known = InnerRotation(each, channels, is_sure=True)
    vectors = _vectors(given, size)
    return min((known, known.turned), key=lambda one: _left(one, vectors))


def hadamard(vectors: Floats) -> Floats:
    """Vectors along the last axis, of a power of two channels, times Sylvester's orthogonal matrix,
    which is its own inverse."""
    shape, channels = vectors.shape, vectors.shape[-1]
    half = 1
    while half < channels:
        pairs = vectors.reshape(-1, channels // (2 * half), 2, half)
        one, other = pairs[:, :, 0], pairs[:, :, 1]
        vectors = np.stack([one + other, one - other], axis=2)
        half *= 2
    scaled: Floats = vectors.reshape(shape) * vectors.dtype.type(channels**-0.5)
    return scaled


def _head_sizes(common: int) -> Iterator[int]:
    return (size for size in range(FEWEST_CHANNELS, _LARGEST_HEAD + 1) if common % size == 0)


def _vectors(arrays: Sequence[Sides], size: int) -> Vectors:
    """Vectors of norm 1 of all these, so many as tell a matrix of one size."""
    share = max(_HELD_OUT, -(-min(_PER_CHANNEL * size, _MOST_TOKENS) // len(arrays)))
    sides = [unit_tokens(both, share) for both in arrays]
    one, other = (np.concatenate(side) for side in zip(*sides, strict=True))
    return one, other


def _split(vectors: Vectors) -> tuple[Vectors, Vectors]:
    """Those that a rotation is found by, and those held out."""
    is_held_out = np.arange(len(vectors[0])) % _HELD_OUT == _HELD_OUT - 1
    found_by, held_out = (
        (vectors[0][chosen], vectors[1][chosen]) for chosen in (~is_held_out, is_held_out)
    )
    return found_by, held_out


def _of_heads(given: Vectors, taken: Vectors, size: int) -> list[InnerRotation]:
    found_by, held_out = _split(given)
    tokens, channels = found_by[0].shape
    if tokens * channels // size < size:
        return []
    products = _products(found_by, size)
    each = InnerRotation(_nearest(products), channels, tokens=tokens)
    if tokens < size:
        one = _one_for_all(each, products, found_by)
        return [one] if _is_explained(one, held_out) and _is_explained(one, taken) else []
    if not (_is_explained(each, held_out) and _is_explained(each, taken)):
        return []
    if channels == size:
        return [each]
    one = _one_for_all(each, products, found_by)
    least = max(_left(each, held_out), _ROUNDING)
    if _left(one, held_out) <= _ALIKE * least:
        return [one]
    return [each, *([one] if _is_explained(one, held_out) else [])]


def _one_for_all(each: InnerRotation, products: Floats, vectors: Vectors) -> InnerRotation:
    """The matrix that serves most heads: each has as much weight as it fits well."""
    weights = np.ones(len(products))
    count = len(products)
    for _ in range(_ROUNDS):
        matrix = _nearest((weights[:, None, None] * products).sum(axis=0, keepdims=True))
        one = replace(each, blocks=np.broadcast_to(matrix, products.shape), is_sure=True)
        error = np.square(one.back(vectors[1]) - vectors[0])
        left = error.reshape(len(error), count, -1).sum(axis=(0, 2)) / len(error)
        weights = 1.0 / np.maximum(left, _ROUNDING)
    return one


def _with_hadamard(vectors: Vectors, channels: int, outer: int) -> InnerRotation | None:
    """The Kronecker product of the smallest odd matrix and a Hadamard matrix: each vector tells of
    as many as the latter has channels. Either way round: it is orthogonal, and symmetric where it
    is a Hadamard matrix alone."""
    one, other = vectors
    if not len(one):
        return None
    parts = one.reshape(len(one), outer, -1), hadamard(other.reshape(len(other), outer, -1))
    products = np.einsum("tap,tbp->ab", *parts)
    return InnerRotation(_nearest(products[None]), channels, is_hadamard=True, tokens=len(one))


def _products(vectors: Vectors, size: int) -> Floats:
    """Of each head [heads, size, size]."""
    one, other = (side.reshape(len(side), -1, size).transpose(1, 2, 0) for side in vectors)
    products: Floats = one @ other.swapaxes(1, 2)
    return products


def _nearest(products: Floats) -> Floats:
    """The orthogonal matrices that make the most of the one side's vectors the other's."""
    left, _, right = np.linalg.svd(products)
    nearest: Floats = left @ right
    return nearest


def _is_explained(rotation: InnerRotation, vectors: Vectors) -> bool:
    return len(vectors[0]) > 0 and _left(rotation, vectors) <= _UNEXPLAINED


def _left(rotation: InnerRotation, vectors: Vectors) -> float:
    """The share of a vector's energy that a rotation leaves, the median."""
    one, other = vectors
    if one.shape[-1] != rotation.channels:
        rotation = rotation.for_channels(one.shape[-1])
    return float(np.median(np.square(rotation.back(other) - one).sum(axis=1)))
