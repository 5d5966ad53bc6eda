"""A comparison as CSV: a header, then one line a pair, for spreadsheets and data frames."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from io import StringIO
from typing import Any

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.rows import Row
from qvtrace.judging.noise_floor import times_floor
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.names import METRICS
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.reports.formatting import printable
from qvtrace.reports.groups import groups_csv

_PLAIN = ("module", "call", "sample", "step", "path", "order")
_SIDES = ("type", "dtype", "shape")
_FURTHER = (
    "layout",
    "scale_factor",
    "transform",
    "residual_peir",
    "residual_sqnr",
    "worst_token",
    "zero_tokens",
    "sampled",
    "padding_tokens",
)


def comparison_csv(comparison: Comparison) -> str:
    """The whole text. The columns are the same for all comparisons, but that of the metrics only
    those are there that were asked for.

    Where rows are rolled up, a line is a group. What is undefined or does not apply is an empty
    cell; indices, shapes and reasons are JSON.
    """
    if comparison.options.group_by is not None:
        return groups_csv(comparison)
    columns = _columns(comparison.options.metrics or METRICS)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in comparison.rows:
        writer.writerow([_text(cell(row)) for cell in columns.values()])
    return text.getvalue()


def _of_samples(name: str, row: Row) -> object:
    figures = None if row.samples is None else row.samples.figures.get("peir")
    return None if figures is None else getattr(figures, name)


def _columns(metrics: Sequence[str]) -> dict[str, Callable[[Row], object]]:
    columns: dict[str, Callable[[Row], object]] = {name: partial(_field, name) for name in _PLAIN}
    for name in _SIDES:
        columns[f"reference_{name}"] = partial(_side, name, 0)
        columns[f"candidate_{name}"] = partial(_side, name, 1)
    for name in ("matched_by", "status", "reason"):
        columns[name] = partial(_field, name)
    columns.update({name: partial(_metric, name) for name in metrics})
    columns["undefined"] = lambda row: row.undefined or None
    columns.update({name: partial(_field, name) for name in _FURTHER})
    columns["peak_index"] = partial(_part, "peak", "index")
    for side in ("reference", "candidate"):
        columns[f"peak_{side}"] = partial(_part, "peak", side)
    for count in fields(Nonfinite):
        columns[count.name] = partial(_part, "nonfinite", count.name)
    columns["times_floor"] = times_floor
    columns["samples"] = lambda row: None if row.samples is None else row.samples.count
    for name in ("median", "p99", "worst", "worst_sample"):
        columns[f"sample_peir_{name}"] = partial(_of_samples, name)
    return columns


def _field(name: str, row: Row) -> object:
    return getattr(row, name)


def _side(name: str, side: int, row: Row) -> object:
    return getattr(row, name)[side]


def _metric(name: str, row: Row) -> object:
    return getattr(row.metrics, name)


def _part(name: str, part: str, row: Row) -> object:
    whole: Peak | Nonfinite | None = getattr(row, name)
    return None if whole is None else getattr(whole, part)


def _text(value: object) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        return printable(value)
    return json.dumps(value) if isinstance(value, tuple | list | dict) else value
