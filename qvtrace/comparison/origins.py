"""The places where error comes in, as they are told: the call or the input that is named for each,
and why, in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qvtrace.comparison.additions import Addition
from qvtrace.comparison.causes import (
    as_handed_on,
    bringing_of,
    cause_of,
    dtypes_text,
    edit_text,
    how_it_differs,
    named,
)
from qvtrace.comparison.noise import (
    CallKey,
    CallNoise,
    added,
    calls_around,
    decibels,
    noise,
    other_values,
)
from qvtrace.comparison.noise_levels import LEAST_EXCESS, Excess
from qvtrace.comparison.noise_steps import Edit, Step, showing
from qvtrace.comparison.replayed_blocks import Told
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.surroundings import Judgement
from qvtrace.patterns import shown

_AGREEMENT = 1e-3  # a ratio of powers, -30 dB
# Reasons that say no more than noise in and noise out do.
ADDS = "its output differs by more than its inputs"
ERRS = "its output differs when it is given the reference's inputs"


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
    # Of each, the noise that is known to come in there, as the model's output has it; 0: none is.
    alone: tuple[float, ...] = ()
    level: str | None = None  # what is usual, in words; None: nothing is noisy at all
    known: bool = True  # False where of no call it is known what came in
    # The same of all places, told or not, together; None: nothing was replayed.
    local: float | None = None
    quantized: bool = False  # whether of any module it is known that it is
    before: Origin | None = None  # which is no place: what comes in there was made by calls unknown
    # Factors that were judged to be made up for and are not, by the first place of what is scaled:
    # the origins are to be found anew with these judgements.
    refuted: Mapping[Place, Judgement] = field(default_factory=dict)


@dataclass(frozen=True)
class Named:
    """An origin, its noises in words, and the place that it was seen at."""

    origin: Origin
    noises: str
    step: Step


def named_once(
    told: Sequence[Told], called: Mapping[CallKey, CallNoise], rounding: float
) -> list[Named]:
    """Each input that differs in kind or is edited once, whatever follows: the most important."""
    found: dict[tuple[object, ...], Named] = {}
    behind: dict[Edit, bool] = {}  # told so far, and whether by what shows afterwards
    erring = _with_those_around([_erring(step, rounding) for _, step in told], called)
    for excess, step in told:
        agree = (step.noise_in or 0.0) <= excess.clean and erring.isdisjoint(step.calls_before)
        origin = _origin(step, excess, rounding, called)
        own = () if origin.path != "output" else (origin.reason,)
        noises = _noises(origin, _place(step, origin), step.breaks, agree=agree)
        if step.source:
            noises = inputs_text(origin, step.breaks)
        key = origin.module, origin.call, origin.path, *own
        edit = step.edit
        if edit is not None:
            is_behind = edit.call != step.call.key
            if behind.get(edit, is_behind) != is_behind:
                continue
            behind.setdefault(edit, is_behind)
        found.setdefault(key, Named(origin, noises, step))
    return _each_module_first(found.values())


def _each_module_first(found: Iterable[Named]) -> list[Named]:
    """Further calls of modules, as steps of a generation are, behind the first one of each."""
    met: set[tuple[str, str]] = set()
    first, further = list[Named](), list[Named]()
    for one in found:
        key = one.origin.module, one.origin.path
        (further if key in met else first).append(one)
        met.add(key)
    return [*first, *further]


def _place(step: Step, origin: Origin) -> str:
    """Where noise shows, in words."""
    edit = step.edit
    after = step.after.removeprefix("the ") or "output"
    if edit is not None and edit.call != step.call.key and after == "output":
        return f"output of {shown(step.call.module)}"
    return "output" if origin.path != "output" and edit is None else after


def _erring(step: Step, rounding: float) -> CallKey:
    """The call that is named for a place."""
    cause = cause_of(step, _agreed(step, rounding))
    return step.call.key if cause is None else cause.call


def _with_those_around(
    keys: Iterable[CallKey], called: Mapping[CallKey, CallNoise]
) -> set[CallKey]:
    found = set(keys)
    for call in [called[key] for key in found if key in called]:
        found.update(above.key for above in calls_around(call, called))
    return found


def unrecorded_origin(step: Step) -> Origin:
    noisiest = max(step.call.inputs, key=lambda row: noise(row) or 0.0)
    noises = step.noise_in if step.before else None, None if step.breaks else step.noise_out
    reason = f"comes in before it, in {step.source}"
    more = step.added if None not in noises else None
    return Origin(*step.call.key, noisiest.path, *noises, more, "in-out", reason)


def _origin(
    step: Step, excess: Excess, rounding: float, called: Mapping[CallKey, CallNoise]
) -> Origin:
    if step.source:
        return unrecorded_origin(step)
    evidence: Literal["local", "in-out"] = "local" if step.is_local else "in-out"
    noises = step.noise_in, None if step.breaks else step.noise_out
    agreed = _agreed(step, rounding)
    cause = cause_of(step, agreed)
    if cause is None:
        call, path, reason = step.call, "output", _reason(step, excess, agreed)
        more = step.added if excess.on_top is None else excess.on_top.noise
        more = None if step.breaks else more
        return Origin(call.module, call.call, path, *noises, more, evidence, reason)
    came_in, came_out = cause.noises
    if came_out is not None and not step.is_local:
        noises = cause.noises  # all of the call follows from it
    more = None if came_in is None or came_out is None else added(came_in, came_out)
    cause = as_handed_on(cause, called)
    module, index = cause.call
    return Origin(module, index, cause.path, *noises, more, evidence, cause.reason)


def inputs_text(origin: Origin, breaks: str = "") -> str:
    """What shows in the inputs of a call, in words."""
    if breaks:
        return f"{breaks} in its inputs"
    return f"its inputs differ by {decibels(origin.noise_out or 0.0)}"


def _noises(origin: Origin, place: str, breaks: str, *, agree: bool) -> str:
    parts = []
    if origin.noise_in is not None:
        parts.append(f"inputs {_came_in(origin.noise_in, agree=agree)}")
    if breaks:
        parts.append(f"{breaks} in the {place}")
    elif origin.noise_out is not None:
        parts.append(f"{place} {decibels(origin.noise_out)}")
    return ", ".join(parts) or "noise not known"


def _came_in(noise_in: float, *, agree: bool) -> str:
    """What is usual may be more than anybody would call agreement."""
    if not noise_in:
        return "agree"
    if not agree:
        return f"differ by {decibels(noise_in)}"
    how = "agree to" if noise_in <= _AGREEMENT else "as usual at"
    return f"{how} {decibels(noise_in)}"


def _agreed(step: Step, rounding: float) -> float:
    """The noise up to which inputs agree, where so much came in."""
    return LEAST_EXCESS * max(step.noise_in or 0.0, rounding)


def _reason(step: Step, excess: Excess, agreed: float) -> str:
    after = f"{step.after}{_brought_by(step, agreed)}"
    if step.breaks:
        return f"{step.breaks} in {after or 'the output'}, none in {step.before}"
    if step.in_few is not None:
        came_in, came_out = map(decibels, step.in_few)
        reason = f"in few tokens, its output differs by {came_out}, its inputs by {came_in}"
        reason += _sample_of(showing(step))
    elif excess.on_top is not None:
        reason = f"{after} has {_on_top(step.call, excess.on_top)}: it comes in between"
    elif step.after:
        reason = f"comes in between {step.before} and {after}"
    elif step.noise_out is None and (values := other_values(step.call.outputs)) is not None:
        reason = f"{values.path} {how_it_differs(values)}, of the same inputs"
    else:
        reason = ERRS if step.is_local else ADDS
    reason += _dtypes(step)
    if step.edit is not None:
        reason += f", besides {edit_text(step.edit)}"
    if excess.above_floor is None:
        return reason
    over_in, over_out = excess.above_floor
    return f"{reason}, {over_out:.2g} dB above the floor, what came in {max(over_in, 0.0):.2g} dB"


def _sample_of(rows: Iterable[Row]) -> str:
    """The sample of the worst token, where there are several."""
    found = (row.samples.token for row in rows if row.samples is not None)
    sample = next((sample for sample in found if sample is not None), None)
    return "" if sample is None else f", most in sample {sample}"


def _on_top(parent: CallNoise, addition: Addition) -> str:
    """What is there beside what was there, in words."""
    joint = " times " if addition.operation == "product" else " and "
    parts = joint.join(_part(parent, part) for part in addition.parts)
    return f"noise of {decibels(addition.noise)} beside {parts}"


def _part(parent: CallNoise, part: Place) -> str:
    if part.module == parent.module:
        return part.path
    name = shown(part.module.removeprefix(f"{parent.module}."))
    return f"the output of {name}" if part.path.startswith("output") else f"what {name} is given"


def _brought_by(step: Step, agreed: float) -> str:
    """Which of several inputs it is."""
    bringing = bringing_of(step, agreed)
    if step.taker is None or not bringing or len(step.taker.inputs) == 1:
        return ""
    return f" ({named(bringing)})"


def _dtypes(step: Step) -> str:
    if not step.recast:
        return ""
    which = "it" if step.after else "its output"
    calls = "call" if step.recast_after == 1 else "calls"
    more = f", as those of {step.recast_after} {calls} after it are" if step.recast_after else ""
    return f", {which} is {dtypes_text(step.recast)}{more}"
