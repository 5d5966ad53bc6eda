"""Which vectors that look turned may be a residual stream's: then all of that is turned, and what
is computed from it is as it was."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["turned", "agrees", "differs"]

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Seen:
    """Vectors that stand at one place on both sides, and how they look before any rotation."""

    module: str
    call: int
    path: str
    is_leaf: bool  # whether they are of a module that calls none
    contents: Hashable  # equal for equal vectors on both sides
    channels: int
    state: State

    @property
    def is_output(self) -> bool:
        """Whether the call gave them."""
        return self.path.partition(".")[0] == "output"

    @property
    def kind(self) -> tuple[str, str, int]:
        """The same for the same place in each layer. The number that a leaf's name ends with tells
        it from others in one layer."""
        layer, dot, name = self.module.rpartition(".")
        if self.is_leaf:
            return _NUMBER.sub("*", layer) + dot + name, self.path, self.channels
        return _NUMBER.sub("*", self.module), self.path, self.channels


def of_no_stream(vectors: Sequence[Seen]) -> set[Hashable]:
    """The contents that look turned but are no rotated stream's, of these places.

    One rotation serves the whole stream. A fault in a layer makes others of all vectors that come
    after it, and of few vectors some matrix makes any others. But the same places of the layers
    before it agree as they are, and what is computed from such vectors agrees nowhere.
    """
    doubted = _agreeing_elsewhere(vectors)
    read_in_vain = _read_in_vain(vectors, doubted)
    return doubted | {
        one.contents for one in vectors if one.state == "turned" and one.channels in read_in_vain
    }


def _agreeing_elsewhere(vectors: Iterable[Seen]) -> set[Hashable]:
    """Turned vectors at places of a kind of which others agree."""
    kinds: dict[tuple[str, str, int], list[Seen]] = defaultdict(list)
    for one in vectors:
        kinds[one.kind].append(one)
    return {
        one.contents
        for alike in kinds.values()
        if any(one.state == "agrees" for one in alike)
        for one in alike
        if one.state == "turned"
    }


def _read_in_vain(vectors: Iterable[Seen], doubted: set[Hashable]) -> set[int]:
    """Lengths of turned vectors from which calls made others of another length, none of which
    agrees."""
    given: dict[tuple[str, int], set[int]] = defaultdict(set)
    gave: dict[tuple[str, int], list[Seen]] = defaultdict(list)
    for one in vectors:
        if one.is_output:
            gave[one.module, one.call].append(one)
        elif one.state == "turned" and one.contents not in doubted:
            given[one.module, one.call].add(one.channels)
    read, agreeing = set(), set()
    for call, lengths in given.items():
        for channels in lengths:
            if any(one.channels != channels for one in gave[call]):
                read.add(channels)
            if any(one.state == "agrees" for one in gave[call]):
                agreeing.add(channels)
    return read - agreeing
