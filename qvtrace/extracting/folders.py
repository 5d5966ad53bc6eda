"""A folder that is there whole, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvtrace.errors import ArchiveError, ExistingFileError

MARK = "module.json"  # what an older extract is known by


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise `ExistingFileError` where something is in the way that must not be replaced."""
    if not folder.exists():
        return
    if folder.is_dir() and (not any(folder.iterdir()) or (overwrite and (folder / MARK).exists())):
        return
    if overwrite:
        raise ExistingFileError(
            f"{folder}: is no folder that `qvtrace extract` wrote; choose another with -o"
        )
    raise ExistingFileError(f"{folder}: is already there; overwrite it with --force, or choose -o")


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block is left without an exception."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be written: {error.strerror}") from error
    try:
        made = beside / "new"
        made.mkdir()
        yield made
        check_folder(folder, overwrite=overwrite)
        if folder.exists():
            folder.rename(beside / "old")
        made.rename(folder)
    except OSError as error:
        raise ArchiveError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
