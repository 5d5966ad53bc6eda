"""Vectors that are turned within a layer: one call gives them, another takes them and undoes it.

What the taking call gives agrees: so nothing is excused that swaps channels of what is given, which
turns vectors too.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeAlias

from qvtrace.comparison.leaf_pairs import Leaves
from qvtrace.comparison.noise import noise_of
from qvtrace.comparison.outcomes import Outcome
from qvtrace.comparison.rotating import UNLIKE, agrees, may_be_turned, what_is_left
from qvtrace.metrics.elements import Floats
from qvtrace.metrics.inner_rotations import (
    InnerRotation,
    declared_rotation,
    fits,
    head_rotations,
    taken_rotations,
)
from qvtrace.metrics.rotations import Sides
from qvtrace.trees import TensorLeaf

Reader: TypeAlias = Callable[[TensorLeaf, TensorLeaf], Sides]

_MUCH_WORSE = 10.0  # times the noise of what is taken, in what is made of it
_NO_WONDER = 0.02  # noise of what is made of them, as int4 makes it
_LAYER = re.compile(r"(.*\.\d+\.)?")


@dataclass(frozen=True, eq=False, slots=True)
class Standing:
    """Two tensors at a place of a call, and what was found between them."""

    module: str
    call: int
    path: str
    leaves: Leaves
    outcome: Outcome
    makes_calls: bool = False

    @property
    def is_output(self) -> bool:
        """Whether the call gave them."""
        return self.path.partition(".")[0] == "output"

    @property
    def is_turned(self) -> bool:
        """Whether nothing explains yet that their vectors look so."""
        is_explained = self.outcome.rotation is not None
        return not is_explained and may_be_turned(self.outcome, *self.leaves, limit=UNLIKE)

    @property
    def is_identical(self) -> bool:
        """Whether both are the same."""
        return self.outcome.status == "identical"

    @property
    def is_undone(self) -> bool:
        """Whether nothing is left of what was done to that which it is made of."""
        return self.is_identical or agrees(self.outcome)

    @property
    def is_unlike(self) -> bool:
        """Whether neither that is so, nor anything explains it."""
        may_be = self.outcome.scaling is None and may_be_turned(self.outcome, *self.leaves)
        return may_be and not self.is_undone


@dataclass(frozen=True, eq=False, slots=True)
class Undone:
    """What a module takes turned, in all its calls, and gives in agreement; and what was given
    turned before it, where that was."""

    taken: list[Standing] = field(default_factory=list)
    given: list[Standing] = field(default_factory=list)
    results: list[Standing] = field(default_factory=list)

    def is_served_by(self, rotation: InnerRotation) -> bool:
        """Whether what is made of the vectors is about as good as these, when turned back."""
        noises = [_noise(one.outcome) for one in self.results]
        return max(noises) <= max(_MUCH_WORSE * rotation.noise, _NO_WONDER)


def find_inner_rotations(
    standing: Iterable[Standing], read: Reader, declared: Mapping[str, Floats]
) -> Iterator[tuple[Leaves, InnerRotation]]:
    """Pairs that look turned with the rotation that explains each; `standing` in order of
    execution, `declared` are matrices of heads by the names of attention modules."""
    innermost = (one for one in standing if not (one.makes_calls or one.is_identical))
    for undone in _undone(innermost):
        given, taken = ([one.leaves for one in side] for side in (undone.given, undone.taken))
        rotation = _of(undone, read, declared)
        if rotation is not None:
            for leaves in (*given, *taken):
                yield leaves, rotation.for_channels(leaves[0].shape[-1])


def _of(undone: Undone, read: Reader, declared: Mapping[str, Floats]) -> InnerRotation | None:
    """Where a matrix of each head serves, but what is made of its vectors is worse than they are,
    channels may be swapped before or behind them: one matrix for all heads tells which."""
    given, taken = ([read(*one.leaves) for one in side] for side in (undone.given, undone.taken))
    known = _declared(undone, declared)
    if known is not None and given and fits(known, given):
        return declared_rotation(known, given)
    return next(
        (one for one in _likely(given, taken) if one.is_sure or undone.is_served_by(one)), None
    )


def _likely(given: Sequence[Sides], taken: Sequence[Sides]) -> Iterator[InnerRotation]:
    """Those of heads first, which are found sooner."""
    if given:
        yield from head_rotations(given, taken)
    yield from taken_rotations(taken)


def _declared(undone: Undone, declared: Mapping[str, Floats]) -> Floats | None:
    module = undone.taken[0].module
    return next((known for name, known in declared.items() if module.startswith(f"{name}.")), None)


def _undone(standing: Iterable[Standing]) -> Iterable[Undone]:
    """In a layer, what is taken turned is what was given so before it at last."""
    found: dict[tuple[str, str], Undone] = defaultdict(Undone)
    waiting: dict[str, Standing] = {}  # by layer
    for _, places in groupby(standing, key=lambda one: (one.module, one.call)):
        inputs: list[Standing] = []
        outputs: list[Standing] = []
        for one in places:
            (outputs if one.is_output else inputs).append(one)
        taken = [one for one in inputs if one.is_turned]
        if taken and outputs and all(agrees(one.outcome) for one in outputs):
            given = waiting.pop(layer_of(taken[0].module), None)
            undone = found[given.module if given else "", taken[0].module]
            undone.taken.append(taken[0])
            undone.results.extend(outputs)
            undone.given.extend([given] if given else ())
        waiting.update((layer_of(one.module), one) for one in outputs if one.is_turned)
    return found.values()


def layer_of(module: str) -> str:
    """The start of the name of a module that those of one layer share."""
    match = _LAYER.match(module)
    return match[0] if match else ""


def _noise(outcome: Outcome) -> float:
    left = what_is_left(outcome)
    return (None if left is None else noise_of(left.metrics, left.undefined)) or 0.0
