"""A comparison as one strict JSON object, the form that other tools read."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from qvtrace.comparison import Comparison, Coverage, Place, Row, Side, Verdict
from qvtrace.elements import number_json
from qvtrace.factors import ChannelFactors, ScaleFactor
from qvtrace.metrics import METRICS
from qvtrace.trees import Json

FORMAT_VERSION = 1

# A fold is a table's matter: here every row stands for itself. A judgement is told by the reason.
_NO_KEYS = frozenset({"same_as", "judgement"})
_ROW_KEYS = tuple(field.name for field in fields(Row) if field.name not in _NO_KEYS)
_RANGES_LISTED = 64  # of channels with a factor, those that are farthest from 1
_DIGITS = 7  # significant ones of a factor: float32 has no more


def comparison_text(comparison: Comparison, version: str) -> str:
    """The object as text, written by qvtrace `version`: a line for each key and for each row."""
    report = comparison_json(comparison, version)
    return _lines("{", (_member(name, value) for name, value in report.items()), "}")


def comparison_json(comparison: Comparison, version: str) -> Json:
    """The object itself.

    Every row has every metric, unless some were asked for; `complete` then says that it was cut.
    Two generations have `tokens` besides: how many agree, and the first that differs.
    """
    tokens = comparison.tokens
    return {
        "format": FORMAT_VERSION,
        "qvtrace": version,
        "complete": comparison.complete,
        "reference": _side(comparison.reference),
        "candidate": _side(comparison.candidate),
        "comparable": asdict(comparison.comparable),
        "coverage": _coverage(comparison.coverage),
        **({} if tokens is None else {"tokens": asdict(tokens)}),
        "rows": [_row(row, comparison.options.metrics) for row in comparison.rows],
        "verdict": _verdict(comparison.verdict),
    }


def strict(value: Any) -> Any:
    """The value as JSON can say it: a non-finite number is written as text."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return number_json(value) if isinstance(value, float) else value


def _member(name: str, value: object) -> str:
    if name != "rows" or not isinstance(value, list):
        return f"{_dump(name)}: {_dump(value)}"
    return f"{_dump(name)}: {_lines('[', map(_dump, value), ']')}"


def _lines(left: str, items: Iterable[str], right: str) -> str:
    return "\n".join([left, ",\n".join(items), right])


def _dump(value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(strict(value), allow_nan=False)


def _side(side: Side) -> Json:
    report = {
        "file": side.file,
        "model": side.model,
        "variant": side.variant,
        "environment": side.environment,
    }
    return report if side.complete else {**report, "incomplete": side.error or "killed"}


def _coverage(coverage: Coverage) -> Json:
    return {
        "compared": coverage.compared,
        "identical": coverage.identical,
        "not_comparable": coverage.not_comparable,
        "only_in_reference": list(map(_place, coverage.only_in_reference)),
        "only_in_candidate": list(map(_place, coverage.only_in_candidate)),
    }


def _verdict(verdict: Verdict) -> Json:
    report = asdict(verdict)
    del report["lines"]  # the origins in words
    return report


def _place(place: Place) -> Json:
    return {"module": place.module, "call": place.call, "path": place.path}


def _row(row: Row, metrics: Sequence[str]) -> Json:
    report: Json = {name: getattr(row, name) for name in _ROW_KEYS}
    report["scale_factor"] = _scale_factor(row.scale_factor)
    report["metrics"] = {name: getattr(row.metrics, name) for name in metrics or METRICS}
    report["peak"] = None if row.peak is None else asdict(row.peak)
    report["nonfinite"] = None if row.nonfinite is None else asdict(row.nonfinite)
    return report


def _scale_factor(factor: ScaleFactor | None) -> float | Json | None:
    """A number; or ranges of channels (the first, one past the last) and the factor of each. Of
    many, those farthest from 1 are listed, the others counted."""
    if not isinstance(factor, ChannelFactors):
        return factor if factor is None else _rounded(factor)
    ranges = factor.ranges()
    listed = sorted(ranges, key=_distance_from_one, reverse=True)[:_RANGES_LISTED]
    listed.sort()
    report: Json = {
        "channels": [[start, stop] for start, stop, _ in listed],
        "factors": [_rounded(value) for _, _, value in listed],
    }
    if len(ranges) > len(listed):
        values = [value for _, _, value in ranges]
        report["not_listed"] = len(ranges) - len(listed)
        report["smallest"], report["largest"] = _rounded(min(values)), _rounded(max(values))
    return report


def _distance_from_one(channels: tuple[int, int, float]) -> float:
    size = abs(channels[2])
    return abs(math.log(size)) if size else math.inf


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
