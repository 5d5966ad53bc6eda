"""What was found becomes a verdict: held against gates and an earlier comparison, an exit code."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvtrace.comparison.row_names import RowNames
from qvtrace.judging.gates import Finding, Gate, GateResult, Scope, judge_gates
from qvtrace.judging.measures import number_text
from qvtrace.judging.regression import Baseline, changes, have_common_rows, regress
from qvtrace.metrics.names import DECIBELS
from qvtrace.patterns import shown

DONE = 0
GATE_FAILED = 1
NOTHING_COMPARABLE = 3

_NAMES_TOLD = 8


@dataclass(frozen=True)
class Case:
    """All that gates are judged by, and what is to be said besides."""

    scope: Scope
    findings: tuple[str, ...]  # the loudest first
    compared: int  # rows
    is_trusted: bool  # both recordings are whole, of the same inputs, and in the right order


@dataclass(frozen=True)
class Decision:
    """The answer in one line."""

    text: str
    exit_code: int
    gates: tuple[GateResult, ...]


def decide(case: Case, gates: Sequence[Gate], baseline: Baseline | None = None) -> Decision:
    """Judge a case.

    Raises `UsageError` for a gate whose pattern matches nothing.
    """
    results = judge_gates(gates, case.scope)
    doubts: list[str] = []
    if baseline is not None:
        results += tuple(regress(limit, case.scope, baseline) for limit in baseline.limits)
        doubts += _doubts(case.scope, baseline)
    is_trusted = case.is_trusted and not doubts
    name = RowNames(case.scope.rows)
    told = [gate_text(result, name) for result in sorted(results, key=lambda result: result.ok)]
    if baseline is not None:
        told += [*baseline.notes, *_changes(case.scope, baseline)]
    if not case.compared or (results and not is_trusted):
        return Decision("; ".join([*doubts, *case.findings, *told]), NOTHING_COMPARABLE, results)
    code = DONE if all(result.ok for result in results) else GATE_FAILED
    return Decision("; ".join([*told, *case.findings]), code, results)


def _doubts(scope: Scope, baseline: Baseline) -> Iterator[str]:
    """Why nothing can be told by a baseline."""
    doubt = baseline.doubt
    if not have_common_rows(scope, baseline.scope):
        doubt = "it has no row at the place of any of these"
    if doubt is not None:
        yield f"nothing can be told by {baseline.file}: {doubt}"


def gate_text(result: GateResult, name: RowNames) -> str:
    """The gate with its limit, how many rows it covers, the worst of them and by how much."""
    asides = f" ({', '.join(result.asides)})" if result.asides else ""
    if result.note is not None:
        came = "FAILED" if result.is_applied else "not applied"
        return f"gate {result.gate} {came}: {result.note}{asides}"
    rows = _counted(result.rows, "row")
    came = f"held in {rows}" if result.ok else f"FAILED in {result.failed} of {rows}"
    came += asides
    if result.worst is None:
        return f"gate {result.gate} {came}"
    worst = f"{name(result.worst.place)} ({measured(result.worst, result.subject)})"
    return f"gate {result.gate} {came}, worst: {worst}"


def measured(finding: Finding, subject: str) -> str:
    """What a row has under a gate: its number and by how much, or why there is none."""
    parts = []
    if finding.value is not None and finding.excess is not None:
        unit = " dB" if subject in DECIBELS else ""
        side = "on the good side" if finding.ok else "beyond the limit"
        distance = abs(finding.excess)
        value = number_text(subject, finding.value)
        parts.append(f"{value}{unit}, {distance:.3g}{unit} {side}")
    if finding.reason is not None:
        parts.append(finding.reason)
    return ", ".join(parts) or finding.status


def _changes(scope: Scope, baseline: Baseline) -> Iterator[str]:
    found = changes(scope, baseline)
    for what, names in (("new", found.new), ("vanished", found.vanished)):
        if names:
            more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
            told = ", ".join(map(shown, names[:_NAMES_TOLD]))
            yield f"{_counted(len(names), 'module')} {what} since {found.baseline}: {told}{more}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
