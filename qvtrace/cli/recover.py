"""`qvtrace recover`: makes readable what a killed recording left."""

import shlex
import sys
from typing import Annotated

import typer

from qvtrace.cli.terminal import print_next


def recover(
    archive: Annotated[
        str, typer.Argument(metavar="ARCHIVE.partial", help="The file that the recording left.")
    ],
) -> None:
    """Make readable what a killed recording left."""
    from qvtrace import archive as archives
    from qvtrace.reports.formatting import counted, printable

    recovery = archives.recover(archive)
    found = f"{counted(recovery.calls, 'call')}, {counted(recovery.tensors, 'tensor')}"
    state = "was readable already" if recovery.was_readable else "is readable again"
    if recovery.lost:
        found += f", {counted(recovery.lost, 'tensor')} lost with the end of the file"
    print(f"{printable(archive)}: {state}: {found}")
    if recovery.damage is not None:
        lost = counted(recovery.damage.lines_lost, "line")
        print(
            f"qvtrace: {printable(archive)}: line {recovery.damage.line} of its journal is "
            f"damaged: {lost} of it could not be used, and what they told of is lost",
            file=sys.stderr,
        )
    print_next(shlex.join(["qvtrace", "show", archive]))
