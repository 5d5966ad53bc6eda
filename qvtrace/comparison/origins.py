"""Where error comes in: calls and gaps between calls that give more noise than they received.

A call without calls of its own errs when its output is noisier than its inputs. One with calls of
its own is these calls and what happens between them: an input of a call is bounded by the noisiest
of what its parent received and what the calls before it in the same parent gave, and so is the
parent's output by all of them. More than that came in between: by a functional operation, a
residual add, an edit in place, or an input of the parent that differs in kind.

What is usual is told by a floor, or else by the run's own places of the same kind.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qvtrace.comparison.noise import CallNoise
from qvtrace.comparison.noise_levels import Excess, FloorLevels, OwnLevels
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
    clean: tuple[float, ...] = ()  # of each, the noise up to which its inputs agree
    level: str | None = None  # what is usual, in words; None: nothing is noisy at all
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
) -> Origins:
    """The origins among all calls of the reference that have rows, in order of execution.

    `rounding` is the noise of mere rounding; `narrowed`: calls were left out on purpose. A call of
    which inputs or outputs are not known is neither blamed nor taken for clean.
    """
    steps = list(steps_of(calls, narrowed=narrowed))
    levels: OwnLevels | FloorLevels = OwnLevels(steps, rounding)
    if floor is not None:
        of_floor = list(steps_of(floor.calls, narrowed=narrowed))
        levels = FloorLevels(steps, of_floor, rounding, file=floor.file)
    excesses = [(levels.excess(step), step) for step in steps]
    broken = [found for found in excesses if found[1].new_nan]
    noisy = sorted(
        (found for found in excesses if found[0].is_told and not found[1].new_nan),
        key=lambda found: found[0].importance,
        reverse=True,
    )
    told = [*broken[:1], *noisy]
    is_noisy = bool(told) or any(step.noise_out for step in steps)
    local = [step.noise_out or 0.0 for step in steps if step.is_local]
    return Origins(
        tuple(_origin(step, excess) for excess, step in told),
        tuple(excess.clean for excess, _ in told),
        levels.text if is_noisy else None,
        sum(local) if local else None,
    )


def _origin(step: Step, excess: Excess) -> Origin:
    call = step.call
    differing = _differing(call.inputs)
    reason = _reason(step, excess)
    if differing is not None:
        reason = f"{differing.path} {_how_it_differs(differing)}"
    return Origin(
        call.module,
        call.call,
        "output" if differing is None else differing.path,
        step.noise_in,
        step.noise_out,
        step.added,
        "local" if step.is_local else "in-out",
        reason,
    )


def _reason(step: Step, excess: Excess) -> str:
    if step.new_nan:
        return f"NaN in {step.after or 'the output'}, none in {step.before}"
    if step.after:
        reason = f"{step.before} agree, {step.after} does not: it comes in between"
    elif step.is_local:
        reason = "its output differs when it is given the reference's inputs"
    else:
        reason = "its output differs by more than its inputs"
    if excess.above_floor is None:
        return reason
    came_in, came_out = excess.above_floor
    return f"{reason} ({came_out:.2g} dB above the floor, what came in {max(came_in, 0.0):.2g} dB)"


def _differing(inputs: Iterable[Row]) -> Row | None:
    """The first input that no noise can be told of, since it is something else."""
    for row in inputs:
        if row.status in ("structure", "mismatch", "shape"):
            return row
        if row.status == "nonfinite" and row.nonfinite and row.nonfinite.sentinel_mismatches:
            return row
    return None


def _how_it_differs(row: Row) -> str:
    if row.reason is not None:
        return f"differs in kind: {row.reason}"
    if row.status == "mismatch" and row.shape[0] is not None:
        count, all_of_them = row.metrics.mismatches, math.prod(row.shape[0])
        return f"holds other values: {count} of {all_of_them} elements differ"
    shapes = f"{row.dtype[0]} {row.shape[0]} against {row.dtype[1]} {row.shape[1]}"
    return f"differs in kind: {shapes}"
