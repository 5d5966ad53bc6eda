"""What reaches the terminal: lines on standard output, progress on standard error."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    import rich.progress

    from qvtrace.recording.options import Progress
    from qvtrace.reports.styled import Styled


_NEXT = "next        "
_CONTINUED = " \\\n"  # a shell goes on with the next line


class ShowProgress(Protocol):
    """Called as a recording goes on."""

    def __call__(self, progress: "Progress", /) -> None: ...


def output_width() -> int | None:
    """The columns of the terminal; None where lines may be as long as they get."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def error_width() -> int | None:
    """The columns of the terminal that standard error is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stderr.isatty() else None


def shows_blocks() -> bool:
    """Whether standard output is a terminal that has block characters."""
    return sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")


def print_lines(lines: Iterable["Styled"], file: TextIO | None = None) -> None:
    """Write lines of text, styled where a terminal can show it; a long line is never cut."""
    stream = file or sys.stdout
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        stream.writelines(f"{line.plain}\n" for line in lines)
        return
    from rich.console import Console
    from rich.text import Text

    class Output(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1, the code of a failed gate
            raise BrokenPipeError

    console = Output(file=stream, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(Text.assemble(*line.pieces), soft_wrap=True)


def print_next(command: str) -> None:
    """Say on standard error what to type next: on a terminal in lines that fit it, which a shell
    takes for one."""
    from qvtrace.reports.formatting import printable

    lines = _fitting(printable(command), error_width())
    print(_NEXT + f"{_CONTINUED}{' ' * len(_NEXT)}".join(lines), file=sys.stderr)


def _fitting(command: str, width: int | None) -> list[str]:
    """A command in lines, each of as many options with their values as there is room for."""
    if width is None or len(_NEXT) + len(command) <= width:
        return [command]
    room = width - len(_NEXT) - len(_CONTINUED.rstrip())
    lines: list[str] = []
    for piece in _options(command):
        if lines and len(lines[-1]) + 1 + len(piece) <= room:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return lines


def _options(command: str) -> list[str]:
    """The words of a command; an option and its value are one."""
    found: list[str] = []
    awaits_value = False
    for word in map(shlex.quote, shlex.split(command)):
        is_option = word.startswith("-")
        if awaits_value and not is_option:
            found[-1] += f" {word}"
        else:
            found.append(word)
        awaits_value = is_option
    return found


def silence(stream: TextIO) -> None:
    """Let nothing that is still buffered for a closed pipe be written when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_streams() -> None:
    """Let both streams write any text.

    A process that was started without one of the standard streams gets one that leads nowhere: the
    first file that it opens would otherwise have its number, and what a library prints would be
    written into it.
    """
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 (it stays open)
            setattr(sys, name, nowhere)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def takes_nothing(stream: TextIO) -> bool:
    """Whether not one byte can be written; what is still buffered is then given up."""
    try:
        os.write(stream.fileno(), b"\n")
    except OSError:
        silence(stream)
        return True
    return False


@contextmanager
def progress_bar(variant: str, *, hidden: bool = False) -> Iterator[ShowProgress]:
    """A bar on standard error while something is recorded; nothing when that is no terminal, or
    when it is to be `hidden`."""
    if hidden or not sys.stderr.isatty():
        yield lambda progress: None
        return
    with _bar() as bar:
        task = bar.add_task(f"loading {variant}", total=None, bytes="")

        def show(progress: "Progress") -> None:
            from qvtrace.reports.formatting import byte_size

            bar.update(
                task,
                description=f"recording {variant}",
                completed=progress.modules_done,
                total=progress.modules_total,
                bytes=byte_size(progress.bytes_written),
            )

        yield show


def _bar() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("modules  {task.fields[bytes]}", markup=False),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
    )
