"""The inputs that bring error into a call.

They are something else on the two sides, or hold other values where all that came before agrees.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qvtrace.comparison.noise import (
    CallKey,
    CallNoise,
    calls_around,
    decibels,
    first_in_kind,
    noise,
)
from qvtrace.comparison.noise_steps import Edit, Step, argument, breaks
from qvtrace.comparison.rows import Row
from qvtrace.metrics.names import Undefined

_NAMED = 3


@dataclass(frozen=True)
class Cause:
    """An input that makes a call err, and what its call was given besides and gave; of one that is
    edited in place, what shows afterwards."""

    call: CallKey
    path: str
    reason: str
    noises: tuple[float | None, float | None]


def cause_of(step: Step, agreed: float) -> Cause | None:
    """The input that brings what shows at a place; None where no input alone does.

    `agreed` is the noise up to which inputs agree.
    """
    call = step.call
    differing = first_in_kind(call.inputs)
    if differing is not None:
        reason = f"{differing.path} {how_it_differs(differing)}"
        return Cause(call.key, differing.path, reason, (call.noise_in, call.noise_out))
    edit = step.edit
    if edit is not None and edit.call != call.key:
        noises = step.noise_in, step.noise_out
        return Cause(edit.call, edit.path, edit_text(edit).removeprefix("it "), noises)
    bringing = bringing_of(step, agreed)
    if step.taker is None or not bringing:
        return None
    recast = [row for row in bringing if any(row is other for other in step.recast)]
    if recast and not step.breaks:
        bringing, verb = recast, "differs" if len(recast) == 1 else "differ"
        reason = f"{named(recast)} {verb} in kind: {dtypes_text(recast)}"
    elif _is_beside_the_first(bringing, step.taker.inputs):
        reason = _other_values(bringing, step)
    else:
        return None
    noises = step.noise_in, step.taker.noise_out
    return Cause(step.taker.key, bringing[0].path, reason, noises)


def as_handed_on(cause: Cause, called: Mapping[CallKey, CallNoise]) -> Cause:
    """The same, named where it comes from: a call without calls of its own may have it handed on
    from the one around it. Of what the model itself is given, that one is told which takes it."""
    taker = called.get(cause.call)
    if taker is None or taker.held or first_in_kind(taker.inputs) is None:
        return cause
    contents = {row.path: row.first_place for row in taker.inputs}.get(cause.path)
    found = cause
    for call in calls_around(taker, called):
        same = [row.path for row in call.inputs if row.first_place == contents]
        if not same:
            break
        if not call.module:
            return cause
        reason = cause.reason.replace(cause.path, same[0], 1)
        found = replace(cause, call=call.key, path=same[0], reason=reason)
    return found


def edit_text(edit: Edit) -> str:
    """An edit in words."""
    if edit.by_reference:
        return f"the reference edits {edit.path} in place, the candidate does not"
    return f"it edits {edit.path} in place, which the reference does not"


def bringing_of(step: Step, agreed: float) -> list[Row]:
    """The inputs that a call within receives and that bring what shows there."""
    if step.taker is None or step.is_own_cast:
        return []
    if step.breaks:
        return [row for row in step.taker.inputs if breaks(row)]
    return [row for row in step.taker.inputs if (noise(row) or 0.0) > agreed]


def dtypes_text(recast: Sequence[Row]) -> str:
    """The dtypes of what is of another float dtype in the candidate."""
    reference, candidate = recast[0].dtype
    return f"{candidate} against {reference} in the reference"


def _is_beside_the_first(bringing: Sequence[Row], inputs: Sequence[Row]) -> bool:
    """Whether what a call works on, its first argument, brings nothing: that comes from the calls
    before, by additions and the like, where others are handed on as they are."""
    return argument(inputs[0]) not in map(argument, bringing)


def _other_values(rows: Sequence[Row], step: Step) -> str:
    verb = "holds" if len(rows) == 1 else "hold"
    beside = "nothing else that comes in does"
    if step.breaks:
        return f"{named(rows)} {verb} {step.breaks}, {beside}"
    sizes = ", ".join(decibels(noise(row) or 0.0) for row in rows[:_NAMED])
    if step.noise_in:
        beside = "all else that comes in is closer"
    return f"{named(rows)} {verb} other values ({sizes}), {beside}"


def named(rows: Sequence[Row]) -> str:
    """The paths of rows of one call, in words."""
    paths = [row.path for row in rows]
    if len(paths) > _NAMED:
        paths[_NAMED - 1 :] = [f"{len(paths) - _NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(paths[:-1]), paths[-1])))


def how_it_differs(row: Row) -> str:
    """What tells a row apart that is something else on the two sides, in words."""
    if row.status == "mismatch" and row.shape[0] is not None:
        count, all_of_them = row.metrics.mismatches, math.prod(row.shape[0])
        return f"holds other values: {count} of {all_of_them} elements differ"
    if row.undefined.get("sqnr") == Undefined.ZERO_REFERENCE and row.status == "ok":
        error = row.metrics.max_abs_error
        return f"holds other values: up to {error:.3g} where the reference's are zero"
    reasons = [] if row.reason is None else [row.reason]
    if None not in row.dtype and (row.dtype[0], row.shape[0]) != (row.dtype[1], row.shape[1]):
        reasons = [f"{_form(row, 0)} against {_form(row, 1)}"]
    if row.nonfinite is not None and row.nonfinite.sentinel_mismatches:
        reasons.append(f"masked on one side only: {row.nonfinite.sentinel_mismatches} elements")
    return f"differs in kind: {', '.join(reasons)}"


def _form(row: Row, side: Literal[0, 1]) -> str:
    return f"{row.dtype[side]} {list(row.shape[side] or ())}"
