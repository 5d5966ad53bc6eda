"""`qvtrace run --in-flight`: one variant compared with an archive while it runs."""

import sys
from contextlib import ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import typer

from qvtrace.cli.comparison_flags import ReportFlags
from qvtrace.cli.recording import Job, run_job
from qvtrace.cli.reporting import check_output, write_comparison
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.comparison.options import DiffOptions


@dataclass(frozen=True)
class InFlight:
    """What such a run was asked for."""

    reference: str
    job: Job  # of the candidate
    options: "DiffOptions"
    report: ReportFlags
    floor: str | None = None
    local: str | None = None


def run_in_flight(asked: InFlight) -> None:
    """Run the candidate, write the report, and exit as `diff` does."""
    from qvtrace.archive import Archive
    from qvtrace.comparison.options import check_gates
    from qvtrace.inflight.flight import Flight

    job, report = asked.job, asked.report
    if job.model.like is not None:
        raise UsageError("--like: --in-flight says which archive to be like; leave it out")
    job = replace(job, model=replace(job.model, like=asked.reference))
    check_output(report.output, job.files_read)
    if job.storage.weights:
        raise UsageError("--weights: no weights are compared in flight; leave it out")
    for name, value in (
        ("--sample-tokens", job.share.sample_tokens),
        ("--stats-only", job.share.stats_only or None),
        ("--max-bytes", job.share.max_bytes),
    ):
        if value is not None:
            raise UsageError(f"{name}: nothing is stored in flight; leave it out")
    with ExitStack() as stack:
        archives = [
            None if file is None else stack.enter_context(Archive.open(file))
            for file in (asked.reference, asked.floor, asked.local)
        ]
        reference, floor, local = archives
        assert reference is not None
        if job.storage.private and not reference.is_private:
            raise UsageError(
                f"--private: {reference.file} is not private, and nothing is stored in flight; "
                "leave it out"
            )
        check_gates(asked.options, reference)
        flight = Flight(reference, asked.options, floor=floor, local=local)
        run_job(replace(job, open_writer=flight.open_writer))
        print(file=sys.stderr)
        comparison = flight.comparison()
    with redirect_stdout(sys.stderr) if job.watch.print_calls else nullcontext():
        write_comparison(comparison, report)
    raise typer.Exit(comparison.verdict.exit_code)
