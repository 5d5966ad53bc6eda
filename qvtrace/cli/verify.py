"""`qvtrace verify`: whether an archive still holds what was recorded."""

from typing import Annotated

import typer

from qvtrace.errors import DamagedArchiveError


def verify(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="The archive to check.")],
) -> None:
    """Check every digest of an archive."""
    from qvtrace.archive import Archive
    from qvtrace.reports.formatting import counted, printable

    with Archive.open(archive) as opened:
        damaged = list(opened.damaged_tensors())
        tensors = counted(len(opened.manifest.tensors), "tensor")
    for key in damaged:
        print(printable(key))
    if damaged:
        raise DamagedArchiveError(
            f"{archive}: {len(damaged)} of {tensors} do not match their digest, "
            f"the first is {damaged[0]}; copy it again, or record again"
        )
    print(f"{printable(archive)}: {tensors}, every digest matches")
