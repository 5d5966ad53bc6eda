"""The command line: each command is parse -> call -> print -> exit code, in a module of its own."""

from typing import Annotated

import typer

from qvtrace.cli.diff import diff
from qvtrace.cli.extract import extract
from qvtrace.cli.gate import gate
from qvtrace.cli.group import TROUBLE, ReportErrors
from qvtrace.cli.merge import merge
from qvtrace.cli.quantizers import quantizers
from qvtrace.cli.record import record
from qvtrace.cli.recover import recover
from qvtrace.cli.replay import replay
from qvtrace.cli.run import run
from qvtrace.cli.show import show
from qvtrace.cli.suggest import suggest
from qvtrace.cli.terminal import prepare_streams
from qvtrace.cli.verify import verify

app = typer.Typer(
    name="qvtrace",
    cls=ReportErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for command in (
    run,
    record,
    diff,
    gate,
    replay,
    suggest,
    extract,
    show,
    verify,
    recover,
    merge,
    quantizers,
):
    app.command()(command)


def main() -> None:
    """The console script."""
    prepare_streams()
    app(prog_name="qvtrace")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qvtrace {version('qvtrace')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Show the version.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """See where a quantized model starts to differ from its float original, module by module.

    Start with: qvtrace run
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(TROUBLE)
