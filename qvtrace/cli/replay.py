"""`qvtrace replay`: a variant's modules one by one, on the inputs recorded from another."""

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvtrace.cli.flags import Force, ModulePatterns, Traceback
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.options import MODEL, MODULES, OUTPUT, file_option, option, with_flags
from qvtrace.cli.recording import TRACES
from qvtrace.cli.recording_flags import ShareFlags
from qvtrace.cli.terminal import error_width, print_lines, print_next, progress_bar
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.replayer import ReplayReport

# What the archive says of the inputs.
_SAMPLE = ("prompt", "image", "inputs", "samples", "like", "generate", "use_cache")


@with_flags
def replay(
    *,
    archive: Annotated[
        str, typer.Argument(metavar="ARCHIVE", help="The archive whose inputs modules are given.")
    ],
    variant: Annotated[Variant, option(MODEL, "Which variant runs.")] = Variant.QUANT,
    model: ModelFlags,
    patterns: ModulePatterns,
    share: ShareFlags,
    depth: Annotated[
        int | None,
        option(
            MODULES,
            "Blocks with N components in their names, not leaves.",
            metavar="N",
            min=0,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "The archive to write. (default: traces/local.st)",
            "--output",
            "-o",
        ),
    ] = None,
    force: Force = False,
    traceback: Traceback = False,
) -> None:
    """Run each module of a variant on the inputs that an archive holds for it.

    The error that is left is the module's own: compare with --local, or as any other archive.
    """
    from qvtrace.archive.overwriting import refuse_overwriting_by_archive
    from qvtrace.cli.files_read import compared, of_model

    file = output or TRACES / "local.st"
    refuse_samples(model, archive)
    share.share()  # what is wrong is said before a model is loaded
    share.budget()
    inputs = (*compared(archive), *of_model(model, archive))
    refuse_overwriting_by_archive(file, inputs)
    report = _replay(archive, variant, model, patterns, share, depth, file, overwrite=force)
    from qvtrace.judging.decision import NOTHING_COMPARABLE
    from qvtrace.reports.recording import replay_lines

    print_lines(replay_lines(report, error_width()), sys.stderr)
    if not report.calls:
        reason = next(iter(report.skipped), "it holds no call of them")
        print(
            f"qvtrace: {archive}: no module was replayed: {reason}; record it with inputs and "
            "kwargs, of the same model",
            file=sys.stderr,
        )
        raise typer.Exit(NOTHING_COMPARABLE)
    candidate = _candidate(Path(archive), variant)
    if candidate is None:
        from qvtrace.reports.formatting import printable

        beside = _next_command(archive, Path("QUANT.st"), report.file)
        what = "with a recording of the quantized model"
        print(f"or          {printable(beside)}, {what}", file=sys.stderr)
    print_next(_next_command(archive, candidate, report.file))


def refuse_samples(model: ModelFlags, archive: str) -> None:
    """Raise `UsageError` for options that say what the archive says."""
    for name in _SAMPLE:
        if getattr(model, name, None):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: the inputs are those of {archive}; leave it out")


def _candidate(archive: Path, variant: Variant) -> Path | None:
    """A recording of the variant, where one is where it is likely to be."""
    likely = (archive.with_name(f"{variant}.st"), TRACES / f"{variant}.st")
    return next((path for path in likely if path != archive and path.exists()), None)


def _next_command(archive: str, candidate: Path | None, file: Path) -> str:
    """What to type after a replay: compare it, beside a recording of the candidate."""
    words = ["qvtrace", "diff", archive]
    if candidate is None:
        return shlex.join([*words, str(file), "--sort-by", "noise_out"])
    return shlex.join([*words, str(candidate), "--local", str(file)])


def _replay(
    archive: str,
    variant: Variant,
    model: ModelFlags,
    patterns: ModulePatterns,
    share: ShareFlags,
    depth: int | None,
    file: Path,
    *,
    overwrite: bool,
) -> "ReplayReport":
    from qvtrace.archive import Archive, refuse_existing

    if not overwrite:
        refuse_existing(file)  # before a model is loaded in vain
    with (
        redirect_stdout(sys.stderr),
        progress_bar(variant) as progress,
        Archive.open(archive) as opened,
    ):
        from qvtrace.models import prepare
        from qvtrace.models.chatter import quiet
        from qvtrace.replayer import Replay, ReplayOptions, refuse_private

        refuse_private(opened)  # before a model is loaded in vain
        prepared = prepare(model.request(variant), opened)
        options = ReplayOptions(
            include=tuple(patterns.include),
            exclude=tuple(patterns.exclude),
            depth=depth,
            overwrite=overwrite,
            share=share.share(),
            max_bytes=share.budget(),
            model=prepared.info,
            variant=prepared.variant,
            environment=prepared.environment,
            progress=progress,
        )
        with quiet():
            return Replay(prepared.model, opened, file, options).run()
