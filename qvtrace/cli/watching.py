"""What is seen of a recording while it runs: calls as JSON, inputs, stops in the debugger."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qvtrace.cli.flags import ElementFlags
from qvtrace.cli.recording_flags import WatchFlags
from qvtrace.cli.terminal import error_width, print_lines, silence
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.models import PreparedModel
    from qvtrace.observers import Observer


def check_watching(watch: WatchFlags, elements: ElementFlags) -> None:
    """Raise `UsageError` for what cannot be watched, before a model is loaded in vain."""
    elements.limit(0)
    if watch.break_before and not watch.break_at:
        raise UsageError("--break-before: stops where --break does; add --break PATTERN")
    if watch.break_at:
        _refuse_without_terminal()


def _refuse_without_terminal() -> None:
    from qvtrace.observers.breaking import needs_terminal, refuse_missing_debugger

    refuse_missing_debugger()
    if needs_terminal() and not (sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError(
            "--break: standard input is no terminal to debug in; run it in one, "
            "or name a debugger that needs none in PYTHONBREAKPOINT"
        )


def shares_terminal(watch: WatchFlags, output: TextIO) -> bool:
    """Whether what is seen may come between the lines of a progress bar: a debugger, or text that
    goes to a terminal, if only through another program."""
    if watch.break_at:
        return True
    return (watch.print_calls or watch.print_inputs) and (output.isatty() or _is_pipe(output))


def _is_pipe(output: TextIO) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(output.fileno()).st_mode)
    except (OSError, ValueError):  # no file at all
        return False


@contextmanager
def watching(
    watch: WatchFlags, elements: ElementFlags, output: TextIO
) -> Iterator[tuple["Observer", ...]]:
    """Observers for one recording; `output` is what is standard output for the user."""
    from qvtrace.metrics.elements import ELEMENTS_LIMIT
    from qvtrace.observers.breaking import BreakAt, is_enabled
    from qvtrace.observers.printing import PrintCalls

    printer = PrintCalls(output, values=elements.values, limit=elements.limit(ELEMENTS_LIMIT))
    screen = output if output.isatty() else sys.stderr
    stopper = BreakAt(*watch.break_at, before=watch.break_before, output=screen)
    printers = (printer,) if watch.print_calls else ()
    stoppers = (stopper,) if watch.break_at and is_enabled() else ()
    try:
        yield (*printers, *stoppers)
    finally:
        if printer.is_cut:
            silence(output)
    if stoppers and not stopper.stops:
        _warn("--break stopped nowhere: none of its modules was called")


def _warn(text: str) -> None:
    from qvtrace.reports.layout import labelled, words

    print_lines(labelled("warning", words(text, "yellow"), error_width()), sys.stderr)


def print_inputs(prepared: "PreparedModel", file: TextIO) -> None:
    """Print what a model is about to be given."""
    from qvtrace.recording.identity import positional_parameters
    from qvtrace.reports.inputs import input_lines

    names = positional_parameters(prepared.model)
    print_lines(input_lines(names, prepared.args, prepared.kwargs), file)
