"""What got worse since an earlier comparison, row by row."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from qvtrace.comparison.rows import Place, Row
from qvtrace.errors import UsageError
from qvtrace.judging.gates import (
    ONLY_IN_REFERENCE,
    Finding,
    GateResult,
    Scope,
    finite_number,
    gate_result,
)
from qvtrace.judging.measures import Measure, Number, measure, size
from qvtrace.judging.noise_floor import is_noise
from qvtrace.metrics.differences import DECIBELS, HIGHER_IS_BETTER, METRICS

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
    below the noise floor is not worse; a place that was not there before is not covered.
    """
    before = {row.place: row for row in baseline.scope.rows}
    findings = [
        finding
        for row in now.rows
        if (finding := _finding(limit, row, before.get(row.place))) is not None
    ]
    lost = (place for place in now.only_in_reference if place in before)
    findings += [one for place in lost if (one := _lost(limit, place, before[place])) is not None]
    return gate_result(f"{limit.text} since {baseline.file}", limit.metric, findings)


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


def _finding(limit: RegressionLimit, row: Row, earlier: Row | None) -> Finding | None:
    """None where nothing can be said: a new place, or one that was never judged."""
    if earlier is None:
        return None
    now, before = measure(row, limit.metric), measure(earlier, limit.metric)
    was_good = before is not None and before.fault is None
    if now is None:
        reason = "not compared any more"
        return Finding(row.place, row.status, False, reason=reason) if was_good else None
    if now.fault is not None:
        reason = now.fault if was_good else f"{now.fault}, as before"
        return Finding(row.place, row.status, not was_good, reason=reason)
    if before is None or before.fault is not None:
        return Finding(row.place, row.status, ok=True)
    return _compared(limit, row, now, before)


def _compared(limit: RegressionLimit, row: Row, now: Measure, before: Measure) -> Finding:
    if now.value is None:
        return Finding(row.place, row.status, ok=True)
    excess = limit.excess(before.value, now.value)
    reason = "no difference before" if before.value is None else f"{before.value:.3g} before"
    if excess > 0 and is_noise(row, limit.metric, now.value):
        reason = f"{reason}, below the noise floor"
        return Finding(row.place, row.status, True, now.value, reason=reason)
    told = excess if math.isfinite(excess) else None
    return Finding(row.place, row.status, excess <= 0, now.value, told, reason)


def _lost(limit: RegressionLimit, place: Place, earlier: Row) -> Finding | None:
    before = measure(earlier, limit.metric)
    if before is None:
        return None
    return Finding(place, ONLY_IN_REFERENCE, before.fault is not None, reason=ONLY_IN_REFERENCE)
