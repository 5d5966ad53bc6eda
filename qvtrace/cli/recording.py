"""Runs one recording: a model prepared, a forward under the hook, a summary of what came of it."""

import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from qvtrace.cli.flags import ElementFlags, ModulePatterns
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.recording_flags import ShareFlags, StorageFlags, WatchFlags
from qvtrace.cli.terminal import (
    ShowProgress,
    error_width,
    output_width,
    print_lines,
    progress_bar,
)
from qvtrace.cli.watching import check_watching, print_inputs, shares_terminal, watching
from qvtrace.errors import ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qvtrace.archive import Archive
    from qvtrace.archive.overwriting import InputFile
    from qvtrace.manifest import Manifest
    from qvtrace.models import PreparedModel
    from qvtrace.privacy import Privacy
    from qvtrace.recording.options import RecordOptions
    from qvtrace.recording.recorder import Recording
    from qvtrace.recording.writers import Writer
    from qvtrace.reports.recording import Outcome
    from qvtrace.trees import Json

TRACES = Path("traces")  # where archives go unless a name is given


@dataclass(frozen=True)
class Job:
    """One recording that was asked for."""

    model: ModelFlags
    variant: Variant
    patterns: ModulePatterns
    storage: StorageFlags
    share: ShareFlags
    file: Path
    overwrite: bool = False
    dry_run: bool = False
    recorded_by: str = "record"
    watch: WatchFlags = field(default_factory=WatchFlags)
    elements: ElementFlags = field(default_factory=ElementFlags)
    open_writer: "Callable[[Manifest], Writer] | None" = None  # in place of the file
    compared_by: tuple["InputFile", ...] = ()  # what is read of the comparison that follows

    @property
    def files_read(self) -> "Iterator[InputFile]":
        """What a recording must not be written over."""
        from qvtrace.cli.files_read import of_model, of_storage

        return chain(self.compared_by, of_model(self.model), of_storage(self.storage))

    @property
    def messages_only(self) -> bool:
        """Whether standard output is kept for something else than what came of the recording."""
        return self.watch.print_calls or self.recorded_by != "record"


def run_job(job: Job) -> "Outcome":
    """Record, and say what came of it: on standard error, or on standard output for a dry run
    that does not print calls there."""
    from qvtrace.archive import refuse_existing
    from qvtrace.archive.overwriting import check_archive_place, refuse_overwriting_by_archive
    from qvtrace.reports.recording import dry_run_lines, in_flight_lines, recording_lines

    check_watching(job.watch, job.elements)
    job.share.share()  # what is wrong is said before a model is loaded
    job.share.budget()
    if job.dry_run:
        check_archive_place(job.file)
        outcome = _record(job)
        width = error_width() if job.messages_only else output_width()
        print_lines(dry_run_lines(outcome, width), sys.stderr if job.messages_only else sys.stdout)
        return outcome
    if job.open_writer is not None:
        outcome = _record(job)
        print_lines(in_flight_lines(outcome, error_width()), sys.stderr)
        return outcome
    refuse_overwriting_by_archive(job.file, job.files_read)
    if not job.overwrite:
        refuse_existing(job.file)  # before a model is loaded in vain
    outcome = _record(job)
    print_lines(recording_lines(outcome, error_width()), sys.stderr)
    return outcome


def _record(job: Job) -> "Outcome":
    from qvtrace.reports.recording import Outcome

    output = sys.stdout
    with (
        redirect_stdout(sys.stderr),  # what a user's code prints is not what was asked for
        progress_bar(job.variant, hidden=shares_terminal(job.watch, output)) as progress,
        _opened(job.model.like) as like,
        watching(job.watch, job.elements, output) as observers,
    ):
        from qvtrace.models import prepare
        from qvtrace.recording.recorder import Recording

        prepared = prepare(job.model.request(job.variant), like)
        if job.watch.print_inputs:
            print_inputs(prepared, sys.stderr if job.messages_only else output)
        options = _options(job, prepared, like, progress)
        if like is not None and options.privacy is not None:
            _refuse_other_inputs(job.model, like, options.privacy, prepared.source)
        recording = Recording(
            prepared.model,
            job.file if job.open_writer is None else None,
            replace(options, observers=observers),
        )
        try:
            with recording:
                prepared.run(recording)
        except (ModelError, KeyboardInterrupt) as error:
            _name_remains(error, recording)
            raise
        assert recording.report is not None
        return Outcome(recording.report, prepared.variant, prepared.warnings, prepared.generation)


def _opened(like: str | None) -> AbstractContextManager["Archive | None"]:
    if like is None:
        return nullcontext()
    from qvtrace.archive import Archive

    return Archive.open(like)


def _options(
    job: Job, prepared: "PreparedModel", like: "Archive | None", progress: ShowProgress
) -> "RecordOptions":
    from qvtrace.recording.options import RecordOptions, options_like

    options = RecordOptions(
        include=tuple(job.patterns.include),
        exclude=tuple(job.patterns.exclude),
        overwrite=job.overwrite,
        inputs=not job.storage.no_inputs,
        kwargs=not job.storage.no_kwargs,
        caches=job.storage.caches,
        weights=job.storage.weights,
        share=job.share.share(),
        privacy=job.storage.privacy(is_like_private=like is not None and like.is_private),
        max_bytes=job.share.budget(),
        rehearse=prepared.run,
        dry_run=job.dry_run,
        recorded_by=job.recorded_by,
        model=prepared.info,
        variant=prepared.variant,
        source=prepared.source,
        environment=prepared.environment,
        progress=progress,
        open_writer=job.open_writer,
    )
    if like is not None:
        options = options_like(like.manifest, options)
    # Weights are compared between archives.
    return options if job.open_writer is None else replace(options, weights=False)


def _refuse_other_inputs(
    asked: ModelFlags, like: "Archive", privacy: "Privacy", source: "Json"
) -> None:
    """Raise `UsageError` where none were named and those of a private archive were named."""
    if asked.prompt is not None or asked.image or asked.inputs is not None:
        return
    if like.key_digest == privacy.key_digest and privacy.source(source) != (
        like.manifest.inputs.source
    ):
        raise UsageError(
            f"--like {like.file}: is private and its inputs were named; "
            "give the same with --inputs, --prompt or --image"
        )


def _name_remains(error: BaseException, recording: "Recording") -> None:
    report = recording.report
    if report is not None and report.file is not None:
        error.add_note(f"what was recorded until then is in {report.file}")
