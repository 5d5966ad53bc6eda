"""A comparison as JUnit XML: a test case for each gate and one for comparability."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.row_names import RowNames
from qvtrace.judging.decision import measured
from qvtrace.judging.gates import GateResult
from qvtrace.reports.formatting import printable
from qvtrace.reports.head import coverage_text, side_facts

_DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>'
_ROWS_LISTED = 20


@dataclass(frozen=True)
class _Case:
    """One test case; it failed where there is a message, unless it was skipped."""

    group: str
    name: str
    message: str | None = None
    details: Sequence[str] = ()
    skipped: bool = False

    @property
    def failed(self) -> bool:
        return self.message is not None and not self.skipped


def comparison_junit(comparison: Comparison) -> str:
    """The whole document. A gate that fails lists its worst rows with their numbers."""
    cases = [_comparability(comparison), *_gates(comparison)]
    counts = {
        "name": "qvtrace",
        "tests": str(len(cases)),
        "failures": str(sum(case.failed for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.skipped for case in cases)),
        "time": "0",
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", counts)
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(comparison):
        ElementTree.SubElement(properties, "property", name=name, value=printable(value))
    for case in cases:
        _append(suite, case)
    said = comparison.verdict.text, *comparison.verdict.further
    ElementTree.SubElement(suite, "system-out").text = "\n".join(map(printable, said))
    ElementTree.indent(root)
    return f"{_DECLARATION}\n{ElementTree.tostring(root, encoding='unicode')}"


def _append(suite: ElementTree.Element, case: _Case) -> None:
    where = {"classname": case.group, "name": printable(case.name), "time": "0"}
    element = ElementTree.SubElement(suite, "testcase", where)
    if case.skipped:
        ElementTree.SubElement(element, "skipped", message=printable(case.message or ""))
    elif case.message is not None:
        failure = {"message": printable(case.message), "type": case.group}
        details = "\n".join(map(printable, case.details))
        ElementTree.SubElement(element, "failure", failure).text = details


def _properties(comparison: Comparison) -> Iterator[tuple[str, str]]:
    for name in ("reference", "candidate"):
        side = getattr(comparison, name)
        yield name, side.file
        for fact, value in side_facts(side).items():
            yield f"{name}.{fact}", value
    yield "coverage", coverage_text(comparison.coverage)


def _comparability(comparison: Comparison) -> _Case:
    """Fails where numbers are missing, or may not mean what they seem to mean."""
    faults = [] if comparison.coverage.compared else ["nothing was comparable"]
    for name in ("reference", "candidate"):
        side = getattr(comparison, name)
        if not side.complete:
            faults.append(f"the {name} is incomplete: {side.error or 'its recording was killed'}")
    differences = comparison.comparable.differences
    if not comparison.comparable.ok:
        faults.append(f"not comparable: {differences[0]}")
    return _Case("qvtrace", "comparable", "; ".join(faults) or None, differences)


def _gates(comparison: Comparison) -> Iterator[_Case]:
    names = RowNames(comparison.rows)
    for result in comparison.verdict.gates:
        message = result.note
        if message is None and not result.ok:
            message = f"{result.failed} of {result.rows} rows are not within"
        rows = list(_rows(result, names))
        yield _Case("qvtrace.gates", result.gate, message, rows, not result.is_applied)


def _rows(result: GateResult, names: RowNames) -> Iterator[str]:
    for finding in result.failures[:_ROWS_LISTED]:
        yield f"{names(finding.place)}: {measured(finding, result.subject)}"
    if result.failed > _ROWS_LISTED:
        yield f"and {result.failed - _ROWS_LISTED} more"
