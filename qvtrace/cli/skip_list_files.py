"""The file of modules to keep float that `suggest` writes."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.archive.overwriting import InputFile
    from qvtrace.suggesting import Suggestion

_MARK = "# qvtrace suggest: "  # what an older list is known by


def check_list(file: Path, inputs: Iterable["InputFile"]) -> None:
    """Raise `UsageError` where a list would take the place of anything but an older one: elsewhere
    this option names a file that somebody wrote by hand."""
    from qvtrace.archive.overwriting import refuse_overwriting

    refuse_overwriting(file, inputs, "--keep-float-file")
    if file.is_file() and not _is_older_list(file):
        raise UsageError(
            f"--keep-float-file {file}: is there, and what to keep is looked for here and written "
            "to it; name a new file, or narrow the search with --include and --exclude"
        )


def write_list(found: "Suggestion", file: Path) -> None:
    """Write the modules, unless there are none: such a file could not be read."""
    from qvtrace.cli.reporting import write_file

    if not found.keep_float:
        print(f"qvtrace: nothing to keep float, {file} is not written", file=sys.stderr)
        return
    names = "".join(f"{name}\n" for name in found.keep_float)
    text = f"{_MARK}{found.target.described}, {found.quantizer}\n{names}"
    write_file(text, file, "--keep-float-file")
    print(f"qvtrace: wrote {file}", file=sys.stderr)


def _is_older_list(file: Path) -> bool:
    with file.open("rb") as there:
        return there.read(len(_MARK)) == _MARK.encode()
