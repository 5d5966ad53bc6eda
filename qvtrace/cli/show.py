"""`qvtrace show`: what is inside an archive."""

import sys
from typing import Annotated

import typer

from qvtrace.cli.flags import ElementFlags
from qvtrace.cli.options import OUTPUT, flag, with_flags
from qvtrace.cli.terminal import output_width, print_lines


@with_flags
def show(
    *,
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="The archive to look into.")],
    patterns: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATTERN]...", help="Only modules whose name is or fits one."),
    ] = None,
    as_json: Annotated[
        bool, flag(OUTPUT, "Each call as one JSON object on a line.", "--json")
    ] = False,
    elements: ElementFlags,
    statistics: Annotated[
        bool, flag(OUTPUT, "Mean, range and more of each tensor.", "--stats")
    ] = False,
) -> None:
    """Show what is inside an archive.

    What ran and what was recorded of it, then the modules as a tree with a line for each call.
    """
    from qvtrace.archive import Archive
    from qvtrace.metrics.elements import ELEMENTS_LIMIT
    from qvtrace.reports.call_json import call_lines
    from qvtrace.reports.trace import Selection, Trace
    from qvtrace.reports.trace_tree import TreeOptions, trace_lines
    from qvtrace.reports.values import ELEMENTS_SHOWN

    limit = elements.limit(ELEMENTS_LIMIT if as_json else ELEMENTS_SHOWN)
    with Archive.open(archive) as opened:
        trace = Trace(opened, Selection.of(opened, patterns or (), elements.values))
        if as_json:
            sys.stdout.writelines(f"{line}\n" for line in call_lines(trace, limit))
        else:
            print_lines(trace_lines(trace, TreeOptions(output_width(), statistics, limit)))
