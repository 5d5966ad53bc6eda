"""`qvtrace diff`: where the candidate differs from the reference."""

from itertools import chain
from typing import Annotated

import typer

from qvtrace.cli.comparison_flags import ExplainFlags, GateFlags, ReportFlags, RowFlags
from qvtrace.cli.flags import ElementFlags, ModulePatterns
from qvtrace.cli.options import ROWS, option, with_flags
from qvtrace.cli.reporting import check_output, check_places, write_comparison


@with_flags
def diff(
    *,
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The archive to measure against.")
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="The archive that may differ.")
    ],
    local: Annotated[
        str | None,
        option(
            ROWS,
            "A replay of the candidate's model: tells a module's own error from inherited one.",
            metavar="ARCHIVE",
        ),
    ] = None,
    rows: RowFlags,
    patterns: ModulePatterns,
    elements: ElementFlags,
    explained: ExplainFlags,
    gates: GateFlags,
    report: ReportFlags,
) -> None:
    """Compare two archives module by module; the first is the reference."""
    from qvtrace.cli.files_read import compared, named, of_gates, of_rows
    from qvtrace.comparison.diffing import diff as compare

    files = (compared(reference, candidate), of_rows(rows), of_gates(gates))
    check_places(report, rows, elements.values, explained.explain)
    check_output(report.output, chain(*files, named(("--local", local))))
    options = rows.options(patterns, gates, elements, report.limit(elements))
    comparison = compare(
        reference,
        candidate,
        floor=rows.floor,
        local=local,
        options=options,
        details=report.details,
        explain=tuple(explained.explain),
    )
    write_comparison(comparison, report)
    raise typer.Exit(comparison.verdict.exit_code)
