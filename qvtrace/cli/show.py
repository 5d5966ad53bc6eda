"""`qvtrace show`: what is inside an archive."""

import sys
from typing import Annotated

import typer

from qvtrace.cli.flags import OUTPUT, ROWS, flag, option
from qvtrace.cli.terminal import output_width, print_lines


def show(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="The archive to look into.")],
    patterns: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATTERN]...", help="Only modules whose name is or fits one."),
    ] = None,
    as_json: Annotated[
        bool, flag(OUTPUT, "Each call as one JSON object on a line.", "--json")
    ] = False,
    values: Annotated[
        list[str] | None,
        option(ROWS, "With the elements of these modules; repeatable.", metavar="PATTERN"),
    ] = None,
    statistics: Annotated[
        bool, flag(OUTPUT, "Mean, range and more of each tensor.", "--stats")
    ] = False,
) -> None:
    """Show what is inside an archive.

    What ran and what was recorded of it, then the modules as a tree with a line for each call.
    """
    from qvtrace.archive import Archive
    from qvtrace.reports.call_json import call_lines
    from qvtrace.reports.trace import Selection, Trace
    from qvtrace.reports.trace_tree import TreeOptions, trace_lines

    with Archive.open(archive) as opened:
        trace = Trace(opened, Selection.of(opened, patterns or (), values or ()))
        if as_json:
            sys.stdout.writelines(f"{line}\n" for line in call_lines(trace))
        else:
            print_lines(trace_lines(trace, TreeOptions(output_width(), statistics)))
