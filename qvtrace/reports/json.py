"""A comparison as one strict JSON object, the form that other tools read."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.comparison import RESULT_FORMAT, Comparison, Side
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.grouping import Group
from qvtrace.comparison.logits import Logits
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.verdict import Verdict
from qvtrace.judging.gates import Finding, GateResult
from qvtrace.judging.noise_floor import times_floor
from qvtrace.metrics.elements import number_json
from qvtrace.metrics.factors import ChannelFactors, ListedFactors, ScaleFactor
from qvtrace.metrics.names import METRICS, NOISE_METRICS, PAIR_METRICS, Metrics
from qvtrace.reports.explanations import explanation_json
from qvtrace.reports.quantization import calibration_text
from qvtrace.trees import Json

# A fold is a table's matter: here every row stands for itself. A judgement is told by the
# reason, and details are for people.
_WHERE_THERE_ARE = frozenset({"groups", "sampled", "samples", "padding_tokens"})
_NO_KEYS = _WHERE_THERE_ARE | {"same_as", "judgement", "residual", "floor", "details", "unseen"}
_ROW_KEYS = tuple(field.name for field in fields(Row) if field.name not in _NO_KEYS)
_GROUP_KEYS = tuple(field.name for field in fields(Group))
_RANGES_LISTED = 64  # of channels with a factor, those that are farthest from 1
_DIGITS = 7  # significant ones of a factor: float32 has no more


def comparison_text(comparison: Comparison, version: str) -> str:
    """The object as text, written by qvtrace `version`: a line for each key and for each row."""
    report = comparison_json(comparison, version)
    return _lines("{", (_member(name, value) for name, value in report.items()), "}")


def comparison_json(comparison: Comparison, version: str) -> Json:
    """The object itself.

    Every row has every metric, unless some were asked for; `complete` then says that it was cut.
    Where they apply, it has further keys: `tokens` of two generations (how many agree, and the
    first that differs), `logits` of a language model (its keys are those of `Logits`, and whether
    they are `too_few`), `filters` for what narrowed the rows, `changes` since a baseline,
    `portions` (what was compared by a sample, or not at all) and `sampled` in rows of samples (how
    many vectors of how many), `floor` and `times_floor` (of the PEIR) in every row where a floor
    was measured, `difference` in every row where elements were asked for (None for modules of
    which they were not) with the `quantization` parameters of both sides, `groups` where rows are
    rolled up, `explanations` of modules that were to be explained (each as `explanation_json` has
    it), `inputs` (a digest of all that the reference was given, of how many samples, and under
    which key where that is private), `swapped` of `comparable` where the reference looks quantized
    and the candidate does not, and for sides that are `incomplete` or come with `warnings` or
    `findings`.
    """
    tokens = comparison.tokens
    report = {
        "format": RESULT_FORMAT,
        "qvtrace": version,
        "complete": comparison.complete,
        "reference": _side(comparison.reference),
        "candidate": _side(comparison.candidate),
        "comparable": _comparable(comparison.comparable),
        "coverage": _coverage(comparison.coverage),
        **({} if tokens is None else {"tokens": asdict(tokens)}),
        **({} if comparison.logits is None else {"logits": _logits(comparison.logits)}),
        **({} if comparison.inputs is None else {"inputs": comparison.inputs}),
        "rows": [_row(row, comparison) for row in comparison.rows],
        "verdict": _verdict(comparison.verdict),
    }
    if comparison.options.group_by is not None:
        report["groups"] = [_group(group, comparison) for group in comparison.groups]
    if comparison.options.rows_asked != DiffOptions().rows_asked:
        include, exclude, path = comparison.options.rows_asked
        report["filters"] = {"include": include, "exclude": exclude, "path": path}
    if comparison.floor is not None:
        report["floor"] = _side(comparison.floor)
    if comparison.local is not None:
        report["local"] = _side(comparison.local)
    if comparison.options.explain:
        report["explanations"] = list(map(explanation_json, comparison.explanations))
    if comparison.portions:
        report["portions"] = comparison.portions
    if comparison.changes is not None:
        report["changes"] = asdict(comparison.changes)
    return report


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
    report: Json = {
        "file": side.file,
        "model": side.model,
        "variant": side.variant,
        "environment": side.environment,
    }
    if side.findings:
        report["findings"] = list(map(asdict, side.findings))
    if not side.complete:
        report["incomplete"] = side.error or "killed"
    if side.warnings:
        report["warnings"] = side.warnings
    calibration = calibration_text(side.variant)
    if calibration is not None:
        report["calibration"] = calibration
    return report


def _comparable(found: Comparable) -> Json:
    report: Json = {"ok": found.ok, "differences": found.differences}
    return {**report, "swapped": True} if found.swapped else report


def _coverage(coverage: Coverage) -> Json:
    report: Json = {
        "compared": coverage.compared,
        "identical": coverage.identical,
        "not_comparable": coverage.not_comparable,
        "only_in_reference": list(map(_place, coverage.only_in_reference)),
        "only_in_candidate": list(map(_place, coverage.only_in_candidate)),
    }
    return {**report, "wrappers": coverage.wrappers} if coverage.wrappers else report


def _logits(logits: Logits) -> Json:
    return {**asdict(logits), "too_few": logits.too_few}


def _names(comparison: Comparison) -> Sequence[str]:
    """Those that were asked for, else all; what a replay tells only where one was given."""
    if comparison.options.metrics:
        return comparison.options.metrics
    return METRICS if comparison.local else (*PAIR_METRICS, *NOISE_METRICS)


def _verdict(verdict: Verdict) -> Json:
    return {
        "text": verdict.text,
        "exit_code": verdict.exit_code,
        "gates": list(map(_gate, verdict.gates)),
        "origins": list(map(asdict, verdict.origins)),
        "lines": verdict.lines,
        "findings": verdict.findings,
    }


def _gate(result: GateResult) -> Json:
    """`ok` is null where an earlier gate decides for all that it matches, as its `note` says;
    `asides` are of rows that it does not judge."""
    return {
        "gate": result.gate,
        "ok": result.ok if result.is_applied else None,
        "rows": result.rows,
        "failed": result.failed,
        "worst": None if result.worst is None else _finding(result.worst),
        **({"note": result.note} if result.note is not None else {}),
        **({"asides": result.asides} if result.asides else {}),
    }


def _finding(finding: Finding) -> Json:
    """`excess` is how far the value is beyond the limit, negative where it is within."""
    return {
        **_place(finding.place),
        "status": finding.status,
        "value": finding.value,
        "excess": finding.excess,
        "reason": finding.reason,
    }


def _quantization(comparison: Comparison, row: Row) -> Json | None:
    """The quantization parameters of both sides; None for modules whose values are not wanted."""
    sides = comparison.quantization.get(row.module)
    if sides is None:
        return None
    reference, candidate = ([found.to_json() for found in side] for side in sides)
    return {"reference": reference, "candidate": candidate}


def _group(group: Group, comparison: Comparison) -> Json:
    """Its own fields, and every metric that was asked for."""
    report: Json = {name: getattr(group, name) for name in _GROUP_KEYS}
    report["metrics"] = _metrics(group.metrics, _names(comparison))
    report["worst"] = None if group.worst is None else _place(group.worst)
    return report


def _place(place: Place) -> Json:
    return {"module": place.module, "call": place.call, "path": place.path}


def _row(row: Row, comparison: Comparison) -> Json:
    metrics = _names(comparison)
    report: Json = {name: getattr(row, name) for name in _ROW_KEYS}
    report["scale_factor"] = _scale_factor(row.scale_factor)
    report["metrics"] = _metrics(row.metrics, metrics)
    report["undefined"] = {name: row.undefined[name] for name in metrics if name in row.undefined}
    if row.sampled is not None:
        report["sampled"] = row.sampled
    if row.padding_tokens:
        report["padding_tokens"] = row.padding_tokens
    if row.samples is not None:
        report["samples"] = asdict(row.samples)
    if row.groups is not None:
        report["groups"] = asdict(row.groups)
    report["peak"] = None if row.peak is None else asdict(row.peak)
    report["nonfinite"] = None if row.nonfinite is None else asdict(row.nonfinite)
    if comparison.floor is not None:
        report["floor"] = None if row.floor is None else _metrics(row.floor, metrics)
        report["times_floor"] = times_floor(row)
    if comparison.options.values:
        elements = comparison.elements.get(row.place)
        report["difference"] = None if elements is None else elements.to_json()
        report["quantization"] = _quantization(comparison, row)
    return report


def _metrics(found: Metrics, names: Sequence[str]) -> Json:
    return {name: getattr(found, name) for name in names}


def _scale_factor(factor: ScaleFactor | ListedFactors | None) -> float | Json | None:
    """A number; or ranges of channels (the first, one past the last) and the factor of each."""
    if isinstance(factor, ChannelFactors):
        factor = _listed(factor.ranges())
    if not isinstance(factor, ListedFactors):
        return factor if factor is None else _rounded(factor)
    report: Json = {
        "channels": [[start, stop] for start, stop, _ in factor.listed],
        "factors": [_rounded(value) for _, _, value in factor.listed],
    }
    if factor.not_listed:
        report["not_listed"] = factor.not_listed
        report["smallest"], report["largest"] = factor.smallest, factor.largest
    return report


def _listed(ranges: list[tuple[int, int, float]]) -> ListedFactors:
    """Of many, those farthest from 1 are listed, the others counted."""
    listed = sorted(ranges, key=_distance_from_one, reverse=True)[:_RANGES_LISTED]
    listed.sort()
    if len(ranges) == len(listed):
        return ListedFactors(tuple(listed))
    values = [value for _, _, value in ranges]
    ends = _rounded(min(values)), _rounded(max(values))
    return ListedFactors(tuple(listed), len(ranges) - len(listed), *ends)


def _distance_from_one(channels: tuple[int, int, float]) -> float:
    size = abs(channels[2])
    return abs(math.log(size)) if size else math.inf


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
