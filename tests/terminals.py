"""A command at a terminal, as somebody sits before it: reads what it shows, types into it."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


class Terminal:
    """What a command shows on a terminal, and the keys that are pressed there."""

    def __init__(self, descriptor: int, process: "subprocess.Popen[bytes]") -> None:
        self.shown = ""
        self._descriptor = descriptor
        self._process = process

    def until(self, wanted: str) -> str:
        """Everything that is shown next, up to and with this text."""
        begin = len(self.shown)
        while wanted not in self.shown[begin:]:
            chunk = self._read()
            assert chunk, f"{wanted!r} does not come after {self.shown!r}"
            self.shown += chunk
        return self.shown[begin:]

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self._descriptor, f"{line}\n".encode())

    def press(self, key: str) -> None:
        """Press one key, such as Ctrl-C."""
        os.write(self._descriptor, key.encode())

    def exit_code(self) -> int:
        """Read to the end, and wait."""
        while chunk := self._read():
            self.shown += chunk
        return self._process.wait()

    def _read(self) -> str:
        try:
            return os.read(self._descriptor, 1 << 16).decode().replace("\r\n", "\n")
        except OSError:  # the other end is closed
            return ""


@contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[Terminal]:
    """`qvtrace` with these arguments, at a terminal of its own of 80 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    words = [sys.executable, "-m", "qvtrace", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    process = subprocess.Popen(
        words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**inherited, "TERM": "dumb", **environment},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
