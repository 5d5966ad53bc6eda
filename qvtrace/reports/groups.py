"""Rows rolled up by block or by kind of module, as a table and as CSV."""

import csv
import json
from collections.abc import Callable
from io import StringIO
from typing import TypeAlias

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.grouping import Group
from qvtrace.comparison.row_names import RowNames
from qvtrace.metrics.names import METRICS
from qvtrace.reports.columns import TITLES, Bar, metric_cell
from qvtrace.reports.formatting import counted, number, printable
from qvtrace.reports.layout import Entry, Table
from qvtrace.reports.styled import Styled, styled

_DEFAULT = ("peir", "noise_out", "added", "sqnr", "max_abs_error")
_PLAIN = ("name", "modules", "rows", "compared", "nonfinite", "made_up_for")

Columns: TypeAlias = dict[str, Callable[[Group], Styled]]


def group_table(comparison: Comparison, *, blocks: bool = False) -> Table:
    """A line for each group; `blocks`: bars of block characters, else of `#`."""
    columns = group_columns(comparison, blocks=blocks)
    entries = [
        Entry(
            key=str(group.rows),
            name=styled(group_name(group)),
            cells=tuple(cell(group) for cell in columns.values()),
            notes=tuple(group_notes(group)),
        )
        for group in comparison.groups
    ]
    title = comparison.options.group_by or ""
    return Table("rows", title, tuple(columns), tuple(entries))


def group_columns(comparison: Comparison, *, blocks: bool = False) -> Columns:
    """The metrics that were asked for, else the most telling and what sorts; where the worst is."""
    options = comparison.options
    names = options.metrics or _default_metrics(comparison)
    lengths = (group.metrics.peir or 0.0 for group in comparison.groups)
    bar = Bar(max(lengths, default=0.0), blocks)
    columns: Columns = {TITLES.get(name, name): _cell(name, bar) for name in names}
    row_name = RowNames(comparison.rows)
    columns["worst in"] = lambda group: _worst(group, row_name)
    return columns


def rows_beyond(comparison: Comparison) -> int:
    """How many rows are in groups that `--top` left out."""
    return len(comparison.rows) - sum(group.rows for group in comparison.groups)


def group_name(group: Group) -> str:
    """As it is shown."""
    return printable(group.name)


def groups_csv(comparison: Comparison) -> str:
    """A header, then a line for each group; the worst row is told by module, call and path."""
    metrics = comparison.options.metrics or METRICS
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    worst_titles = [f"worst_{part}" for part in ("module", "call", "path")]
    writer.writerow([*_PLAIN, *metrics, "undefined", *worst_titles])
    for group in comparison.groups:
        plain = [group_name(group), *(getattr(group, name) for name in _PLAIN[1:])]
        values = [getattr(group.metrics, name) for name in metrics]
        worst = group.worst
        place = ["", "", ""]
        if worst is not None:
            place = [printable(worst.module), str(worst.call), printable(worst.path)]
        undefined = json.dumps(group.undefined) if group.undefined else ""
        writer.writerow([*plain, *("" if v is None else v for v in values), undefined, *place])
    return text.getvalue()


def _default_metrics(comparison: Comparison) -> tuple[str, ...]:
    sort_by = comparison.options.order
    names = [*_DEFAULT, *(["local_noise"] if comparison.local is not None else [])]
    return tuple(dict.fromkeys([*([sort_by] if sort_by in METRICS else []), *names]))


def _cell(name: str, bar: Bar) -> Callable[[Group], Styled]:
    def cell(group: Group) -> Styled:
        value = group.metrics.peir
        if name != "peir" or value is None:
            return metric_cell(group, name)
        return styled(f"{number(value):<8} {bar.of(value)}".rstrip(), bar.style(value))

    return cell


def _worst(group: Group, row_name: RowNames) -> Styled:
    if group.worst is None:
        return styled("-", "dim")
    return styled(printable(row_name(group.worst)))


def group_notes(group: Group) -> list[Styled]:
    """What the figures leave out."""
    notes = []
    if group.nonfinite:
        notes.append(styled(f"{counted(group.nonfinite, 'row')} not finite", "bold red"))
    if group.compared < group.rows:
        missing = counted(group.rows - group.compared, "row")
        notes.append(styled(f"{missing} not compared", "yellow"))
    if group.made_up_for:
        notes.append(styled(f"{counted(group.made_up_for, 'row')} equal up to a factor", "dim"))
    return notes
