"""Permutations of channels, or of whole heads, with or without signs: orthogonal matrices that few
tokens tell, since each channel is matched by itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qvtrace.metrics.elements import Floats, Readable, format_of, reader
from qvtrace.metrics.rotations import OfVectors, Sides, unit_tokens

Integers: TypeAlias = npt.NDArray[np.int64]

_FEWEST_TOKENS = 5  # of which one is held out
_MOST_TOKENS = 64  # that channels are matched by
_MOST_PLACES = 4096  # of the rows and columns of attention weights
_HELD_OUT = 5  # one token in so many is held out
_UNEXPLAINED = 0.25  # share of the energy of vectors that may be left
_MOST_CHANNELS = 32768
_AT_ONCE = 1 << 22  # elements of a table of channels by channels
_SMALLEST_HEAD = 8  # channels
_MOST = 0.5  # of all channels, that move as their heads do
_ABOUT = 0.98  # of the channels that move as smaller parts of heads do, where some move by chance
_CHANGED = -0.25  # of a head's channels, on balance, whose sign is another: no chance


@dataclass(frozen=True, eq=False)
class Permutation:
    """Where each channel of a reference is in the candidate, and with which sign.

    Channels lie along `axis`, counted from the end.
    """

    order: Integers = field(repr=False)
    signs: Floats = field(repr=False)  # 1 or -1
    axis: int = -1

    def sides(self, reference: Readable, candidate: Readable) -> Sides:
        """Both as they are compared: the candidate's channels in the order of the reference; it is
        not copied."""
        inner = prod(candidate.shape[len(candidate.shape) + self.axis + 1 :])
        is_narrow = format_of(candidate.dtype).fits_float32
        dtype = np.dtype(np.float32 if is_narrow else np.float64)
        signs = self.signs.astype(dtype)[:, None]

        def back(tokens: Floats) -> Floats:
            parts = tokens.reshape(len(tokens), self.order.size, inner)
            ordered: Floats = (parts[:, self.order] * signs).reshape(len(tokens), -1)
            return ordered

        return reference, OfVectors(candidate, self.order.size * inner, dtype, back)


def find_permutation(
    arrays: Sequence[Sides], like: Permutation | None = None
) -> Permutation | None:
    """The one permutation of the channels of all these, of one length; None where there is none.
    One of vectors as long, if it explains these as well, is preferred.

    Each channel of a candidate is matched to the nearest of the reference by four tokens in five,
    which is verified on the others. Where most channels move with their heads, heads are
    permuted, and a channel that does not move with its own is in a wrong place.
    """
    channels = arrays[0][0].shape[-1]
    if channels > _MOST_CHANNELS:
        return None
    share = max(_FEWEST_TOKENS, -(-_MOST_TOKENS // len(arrays)))
    sides = [unit_tokens(both, share) for both in arrays]
    one, other = (np.concatenate(side) for side in zip(*sides, strict=True))
    fits = like is not None and like.order.size == channels
    if like is not None and fits and _left(like, one, other) <= _UNEXPLAINED:
        return like
    return _found(one, other)


def permuted_heads(sides: Sides) -> Permutation | None:
    """The same of the heads of attention weights [batch, heads, queries, keys]."""
    heads = sides[0].shape[1]
    one, other = (_by_head(side) for side in sides)
    varied = np.flatnonzero(np.ptp(one, axis=1) > 0)  # a weight that all heads have says nothing
    places = varied[:: max(1, varied.size // _MOST_PLACES)]
    found = _found(one[places], other[places]) if heads > 1 else None
    return None if found is None else Permutation(found.order, found.signs, axis=-3)


def _by_head(array: Readable) -> Floats:
    batch, heads, *_ = array.shape
    values = reader(array)(0, array.size).astype(np.float64).reshape(batch, heads, -1)
    together: Floats = values.swapaxes(1, 2).reshape(-1, heads)
    return together


def _found(one: Floats, other: Floats) -> Permutation | None:
    if len(one) < _FEWEST_TOKENS:
        return None
    is_held_out = np.arange(len(one)) % _HELD_OUT == _HELD_OUT - 1
    held_out = one[is_held_out], other[is_held_out]
    found_by = one[~is_held_out], other[~is_held_out]
    finest = _matched(*found_by)
    if finest is None:
        return None
    for found in (*_of_heads(finest), finest):
        if _left(found, *held_out) <= _UNEXPLAINED and not _is_none(found):
            return found
    return None


def _is_none(found: Permutation) -> bool:
    return bool((found.order == np.arange(found.order.size)).all() and (found.signs > 0).all())


def _left(found: Permutation, one: Floats, other: Floats) -> float:
    """The share of a vector's energy that a permutation leaves, the median."""
    energy = np.square(one).sum(axis=1)
    error = np.square(other[:, found.order] * found.signs - one).sum(axis=1)
    counted = energy > 0
    return float(np.median(error[counted] / energy[counted])) if counted.any() else 1.0


def _matched(one: Floats, other: Floats) -> Permutation | None:
    """The nearest channel of the candidate for each of the reference; those that another one is
    nearer to take what is left. None where these are more than a quarter."""
    channels = one.shape[1]
    nearest, gains = np.empty(channels, np.int64), np.empty(channels)
    step = max(1, _AT_ONCE // channels)
    for start in range(0, channels, step):
        table = _gains(one[:, start : start + step], other)
        nearest[start : start + step] = table.argmax(axis=1)
        gains[start : start + step] = table.max(axis=1)
    best_first = np.argsort(-gains, kind="stable")
    _, first = np.unique(nearest[best_first], return_index=True)
    kept = best_first[first]
    order = np.full(channels, -1)
    order[kept] = nearest[kept]
    without = np.flatnonzero(order < 0)
    if without.size > channels * _UNEXPLAINED:
        return None
    order[without] = np.setdiff1d(np.arange(channels), order)
    products = np.einsum("ij,ij->j", one, other[:, order])
    return Permutation(order, np.where(products < 0, -1.0, 1.0))


def _gains(one: Floats, other: Floats) -> Floats:
    """For channels of both sides, how much of the energy of the one the other explains, of either
    sign: a distance, so that a single token tells channels apart by their values."""
    table: Floats = 2.0 * np.abs(one.T @ other) - np.square(other).sum(axis=0)
    table -= np.square(one).sum(axis=0)[:, None]
    return table


def _of_heads(finest: Permutation) -> list[Permutation]:
    """The same in which whole heads are moved, of the largest size that about most channels move
    by, if any."""
    channels = finest.order.size
    sizes = [size for size in range(channels // 2, _SMALLEST_HEAD - 1, -1) if channels % size == 0]
    moved = [_moved(finest, size) for size in sizes]
    shares = [float(_is_alike(one, finest).mean()) for one in moved]
    least = max(_MOST, _ABOUT * max(shares, default=0.0))
    return [one for one, share in zip(moved, shares, strict=True) if share >= least][:1]


def _is_alike(one: Permutation, other: Permutation) -> npt.NDArray[np.bool_]:
    is_alike: npt.NDArray[np.bool_] = (one.order == other.order) & (one.signs == other.signs)
    return is_alike


def _moved(finest: Permutation, size: int) -> Permutation:
    """Each head goes where most of its channels do; behind noise, which has no say, where a place
    is left."""
    places = np.arange(finest.order.size)
    keeps = finest.order % size == places % size
    count = places.size // size
    votes = np.zeros((count, count))
    np.add.at(votes, (places[keeps] // size, finest.order[keeps] // size), 1)
    heads = np.empty(count, np.int64)
    for _ in range(count):
        head, its = np.unravel_index(votes.argmax(), votes.shape)
        heads[head] = its
        votes[head], votes[:, its] = -1, -1
    order = (heads[:, None] * size + np.arange(size)).reshape(-1)
    agreeing = (finest.signs * (order == finest.order)).reshape(-1, size).sum(axis=1)
    return Permutation(order, np.repeat(np.where(agreeing < _CHANGED * size, -1.0, 1.0), size))
