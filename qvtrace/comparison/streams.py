"""Which vectors that look turned may be a residual stream's: then all of that is turned, and what
is computed from it is as it was."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["turned", "agrees", "identical", "differs"]

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
    leaves = [one for one in vectors if one.is_leaf]
    none = _behind_a_fault(leaves, doubted) | _read_in_vain(leaves, doubted)
    return doubted | {
        one.contents for one in vectors if one.state == "turned" and one.channels in none
    }


def _agreeing_elsewhere(vectors: Iterable[Seen]) -> set[Hashable]:
    """Turned vectors at places of a kind of which others agree."""
    kinds: dict[tuple[str, str, int], list[Seen]] = defaultdict(list)
    for one in vectors:
        kinds[one.kind].append(one)
    return {
        one.contents
        for alike in kinds.values()
        if any(one.state in ("agrees", "identical") for one in alike)
        for one in alike
        if one.state == "turned"
    }


def _behind_a_fault(vectors: Iterable[Seen], doubted: set[Hashable]) -> set[int]:
    """Lengths of which the first vectors that look turned are none that a rotation turns: those
    after them come from these."""
    first: dict[int, Seen] = {}
    for one in vectors:
        if one.is_output and one.state == "turned":
            first.setdefault(one.channels, one)
    return {channels for channels, one in first.items() if one.contents in doubted}


def _read_in_vain(vectors: Sequence[Seen], doubted: set[Hashable]) -> set[int]:
    """Lengths of turned vectors from which others were made, none of which agrees. What is
    identical was made from something else: a rotation that is undone leaves rounding."""
    turned = [one for one in vectors if one.state == "turned" and one.contents not in doubted]
    others = [one for one in vectors if one.is_output and one.state != "identical"]
    in_vain = set()
    for channels in {one.channels for one in turned}:
        stream = [one for one in turned if one.channels == channels]
        made = [one for one in others if one.state == "agrees" or one.channels != channels]
        readers = {(one.module, one.call): one for one in stream if not one.is_output}
        read = [one for one in made if (one.module, one.call) in readers]
        # Of several vectors that others were made of, a fault in one layer is not to blame.
        given = {readers[one.module, one.call].contents for one in read}
        found = read if len(given) > 1 else [*read, *_made_first(stream, made, vectors)]
        if found and not any(one.state == "agrees" for one in found):
            in_vain.add(channels)
    return in_vain


def _made_first(
    stream: Sequence[Seen], made: Sequence[Seen], vectors: Sequence[Seen]
) -> list[Seen]:
    """What was made after vectors of a stream and before the next ones of it, the first that there
    is: from these, though nobody may know what calls were given, or a norm lie between that is
    folded."""
    found: list[Seen] = []
    given = {id(one) for one in stream if one.is_output}
    wanted = {id(one) for one in made}
    has_begun = False
    for one in vectors:
        if id(one) in given:
            if found:
                break
            has_begun = True
        elif has_begun and id(one) in wanted:
            found.append(one)
    return found
