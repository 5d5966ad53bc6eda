"""`qvtrace diff`: where the candidate differs from the reference."""

from typing import Annotated

import typer

from qvtrace.cli.flags import (
    ElementFlags,
    GateFlags,
    ModulePatterns,
    ReportFlags,
    RowFlags,
    with_flags,
)
from qvtrace.cli.reporting import refuse_archive_name, write_comparison


@with_flags
def diff(
    *,
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The archive to measure against.")
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="The archive that may differ.")
    ],
    rows: RowFlags,
    patterns: ModulePatterns,
    elements: ElementFlags,
    gates: GateFlags,
    report: ReportFlags,
) -> None:
    """Compare two archives module by module; the first is the reference."""
    from qvtrace.comparison import diff as compare

    refuse_archive_name(report, reference, candidate, *([rows.floor] if rows.floor else []))
    options = rows.options(patterns, gates, elements, report.limit(elements))
    comparison = compare(reference, candidate, floor=rows.floor, options=options)
    write_comparison(comparison, report)
    raise typer.Exit(comparison.verdict.exit_code)
