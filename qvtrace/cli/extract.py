"""`qvtrace extract`: what a bug report on one module needs."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qvtrace.cli.flags import Force
from qvtrace.cli.options import OUTPUT, ROWS, option
from qvtrace.cli.terminal import print_next


def extract(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The archive to measure against.")
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="The archive that may differ.")
    ],
    module: Annotated[
        str,
        typer.Argument(metavar="MODULE", help="Its name, or a pattern that fits it alone."),
    ],
    output: Annotated[Path, option(OUTPUT, "The folder.", "--output", "-o", metavar="FOLDER")],
    call: Annotated[
        int | None,
        option(ROWS, "Which of its calls, by index. (default: the first)", metavar="K", min=0),
    ] = None,
    sample: Annotated[
        int | None, option(ROWS, "The first call of this sample.", metavar="S", min=0)
    ] = None,
    maps: Annotated[
        list[str] | None,
        option(
            ROWS,
            "Regular expression on candidate names; repeatable.",
            "--map",
            metavar="PATTERN=REPLACEMENT",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write inputs, outputs and weights of one module, and a script that shows how they differ.

    Inputs of a module can reveal the prompt: look at the folder before you pass it on.
    """
    from qvtrace.extracting import extract as take_out
    from qvtrace.patterns import shown
    from qvtrace.reports.formatting import counted, printable

    made = take_out(
        reference,
        candidate,
        module,
        output,
        call=call,
        sample=sample,
        maps=maps or (),
        overwrite=force,
    )
    print(
        f"{printable(str(made.folder))}: {counted(len(made.files), 'file')} on "
        f"{printable(shown(made.module))}, call {made.call}"
    )
    for text in made.missing:
        print(f"not at hand: {printable(text)}")
    print("it holds elements of the module's inputs, which can reveal the prompt")
    print_next(shlex.join(["python", str(made.folder / "reproduce.py")]))
