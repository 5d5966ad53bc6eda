"""A comparison as lines of text: what is compared, the rows, the verdict."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvtrace.comparison import Comparison, DiffOptions, Place, Row
from qvtrace.reports.columns import (
    Bar,
    Column,
    default_columns,
    further_columns,
    message,
    metric_column,
    notes,
    peir_bar,
    row_name,
)
from qvtrace.reports.formatting import counted, printable
from qvtrace.reports.head import head_lines
from qvtrace.reports.layout import GAP, Entry, Table, labelled, separated, words
from qvtrace.reports.styled import Styled, styled
from qvtrace.row_names import RowNames
from qvtrace.rows import NOT_STORED

_IN_DEFAULT_COLUMNS = frozenset(
    {"order", "name", "peir", "token_sqnr_p50", "token_sqnr_p5", "max_abs_error", "mean_abs_error"}
)


@dataclass(frozen=True)
class TableOptions:
    """How a comparison is shown."""

    width: int | None = None  # of the terminal; None: lines as long as they get
    blocks: bool = False  # bars of block characters
    everything: bool = False  # rows that are folded or hidden otherwise


def comparison_lines(comparison: Comparison, options: TableOptions) -> Iterator[Styled]:
    """The whole report."""
    yield from head_lines(comparison, options.width, everything=options.everything)
    yield Styled()
    rows = _Rows.of(comparison, everything=options.everything)
    if rows.listed:
        yield from _table(comparison, rows, options).lines(options.width)
        yield Styled()
    yield from _hidden_lines(comparison, rows, options.width)
    style = "bold" if comparison.verdict.exit_code == 0 else "bold red"
    verdict = words(printable(comparison.verdict.text), style)
    yield from labelled("verdict", verdict, options.width)
    for line in comparison.verdict.lines:
        yield from labelled("", words(printable(line)), options.width)


@dataclass(frozen=True)
class _Rows:
    """Which rows are listed, which are folded into those, and how many of each kind are hidden."""

    listed: tuple[Row, ...]
    folded: dict[Place, list[Row]]
    hidden: Counter[str]

    @classmethod
    def of(cls, comparison: Comparison, *, everything: bool) -> "_Rows":
        """Sort the rows of a comparison."""
        if everything:
            return cls(comparison.rows, {}, Counter())
        kinds = Counter(kind for row in comparison.rows if (kind := _hidden_kind(row)) is not None)
        seen = [row for row in comparison.rows if _hidden_kind(row) is None]
        places = {row.place for row in seen if row.same_as is None}
        listed = []
        folded = defaultdict(list)
        for row in seen:
            if row.same_as is not None and row.same_as in places:
                folded[row.same_as].append(row)
            else:
                listed.append(row)
        return cls(tuple(listed), dict(folded), kinds)


def _hidden_kind(row: Row) -> str | None:
    """Why nothing would be learnt from seeing the row; None when it is to be seen."""
    if row.status == "identical":
        return "identical"
    if row.status == "exact":
        return "equal integers and values"
    if row.status == "opaque" and row.undefined.get("peir") == NOT_STORED:
        return "objects of one type, not stored"
    return None


def _table(comparison: Comparison, rows: _Rows, options: TableOptions) -> Table:
    bar = peir_bar(rows.listed, blocks=options.blocks)
    columns = _columns(bar, comparison.options)
    further = [] if comparison.options.metrics else further_columns(bar)
    if options.width is None:
        return _filled(comparison, rows, [*columns, *further])
    table = _filled(comparison, rows, columns)
    if further and table.stacked_width > options.width:
        return _filled(comparison, rows, [column for column in columns if not column.optional])
    fitting = list(_fitting(further, rows.listed, options.width - table.width))
    return _filled(comparison, rows, [*columns, *fitting]) if fitting else table


def _columns(bar: Bar, options: DiffOptions) -> list[Column]:
    if options.metrics:
        return [metric_column(name, bar) for name in options.metrics]
    columns = default_columns(bar)
    if options.sort_by not in _IN_DEFAULT_COLUMNS:
        columns.insert(0, metric_column(options.sort_by, bar))
    return columns


def _fitting(columns: Sequence[Column], rows: Sequence[Row], room: int) -> Iterator[Column]:
    """The first of the columns, as many as fit into `room`."""
    for column in columns:
        cells = (column.cell(row).width for row in rows if message(row) is None)
        room -= GAP + max([len(column.title), *cells])
        if room < 0:
            return
        yield column


def _filled(comparison: Comparison, rows: _Rows, columns: Sequence[Column]) -> Table:
    dtypes = (comparison.reference.model.get("dtype"), comparison.candidate.model.get("dtype"))
    names = RowNames(comparison.rows)
    entries = [
        Entry(
            key=str(row.order),
            name=row_name(row, names),
            cells=() if message(row) else tuple(column.cell(row) for column in columns),
            message=message(row),
            notes=tuple(_under(row, rows, dtypes, names)),
        )
        for row in rows.listed
    ]
    return Table("#", "module", tuple(column.title for column in columns), tuple(entries))


def _under(
    row: Row, rows: _Rows, dtypes: tuple[str | None, str | None], names: RowNames
) -> Iterator[Styled]:
    for other in rows.folded.get(row.place, ()):
        name = row_name(other, names)
        yield styled(f"= {name.plain}", "dim")
    yield from notes(row, dtypes)


def _hidden_lines(comparison: Comparison, rows: _Rows, width: int | None) -> Iterator[Styled]:
    """How many rows are not listed, why, and how to see them."""
    hidden = [f"{count} {kind}" for kind, count in rows.hidden.items()]
    folded = sum(map(len, rows.folded.values()))
    if folded:
        hidden.append(f"{folded} folded into the row above (=)")
    if hidden:
        pieces = [*separated(hidden, ","), styled("(--all lists them)", "dim")]
        yield from labelled("not listed", pieces, width)
    cut = comparison.coverage.pairs - len(comparison.rows)
    if cut:
        yield from labelled("not listed", words(f"{counted(cut, 'row')} beyond --top"), width)
