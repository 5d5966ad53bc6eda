"""A comparison as Markdown that fits into a comment on a pull request, whatever the model."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.grouping import Group
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import Row
from qvtrace.judging.decision import GATE_FAILED, NOTHING_COMPARABLE, measured
from qvtrace.judging.gates import GateResult
from qvtrace.metrics.names import METRICS
from qvtrace.reports.columns import asked_columns, message, notes, row_name
from qvtrace.reports.explanations import explained
from qvtrace.reports.formatting import counted, listed, printable
from qvtrace.reports.groups import group_columns, group_name, group_notes, rows_beyond
from qvtrace.reports.head import (
    comparable_text,
    coverage_text,
    floor_text,
    sides_told,
    unmatched,
)
from qvtrace.reports.selection import ListedRows

LARGEST = 59_000  # bytes; a comment on GitHub may have 65536 characters
_RESERVE = 1_000  # for what closes the document
_LARGEST_LINE = 3_000
_LARGEST_PART = 6_000  # of the verdict, and of the lines under it
_LARGEST_TABLE = 15_000  # of the gates, of the head, and of the worst rows
_WORST = 10
_NAMED = 8  # unmatched modules

_CUT = "… (cut)"
_MARKUP = re.compile(r"[\\`*_{}\[\]()!|~$]")
_HTML = re.compile(r"[&<>]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Where a mention, a reference to an issue or a link would begin.
_LINK = re.compile(r"(?<=@)(?=\w)|(?<=#)(?=\d)|(?<=:)(?=//)|(?<=www)(?=\.)", re.IGNORECASE)


def comparison_markdown(comparison: Comparison) -> str:
    """Verdict, gates, what was compared, the ten worst rows, and the others folded; at most
    `LARGEST` bytes in UTF-8, what has no room is counted."""
    document = _Document()
    document.add(f"### qvtrace: {_headline(comparison)}", "")
    document.add(prose(printable(comparison.verdict.text), _LARGEST_PART), "")
    lines = [prose(printable(line)) for line in comparison.verdict.further]
    document.add_list(lines, _LARGEST_PART)
    document.add_table(_gate_table(comparison), comparison.verdict.gates, _LARGEST_TABLE)
    document.add_list(list(_head(comparison)), _LARGEST_TABLE)
    if comparison.options.group_by is not None:
        _add_groups(document, comparison)
    else:
        _add_rows(document, comparison)
    explanations = list(_explanations(comparison))
    if explanations:
        document.add("**Where the error is**", "")
        document.add_list(explanations, LARGEST)
    return document.text


Item = TypeVar("Item")


@dataclass(frozen=True)
class _Table(Generic[Item]):
    """How items become rows of a table."""

    noun: str
    titles: Sequence[str]
    cells: Callable[[Item], Sequence[str]]


class _Document:
    """Lines of Markdown, never more than there is room for."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._room = LARGEST - _RESERVE

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def add(self, *lines: str) -> None:
        """Lines that have to be there."""
        self._lines += lines
        self._room -= sum(map(_size, lines))

    def add_list(self, items: Sequence[str], room: int) -> None:
        """As many items as there is room for, and how many there was none for."""
        if not items:
            return
        end = self._room - room
        for position, item in enumerate(items):
            if _size(item) + len("- ") > self._room - end:
                left_out = counted(len(items) - position, "line")
                self.add(f"- and {left_out} for which there is no room here")
                break
            self.add(f"- {item}")
        self.add("")

    def add_table(self, table: "_Table[Item]", items: Sequence[Item], room: int = LARGEST) -> None:
        """As many rows as there is room for, and how many there was none for."""
        if not items:
            return
        self.add(_table_line(table.titles), _table_line(["---"] * len(table.titles)))
        end = max(0, self._room - room)
        left_out = 0
        for position, item in enumerate(items):
            line = _table_line(table.cells(item))
            if _size(line) > _LARGEST_LINE:
                left_out += 1
            elif _size(line) > self._room - end:
                left_out += len(items) - position
                break
            else:
                self.add(line)
        self.add("")
        if left_out:
            self.add(f"and {counted(left_out, table.noun)} for which there is no room here", "")


def _size(line: str) -> int:
    return len(line.encode()) + 1


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _headline(comparison: Comparison) -> str:
    gates = comparison.verdict.gates
    failed = sum(not result.ok for result in gates)
    if comparison.verdict.exit_code == GATE_FAILED:
        return f"{failed} of {counted(len(gates), 'gate')} failed"
    if comparison.verdict.exit_code == NOTHING_COMPARABLE:
        return "nothing was comparable" if not gates else "not to be judged"
    return "every gate held" if gates else "compared, no gate was set"


def _gate_table(comparison: Comparison) -> _Table[GateResult]:
    name = RowNames(comparison.rows)

    def cells(result: GateResult) -> Sequence[str]:
        rows = str(result.rows) if result.ok else f"{result.failed} of {result.rows}"
        worst = prose(result.note or "")
        if result.worst is not None:
            told = prose(printable(measured(result.worst, result.subject)))
            worst = f"{code(printable(name(result.worst.place)))}: {told}"
        worst = "; ".join(filter(None, (worst, *map(prose, result.asides))))
        came = "held" if result.is_applied else "not applied"
        return code(printable(result.gate)), came if result.ok else "**failed**", rows, worst

    return _Table("gate", ("gate", "", "rows", "worst"), cells)


def _head(comparison: Comparison) -> Iterator[str]:
    """What is compared, whether it may be, how much of it was, and what was not."""
    sides = comparison.reference, comparison.candidate
    told = zip(("reference", "candidate"), sides, sides_told(comparison), strict=True)
    for label, side, facts in told:
        yield prose(f"{label} {printable(side.file)}: {printable(' · '.join(facts))}")
    answer, reasons = comparable_text(comparison)
    yield f"comparable **{answer}**: {prose(reasons)}"
    yield prose(coverage_text(comparison.coverage))
    for text in comparison.portions:
        yield prose(printable(text))
    floor = floor_text(comparison)
    if floor is not None:
        yield prose(f"floor {floor}")
    for text, modules in unmatched(comparison.coverage):
        yield prose(f"{text}: {listed(modules, _NAMED)}")
    for side in sides:
        for warning in side.warnings:
            yield prose(f"{printable(side.file)}: {printable(warning)}")


def _explanations(comparison: Comparison) -> Iterator[str]:
    for name, texts in explained(comparison):
        yield "<br>".join([code(name), *map(prose, texts)])


def _add_rows(document: _Document, comparison: Comparison) -> None:
    rows = ListedRows.of(comparison, everything=False)
    metric = comparison.options.order if comparison.options.order in METRICS else "peir"
    listed_places = {row.place for row in rows.listed}
    ranked = comparison.worst(metric, len(comparison.rows))
    worst = [row for row in ranked if row.place in listed_places][:_WORST]
    others = [row for row in rows.listed if row not in worst]
    table = _row_table(comparison, rows)
    document.add_table(table, worst, _LARGEST_TABLE)
    cut = comparison.coverage.pairs - len(comparison.rows)
    hidden = [*rows.hidden_texts(), *([f"{counted(cut, 'row')} beyond --top"] if cut else [])]
    if others:
        document.add(f"<details><summary>{counted(len(others), 'further row')}</summary>", "")
        document.add_table(table, others)
        document.add("</details>", "")
    if hidden:
        document.add(prose(f"not listed: {', '.join(hidden)}"), "")


def _add_groups(document: _Document, comparison: Comparison) -> None:
    columns = group_columns(comparison)
    titles = [comparison.options.group_by or "", "rows", *map(prose, columns)]

    def cells(group: Group) -> Sequence[str]:
        numbers = (prose(cell(group).plain) for cell in columns.values())
        notes = (prose(note.plain) for note in group_notes(group))
        return "<br>".join([code(group_name(group)), *notes]), str(group.rows), *numbers

    document.add_table(_Table("group", titles, cells), comparison.groups)
    cut = rows_beyond(comparison)
    if cut:
        document.add(f"not listed: {counted(cut, 'row')} in groups beyond --top", "")


def _row_table(comparison: Comparison, rows: ListedRows) -> _Table[Row]:
    columns = [column for column in asked_columns(None, comparison) if not column.optional]
    dtypes = (comparison.reference.model.get("dtype"), comparison.candidate.model.get("dtype"))
    row_names = RowNames(comparison.rows)

    def name(row: Row) -> str:
        return code(row_name(row, row_names).plain)

    def cells(row: Row) -> Sequence[str]:
        names = [name(row), *(f"= {name(other)}" for other in rows.folded.get(row.place, ()))]
        under = [prose(note.plain) for note in notes(row, dtypes)]
        instead = message(row)
        if instead is not None:
            numbers = [prose(instead.plain), *[""] * (len(columns) - 1)]
        else:
            numbers = [prose(column.cell(row).plain) for column in columns]
        return ("<br>".join([*names, *under]), *numbers)

    return _Table("row", ["module", *(prose(column.title) for column in columns)], cells)


def prose(text: str, room: int = _LARGEST_LINE) -> str:
    """Text that shows as it is, no markup, no mention, no link; cut where it would be longer than
    `room` bytes."""
    escaped = _escaped(text)
    while _size(escaped) > room and text:
        text = text[: len(text) * room // (_size(escaped) + 1)]
        escaped = _escaped(text) + _CUT
    return escaped


def _escaped(text: str) -> str:
    escaped = _MARKUP.sub(lambda found: f"\\{found[0]}", _HTML.sub(_entity, text))
    return _LINK.sub("<!-- -->", escaped)


def code(text: str) -> str:
    """A name as code, in a cell of a table."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|")


def _entity(found: re.Match[str]) -> str:
    return _ENTITIES[found[0]]
