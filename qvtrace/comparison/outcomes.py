"""What a row says of its two leaves: of tensors once they are measured, of all else by itself."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from qvtrace.comparison.leaves import described
from qvtrace.comparison.routing import Routed
from qvtrace.comparison.rows import (
    NOT_STORED,
    ON_BOTH_SIDES,
    PLAIN_VALUE,
    ROUTING_DIFFERS,
    SHAPES_DIFFER,
    STRUCTURE_DIFFERS,
    TYPES_DIFFER,
    Status,
)
from qvtrace.metrics.differences import Difference, Peak
from qvtrace.metrics.elements import Array
from qvtrace.metrics.inner_rotations import AnyRotation
from qvtrace.metrics.layouts import Layout
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.metrics.scaling import Scaling
from qvtrace.privacy import same_key
from qvtrace.trees import Container, Node, OpaqueLeaf, Original, PlainValue, TensorLeaf, ValueLeaf

# Values of these types are no contents of a prompt or a file, so that they can be shown.
_HARMLESS = frozenset({"bool", "int", "float", "dtype", "device", "layout", "range", "slice"})


@dataclass(frozen=True)
class Outcome:
    """What a row says of its two leaves."""

    status: Status
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    peak: Peak | None = None
    difference: Difference | None = None
    layout: Layout | None = None
    scaling: Scaling | None = None
    nonfinite: Nonfinite | None = None  # where that is known from more than the difference
    rotation: AnyRotation | None = None  # the candidate is turned by it, a factor comes after it
    rest: Difference | None = None  # what is left when it is turned back
    unseen: bool = False  # no more than a class, or a length, is known of what stood there


def measured(
    difference: Difference, layout: Layout | None = None, scaling: Scaling | None = None
) -> Outcome:
    return Outcome(
        difference.status,
        None,
        difference.metrics,
        difference.undefined,
        difference.peak,
        difference,
        layout,
        scaling,
    )


def unlike(reference: TensorLeaf, candidate: TensorLeaf) -> Iterator[str]:
    """Says where a side held a tensor of another kind than the other's, or another part of one."""
    leaves = reference, candidate
    originals = reference.original, candidate.original
    names = [original and original.class_name for original in originals]
    if names[0] != names[1]:
        sides = zip(("reference", "candidate"), originals, strict=True)
        yield ", ".join(_once(original, side) for side, original in sides if original)
    if reference.added != candidate.added:
        whole, added = "whole", "what a step added after the first {}"
        parts = [added.format(leaf.added.after) if leaf.added else whole for leaf in leaves]
        yield f"{parts[0]} in the reference, {parts[1]} in the candidate"


def _once(original: Original, side: str) -> str:
    how = "dequantized" if original.placement is None else "the part that one process holds"
    return f"{original.class_name} in the {side}, {how}"


def _not_comparable(status: Status, why: str, reason: str | None) -> Outcome:
    return Outcome(status, reason, undefined=dict.fromkeys(METRICS, why))


def shapes_differ(
    reference: TensorLeaf, candidate: TensorLeaf, stored: tuple[Array, Array] | None = None
) -> Outcome:
    shapes, how = (reference.shape, candidate.shape), ""
    if stored is not None and shapes[0] == shapes[1]:
        shapes, how = (stored[0].shape, stored[1].shape), "stored as "
    reason = f"{how}{list(shapes[0])} against {list(shapes[1])}"
    return _not_comparable("shape", SHAPES_DIFFER, reason)


def routing_differs(routed: Routed) -> Outcome:
    return _not_comparable("routing", ROUTING_DIFFERS, routed.text)


def structure_differs(reference: Node | None, candidate: Node | None) -> Outcome:
    if candidate is None:
        reason = "only in the reference"
    elif reference is None:
        reason = "only in the candidate"
    else:
        reason = f"{described(reference)} against {described(candidate)}"
    return _not_comparable("structure", STRUCTURE_DIFFERS, reason)


def failed(reference: str, candidate: str) -> Outcome:
    """Of what became of a call that has no output on either side."""
    if reference == candidate:
        return _not_comparable("opaque", NOT_STORED, f"{reference}{ON_BOTH_SIDES}")
    reason = f"{reference} in the reference, {candidate} in the candidate"
    return _not_comparable("structure", STRUCTURE_DIFFERS, reason)


def private(reference: OpaqueLeaf | ValueLeaf, candidate: OpaqueLeaf | ValueLeaf) -> Outcome:
    """Of plain values of which one side at least is known by its keyed digest alone."""
    one, other = (
        leaf.digest if isinstance(leaf, OpaqueLeaf) else None for leaf in (reference, candidate)
    )
    if one is None or other is None or not same_key(one, other):
        side = "reference" if other is None else "candidate"
        how = "under two keys" if one and other else f"in the {side}"
        return _not_comparable("opaque", NOT_STORED, f"a {reference.class_name}, private {how}")
    equal = one == other
    reason = None if equal else f"a {reference.class_name} differs, which is private"
    return _plain(equal, None, None, reason=reason)


def opaque(reference: OpaqueLeaf, candidate: OpaqueLeaf) -> Outcome:
    one, other = reference.class_name, candidate.class_name
    if one == other:
        outcome = _not_comparable("opaque", NOT_STORED, f"an object of type {one}")
    else:
        outcome = _not_comparable("opaque", TYPES_DIFFER, f"types differ: {one} against {other}")
    return replace(outcome, unseen=True)


def caches(reference: Container, candidate: Container) -> Outcome:
    """By class and length; their tensors have rows of their own where both sides stored them."""
    if reference.class_name != candidate.class_name:
        return structure_differs(reference, candidate)
    lengths = [cache.length for cache in (reference, candidate)]
    reason = None if lengths[0] == lengths[1] else f"length {lengths[0]} against {lengths[1]}"
    if bool(reference.items) != bool(candidate.items):
        side = "reference" if reference.items else "candidate"
        reason = "; ".join(filter(None, (reason, f"tensors stored only in the {side}")))
    unseen = any(cache.length != 0 and not cache.items for cache in (reference, candidate))
    if unseen and reason is None:
        reason = "by class and length, its tensors were not stored"
    return replace(_plain(lengths[0] == lengths[1], *lengths, reason=reason), unseen=unseen)


def values(reference: ValueLeaf, candidate: ValueLeaf, *, listed: bool) -> Outcome:
    """`listed`: they are elements of a list of numbers, which are shown no more than a tensor's."""
    equal = equal_values(reference, candidate)
    if listed and not equal:
        outcome = _plain(equal, reference.value, candidate.value, reason="an element differs")
        return replace(outcome, peak=None)
    reason = None if equal else f"{_shown(reference)} against {_shown(candidate)}"
    return _plain(equal, reference.value, candidate.value, reason=reason)


def _plain(
    equal: bool, reference: PlainValue, candidate: PlainValue, *, reason: str | None
) -> Outcome:
    undefined = dict.fromkeys(METRICS, PLAIN_VALUE)
    del undefined["mismatches"]
    error = peak = None
    if _is_number(reference) and _is_number(candidate):
        error = _absolute_difference(reference, candidate)
        if error is not None:
            del undefined["max_abs_error"]
            peak = None if equal else Peak((), reference, candidate)
    metrics = Metrics(max_abs_error=error, mismatches=int(not equal))
    return Outcome("exact" if equal else "mismatch", reason, metrics, undefined, peak)


def equal_values(reference: ValueLeaf, candidate: ValueLeaf) -> bool:
    one, other = reference.value, candidate.value
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    same_type = reference.class_name == candidate.class_name
    return one == other and (same_type or not isinstance(one, str))


def _absolute_difference(reference: float, candidate: float) -> float | int | None:
    """None where JSON cannot say it."""
    try:
        error = abs(reference - candidate)
        return error if math.isfinite(error) else None
    except OverflowError:  # an integer beyond every float
        return None


def _is_number(value: PlainValue) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(leaf: ValueLeaf) -> str:
    if leaf.value is None:
        return "None"
    return str(leaf.value) if leaf.class_name in _HARMLESS else f"a {leaf.class_name}"
