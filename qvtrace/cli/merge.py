"""`qvtrace merge`: one archive of the files that the processes of one run wrote."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qvtrace.cli.flags import Force
from qvtrace.cli.options import OUTPUT, file_option
from qvtrace.cli.terminal import print_next


def merge(
    archives: Annotated[
        list[str],
        typer.Argument(metavar="ARCHIVE...", help="The files of all ranks: fp.rank0-of-2.st ..."),
    ],
    output: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "The archive. (default: the first name without its rank)",
            "--output",
            "-o",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Join the files that the processes of one run wrote.

    A tensor that is spread over the ranks is joined as it was placed, one that all ranks have alike
    is kept once, and what cannot be joined is kept apart.
    """
    from qvtrace.merging import merge as merge_files
    from qvtrace.reports.formatting import byte_size, counted, printable

    merged = merge_files(archives, output, overwrite=force)
    counts = merged.counts
    print(
        f"{printable(str(merged.file))}: {byte_size(merged.size)}, "
        f"{counted(merged.calls, 'call')} of {counted(merged.ranks, 'rank')}; "
        f"{counted(counts.joined, 'tensor')} joined, {counts.alike} alike on every rank, "
        f"{counts.apart} kept apart"
    )
    for warning in merged.warnings:
        print(f"warning: {printable(warning)}")
    print_next(shlex.join(["qvtrace", "show", str(merged.file)]))
