"""What came of the gates, as lines of text: the rows that failed each of them."""

from collections.abc import Iterator

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.row_names import RowNames
from qvtrace.judging.decision import measured
from qvtrace.patterns import shown
from qvtrace.reports.formatting import counted, listed, printable
from qvtrace.reports.layout import LABEL_WIDTH, labelled, words, wrapped
from qvtrace.reports.styled import Styled, styled

_ROWS_LISTED = 10
_MODULES_LISTED = 8


def gate_lines(comparison: Comparison, width: int | None, *, everything: bool) -> Iterator[Styled]:
    """Each gate with the rows that failed it, worst first; `everything` names all of them."""
    name = RowNames(comparison.rows)
    indent = styled(" " * LABEL_WIDTH)
    limit = None if everything else _ROWS_LISTED
    for result in comparison.verdict.gates:
        answer, style = ("held", "green") if result.ok else ("FAILED", "bold red")
        if not result.is_applied:
            answer, style = "not applied", "yellow"
        rows = counted(result.rows, "row")
        told = rows if result.ok else f"{result.failed} of {rows}"
        asides = f" ({', '.join(result.asides)})" if result.asides else ""
        head = f"{printable(result.gate)}: {printable((result.note or told) + asides)}"
        yield from labelled("gate", [styled(answer, style), *words(head)], width)
        for finding in result.failures[:limit]:
            text = f"{name(finding.place)}: {measured(finding, result.subject)}"
            yield from wrapped(indent, indent, words(printable(text)), width)
        if limit is not None and result.failed > limit:
            more = f"and {result.failed - limit} more (--all lists them)"
            yield from wrapped(indent, indent, [styled(more, "dim")], width)
    yield from _changed_lines(comparison, width, everything=everything)


def _changed_lines(
    comparison: Comparison, width: int | None, *, everything: bool
) -> Iterator[Styled]:
    if comparison.changes is None:
        return
    limit = None if everything else _MODULES_LISTED
    for label in ("new", "vanished"):
        names = [shown(name) for name in getattr(comparison.changes, label)]
        if names:
            text = f"{counted(len(names), 'module')}: {listed(names, limit)}"
            yield from labelled(label, words(text), width)
