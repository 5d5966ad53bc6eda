"""Which vectors of a tensor are stored where not all of them are.

A vector lies along the last dimension: a token, of most tensors. The places depend on nothing but
how many vectors there are, how many are wanted, and a seed, so that two recordings of one model
store the same. Of two samplings with one seed, the smaller one's places are all in the larger.
"""

import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

SEED = 0
FEWEST = 2  # the first and the last are always there

Places: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

_ROUNDS = 4
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def count_vectors(shape: tuple[int, ...]) -> int:
    """How many vectors lie along the last dimension; a tensor of one dimension or none is one."""
    return math.prod(shape[:-1])


def every_place(count: int) -> Places:
    """The places of all of `count` vectors."""
    return np.arange(count, dtype=np.int64)


@lru_cache(maxsize=256)
def sampled_places(count: int, tokens: int, seed: int = SEED) -> Places:
    """The places of at most `tokens` of `count` vectors, in order: the first, the last, and others
    that follow from the seed. All of them where there are no more; `tokens` is at least 2."""
    if count <= tokens:
        chosen = every_place(count)
    else:
        inner = _permuted(np.arange(tokens - FEWEST, dtype=np.uint64), count - FEWEST, seed)
        chosen = np.concatenate([[0], inner.astype(np.int64) + 1, [count - 1]])
        chosen.sort()
    chosen.flags.writeable = False
    return chosen


def _permuted(numbers: Any, size: int, seed: int) -> Any:
    """Where a permutation of `range(size)` that follows from the seed sends these numbers.

    A Feistel network permutes the next power of 4; what falls outside is sent on until it does not
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    sent = _network(numbers, half, seed)
    while (outside := sent >= size).any():
        sent[outside] = _network(sent[outside], half, seed)
    return sent


def _network(numbers: Any, half: int, seed: int) -> Any:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = numbers >> shift, numbers & mask
    for number in range(_ROUNDS):
        key = np.uint64((seed * _ROUNDS + number + 1) * _INCREMENT % 2**64)
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << shift) | right


def _mixed(words: Any) -> Any:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    return words ^ (words >> np.uint64(31))
