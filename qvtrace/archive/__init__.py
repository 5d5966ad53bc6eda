"""The archive: the only code that knows the file."""

import os

from qvtrace.archive.reader import Archive, recorded_by
from qvtrace.archive.recovery import Recovery, recover
from qvtrace.archive.writer import ArchiveWriter, Tensor, refuse_existing

__all__ = [
    "Archive",
    "ArchiveWriter",
    "Recovery",
    "Tensor",
    "load",
    "recorded_by",
    "recover",
    "refuse_existing",
]


def load(file: str | os.PathLike[str]) -> Archive:
    """Open an archive for reading; close it, or use it in a `with` block.

    Raises a child of `ArchiveError` that names the file.
    """
    return Archive.open(file)
