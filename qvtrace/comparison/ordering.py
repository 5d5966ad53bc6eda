"""Rows in the order that is asked for."""

from collections.abc import Sequence

from qvtrace.comparison.options import ORDERS, DiffOptions
from qvtrace.comparison.rows import NOT_STORED, PLAIN_VALUE, Row
from qvtrace.metrics.differences import Undefined, badness


def in_order(rows: Sequence[Row], sort_by: str) -> list[Row]:
    """`rows`, which are in order of execution, in the order that is asked for."""
    if sort_by == "order":
        return list(rows)
    if sort_by == "name":
        return sorted(rows, key=lambda row: (row.module, row.call))
    return _worst_first(rows, sort_by)


def _worst_first(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows that are equally bad stay in their order."""
    return sorted(rows, key=lambda row: row_badness(row, metric), reverse=True)


def most_telling(rows: Sequence[Row], metric: str) -> list[Row]:
    """As `_worst_first`, where a factor that is made up for is no reason to look at a row."""
    return sorted(_worst_first(rows, metric), key=lambda row: row.is_made_up_for)


def row_badness(row: Row, metric: str) -> tuple[int, float]:
    """`metrics.badness` of a row: a key that sorts the worst last."""
    reason = row.undefined.get(metric)
    if reason in (PLAIN_VALUE, NOT_STORED):
        reason = Undefined.INTEGER  # no more part of the ranking than an integer is
    return badness(metric, getattr(row.metrics, metric), reason)


def top(rows: list[Row], options: DiffOptions) -> list[Row]:
    """The worst of the rows, in the order that they are in."""
    metric = "peir" if options.sort_by in ORDERS else options.sort_by
    worst = {row.place for row in most_telling(rows, metric)[: options.top]}
    return [row for row in rows if row.place in worst]
