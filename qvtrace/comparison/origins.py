"""Where error comes in: calls and gaps between calls that give more noise than they received.

A call without calls of its own errs when its output is noisier than its inputs. One with calls of
its own is these calls and what happens between them: an input of a call is bounded by the noisiest
of what its parent received and what the calls before it in the same parent gave, and so is the
parent's output by all of them. More than that came in between: by a functional operation, a
residual add, an edit in place, or an input of the parent that differs in kind.

What is usual is judged by the run's own places of the same kind: the same name but for the numbers
in it, or where there are too few of these, the same class.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from qvtrace.comparison.noise import CallKey, CallNoise, added
from qvtrace.comparison.rows import Row
from qvtrace.patterns import shown

LEAST_EXCESS = 10.0**0.6  # a ratio of powers: 6 dB more than what came in and is usually added
_ENOUGH_ALIKE = 3  # places of one kind that tell what is usual
_REPLAYED = " replayed"  # are of a kind of their own
_TINY = 1e-30  # less noise than that of any dtype: keeps ratios finite


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
    level: float | None = None  # usual noise, a ratio of powers; None: nothing is noisy at all
    local: float | None = None  # noise of all replayed calls together; None: nothing was replayed


@dataclass(frozen=True)
class _Step:
    """One place where noise can come in: a call without calls of its own, or a gap in one."""

    call: CallNoise  # that errs
    before: str  # what gave the noise that comes in, in words
    after: str  # where it shows, in words; empty for the call's own output
    noise_in: float | None
    noise_out: float | None
    new_nan: bool  # NaN that was not there before
    is_local: bool  # seen in a replay, into which no noise came
    kind: str
    class_name: str

    @property
    def added(self) -> float | None:
        """Noise beyond what came in; None where that is not known."""
        if self.noise_in is None or self.noise_out is None:
            return None
        return added(self.noise_in, self.noise_out)


def find_origins(calls: Sequence[CallNoise], floor: float, *, narrowed: bool = False) -> Origins:
    """The origins among all calls of the reference that have rows, in order of execution.

    `floor` is the noise of mere rounding; `narrowed`: calls were left out on purpose. A call of
    which inputs or outputs are not known is neither blamed nor taken for clean.
    """
    steps = list(_steps(calls, narrowed=narrowed))
    levels = _Levels(steps, floor)
    broken = [step for step in steps if step.new_nan]
    excesses = [(levels.excess(step), step) for step in steps if not step.new_nan]
    noisy = sorted(
        ((excess, step) for excess, step in excesses if excess >= LEAST_EXCESS),
        key=lambda pair: pair[0],
        reverse=True,
    )
    found = [_origin(step) for step in (*broken[:1], *(step for _, step in noisy))]
    is_noisy = bool(found) or any(step.noise_out for step in steps)
    local = [step.noise_out or 0.0 for step in steps if step.is_local]
    return Origins(tuple(found), levels.usual if is_noisy else None, sum(local) if local else None)


def _steps(calls: Sequence[CallNoise], *, narrowed: bool) -> Iterator[_Step]:
    children: dict[CallKey | None, list[CallNoise]] = defaultdict(list)
    for call in calls:
        children[call.parent].append(call)
    for call in calls:
        known = children.get(call.key, ())
        if known and not (narrowed and len(known) < call.held):
            yield from _gaps(call, known)
        else:
            yield _own_step(call)


def _own_step(call: CallNoise) -> _Step:
    is_local = call.local is not None
    return _Step(
        call,
        "its inputs",
        "",
        0.0 if is_local else call.noise_in,
        call.local if is_local else call.noise_out,
        _has_new_nan(call.outputs) and not _has_new_nan(call.inputs),
        is_local,
        f"{_kind(call.module)}{_REPLAYED * is_local}",
        f"{_class_name(call)}{_REPLAYED * is_local}",
    )


def _gaps(parent: CallNoise, children: Sequence[CallNoise]) -> Iterator[_Step]:
    """Between what a parent received, the calls in it, and what it gave."""
    bound = parent.noise_in
    has_nan = _has_new_nan(parent.inputs)
    before = ["the inputs"]
    last = parent.module
    for child in children:
        after = f"the input of {_inner(parent, child)}"
        nan = _has_new_nan(child.inputs) and not has_nan
        kind = f"{_kind(last)} > {_kind(child.module)}"
        noises = bound, child.noise_in
        yield _Step(parent, _joined(before), after, *noises, nan, False, kind, kind)
        # Noise that has been told of is no news further on.
        for noise in (child.noise_in, child.noise_out):
            bound = None if bound is None or noise is None else max(bound, noise)
        has_nan = has_nan or _has_new_nan(child.inputs) or _has_new_nan(child.outputs)
        before.append(_inner(parent, child))
        last = child.module
    nan = _has_new_nan(parent.outputs) and not has_nan
    kind = f"{_kind(last)} > output of {_kind(parent.module)}"
    noises = bound, parent.noise_out
    yield _Step(parent, _joined(before), "the output", *noises, nan, False, kind, kind)


class _Levels:
    """How much noise is usual for each kind of place."""

    def __init__(self, steps: Sequence[_Step], floor: float) -> None:
        self._floor = floor
        self._by_kind: dict[str, list[float]] = defaultdict(list)
        self._by_class: dict[str, list[float]] = defaultdict(list)
        for step in steps:
            if step.noise_in is not None and step.noise_out is not None:
                self._by_kind[step.kind].append(step.noise_out)
                self._by_class[step.class_name].append(step.noise_out)
        local = sorted(step.noise_out or 0.0 for step in steps if step.is_local)
        # For a class of one: most modules are not quantized, and have no noise of their own.
        self._local = local[len(local) * 3 // 4] if local else 0.0
        kinds = sorted(map(_usual, self._by_kind.values()))
        self.usual = max(floor, kinds[len(kinds) // 2]) if kinds else floor

    def excess(self, step: _Step) -> float:
        """Noise out over the noise that came in and is usually added; 0 where it is not known."""
        if step.noise_in is None or step.noise_out is None:
            return 0.0
        alike = self._by_kind[step.kind]
        if step.is_local:  # nothing was handed on, so that a class tells as much as a kind
            same_class = self._by_class[step.class_name]
            level = max(median(alike), median(same_class)) if len(same_class) > 1 else self._local
            return (step.noise_out + self._floor) / max(level, self._floor, _TINY)
        if len(alike) < _ENOUGH_ALIKE:
            alike = self._by_class[step.class_name]
        level = max(self._floor, _usual(alike) if len(alike) > 1 else 0.0, _TINY)
        return (step.noise_out + level) / (step.noise_in + level)


def _usual(noises: Sequence[float]) -> float:
    """The lower quartile: behind a fault, most places hand on and amplify what they received."""
    return sorted(noises)[(len(noises) - 1) // 4]


def _origin(step: _Step) -> Origin:
    call = step.call
    differing = _differing(call.inputs)
    if step.new_nan:
        reason = f"NaN in {step.after or 'the output'}, none in {step.before}"
    elif step.after:
        reason = f"{step.before} agree, {step.after} does not: it comes in between"
    elif step.is_local:
        reason = "its output differs when it is given the reference's inputs"
    else:
        reason = "its output differs by more than its inputs"
    if differing is not None:
        reason = f"{differing.path} differs in kind: {differing.reason or _shapes(differing)}"
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


def _differing(inputs: Iterable[Row]) -> Row | None:
    """The first input that no noise can be told of, since it is something else."""
    for row in inputs:
        if row.status in ("structure", "mismatch", "shape"):
            return row
        if row.status == "nonfinite" and row.nonfinite and row.nonfinite.sentinel_mismatches:
            return row
    return None


def _shapes(row: Row) -> str:
    return f"{row.dtype[0]} {row.shape[0]} against {row.dtype[1]} {row.shape[1]}"


def _has_new_nan(rows: Iterable[Row]) -> bool:
    return any(row.nonfinite is not None and row.nonfinite.new_nan for row in rows)


def _kind(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _class_name(call: CallNoise) -> str:
    return (call.outputs or call.inputs)[0].type[0]


def _inner(parent: CallNoise, child: CallNoise) -> str:
    """The child's name within the parent."""
    return shown(child.module.removeprefix(f"{parent.module}."))


def _joined(names: Sequence[str]) -> str:
    shown_names = names if len(names) <= 4 else (names[0], "...", *names[-2:])
    return ", ".join(shown_names)
