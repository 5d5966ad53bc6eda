"""`qvtrace run`: float and quantized variant recorded, and compared, in one go."""

import gc
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvtrace.cli.comparison_flags import Format, GateFlags, Paths, ReportFlags, RowFlags
from qvtrace.cli.flags import ElementFlags, Force, ModulePatterns, Traceback
from qvtrace.cli.in_flight import InFlight, run_in_flight
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.options import MODEL, OUTPUT, ROWS, option, with_flags
from qvtrace.cli.recording import TRACES, Job, run_job
from qvtrace.cli.recording_flags import ShareFlags, StorageFlags, WatchFlags
from qvtrace.cli.reporting import check_output, check_places, write_comparison
from qvtrace.errors import ExistingFileError, UsageError

if TYPE_CHECKING:
    from qvtrace.comparison.options import DiffOptions


@with_flags
def run(
    *,
    model: ModelFlags,
    patterns: ModulePatterns,
    storage: StorageFlags,
    share: ShareFlags,
    watch: WatchFlags,
    rows: RowFlags,
    elements: ElementFlags,
    gates: GateFlags,
    report: ReportFlags,
    in_flight: Annotated[
        str | None,
        option(
            MODEL,
            "Record no float variant, and store nothing: compare with this archive while the model "
            "runs.",
            "--in-flight",
            metavar="ARCHIVE",
        ),
    ] = None,
    variant: Annotated[
        Variant | None, option(MODEL, "With --in-flight: which variant runs. (default: quant)")
    ] = None,
    local: Annotated[
        str | None,
        option(ROWS, "With --in-flight: a replay, as for diff.", metavar="ARCHIVE"),
    ] = None,
    traces: Annotated[
        Path | None,
        option(OUTPUT, "Where the two archives go. (default: traces)", "--traces", metavar="DIR"),
    ] = None,
    force: Force = False,
    traceback: Traceback = False,
) -> None:
    """Record the float and the quantized variant, and compare them.

    With --in-flight, only the quantized one runs and nothing is stored.
    """
    from qvtrace.archive.overwriting import refuse_overwriting_by_archive
    from qvtrace.cli.files_read import compared, named, of_gates, of_rows
    from qvtrace.comparison.diffing import diff

    if watch.print_calls and report.output is None and report.format is not Format.TABLE:
        raise UsageError(
            f"--format {report.format}: --print has standard output for itself; "
            "write the report to a file with --output FILE"
        )
    if not watch.print_calls:  # which would have a place for elements
        check_places(report, rows, elements.values)
    if in_flight is not None:
        for name, asked in (("traces", traces), ("force", force)):
            if asked:
                raise UsageError(f"--{name}: nothing is stored in flight; leave it out")
        options = rows.options(patterns, gates, elements, report.limit(elements))
        job = Job(
            model,
            variant or Variant.QUANT,
            ModulePatterns(),
            storage,
            share,
            Path(in_flight),
            recorded_by="run",
            watch=watch,
            elements=elements,
            compared_by=(
                *compared(in_flight),
                *named(("--local", local)),
                *of_rows(rows),
                *of_gates(gates),
            ),
        )
        options = replace(options, details=report.details)
        run_in_flight(InFlight(in_flight, job, options, report, rows.floor, local))
    for name, given in (("variant", variant), ("local", local)):
        if given is not None:
            raise UsageError(f"--{name}: says something with --in-flight only; leave it out")
    options = rows.options(ModulePatterns(), gates, elements, report.limit(elements))
    folder = traces or TRACES
    _check_folder(folder)
    _check_comparison(rows, storage)
    reference, candidate = (folder / f"{variant}.st" for variant in Variant)
    job = Job(
        model,
        Variant.FP,
        patterns,
        storage,
        share,
        reference,
        overwrite=True,
        recorded_by="run",
        watch=watch,
        elements=elements,
        compared_by=(*of_rows(rows), *of_gates(gates)),
    )
    check_output(report.output, chain(job.files_read, compared(reference, candidate)))
    for file in (reference, candidate):
        refuse_overwriting_by_archive(file, job.files_read)
        _refuse_foreign(file, force=force)
    _record_both(job, candidate, options)
    comparison = diff(
        reference, candidate, floor=rows.floor, options=options, details=report.details
    )
    # Standard output has the calls already, for a reader of JSON.
    with redirect_stdout(sys.stderr) if watch.print_calls else nullcontext():
        write_comparison(comparison, report)
    raise typer.Exit(comparison.verdict.exit_code)


def _check_folder(folder: Path) -> None:
    from qvtrace.archive.destinations import archive_fault

    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--traces {folder}: is no folder; name one, or a new one")
    fault = archive_fault(folder / "fp.st")
    if fault is not None:
        raise UsageError(f"--traces {folder}: {fault}")


def _check_comparison(rows: RowFlags, storage: StorageFlags) -> None:
    """Raise `UsageError` or `ArchiveError` for what the comparison would refuse, before there are
    two recordings."""
    from qvtrace.archive import Archive
    from qvtrace.comparison.rotation_files import load_rotations

    if rows.path is Paths.WEIGHTS and not storage.weights:
        raise UsageError("--path weights: needs the weights of both variants; add --weights")
    if rows.floor is not None:
        with Archive.open(rows.floor):
            pass
    if rows.transform is not None:
        load_rotations(rows.transform)


def _record_both(job: Job, candidate: Path, options: "DiffOptions") -> None:
    """Run a job for the float variant, and again like it for the quantized one."""
    from qvtrace.archive import Archive
    from qvtrace.comparison.options import check_gates
    from qvtrace.models.quantizers import choose
    from qvtrace.patterns import require_matches

    chosen = choose(job.model.quantizer)  # what is wrong is said before the first recording
    request = job.model.request(Variant.QUANT)
    chosen.check(
        calibration=request.calibration,
        wrap_only=request.no_quantize,
        keep_float=request.keep_float,
    )
    # The patterns are those that were read: a pipe has them only once.
    quantized = replace(job.model, keep_float=[*request.keep_float], keep_float_file=None)
    run_job(replace(job, model=job.model.for_float()))
    print(file=sys.stderr)
    with Archive.open(job.file) as reference:
        check_gates(options, reference)
        names = [module.name for module in reference.manifest.modules]
        require_matches(names, options.values, "--values")
    gc.collect()  # a model is full of cycles, and the next one may need its memory
    like = quantized
    if not _is_private(job.file):
        # The sample comes from the archive, and with it the tokens of a generation.
        like = replace(like, like=str(job.file), prompt=None, image=[], inputs=None, samples=None)
    watch = replace(job.watch, print_inputs=False)  # they are the same
    run_job(replace(job, model=like, variant=Variant.QUANT, file=candidate, watch=watch))
    print(file=sys.stderr)


def _is_private(file: Path) -> bool:
    """Whether a recording holds no inputs that a second one could be given."""
    from qvtrace.archive import Archive

    with Archive.open(file) as archive:
        return archive.is_private


def _refuse_foreign(file: Path, *, force: bool) -> None:
    """Raise `ExistingFileError` for an archive that no earlier `run` has left."""
    from qvtrace.archive import recorded_by
    from qvtrace.archive.layout import partial_of

    for there in (file, partial_of(file)):
        if there.exists() and not force and recorded_by(there) != "run":
            raise ExistingFileError(
                f"{there}: was not written by `qvtrace run`; keep it and name another folder with "
                "--traces, or overwrite it with --force"
            )
