"""The journal beside a file that is being recorded: a line as soon as anything is known.

Each line is a tag, the checksum of tag and payload, and the payload, with spaces between them. It
carries what the manifest will say, so that the manifest is written from it without ever being in
memory, and a killed recording can be finished from it.

    P json            what is known of the trace at its start (and again when that changes)
    M json            the modules
    R json            the inputs of a root call
    W json            a weight, whose values are stored
    T json TAB entry  a stored tensor: as in the manifest, and as in the safetensors header
    S json            what is stored of a content that is not stored whole
    E number TAB json a call begins: its inputs
    L number TAB json the same call ends: its output
    D json            contents are being moved to make room for the header
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

_WRITE_BYTES = 1 << 20
_PAYLOAD = len("T 01234567 ")  # where it begins in a line


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
        line = journal_line(tag, payload)
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


def journal_line(tag: str, payload: str) -> bytes:
    """One line as it stands in the file."""
    mark, text = tag.encode(), payload.encode()
    return mark + _checksum(mark, text) + text + b"\n"


def _checksum(tag: bytes, payload: bytes) -> bytes:
    """As it stands between the two."""
    return b" %08x " % crc32(payload, crc32(tag))


def _is_whole(line: bytes) -> bool:
    """Whether a line is as it was written: neither cut off nor damaged."""
    return (
        line.endswith(b"\n")
        and line.isascii()
        and line[1:_PAYLOAD] == _checksum(line[:1], line[_PAYLOAD:-1])
    )


def _whole_bytes(file: Path) -> int:
    """How far the file reaches before a line that was cut off or is damaged."""
    whole = 0
    with file.open("rb") as lines:
        for line in lines:
            if not _is_whole(line):
                break
            whole += len(line)
    return whole


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte, in as many writes as the system needs.

    At most a mebibyte at a time: a single write of many was seen to take twice as long.
    """
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view[:_WRITE_BYTES]) :]


class JournalLines:
    """The lines that a journal has now, up to one that was cut off or is damaged: what comes after
    it may be about what it said."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._end = _whole_bytes(file)

    def of(self, tags: str) -> Iterator[tuple[str, str]]:
        """The tag and payload of each line that has one of these tags."""
        wanted = tags.encode()
        with self.file.open("rb") as lines:
            left = self._end
            for line in lines:
                if left <= 0:
                    return
                left -= len(line)
                if line[0] in wanted:
                    yield chr(line[0]), line[_PAYLOAD:-1].decode("ascii")


@dataclass(frozen=True)
class JournalDamage:
    """Where a journal is not as it was written."""

    line: int  # counted from 1
    lines_lost: int  # that one, and all after it


def find_damage(file: Path) -> JournalDamage | None:
    """The first line that is not as it was written; a last one that was cut off is no damage."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n") and not _is_whole(line):
                return JournalDamage(number, 1 + sum(1 for _ in lines))
    return None
