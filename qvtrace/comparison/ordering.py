"""Rows in the order that is asked for."""

from collections.abc import Collection, Sequence

from qvtrace.comparison.options import ORDERS, DiffOptions
from qvtrace.comparison.rows import (
    NOT_STORED,
    PLAIN_VALUE,
    ROUTING_DIFFERS,
    STRUCTURE_DIFFERS,
    TYPES_DIFFER,
    Row,
)
from qvtrace.metrics.names import NOT_APPLICABLE, Undefined, badness

# Findings of which no metric says how bad they are: no more are they the worst by one.
_WITHOUT_NUMBERS = frozenset({STRUCTURE_DIFFERS, TYPES_DIFFER, ROUTING_DIFFERS})

_IDENTICAL = (-1, 0.0)
_NOT_FINITE = (2, 0.0)


def in_order(rows: Sequence[Row], sort_by: str) -> list[Row]:
    """`rows`, which are in order of execution, in the order that is asked for."""
    if sort_by == "order":
        return list(rows)
    if sort_by == "name":
        return sorted(rows, key=lambda row: (row.module, row.call))
    return _worst_first(rows, sort_by)


def _worst_first(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows that are equally bad stay in their order."""
    return sorted(rows, key=lambda row: _rank(row, metric), reverse=True)


def most_telling(rows: Sequence[Row], metric: str) -> list[Row]:
    """As `_worst_first`, where a factor that is made up for is no reason to look at a row."""
    return sorted(_worst_first(rows, metric), key=lambda row: row.is_made_up_for)


def _rank(row: Row, metric: str) -> tuple[int, float]:
    """Sorts the worst last; what has no number comes between numbers and identical rows.

    Numbers are of what is finite: where the candidate alone is not, they say nothing.
    """
    if row.nonfinite is not None and row.nonfinite.introduced:
        return _NOT_FINITE
    if row.undefined.get(metric) in _WITHOUT_NUMBERS:
        return -1, 1.0
    badness_of_row = row_badness(row, metric)
    return min(badness_of_row, _IDENTICAL) if row.status == "identical" else badness_of_row


def is_ranked(row: Row, metric: str) -> bool:
    """Whether the metric applies to the row."""
    return row_badness(row, metric) > NOT_APPLICABLE


def row_badness(row: Row, metric: str) -> tuple[int, float]:
    """`badness` of a row: a key that sorts the worst last."""
    reason = row.undefined.get(metric)
    if reason in (PLAIN_VALUE, NOT_STORED):
        reason = Undefined.INTEGER  # no more part of the ranking than an integer is
    return badness(metric, getattr(row.metrics, metric), reason)


def top(
    rows: Sequence[Row], options: DiffOptions, asked: Collection[str]
) -> tuple[list[Row], list[Row]]:
    """The worst of the rows and those of the modules that are asked for, and the others; both in
    the order that they are in."""
    metric = "peir" if options.order in ORDERS else options.order
    worst = {row.place for row in most_telling(rows, metric)[: options.top]}
    kept: list[Row] = []
    cut: list[Row] = []
    for row in rows:
        (kept if row.place in worst or row.module in asked else cut).append(row)
    return kept, cut
