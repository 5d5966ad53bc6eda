"""Gates: thresholds that turn a comparison into an exit code, parsed, then judged over its rows."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Literal

from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.logits import Logits
from qvtrace.comparison.rows import COMPARED, Place, Row, Status
from qvtrace.errors import UsageError
from qvtrace.judging.end_to_end import END_TO_END, HIGHER_END_TO_END, doubt, end_to_end
from qvtrace.judging.measures import is_unjudged, measure, not_finite, size
from qvtrace.metrics.names import HIGHER_IS_BETTER, METRICS
from qvtrace.patterns import match

Operator = Literal[">", ">=", "<", "<="]

FINDINGS = ("nonfinite", "unmatched", "structure")  # gates without a number
ONLY_IN_REFERENCE = "only in the reference"
ONLY_IN_CANDIDATE = "only in the candidate"
_NUMBERED = (*METRICS, *END_TO_END)
_HIGHER_IS_BETTER = HIGHER_IS_BETTER | HIGHER_END_TO_END
_LOGITS = Place("", 0, "output.logits")

_CONDITION = re.compile(
    r"(?:(?P<worst>worst)\(\s*)?(?P<subject>[A-Za-z]\w*)(?(worst)\s*\))\s*"
    r"(?:(?P<operator>[<>]=?)\s*(?P<limit>\S+))?"
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FLIPPED = re.compile(r"(?P<limit>[^\s<>]+)\s*(?P<operator>[<>]=?)\s*(?P<subject>[A-Za-z]\w*)")
_MIRRORED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}


@dataclass(frozen=True)
class Gate:
    """What must not be: a metric beyond a limit, or a kind of finding."""

    text: str  # as it was given
    subject: str  # a metric, or one of `END_TO_END` or `FINDINGS`
    operator: Operator | None = None  # None for a finding
    limit: float = 0.0
    pattern: str | None = None  # on module names; None: all of them
    option: str = field(default="--fail-on", compare=False)  # where it was given, for errors
    of_worst_sample: bool = False  # where samples are pooled

    @classmethod
    def parse(cls, text: str, option: str = "--fail-on") -> "Gate":
        """From `METRIC OP NUMBER [@ PATTERN]`, with `worst(METRIC)` of the worst sample, or a
        finding in place of the condition.

        Raises `UsageError` for what is no gate, for a limit that is not finite, and for an operator
        that would let bad rows pass and fail good ones.
        """
        condition, at, pattern = (part.strip() for part in text.partition("@"))
        faulty = partial(_error, option, text)
        if at and not pattern:
            raise faulty("has no pattern after '@'; give one, or leave '@' out")
        parsed = _CONDITION.fullmatch(condition)
        if parsed is None:
            raise faulty(_why_no_condition(condition))
        subject, operator = parsed["subject"], _operator(parsed["operator"])
        if subject not in (*_NUMBERED, *FINDINGS):
            known = ", ".join((*_NUMBERED, *FINDINGS))
            raise faulty(f"{subject!r} is not known; choose one of {known}")
        if parsed["worst"] and subject not in METRICS:
            raise faulty(f"{subject} is of no sample; leave 'worst()' out")
        if subject in FINDINGS and operator is not None:
            raise faulty(f"{subject} takes no number; write {subject!r}")
        if subject in END_TO_END and pattern:
            raise faulty(f"{subject} is of the whole model; leave '@ {pattern}' out")
        if subject in _NUMBERED and operator is None:
            example = f"{condition}{_failing(subject)}0.05"
            raise faulty(f"has no limit; write one, such as '{example}'")
        if operator is not None and operator[0] != _failing(subject):
            raise faulty(_why_wrong_way(subject, operator))
        limit = 0.0 if operator is None else _limit(parsed["limit"], faulty)
        worst = parsed["worst"] is not None
        return cls(text.strip(), subject, operator, limit, pattern or None, option, worst)

    def excess(self, value: float | int) -> float:
        """How far a metric is beyond the limit; negative where it is on the good side of it."""
        higher = self.subject in _HIGHER_IS_BETTER
        return float(self.limit - value if higher else size(self.subject, value) - self.limit)

    def is_within(self, value: float | int) -> bool:
        """Whether a metric holds; NaN never does. `mean_error` counts by its absolute value."""
        excess = self.excess(value)
        return excess <= 0 if self.operator in (">", "<") else excess < 0


@dataclass(frozen=True)
class Finding:
    """One row, or one place that only one side has, under one gate."""

    place: Place
    status: str  # of the row; else `ONLY_IN_REFERENCE` or `ONLY_IN_CANDIDATE`
    ok: bool
    value: float | int | None = None  # of the metric
    excess: float | None = None  # beyond the limit, in the units of the metric
    reason: str | None = None  # why there is nothing to hold against the limit

    @property
    def badness(self) -> tuple[int, float]:
        """A key that sorts worst last: a failure without a number is worse than any number."""
        if self.excess is None or math.isnan(self.excess):
            return (-1 if self.ok else 2), 0.0
        return (0 if self.ok else 1), self.excess


@dataclass(frozen=True)
class GateResult:
    """What came of one gate."""

    gate: str
    subject: str
    ok: bool
    rows: int  # that it covers
    failures: tuple[Finding, ...] = ()  # worst first
    worst: Finding | None = None  # of all rows that have a number or fail
    unjudged: int = 0  # rows of objects of one type, which nobody could have stored
    note: str | None = None  # what no row says
    asides: tuple[str, ...] = ()  # what the numbers do not say: of how many rows nothing is told

    @property
    def is_applied(self) -> bool:
        """Whether there was anything to decide that an earlier gate has not decided."""
        return self.note is None or not self.ok

    @property
    def failed(self) -> int:
        """The number of rows that are not within."""
        return len(self.failures)


@dataclass(frozen=True)
class Scope:
    """What gates are judged over: all that was asked for, whatever of it is shown."""

    rows: Sequence[Row]
    only_in_reference: Sequence[Place] = ()
    only_in_candidate: Sequence[Place] = ()
    logits: Logits | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], coverage: Coverage, logits: Logits | None = None) -> "Scope":
        """Modules that only wrap a compared one are no further modules, on neither side."""
        wrappers = frozenset(coverage.wrappers)
        sides = coverage.only_in_reference, coverage.only_in_candidate
        ours, theirs = ([place for place in side if place.module not in wrappers] for side in sides)
        return cls(rows, ours, theirs, logits)

    def names(self, subject: str) -> set[str]:
        """The modules that a gate of this subject can be about."""
        names = {row.module for row in self.rows}
        names.update(place.module for place in self.only_in_reference)
        if subject == "unmatched":
            names.update(place.module for place in self.only_in_candidate)
        return names


def parse_gates(gates: Iterable[str | Gate]) -> tuple[Gate, ...]:
    """Those that are text, parsed; raises `UsageError`."""
    return tuple(gate if isinstance(gate, Gate) else Gate.parse(gate) for gate in gates)


def judge_gates(gates: Sequence[Gate], scope: Scope) -> tuple[GateResult, ...]:
    """Hold each gate against the rows in its pattern.

    Of several gates on one metric, the first whose pattern matches a row decides for it. Raises
    `UsageError` for a pattern that matches nothing.
    """
    decided: dict[tuple[str, bool], set[str]] = {}
    results = []
    for gate in gates:
        names = _matching(gate, scope.names(gate.subject))
        if gate.subject in METRICS:
            earlier = decided.setdefault((gate.subject, gate.of_worst_sample), set())
            names, all_names = names - earlier, names
            earlier |= names
            if all_names and not names:
                note = "an earlier gate decides for all that it matches"
                results.append(GateResult(gate.text, gate.subject, ok=True, rows=0, note=note))
                continue
        results.append(_judged(gate, names, scope))
    return tuple(results)


def check_patterns(gates: Sequence[Gate], modules: Iterable[str]) -> None:
    """Raise `UsageError` for a pattern that matches none of the reference's modules; what only a
    candidate has is for `unmatched`."""
    names = set(modules)
    for gate in gates:
        if gate.subject != "unmatched":
            _matching(gate, names)


def gate_result(
    gate: str, subject: str, findings: Sequence[Finding], unjudged: int = 0
) -> GateResult:
    """What came of a gate that covers these; one that covers nothing does not hold."""
    key = attrgetter("badness")
    failures = sorted((finding for finding in findings if not finding.ok), key=key, reverse=True)
    worst = max(findings, key=key, default=None)
    if worst is not None and worst.ok and worst.excess is None:
        worst = None
    return GateResult(
        gate,
        subject,
        ok=bool(findings) and not failures,
        rows=len(findings),
        failures=tuple(failures),
        worst=worst,
        unjudged=unjudged,
        asides=tuple(_asides(unjudged)),
        note=None if findings else "nothing that it covers could be judged",
    )


def equal_where_sampled(rows: Iterable[Row]) -> Iterator[str]:
    """How many of the rows are held against a limit by what is a part of them."""
    count = sum(row.is_equal_where_sampled for row in rows)
    if count:
        yield f"{count} {'row' if count == 1 else 'rows'} equal in what was sampled only"


def _asides(unjudged: int) -> Iterator[str]:
    if unjudged:
        yield f"{unjudged} opaque {'one' if unjudged == 1 else 'ones'} not judged"


def _error(option: str, text: str, fault: str) -> UsageError:
    return UsageError(f"{option} {text!r}: {fault}")


def _operator(text: str | None) -> Operator | None:
    match text:
        case ">" | ">=" | "<" | "<=":
            return text
    return None


def _failing(metric: str) -> str:
    """The side of a limit on which a metric is bad."""
    return "<" if metric in _HIGHER_IS_BETTER else ">"


def _why_no_condition(condition: str) -> str:
    flipped = _FLIPPED.fullmatch(condition)
    if flipped is not None and flipped["subject"] in _NUMBERED:
        turned = f"{flipped['subject']}{_MIRRORED[flipped['operator']]}{flipped['limit']}"
        return f"the metric comes first; write {turned!r}"
    return (
        "is no 'METRIC OP NUMBER [@ PATTERN]'; write, for example, 'peir>0.05', "
        f"'sqnr<20 @ *.mlp.*', or one of {', '.join(FINDINGS)}"
    )


def _why_wrong_way(metric: str, operator: str) -> str:
    better = "higher" if metric in _HIGHER_IS_BETTER else "lower"
    return (
        f"{better} {metric} is better, so that {operator!r} would fail good rows and pass bad "
        f"ones; write what must not be, with {_failing(metric)!r}"
    )


def _limit(text: str, faulty: Callable[[str], UsageError]) -> float:
    limit = finite_number(text)
    if limit is None:
        raise faulty(f"the limit {text!r} is no finite number; give one, such as 0.05")
    return limit


def finite_number(text: str) -> float | None:
    """The number that a limit is; None for everything that no row could be held against."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def _matching(gate: Gate, names: set[str]) -> set[str]:
    if gate.pattern is None:
        return names
    matching = match(names, gate.pattern)
    if not matching:
        raise UsageError(
            f"{gate.option} {gate.text!r}: the pattern {gate.pattern!r} matches none of the "
            f"{len(names)} modules that are compared; correct it, or leave the gate out"
        )
    return matching


def _judged(gate: Gate, names: set[str], scope: Scope) -> GateResult:
    if gate.subject in END_TO_END:
        return _judged_end_to_end(gate, scope.logits)
    rows = [row for row in scope.rows if row.module in names]
    missing = list(_missing(scope.only_in_reference, names, ONLY_IN_REFERENCE))
    if gate.subject == "unmatched":
        matched = (Finding(row.place, row.status, ok=True) for row in rows)
        surplus = _missing(scope.only_in_candidate, names, ONLY_IN_CANDIDATE)
        return gate_result(gate.text, gate.subject, [*matched, *missing, *surplus])
    if gate.subject == "structure":
        return gate_result(gate.text, gate.subject, list(map(_structure_finding, rows)))
    if gate.subject == "nonfinite":
        compared = (row for row in rows if row.status in COMPARED or row.has_no_elements)
        return gate_result(gate.text, gate.subject, list(map(_nonfinite_finding, compared)))
    found = [(row, _metric_finding(gate, row)) for row in rows]
    covered = [finding for _, finding in found if finding is not None]
    unjudged = sum(map(is_unjudged, rows))
    result = gate_result(gate.text, gate.subject, [*covered, *missing], unjudged)
    judged = (row for row, finding in found if finding is not None)
    return replace(result, asides=(*result.asides, *equal_where_sampled(judged)))


def _judged_end_to_end(gate: Gate, logits: Logits | None) -> GateResult:
    """One number, as if it were a row; a token that is not finite is within no limit."""
    value = None if logits is None else end_to_end(gate.subject, logits)
    if logits is None or value is None:
        note = "there are no logits of a language model that could be compared"
        return replace(gate_result(gate.text, gate.subject, ()), note=note)
    ok = gate.is_within(value) and not logits.nonfinite
    finding = Finding(_LOGITS, "ok", ok, value, gate.excess(value), doubt(logits))
    return gate_result(gate.text, gate.subject, [finding])


def _missing(places: Iterable[Place], names: set[str], status: str) -> Iterator[Finding]:
    return (
        Finding(place, status, False, reason=status) for place in places if place.module in names
    )


def _metric_finding(gate: Gate, row: Row) -> Finding | None:
    """A row under a gate on a metric; None where that is not about it."""
    found = measure(row, gate.subject, of_worst_sample=gate.of_worst_sample)
    if found is None:
        return None
    if found.value is None:
        return Finding(row.place, row.status, ok=found.fault is None, reason=found.fault)
    value, ok = found.value, gate.is_within(found.value)
    explained = None if ok else _explained(row)
    return Finding(row.place, row.status, ok, value, gate.excess(value), found.where or explained)


def _explained(row: Row) -> str | None:
    """What is known to be behind a difference: a factor, or a transform and what that leaves."""
    if row.transform is None or row.scale_factor is not None:
        return row.reason if row.scale_factor is not None else None
    left = "nothing" if row.residual_sqnr is None else f"an SQNR of {row.residual_sqnr:.3g} dB"
    return f"a {row.transform}, which leaves {left}"


def _nonfinite_finding(row: Row) -> Finding:
    if row.status == "opaque" and row.nonfinite is None:
        reason = f"{row.reason}; whether NaN are new cannot be told"
        return Finding(row.place, row.status, ok=False, reason=reason)
    if row.status != "nonfinite":
        return Finding(row.place, row.status, ok=True)
    return Finding(row.place, row.status, ok=False, reason=not_finite(row))


_OTHER_STRUCTURE: frozenset[Status] = frozenset({"structure", "shape", "opaque"})


def _structure_finding(row: Row) -> Finding:
    ok = row.status not in _OTHER_STRUCTURE or is_unjudged(row) or row.has_no_elements
    return Finding(row.place, row.status, ok, reason=None if ok else row.reason or row.status)
