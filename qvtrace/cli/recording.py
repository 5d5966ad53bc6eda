"""Runs one recording: a model prepared, a forward under the hook, a summary of what came of it."""

import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvtrace.cli.flags import ModelFlags, ModulePatterns, StorageFlags, Variant
from qvtrace.cli.terminal import (
    ShowProgress,
    error_width,
    output_width,
    print_lines,
    progress_bar,
)
from qvtrace.errors import ModelError, UsageError

if TYPE_CHECKING:
    from qvtrace.archive import Archive
    from qvtrace.models import PreparedModel
    from qvtrace.recorder import Recording
    from qvtrace.recording import RecordOptions
    from qvtrace.reports.recording import Outcome

TRACES = Path("traces")  # where archives go unless a name is given


@dataclass(frozen=True)
class Job:
    """One recording that was asked for."""

    model: ModelFlags
    variant: Variant
    patterns: ModulePatterns
    storage: StorageFlags
    file: Path
    overwrite: bool = False
    dry_run: bool = False
    recorded_by: str = "record"


def run_job(job: Job) -> None:
    """Record, and say what came of it: on standard error, or on standard output for a dry run."""
    from qvtrace.archive import refuse_existing
    from qvtrace.reports.recording import dry_run_lines, recording_lines

    if not job.file.name or job.file.is_dir():
        raise UsageError(f"--output {job.file}: is a folder; name a file in it, such as fp.st")
    if job.dry_run:
        print_lines(dry_run_lines(_record(job), output_width()))
        return
    if not job.overwrite:
        refuse_existing(job.file)  # before a model is loaded in vain
    print_lines(recording_lines(_record(job), error_width()), sys.stderr)


def _record(job: Job) -> "Outcome":
    from qvtrace.reports.recording import Outcome

    with (
        redirect_stdout(sys.stderr),  # what a user's code prints is not what was asked for
        progress_bar(job.variant) as progress,
        _opened(job.model.like) as like,
    ):
        from qvtrace.models import prepare
        from qvtrace.recorder import Recording

        prepared = prepare(job.model.request(job.variant), like)
        recording = Recording(prepared.model, job.file, _options(job, prepared, like, progress))
        try:
            with recording:
                prepared.run()
        except (ModelError, KeyboardInterrupt) as error:
            _name_remains(error, recording)
            raise
        assert recording.report is not None
        return Outcome(recording.report, prepared.variant, prepared.warnings)


def _opened(like: str | None) -> AbstractContextManager["Archive | None"]:
    if like is None:
        return nullcontext()
    from qvtrace.archive import Archive

    return Archive.open(like)


def _options(
    job: Job, prepared: "PreparedModel", like: "Archive | None", progress: ShowProgress
) -> "RecordOptions":
    from qvtrace.recording import RecordOptions

    settings = {} if like is None else like.manifest.settings
    return RecordOptions(
        include=tuple(job.patterns.include) or _texts(settings.get("include")),
        exclude=tuple(job.patterns.exclude) or _texts(settings.get("exclude")),
        overwrite=job.overwrite,
        inputs=not job.storage.no_inputs and settings.get("inputs") is not False,
        kwargs=not job.storage.no_kwargs and settings.get("kwargs") is not False,
        caches=job.storage.caches or settings.get("caches") is True,
        dry_run=job.dry_run,
        recorded_by=job.recorded_by,
        model=prepared.info,
        variant=prepared.variant,
        source=prepared.source,
        environment=prepared.environment,
        progress=progress,
    )


def _texts(value: Any) -> tuple[str, ...]:
    """Patterns that an archive names; a file may say anything."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _name_remains(error: BaseException, recording: "Recording") -> None:
    report = recording.report
    if report is not None and report.file is not None:
        error.add_note(f"what was recorded until then is in {report.file}")
