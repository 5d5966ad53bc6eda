"""Where error comes in: calls and gaps between calls that give more noise than they received.

A call without calls of its own errs when its output is noisier than its inputs. One with calls of
its own is these calls and what happens between them: an input of a call is bounded by the noisiest
of what its parent received and what the calls before it in the same parent gave, and so is the
parent's output by all of them. More than that came in between: by a functional operation, a
residual add, an edit in place, or an input of the parent that differs in kind.

What is usual is told by a floor, or else by the run's own places of the same kind.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qvtrace.comparison.noise import CallKey, CallNoise, added, decibels, differs_in_kind
from qvtrace.comparison.noise_levels import LEAST_EXCESS, Excess, FloorLevels, OwnLevels
from qvtrace.comparison.noise_steps import Step, steps_of
from qvtrace.comparison.rows import Row


@dataclass(frozen=True)
class Origin:
    """A call that errs, or the input that makes it err. Noise is a ratio of powers."""

    module: str
    call: int
    path: str  # `output`, or the place of an input that differs in kind
    noise_in: float | None
    noise_out: float | None
    added: float | None
    evidence: Literal["local", "in-out"]
    reason: str


@dataclass(frozen=True)
class Origins:
    """The places where error comes in, most important first."""

    found: tuple[Origin, ...] = ()
    noises: tuple[str, ...] = ()  # of each, what came in and what shows, in words
    level: str | None = None  # what is usual, in words; None: nothing is noisy at all
    known: bool = True  # False where of no call it is known what came in
    local: float | None = None  # noise of all replayed calls together; None: nothing was replayed


@dataclass(frozen=True)
class Floor:
    """The noise of the calls of a run that differs from the reference by noise alone."""

    calls: Sequence[CallNoise]
    file: str


def find_origins(
    calls: Sequence[CallNoise],
    rounding: float,
    *,
    narrowed: bool = False,
    floor: Floor | None = None,
    quantized: Collection[str] = (),
) -> Origins:
    """The origins among all calls of the reference that have rows, in order of execution.

    `rounding` is the noise of mere rounding; `narrowed`: calls were left out on purpose;
    `quantized`: modules that are known to be, by the reference's names. A call of which inputs or
    outputs are not known is neither blamed nor taken for clean.
    """
    steps = list(steps_of(calls, narrowed=narrowed))
    own = OwnLevels(steps, rounding, quantized)
    levels: OwnLevels | FloorLevels = own
    if floor is not None:
        of_floor = list(steps_of(floor.calls, narrowed=narrowed))
        levels = FloorLevels(steps, of_floor, own, file=floor.file)
    called = {call.key: call for call in calls}
    excesses = [(levels.excess(step), step) for step in steps]
    broken = [found for found in excesses if found[1].breaks]
    noisy = [
        found
        for found in excesses
        if found[0].is_told
        and not found[1].breaks
        and not _follows_a_choice(found[1].call)
        and not _is_undone(found[1], called, LEAST_EXCESS * rounding)
    ]
    told = _by_place([*broken[:1], *_most_important_first(noisy)])
    is_noisy = bool(told) or any(step.noise_out for step in steps)
    local = [step.noise_out or 0.0 for step in steps if step.is_local]
    return Origins(
        tuple(origin for origin, _ in told),
        tuple(noise for _, noise in told),
        levels.text if is_noisy else None,
        known=any(step.noise_in is not None for step in steps),
        local=sum(local) if local else None,
    )


_Told: TypeAlias = tuple[Excess, Step]


def _most_important_first(told: Sequence[_Told]) -> list[_Told]:
    """Noise that may be that of quantization comes behind what is larger."""
    largest = max((step.noise_out or 0.0 for _, step in told), default=0.0)

    def importance(one: _Told) -> tuple[bool, int, float]:
        excess, step = one
        is_likely = not excess.may_be_usual or (step.noise_out or 0.0) >= largest
        return is_likely, excess.rank, excess.ratio

    return sorted(told, key=importance, reverse=True)


def _by_place(told: Iterable[_Told]) -> list[tuple[Origin, str]]:
    """Each input that differs in kind once, whatever it does in the call: the most important."""
    found: dict[tuple[object, ...], tuple[Origin, str]] = {}
    for excess, step in told:
        origin = _origin(step, excess)
        own = () if origin.path != "output" else (origin.reason,)
        place = "output" if origin.path != "output" else step.after.removeprefix("the ")
        noises = _noises(origin, place or "output", excess.clean)
        found.setdefault((origin.module, origin.call, origin.path, *own), (origin, noises))
    return list(found.values())


def _noises(origin: Origin, place: str, clean: float) -> str:
    parts = []
    if origin.noise_in is not None:
        agree = "agree to" if origin.noise_in <= clean else "differ by"
        noise = f"inputs {agree} {decibels(origin.noise_in)}"
        parts.append(noise if origin.noise_in else "inputs agree")
    if origin.noise_out is not None:
        parts.append(f"{place} {decibels(origin.noise_out)}")
    return ", ".join(parts) or "noise not known"


def _origin(step: Step, excess: Excess) -> Origin:
    call = step.call
    evidence: Literal["local", "in-out"] = "local" if step.is_local else "in-out"
    noises = step.noise_in, step.noise_out
    differing = _differing(call.inputs)
    if differing is None:
        reason = _reason(step, excess)
        return Origin(call.module, call.call, "output", *noises, step.added, evidence, reason)
    if None not in (call.noise_in, call.noise_out) and not step.is_local:
        noises = call.noise_in, call.noise_out  # all of the call follows from it
    reason = f"{differing.path} {_how_it_differs(differing)}"
    came_in, came_out = noises
    more = None if came_in is None or came_out is None else added(came_in, came_out)
    return Origin(call.module, call.call, differing.path, *noises, more, evidence, reason)


def _reason(step: Step, excess: Excess) -> str:
    if step.breaks:
        return f"{step.breaks} in {step.after or 'the output'}, none in {step.before}"
    if step.after and (step.noise_in or 0.0) <= excess.clean:
        reason = f"{step.before} agree, {step.after} does not: it comes in between"
    elif step.after:
        reason = f"{step.after} differs by more than {step.before}: it comes in between"
    elif step.is_local:
        reason = "its output differs when it is given the reference's inputs"
    else:
        reason = "its output differs by more than its inputs"
    if excess.above_floor is None:
        return reason
    came_in, came_out = excess.above_floor
    return f"{reason} ({came_out:.2g} dB above the floor, what came in {max(came_in, 0.0):.2g} dB)"


def _is_undone(step: Step, called: Mapping[CallKey, CallNoise], nothing: float) -> bool:
    """Whether nothing of the noise is left in what the nearest call around it gives: channels in
    another order, say, that the next weights expect in that order."""
    if _differing(step.call.inputs) is not None:
        return False
    holder = step.call
    if step.after in ("", "the output"):
        parent = None if step.call.parent is None else called.get(step.call.parent)
        if parent is None:
            return False
        holder = parent
    return holder.noise_out is not None and holder.noise_out <= nothing


def _follows_a_choice(call: CallNoise) -> bool:
    """Whether an earlier call chose otherwise for it, as a router does whose numbers are noisy:
    then the noise is what follows of that."""
    given = (row.same_as for row in call.inputs if row.status == "mismatch")
    return any(place is not None and place.path.partition(".")[0] == "output" for place in given)


def _differing(inputs: Iterable[Row]) -> Row | None:
    """The first input that no noise can be told of, since it is something else."""
    return next((row for row in inputs if row.status == "mismatch" or differs_in_kind(row)), None)


def _how_it_differs(row: Row) -> str:
    if row.status == "mismatch" and row.shape[0] is not None:
        count, all_of_them = row.metrics.mismatches, math.prod(row.shape[0])
        return f"holds other values: {count} of {all_of_them} elements differ"
    reasons = [] if row.reason is None else [row.reason]
    if None not in row.dtype and (row.dtype[0], row.shape[0]) != (row.dtype[1], row.shape[1]):
        reasons = [f"{_form(row, 0)} against {_form(row, 1)}"]
    if row.nonfinite is not None and row.nonfinite.sentinel_mismatches:
        reasons.append(f"masked on one side only: {row.nonfinite.sentinel_mismatches} elements")
    return f"differs in kind: {', '.join(reasons)}"


def _form(row: Row, side: Literal[0, 1]) -> str:
    return f"{row.dtype[side]} {list(row.shape[side] or ())}"
