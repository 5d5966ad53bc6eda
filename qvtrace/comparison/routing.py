"""Experts that see other tokens on the two sides: their calls cannot be held against each other.

A token that a mixture sends to an expert is a row of what a call around it was given, element by
element, so that its place there tells which token it is, on each side by itself.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from qvtrace.comparison.alignment import Pair
from qvtrace.digests import digest_bytes
from qvtrace.manifest import CallEntry
from qvtrace.metrics.elements import Array

_EXPERT = "expert"  # in the names of modules that are experts, or hold them


@dataclass(frozen=True, slots=True)
class Routed:
    """How many of the tokens that either side sent to an expert both sides sent there; None where
    what was recorded does not tell."""

    alike: int | None = None
    tokens: int | None = None

    @property
    def text(self) -> str:
        """The share in words."""
        if self.alike is None or self.tokens is None:
            return "other tokens on the two sides, how many alike cannot be told"
        share = 100 * self.alike / self.tokens
        return f"{self.alike} of {self.tokens} tokens routed alike ({share:.0f} %)"


@dataclass(frozen=True, slots=True)
class Vectors:
    """A tensor as vectors along its last dimension."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    digests: Callable[[], list[str]]  # of each vector


Given: TypeAlias = Callable[[Pair], Iterable[tuple[Vectors, Vectors]]]  # tensors of both sides


class Routing:
    """Which paired calls saw other tokens on the two sides."""

    def __init__(self, pairs: Iterable[Pair], given: Given) -> None:
        self._pairs = {_key(pair.reference): pair for pair in pairs}
        self._given = given
        self._known: dict[tuple[str, int], Routed | None] = {}
        self._groups: set[str] = set()  # modules that hold experts

    def of(self, pair: Pair) -> Routed | None:
        """What is known of the expert that a pair of calls is, or lies in."""
        unknown = []
        for key in self._path(pair):
            if key in self._known:
                break
            unknown.append(key)
        for key in reversed(unknown):  # from the outside in
            above = self._above(self._pairs[key])
            routed = self._known[_key(above.reference)] if above is not None else None
            self._known[key] = routed or self._own(self._pairs[key])
        return self._known[_key(pair.reference)]

    def may_be_expert(self, pair: Pair) -> bool:
        """Whether the name says so, or that of an expert beside it."""
        name = pair.reference.module
        return is_expert_by_name(pair) or any(name.startswith(group) for group in self._groups)

    def _path(self, pair: Pair) -> Iterator[tuple[str, int]]:
        """The pair and those around it, from the inside out."""
        met = set()
        around: Pair | None = pair
        while around is not None and _key(around.reference) not in met:
            key = _key(around.reference)
            met.add(key)
            yield key
            around = self._above(around)

    def _above(self, pair: Pair) -> Pair | None:
        parent = pair.reference.parent
        return None if parent is None else self._pairs.get(parent)

    def _own(self, pair: Pair) -> Routed | None:
        """Whether this very call saw other tokens, as far as its first tensor tells."""
        mine = next((sides for sides in self._given(pair) if _are_tokens(*sides)), None)
        if mine is None:
            return None
        if mine[0].shape == mine[1].shape and not self.may_be_expert(pair):
            return None
        places = self._places(pair, mine)
        if places is None or places[0] == places[1]:
            return None
        self._groups.add(pair.reference.module.rpartition(".")[0] + ".")
        return Routed((places[0] & places[1]).total(), (places[0] | places[1]).total())

    def _places(
        self, pair: Pair, mine: tuple[Vectors, Vectors]
    ) -> tuple[Counter[int], Counter[int]] | None:
        """Where the tokens of both sides stand in what a call around was given."""
        around = self._above(pair)
        path = [] if around is None else [self._pairs[key] for key in self._path(around)]
        for outer in path:
            for whole in self._given(outer):
                if whole[0].shape != whole[1].shape or not _are_tokens(*whole):
                    continue
                places = _found(mine[0], whole[0]), _found(mine[1], whole[1])
                if places[0] is not None and places[1] is not None:
                    return places[0], places[1]
        return None


def is_expert_by_name(pair: Pair) -> bool:
    """Whether the name of a module says that it is an expert, or in one."""
    return _EXPERT in pair.reference.module.lower()


def _key(call: CallEntry) -> tuple[str, int]:
    return call.module, call.index


def _are_tokens(reference: Vectors, candidate: Vectors) -> bool:
    """Whether both can be vectors of one length."""
    return (
        min(len(reference.shape), len(candidate.shape)) >= 2
        and reference.shape[-1] == candidate.shape[-1]
        and reference.dtype.kind not in "biu"
    )


def _found(tokens: Vectors, whole: Vectors) -> Counter[int] | None:
    """How often each vector of the whole is among the tokens; None where one is no such vector."""
    if tokens.shape[-1] != whole.shape[-1] or tokens.dtype != whole.dtype:
        return None
    first: dict[str, int] = {}
    for place, digest in enumerate(whole.digests()):
        first.setdefault(digest, place)
    places = [first.get(digest) for digest in tokens.digests()]
    return None if None in places else Counter(place for place in places if place is not None)


def vector_digests(array: Array) -> list[str]:
    """The digest of each vector along the last dimension."""
    rows = np.ascontiguousarray(array).reshape(-1, array.shape[-1])
    return [digest_bytes(row.view(np.uint8).data) for row in rows]
