"""The journal beside a file that is being recorded: a line as soon as anything is known.

Each line is a tag, a space and its payload. It carries what the manifest will say, so that the
manifest is written from it without ever being in memory, and a killed recording can be finished
from it.

    P json            what is known of the trace at its start (and again when that changes)
    M json            the modules
    R json            the inputs of a root call
    W json            a weight, whose values are stored
    T json TAB entry  a stored tensor: as in the manifest, and as in the safetensors header
    E number TAB json a call begins: its inputs
    L number TAB json the same call ends: its output
    D json            contents are being moved to make room for the header
"""

import os
from collections.abc import Iterator
from pathlib import Path

from qvtrace.errors import DamagedArchiveError

TAGS = frozenset("PMRWTELD")

_WRITE_BYTES = 1 << 20


class Journal:
    """Appends lines, each with one write to the system, so that a kill loses none of them."""

    def __init__(self, file: Path, *, append: bool = False) -> None:
        """Begin a journal, or go on with one behind its last whole line."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.file = file
        self._descriptor = os.open(file, flags, 0o666)
        self._end = _whole_bytes(file) if append else 0
        os.ftruncate(self._descriptor, self._end)

    def append(self, tag: str, payload: str) -> None:
        """Write one line, or nothing of it; raises `OSError` when the disk is full."""
        line = f"{tag} {payload}\n".encode()
        try:
            write_all(self._descriptor, line)
        except BaseException:  # also Ctrl-C, which comes when the line is already there
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _whole_bytes(file: Path) -> int:
    """How far the file reaches without a last line that was cut off."""
    with file.open("rb") as lines:
        return sum(len(line) for line in lines if line.endswith(b"\n"))


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte, in as many writes as the system needs.

    At most a mebibyte at a time: a single write of many was seen to take twice as long.
    """
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]


def read_journal(file: Path) -> Iterator[tuple[str, str]]:
    """The tag and payload of each line; a last line that was cut off is left out.

    Raises `DamagedArchiveError` for a line that no recording has written.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            text = line[:-1].decode("ascii", errors="replace")
            if text[1:2] != " " or text[0] not in TAGS:
                raise DamagedArchiveError(
                    f"{file}: line {number} was not written by a recording; "
                    "restore the journal from a copy, or record again"
                )
            yield text[0], text[2:]
