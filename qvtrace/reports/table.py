"""A comparison as lines of text: what is compared, the rows, the verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import Row
from qvtrace.metrics.elements import ElementsJson
from qvtrace.reports.columns import (
    Column,
    asked_columns,
    further_columns,
    message,
    notes,
    peir_bar,
    row_name,
)
from qvtrace.reports.explanations import explanation_lines
from qvtrace.reports.formatting import counted, printable
from qvtrace.reports.gates import gate_lines
from qvtrace.reports.groups import group_table, rows_beyond
from qvtrace.reports.head import head_lines
from qvtrace.reports.layout import GAP, Entry, Note, Table, labelled, separated, words
from qvtrace.reports.qparams import parameters_text
from qvtrace.reports.selection import ListedRows
from qvtrace.reports.styled import Styled, styled
from qvtrace.reports.values import elements_text


@dataclass(frozen=True)
class TableOptions:
    """How a comparison is shown."""

    width: int | None = None  # of the terminal; None: lines as long as they get
    blocks: bool = False  # bars of block characters
    everything: bool = False  # rows that are folded or hidden otherwise
    rows: bool = True  # else those only that failed a gate


def comparison_lines(comparison: Comparison, options: TableOptions) -> Iterator[Styled]:
    """The whole report."""
    yield from head_lines(comparison, options.width, everything=options.everything)
    yield Styled()
    if not options.rows:
        yield from gate_lines(comparison, options.width, everything=options.everything)
        yield from _verdict_lines(comparison, options.width)
        return
    if comparison.options.group_by is not None:
        yield from _group_lines(comparison, options)
        yield from explanation_lines(comparison, options.width)
        yield from _verdict_lines(comparison, options.width)
        return
    rows = ListedRows.of(comparison, everything=options.everything)
    if rows.listed:
        yield from _table(comparison, rows, options).lines(options.width)
        yield Styled()
    yield from explanation_lines(comparison, options.width)
    yield from _hidden_lines(comparison, rows, options.width)
    yield from _verdict_lines(comparison, options.width)


def _group_lines(comparison: Comparison, options: TableOptions) -> Iterator[Styled]:
    """Groups in place of rows."""
    if comparison.groups:
        yield from group_table(comparison, blocks=options.blocks).lines(options.width)
        yield Styled()
    cut = rows_beyond(comparison)
    if cut:
        text = f"{counted(cut, 'row')} in groups beyond --top"
        yield from labelled("not listed", words(text), options.width)


def _verdict_lines(comparison: Comparison, width: int | None) -> Iterator[Styled]:
    """On a terminal, the lines that name origins stand together, what else there is before and
    behind them."""
    verdict = comparison.verdict
    style = "bold" if verdict.exit_code == 0 else "bold red"
    told = [(verdict.text, style, 0), *((line, "", 0) for line in verdict.further)]
    if width is not None and verdict.origins and verdict.lines:
        before, after = verdict.around
        first, *others = verdict.lines
        told = [(before, style, 0), (first, style, 2), *((line, "", 2) for line in others)]
        told.append((after, "", 0))
    for number, (text, style, hanging) in enumerate(one for one in told if one[0]):
        label = "" if number else "verdict"
        yield from labelled(label, words(printable(text), style), width, hanging=hanging)


def _table(comparison: Comparison, rows: ListedRows, options: TableOptions) -> Table:
    bar = peir_bar(rows.listed, blocks=options.blocks)
    columns = asked_columns(bar, comparison)
    titles = {column.title for column in columns}
    further = [] if comparison.options.metrics else further_columns(bar)
    further = [column for column in further if column.title not in titles]  # what sorts is in front
    if options.width is None:
        return _filled(comparison, rows, [*columns, *further])
    table = _filled(comparison, rows, columns)
    if further and table.stacked_width > options.width:
        return _filled(comparison, rows, [column for column in columns if not column.optional])
    fitting = list(_fitting(further, rows.listed, options.width - table.width))
    return _filled(comparison, rows, [*columns, *fitting]) if fitting else table


def _fitting(columns: Sequence[Column], rows: Sequence[Row], room: int) -> Iterator[Column]:
    """The first of the columns, as many as fit into `room`."""
    for column in columns:
        cells = (column.cell(row).width for row in rows if message(row) is None)
        room -= GAP + max([len(column.title), *cells])
        if room < 0:
            return
        yield column


def _filled(comparison: Comparison, rows: ListedRows, columns: Sequence[Column]) -> Table:
    dtypes = (comparison.reference.model.get("dtype"), comparison.candidate.model.get("dtype"))
    names = RowNames(comparison.rows)
    first = {row.module: row.place for row in reversed(rows.listed)}
    entries = [
        Entry(
            key=str(row.order),
            name=row_name(row, names),
            cells=() if message(row) else tuple(column.cell(row) for column in columns),
            message=message(row),
            notes=(
                *_under(row, rows, dtypes, names),
                *(_quantization(comparison, row) if row.place == first[row.module] else ()),
                *_elements(row, comparison.elements.get(row.place)),
            ),
        )
        for row in rows.listed
    ]
    return Table("#", "module", tuple(column.title for column in columns), tuple(entries))


def _under(
    row: Row, rows: ListedRows, dtypes: tuple[str | None, str | None], names: RowNames
) -> Iterator[Styled]:
    for other in rows.folded.get(row.place, ()):
        name = row_name(other, names)
        yield styled(f"= {name.plain}", "dim")
    yield from notes(row, dtypes)


def _quantization(comparison: Comparison, row: Row) -> Iterator[Note]:
    """How the module is quantized on each side."""
    sides = comparison.quantization.get(row.module, ((), ()))
    for side, found in zip(("reference", "candidate"), sides, strict=True):
        for parameters in found:
            yield tuple(words(f"{side} {parameters_text(parameters)}", "magenta"))


def _elements(row: Row, elements: ElementsJson | None) -> Iterator[Note]:
    if elements is not None and row.status not in ("identical", "exact"):
        yield tuple(words(f"difference {elements_text(elements)}"))


def _hidden_lines(comparison: Comparison, rows: ListedRows, width: int | None) -> Iterator[Styled]:
    """How many rows are not listed, why, and how to see them."""
    hidden = rows.hidden_texts()
    if hidden:
        pieces = [*separated(hidden, ","), styled("(--all lists them)", "dim")]
        yield from labelled("not listed", pieces, width)
    cut = comparison.coverage.pairs - len(comparison.rows)
    if cut:
        yield from labelled("not listed", words(f"{counted(cut, 'row')} beyond --top"), width)
