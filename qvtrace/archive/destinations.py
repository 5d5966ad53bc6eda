"""Where something can be written: what is wrong with a name is told before there is anything to
lose."""

import os
from pathlib import Path

from qvtrace.errors import ArchiveError

_STDOUT = Path("-")  # what other programs take standard output by


def place_of(name: str | os.PathLike[str]) -> Path:
    """An archive to write, by its name; raises `ArchiveError` for the name of a folder."""
    fault = name_fault(name)
    if fault is not None:
        raise ArchiveError(f"{os.fspath(name)}: {fault}")
    return Path(name)


def name_fault(name: str | os.PathLike[str]) -> str | None:
    """Why no file can be meant by a name as it was typed, and what to do: the slash at the end of a
    folder's name is lost in a `Path`."""
    is_of_a_folder = os.fspath(name).endswith(os.sep)
    return "is a folder; name a file in it" if is_of_a_folder else None


def archive_fault(file: Path) -> str | None:
    """Why no archive can have this name, and what to do; None where nothing is known against it.

    An archive takes the place of what has its name, so that must be a regular file.
    """
    if not file.name or file.is_dir():
        return f"is a folder; name a file in it, such as {file / 'fp.st'}"
    if file == _STDOUT:
        return "an archive cannot go to standard output; name a file"
    if file.exists() and not file.is_file():
        return "is a device or a pipe, which an archive would replace; name a file"
    return _fault_of_folder(file)


def report_fault(file: Path) -> str | None:
    """The same for text, which may go to a device or a pipe."""
    if not file.name or file.is_dir():
        return f"is a folder; name a file in it, such as {file / 'report.txt'}"
    if file == _STDOUT:
        return "standard output is where it goes without the option; leave it out, or name a file"
    if not file.exists():
        return _fault_of_folder(file)
    if not os.access(file, os.W_OK):
        return "cannot be written: Permission denied; check its permissions, or choose another"
    return None


def _fault_of_folder(file: Path) -> str | None:
    """What is wrong with the folder of a file, which is made where there is none."""
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir():
        return f"cannot be written: {there} is no folder; choose another"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"cannot be written: no permission to write in {there}; choose another folder"
    return None
