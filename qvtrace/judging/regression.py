"""What got worse since an earlier comparison, row by row."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from qvtrace.comparison.rows import Place, Row
from qvtrace.errors import UsageError
from qvtrace.judging.gates import (
    ONLY_IN_REFERENCE,
    Finding,
    GateResult,
    Scope,
    equal_where_sampled,
    finite_number,
    gate_result,
)
from qvtrace.judging.measures import Measure, Number, is_not_to_be_had, measure, number_text, size
from qvtrace.judging.noise_floor import is_noise
from qvtrace.metrics.names import DECIBELS, HIGHER_IS_BETTER, METRICS

_LIMIT = re.compile(r"(?P<metric>[A-Za-z]\w*)\s+(?P<amount>[^\sA-Za-z]\S*?)\s*(?P<unit>x|dB)?")


@dataclass(frozen=True)
class RegressionLimit:
    """How much worse a metric may get: by a factor, or a difference of decibels or cosines."""

    text: str  # as it was given
    metric: str
    amount: float

    @classmethod
    def parse(cls, text: str, option: str = "--max-regression") -> "RegressionLimit":
        """From `METRIC NUMBERx`; for decibels `METRIC NUMBERdB`, for cosine `cosine NUMBER`.

        Raises `UsageError` for anything else, and for what would call an improvement too little.
        """
        parsed = _LIMIT.fullmatch(text.strip())
        metric = text.split()[0] if text.split() else ""
        if metric not in METRICS:
            raise _error(option, text, f"{metric!r} is not known; one of {', '.join(METRICS)}")
        unit = _unit(metric)
        amount = finite_number(parsed["amount"]) if parsed is not None else None
        if parsed is None or amount is None or (parsed["unit"] or "") != unit:
            raise _error(
                option, text, f"is no limit of {metric}; write, such as, {_example(metric)!r}"
            )
        least = 1.0 if unit == "x" else 0.0
        if amount < least:
            fault = f"below {least:g}{unit}, what did not change would fail; give at least that"
            raise _error(option, text, fault)
        return cls(text.strip(), metric, amount)

    def excess(self, before: Number | None, now: Number | None) -> float:
        """How far beyond what is allowed; None is as good as can be."""
        if now is None:
            return -math.inf
        if self.metric in HIGHER_IS_BETTER:
            return math.inf if before is None else float(before - now) - self.amount
        if self.metric in DECIBELS:
            return math.inf if before is None else float(now - before) - self.amount
        return size(self.metric, now) - self.amount * size(self.metric, before or 0.0)


def _unit(metric: str) -> str:
    if metric in DECIBELS:
        return "dB"
    return "" if metric in HIGHER_IS_BETTER else "x"


def _example(metric: str) -> str:
    amount = {"dB": "3", "x": "1.2", "": "0.001"}[_unit(metric)]
    return f"{metric} {amount}{_unit(metric)}"


def _error(option: str, text: str, fault: str) -> UsageError:
    return UsageError(f"{option} {text!r}: {fault}")


@dataclass(frozen=True)
class Baseline:
    """An earlier comparison, and how much worse than it a later one may be."""

    file: str
    scope: Scope
    limits: tuple[RegressionLimit, ...]
    doubt: str | None = None  # why its numbers may not mean what they seem to mean
    notes: tuple[str, ...] = ()  # what is not known of it, or other, and does not decide


@dataclass(frozen=True)
class Changes:
    """Which modules an earlier comparison did not have, and which it had."""

    baseline: str  # the file
    new: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()


def parse_limits(limits: Iterable[str | RegressionLimit]) -> tuple[RegressionLimit, ...]:
    """Those that are text, parsed; raises `UsageError`."""
    given = (limits,) if isinstance(limits, str) else limits
    return tuple(
        limit if isinstance(limit, RegressionLimit) else RegressionLimit.parse(limit)
        for limit in given
    )


def regress(limit: RegressionLimit, now: Scope, baseline: Baseline) -> GateResult:
    """Hold each row against the one at the same place earlier.

    A row that is undefined or not comparable is worse only where it was neither before; what is
    below the noise floor is not worse. Places of which only one of the two tells, and figures that
    are not to be had, are not judged: they are counted.
    """
    before = {row.place: row for row in baseline.scope.rows}
    pairs = [(row, before[row.place]) for row in now.rows if row.place in before]
    told = [pair for pair in pairs if not _is_unknown(limit.metric, *pair)]
    lost = [place for place in now.only_in_reference if place in before]
    findings = [_finding(limit, *pair) for pair in told]
    findings += [_lost(limit, place, before[place]) for place in lost]
    result = gate_result(
        f"{limit.text} since {baseline.file}", limit.metric, list(filter(None, findings))
    )
    asides = _not_judged(
        unknown=len(pairs) - len(told),
        vanished=len(before) - len(pairs) - len(lost),
        new=len(now.rows) - len(pairs),
    )
    sampled = equal_where_sampled(row for row, _ in told)
    return replace(result, asides=(*result.asides, *asides, *sampled))


def _not_judged(**counts: int) -> Iterator[str]:
    """How many places a limit says nothing of, and why."""
    why = {"unknown": "no figures to be had", "vanished": "vanished since", "new": "new since"}
    for name, count in counts.items():
        if count:
            yield f"{count} {'row' if count == 1 else 'rows'} not judged: {why[name]}"


def have_common_rows(now: Scope, earlier: Scope) -> bool:
    """Whether there is a place that was compared both times."""
    places = {row.place for row in earlier.rows}
    return any(row.place in places for row in now.rows)


def changes(now: Scope, baseline: Baseline) -> Changes:
    """The modules that only one of the two comparisons knows, each in its order."""
    modules, before = _modules(now), _modules(baseline.scope)
    return Changes(
        baseline.file,
        tuple(name for name in modules if name not in before),
        tuple(name for name in before if name not in modules),
    )


def _modules(scope: Scope) -> dict[str, None]:
    """Every name, in order."""
    unmatched = chain(scope.only_in_reference, scope.only_in_candidate)
    return dict.fromkeys(
        chain((row.module for row in scope.rows), (place.module for place in unmatched))
    )


def _is_unknown(metric: str, row: Row, earlier: Row) -> bool:
    """Whether nobody can tell if a row got worse: a figure is not to be had, and nothing else says
    that it was better before, or is as good, or as bad, as can be now."""
    if is_not_to_be_had(row, metric):
        return not _was_good(measure(earlier, metric))
    return row.status == "ok" and is_not_to_be_had(earlier, metric)


def _was_good(before: Measure | None) -> bool:
    return before is not None and before.fault is None


def _was_bad(earlier: Row, metric: str) -> bool:
    """Whether a row was undefined or not comparable, for all that is known."""
    before = measure(earlier, metric)
    had = not is_not_to_be_had(earlier, metric)
    return had and before is not None and before.fault is not None


def _finding(limit: RegressionLimit, row: Row, earlier: Row) -> Finding | None:
    """None where the metric is not about it."""
    now, before = measure(row, limit.metric), measure(earlier, limit.metric)
    if now is None:
        reason = "not compared any more"
        worse = Finding(row.place, row.status, False, reason=reason)
        return worse if _was_good(before) else None
    if now.fault is not None:
        was_bad = _was_bad(earlier, limit.metric)
        reason = f"{now.fault}, as before" if was_bad else now.fault
        return Finding(row.place, row.status, was_bad, reason=reason)
    if before is None or before.fault is not None:
        return Finding(row.place, row.status, ok=True)
    return _compared(limit, row, now, before)


def _compared(limit: RegressionLimit, row: Row, now: Measure, before: Measure) -> Finding:
    if now.value is None:
        return Finding(row.place, row.status, ok=True)
    excess = limit.excess(before.value, now.value)
    reason = "no difference before"
    if before.value is not None:
        reason = f"{number_text(limit.metric, before.value)} before"
    if excess > 0 and is_noise(row, limit.metric, now.value):
        reason = f"{reason}, below the noise floor"
        return Finding(row.place, row.status, True, now.value, reason=reason)
    told = excess if math.isfinite(excess) else None
    return Finding(row.place, row.status, excess <= 0, now.value, told, reason)


def _lost(limit: RegressionLimit, place: Place, earlier: Row) -> Finding | None:
    """None where the metric was not about it."""
    if measure(earlier, limit.metric) is None:
        return None
    was_bad = _was_bad(earlier, limit.metric)
    return Finding(place, ONLY_IN_REFERENCE, was_bad, reason=ONLY_IN_REFERENCE)
