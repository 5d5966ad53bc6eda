"""A comparison as annotations of GitHub Actions: one line for each gate that failed."""

from collections.abc import Iterator

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.row_names import RowNames
from qvtrace.judging.decision import GATE_FAILED, NOTHING_COMPARABLE, gate_text
from qvtrace.reports.formatting import printable

_DATA = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY = {**_DATA, ":": "%3A", ",": "%2C"}


def annotations(comparison: Comparison) -> Iterator[str]:
    """Workflow commands that mark the run with what made the exit code other than 0."""
    verdict = comparison.verdict
    if verdict.exit_code == NOTHING_COMPARABLE:
        yield _error("nothing was comparable", verdict.text)
    if verdict.exit_code == GATE_FAILED:
        name = RowNames(comparison.rows)
        for result in verdict.gates:
            if not result.ok:
                yield _error(result.gate, gate_text(result, name))


def _error(title: str, text: str) -> str:
    title = _escaped(f"qvtrace: {printable(title)}", _PROPERTY)
    return f"::error title={title}::{_escaped(printable(text), _DATA)}"


def _escaped(text: str, codes: dict[str, str]) -> str:
    return "".join(codes.get(character, character) for character in text)
