"""What is written never takes the place of what was read for it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvtrace.archive.destinations import archive_fault, report_fault
from qvtrace.archive.layout import journal_of, manifest_copy_of, partial_of
from qvtrace.errors import UsageError


@dataclass(frozen=True)
class InputFile:
    """A file that is read, and what for: `which {role}`."""

    file: Path
    role: str = "is compared"

    @property
    def names(self) -> tuple[Path, ...]:
        """Itself, and what is beside it where it is an archive, or a link to one."""
        real = Path(os.path.realpath(self.file))
        files = (file for file in (self.file, real) if file.name)  # `.` and `/` are no archives
        beside = (name(file) for file in files for name in _BESIDE)
        return (self.file, *beside)


_BESIDE = (manifest_copy_of, journal_of)


def refuse_overwriting(output: Path, inputs: Iterable[InputFile], option: str = "--output") -> None:
    """Raise `UsageError` where a report in `output` would take the place of an input, whatever
    links lead there, or of what is beside it, or cannot be written at all."""
    _refuse(output, (output,), inputs, option)
    _refuse_place(output, report_fault(output), option)


def refuse_overwriting_by_archive(output: Path, inputs: Iterable[InputFile]) -> None:
    """As `refuse_overwriting`, for an archive with all that is written beside it."""
    check_archive_place(output)
    copy = manifest_copy_of(output)
    partial = partial_of(output)
    written = (output, copy, partial, journal_of(partial), partial_of(copy))
    _refuse(output, written, inputs, "--output")


def check_archive_place(output: Path) -> None:
    """Raise `UsageError` where no archive can be written."""
    _refuse_place(output, archive_fault(output), "--output")


def _refuse_place(output: Path, fault: str | None, option: str) -> None:
    if fault is not None:
        raise UsageError(f"{option} {output}: {fault}")


def _refuse(
    output: Path, written: tuple[Path, ...], inputs: Iterable[InputFile], option: str
) -> None:
    for given in inputs:
        for name in given.names:
            taken = next((file for file in written if is_same_file(file, name)), None)
            if taken is not None:
                verb = "is" if taken == output else "would overwrite"
                belongs = "" if name == given.file else f"belongs to {given.file}, which "
                raise UsageError(
                    f"{option} {output}: {verb} {name}, which {belongs}{given.role}; "
                    "choose another name"
                )


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two names lead to one file, or would once it is there."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)
