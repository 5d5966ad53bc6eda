"""Where every error of the command line ends: one line on standard error, and an exit code."""

import sys
import traceback
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from qvtrace.cli.terminal import silence, takes_nothing
from qvtrace.errors import DISK_FULL, QvtraceError

TROUBLE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
SHOW_TRACEBACK = "qvtrace.traceback"  # in the context's `meta`

# typer exports only the children of this class.
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class ReportErrors(TyperGroup):
    """A group of commands that reports errors the same way to a shell and to a test."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run a command and exit with its code."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
            _flush(is_told=bool(code))
        except _UsageError as error:
            code = _report(usage_message(error))
        except OSError as error:  # of --help and --version, which run no command
            code = _report_system(error)
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what it raises on purpose becomes an exit code."""
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except QvtraceError as error:
            raise typer.Exit(
                _report_own(error, show_traceback=ctx.meta.get(SHOW_TRACEBACK))
            ) from error
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_report(_with_notes("interrupted", interrupt), INTERRUPTED)) from None
        except OSError as error:
            raise typer.Exit(_report_system(error)) from error
        except (typer.Exit, typer.Abort, _UsageError):
            raise
        except Exception as error:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}; this is a bug, please report what is above"
            raise typer.Exit(_report(text)) from error


def usage_message(error: Any) -> str:
    """What is wrong with the command line, and where its help is."""
    context = error.ctx
    command = context.command_path if context is not None else "qvtrace"
    subject, fault = _subject_and_fault(error)
    return f"{subject}: {fault}; see {command} --help"


def _subject_and_fault(error: Any) -> tuple[str, str]:
    parameter, option = getattr(error, "param", None), getattr(error, "option_name", None)
    message = error.format_message().rstrip(".")
    if parameter is not None:
        name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
        fault = error.message.rstrip(".").removeprefix("Value error, ").removeprefix("Input ")
        return name, fault or "missing"
    if option is not None:
        return option, message.replace(f": {option}", "").lower()
    return "command line", message[0].lower() + message[1:]


def _report_own(error: QvtraceError, *, show_traceback: bool) -> int:
    message = _with_notes(str(error), error)
    if show_traceback:
        traceback.print_exception(error.__cause__ or error)
    return _report(message)


def _flush(*, is_told: bool) -> None:
    """Write what is left; what cannot go anywhere is dropped where an error was told already."""
    try:
        sys.stdout.flush()
    except OSError:
        if not is_told:
            raise
        silence(sys.stdout)


def _report_system(error: OSError) -> int:
    """Of a closed pipe nothing is said: whoever read there has what it wanted."""
    if isinstance(error, BrokenPipeError):
        silence(sys.stdout)
        silence(sys.stderr)
        return BROKEN_PIPE
    subject = error.filename
    if subject is None and error.errno in DISK_FULL:
        subject = "standard output" if takes_nothing(sys.stdout) else None
    return _report(f"{subject or 'system'}: {error.strerror or error}; check path and space")


def _with_notes(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _report(message: str, code: int = TROUBLE) -> int:
    from qvtrace.reports.formatting import printable

    print(f"qvtrace: {printable(message)}", file=sys.stderr)
    return code
