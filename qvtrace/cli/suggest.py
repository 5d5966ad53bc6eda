"""`qvtrace suggest`: which modules to keep float, so that a quantized model reaches a target."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvtrace.cli.flags import ModulePatterns, Traceback
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.options import MODEL, OUTPUT, file_option, option, with_flags
from qvtrace.cli.recording import TRACES
from qvtrace.cli.replay import refuse_samples
from qvtrace.cli.reporting import check_output, write_file
from qvtrace.cli.terminal import output_width, print_lines, print_next
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.suggesting import Suggestion
    from qvtrace.suggesting.suggestion import Step
    from qvtrace.suggesting.targets import Target

SEARCH = "The search"
# What is typed again to record with the modules kept; a token never is.
_REPEATED = (
    "model",
    "quantizer",
    "calibration",
    "from_config",
    "num_layers",
    "dtype",
    "device",
    "device_map",
    "attn",
    "seed",
    "revision",
    "cache_dir",
    "trust_remote_code",
    "attention_maps",
)


class SuggestionFormat(StrEnum):
    """How a suggestion is written."""

    TABLE = "table"
    JSON = "json"


@with_flags
def suggest(
    *,
    archive: Annotated[
        str, typer.Argument(metavar="ARCHIVE", help="A recording of the float variant.")
    ],
    target: Annotated[
        str,
        option(
            SEARCH,
            "What to reach: 'peir 0.02 @ lm_head' (at most), 'sqnr 30' (at least), any metric of "
            "outputs, 'kl 0.01', 'top1 0.99'. Without @ PATTERN: the model's output.",
            metavar="'METRIC NUMBER [@ PATTERN]'",
        ),
    ],
    max_runs: Annotated[
        int, option(SEARCH, "Run the model at most N times.", metavar="N", min=1)
    ] = 16,
    budget: Annotated[
        str | None,
        option(
            SEARCH,
            "Bytes that modules kept float may take beyond what they take quantized: 20MB.",
            metavar="SIZE",
        ),
    ] = None,
    variant: Annotated[Variant, option(MODEL, "Which variant runs.")] = Variant.QUANT,
    model: ModelFlags,
    patterns: ModulePatterns,
    keep_float_file: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "Write what to keep float to a file, one module a line, as --keep-float-file of "
            "`record` reads it.",
        ),
    ] = None,
    format: Annotated[
        SuggestionFormat, option(OUTPUT, "How the result is written.", "--format")
    ] = SuggestionFormat.TABLE,
    output: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "Write the result to a file.",
            "--output",
            "-o",
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Find few modules to keep float, so that the quantized model reaches a target.

    Candidates are ordered by their local error, as `replay` has it; each set is then really run.
    --include and --exclude narrow which modules may be kept.
    """
    from qvtrace.cli.files_read import compared, named, of_model
    from qvtrace.cli.skip_list_files import check_list, write_list
    from qvtrace.suggesting.targets import Target

    if variant is Variant.FP:
        raise UsageError("--variant fp: is not quantized; leave the option out")
    refuse_samples(model, archive)
    inputs = (*compared(archive), *of_model(model, archive))
    check_output(output, (*inputs, *named(("--keep-float-file", keep_float_file))))
    if keep_float_file is not None:
        check_list(keep_float_file, inputs)
    found = _suggest(archive, Target.parse(target), max_runs, budget, model, patterns)
    result = keep_float_file or (output if format is SuggestionFormat.JSON else None)
    command = _next_command(found, archive, model, result)
    if keep_float_file is not None:
        write_list(found, keep_float_file)
    _write(found, format, output, command)
    if command is not None:
        print_next(command)
    raise typer.Exit(0 if found.reached else 1)


def _suggest(
    archive: str,
    target: "Target",
    max_runs: int,
    budget: str | None,
    model: ModelFlags,
    patterns: ModulePatterns,
) -> "Suggestion":
    with redirect_stdout(sys.stderr):  # what a user's code prints is not what was asked for
        from qvtrace.reports.formatting import counted
        from qvtrace.reports.suggestion import step_text
        from qvtrace.suggesting import suggest

        def tell(step: "Step") -> None:
            if step.run == 1:  # by then nothing has been found wrong with what was given
                runs = counted(max_runs, "run")
                heading = f"looking for {target.described}, in at most {runs}"
                print(heading, file=sys.stderr)
            print(step_text(step, target, max_runs), file=sys.stderr, flush=True)

        return suggest(
            archive,
            target,
            model.request(Variant.QUANT),
            max_runs=max_runs,
            budget=budget,
            include=patterns.include,
            exclude=patterns.exclude,
            tell=tell,
        )


def _write(
    found: "Suggestion", format: SuggestionFormat, output: Path | None, command: str | None
) -> None:
    from qvtrace.reports.suggestion import suggestion_lines, suggestion_text

    if format is SuggestionFormat.JSON:
        from importlib.metadata import version

        text = suggestion_text(found, version("qvtrace"), command)
    elif output is None:
        print_lines(suggestion_lines(found, output_width()))
        return
    else:
        text = "".join(f"{line.plain}\n" for line in suggestion_lines(found, None))
    if output is None:
        sys.stdout.write(text)
    else:
        write_file(text, output)
        print(f"qvtrace: wrote {output}", file=sys.stderr)


def _next_command(
    found: "Suggestion", archive: str, model: ModelFlags, result: Path | None
) -> str | None:
    """What to type to record the model with these modules kept; None where there are none."""
    if not found.keep_float:
        return None
    words = ["qvtrace", "record", "--variant", "quant", "--like", archive, *_repeated(model)]
    if result is not None:
        words += ["--keep-float-file", str(result)]
    else:
        words += [word for name in found.keep_float for word in ("--keep-float", name)]
    return shlex.join([*words, "-o", str(TRACES / "kept.st")])


def _repeated(model: ModelFlags) -> Iterator[str]:
    for name in _REPEATED:
        value = getattr(model, name)
        if value is not None and value is not False:
            yield f"--{name.replace('_', '-')}"
            yield from () if value is True else (str(value),)
