"""Pairs whose vectors are turned: which rotation explains them, given or found from all of them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.outcomes import Outcome
from qvtrace.comparison.streams import State
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import Floats, format_of
from qvtrace.metrics.inner_rotations import AnyRotation
from qvtrace.metrics.rotations import (
    FEWEST_CHANNELS,
    Rotation,
    Sides,
    TooFewTokens,
    are_of_one_norm,
    best_turned,
    find_rotation,
    is_turned,
)
from qvtrace.metrics.scaling import Scaling, find_scaling, nearest_scaling
from qvtrace.trees import TensorLeaf

_LEFT = 0.5  # of the error's energy, that a rotation leaves at most
LITTLE = 20.0  # dB, from which on a difference is none that a rotation makes
UNLIKE = 3.0  # dB, below which most vectors are when all are turned
_ALIKE = 6.0  # dB, from which on vectors are alike that any rotation would turn
_SAME_NORM = 0.8, 1.25
FEWEST_ALIKE = 3  # pairs that look turned: what is turned is a stream
_LOOKED_AT = 16  # arrays by which the direction of a rotation is told


@dataclass(frozen=True)
class Rotations:
    """Those that are known: of vectors of each length one at most."""

    known: tuple[Rotation, ...] = ()
    too_few: tuple[TooFewTokens, ...] = ()  # vectors that are turned, nobody knows how

    @property
    def noise(self) -> float:
        """What comes with them, since they were found in noise."""
        return max((rotation.noise for rotation in self.known), default=0.0)

    def of(self, shape: Sequence[int]) -> Rotation | None:
        """The one for vectors along the last dimension."""
        channels = shape[-1] if shape else 0
        return next((known for known in self.known if known.channels == channels), None)


@dataclass(frozen=True)
class Declared:
    """Rotations that the candidate is said to have."""

    stream: tuple[Rotation, ...] = ()
    heads: Mapping[str, Floats] = field(default_factory=dict)  # by the names of attention modules


def find_rotations(
    alike: Sequence[tuple[TensorLeaf, TensorLeaf]],
    read: Callable[[TensorLeaf, TensorLeaf], Sides],
    declared: Sequence[Rotation] = (),
) -> Rotations:
    """The rotations of pairs that look turned; where fewer than three of one length do, none is
    looked for and nothing is read."""
    by_length: dict[int, list[tuple[TensorLeaf, TensorLeaf]]] = defaultdict(list)
    for leaves in alike:
        by_length[leaves[0].shape[-1]].append(leaves)
    known = []
    for given in declared:
        looked_at = by_length.pop(given.channels, [])[:_LOOKED_AT]
        known.append(best_turned(given, [read(*leaves) for leaves in looked_at]))
    too_few = []
    for _, pairs in sorted(by_length.items()):
        if len(pairs) < FEWEST_ALIKE:
            continue
        found = _found([read(*leaves) for leaves in pairs])
        if isinstance(found, Rotation):
            known.append(found)
        elif found is not None:
            too_few.append(found)
    return Rotations(tuple(known), tuple(too_few))


def state_of(outcome: Outcome, reference: TensorLeaf, candidate: TensorLeaf) -> State | None:
    """How the vectors of two tensors look as they are; None of those that have none to turn."""
    if not _may_be_of_a_stream(reference, candidate):
        return None
    if is_like_a_turned_one(outcome, reference, candidate):
        return "turned"
    if outcome.status == "identical":
        return "identical"
    return "agrees" if agrees(outcome) else "differs"


def is_like_a_turned_one(outcome: Outcome, reference: TensorLeaf, candidate: TensorLeaf) -> bool:
    """Whether vectors differ as if they had nothing to do with each other, but are as long."""
    sums = None if outcome.difference is None else outcome.difference.sums
    if sums is None or not sums.reference_norm or sums.candidate_norm is None:
        return False
    has_same_norm = _SAME_NORM[0] <= sums.candidate_norm / sums.reference_norm <= _SAME_NORM[1]
    is_unlike = may_be_turned(outcome, reference, candidate, limit=UNLIKE)
    return has_same_norm and is_unlike and outcome.scaling is None


def may_be_turned(
    outcome: Outcome, reference: TensorLeaf, candidate: TensorLeaf, *, limit: float = LITTLE
) -> bool:
    """Whether vectors may be turned, by an SQNR under `limit`, in dB; so may those be that a factor
    seems to explain."""
    sqnr = _sqnr(outcome)
    return (
        outcome.status == "ok"
        and sqnr is not None
        and sqnr < limit
        and _may_be_of_a_stream(reference, candidate)
    )


def turned_back(
    outcome: Outcome, rotation: AnyRotation, sides: Sides, rest: Difference
) -> Outcome | None:
    """The outcome of a pair whose candidate a rotation turns back, which leaves `rest`; None where
    it does not explain the pair."""
    scaling = _scaling_of_turned(sides, rest)
    if not _is_better(rest if scaling is None else scaling.residual, outcome):
        return None
    return replace(outcome, rotation=rotation, rest=rest, scaling=scaling)


def agrees(outcome: Outcome) -> bool:
    """Whether vectors are alike as they are, or by what explains their difference."""
    sqnr = _sqnr(outcome)
    return sqnr is not None and sqnr >= _ALIKE


def what_is_left(outcome: Outcome) -> Difference | None:
    """The difference, after a factor or a rotation where there is one."""
    if outcome.scaling is not None:
        return outcome.scaling.residual
    return outcome.difference if outcome.rest is None else outcome.rest


def _sqnr(outcome: Outcome) -> float | None:
    left = what_is_left(outcome)
    return None if left is None else left.metrics.sqnr


def _may_be_of_a_stream(reference: TensorLeaf, candidate: TensorLeaf) -> bool:
    return (
        len(reference.shape) >= 2
        and reference.shape[-1] == candidate.shape[-1] >= FEWEST_CHANNELS
        and all(_is_float(leaf) for leaf in (reference, candidate))
    )


def _is_float(leaf: TensorLeaf) -> bool:
    dtype = DTYPES.get(leaf.dtype)
    return dtype is not None and format_of(dtype.numpy).kind == "float"


def _found(alike: Sequence[Sides]) -> Rotation | TooFewTokens | None:
    turned = [sides for sides in alike if is_turned([sides])]
    if not turned and is_turned(alike):  # of few tokens each
        turned = list(alike)
    return find_rotation(turned) if len(turned) >= FEWEST_ALIKE else None


def _is_better(rest: Difference, outcome: Outcome) -> bool:
    """Whether a rotation leaves less than half of the energy that is left without: one that is
    known is not to be doubted where a fault is in the same vectors."""
    left = what_is_left(outcome)
    before, after = None if left is None else _error(left), _error(rest)
    return before is not None and after is not None and after <= _LEFT * before


def _scaling_of_turned(sides: Sides, rest: Difference) -> Scaling | None:
    """The factor of vectors that are turned back. Behind noise, a norm's weight that went into the
    next ones looks like none, and dividing by it makes noise louder: its nearest is taken there."""
    scaling = find_scaling(*sides, rest)
    left = _error(rest if scaling is None else scaling.residual)
    if rest.metrics.sqnr is None or rest.metrics.sqnr >= UNLIKE or left is None:
        return scaling
    nearest = nearest_scaling(*sides) if are_of_one_norm(sides[1]) else None
    other = None if nearest is None else _error(nearest.residual)
    return scaling if other is None or other > _LEFT * left else nearest


def _error(difference: Difference) -> float | None:
    """The energy of the error."""
    return None if difference.sums is None else difference.sums.error_norm**2
