"""A comparison with a model that runs now: `diff_in_flight`, and the flight itself."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Literal, Unpack

from torch import nn

from qvtrace.archive import Archive
from qvtrace.archive.passing import PassingTrace, PassingWriter
from qvtrace.collector import without_collector
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import (
    Source,
    check_local,
    compare_archives,
    open_source,
)
from qvtrace.comparison.options import DiffKeywords, DiffOptions
from qvtrace.comparison.rotating import FEWEST_ALIKE
from qvtrace.comparison.rows import WEIGHTS
from qvtrace.errors import UsageError
from qvtrace.inflight.contents import PassingContents
from qvtrace.inflight.looking import Looking
from qvtrace.manifest import Manifest, VariantInfo
from qvtrace.observers import Observer
from qvtrace.recording.options import RecordOptions, options_like
from qvtrace.recording.recorder import Recording

NAME = "in flight"  # in place of the candidate's file


class Flight:
    """One recording that is compared with an archive as it happens."""

    def __init__(
        self,
        reference: Archive,
        options: DiffOptions,
        *,
        floor: Archive | None = None,
        local: Archive | None = None,
    ) -> None:
        """Raises `UsageError` for options that cannot be used, before anything runs."""
        holds_weights = reference.manifest.weights is not None
        if options.explain:
            raise UsageError(
                "--explain: looks at tensors twice; record the candidate, and use `qvtrace diff`"
            )
        if options.path == WEIGHTS or (options.path == "all" and holds_weights):
            raise UsageError(
                f"--path {options.path}: weights are not compared in flight; record the candidate "
                "with --weights and use `qvtrace diff`, or give another path"
            )
        check_local(reference, local, options)
        self._reference = reference
        self._options = options
        self._floor = floor
        self._local = local
        self._looking = Looking(reference, options)

    def open_writer(self, manifest: Manifest) -> PassingWriter:
        """What the recorder writes to."""
        return PassingWriter(PassingTrace(NAME, manifest, self._reference), self._looking)

    def comparison(self) -> Comparison:
        """The difference of the two, when the recording has ended."""
        contents, trace = self._looking.contents, self._looking.trace
        with without_collector():
            found = compare_archives(
                self._reference, trace, self._floor, self._local, self._options, contents
            )
        trace.close()
        told = tuple(self._doubts(contents))
        candidate = replace(found.candidate, warnings=(*found.candidate.warnings, *told))
        return replace(found, candidate=candidate) if told else found

    def _doubts(self, contents: PassingContents) -> Iterator[str]:
        """What a comparison with a second archive might tell besides."""
        if contents.missed:
            yield (
                f"{contents.missed} questions about elements came after these had passed by: "
                "factors, experts, logits or what comes in between calls may not be told; record "
                "the candidate in an archive of its own"
            )
        if len(contents.turned) >= FEWEST_ALIKE and self._options.transform is None:
            yield (
                f"{len(contents.turned)} tensors look rotated; in flight no rotation is found: "
                "declare it with --transform, or record the candidate in an archive of its own"
            )


def diff_in_flight(
    reference: Source,
    model: nn.Module,
    *,
    variant: str | None = None,
    floor: Source | None = None,
    local: Source | None = None,
    observers: Sequence[Observer] = (),
    options: DiffOptions | None = None,
    **keywords: Unpack[DiffKeywords],
) -> "DiffInFlight":
    """Compare a model with an archive while it runs in a `with` block; no second archive is stored.

        with qvtrace.diff_in_flight("fp.st", model) as flight:
            model(**inputs)
        print(flight.comparison.verdict.text)

    What is recorded is what the archive's own recording was asked for. All else is as in `diff` of
    two archives, and so are the numbers. Of weights none are compared. An exception inside the
    block goes on its way, and there is no comparison.

    Raises `UsageError` for unusable options, children of `ArchiveError` for files that cannot be
    read, and on leaving the block `RecordingError` where the recording ended early.
    """
    options = replace(options or DiffOptions(), **keywords)  # type: ignore[arg-type]
    return DiffInFlight(reference, model, variant, (floor, local), observers, options)


class DiffInFlight(AbstractContextManager["DiffInFlight"]):
    """A comparison under way; `comparison` is there once the block is left."""

    def __init__(
        self,
        reference: Source,
        model: nn.Module,
        variant: str | None,
        others: tuple[Source | None, Source | None],
        observers: Sequence[Observer],
        options: DiffOptions,
    ) -> None:
        """Use `diff_in_flight`."""
        self.comparison: Comparison | None = None
        with ExitStack() as stack:
            archive = open_source(reference, stack)
            floor, local = (
                None if source is None else open_source(source, stack) for source in others
            )
            self._flight = Flight(archive, options, floor=floor, local=local)
            recording = RecordOptions(
                variant=VariantInfo(name=variant),
                observers=tuple(observers),
                open_writer=self._flight.open_writer,
            )
            like = replace(options_like(archive.manifest, recording), weights=False)
            self.recording = Recording(model, None, like)
            self._opened = stack.pop_all()

    def __enter__(self) -> "DiffInFlight":
        with ExitStack() as stack:
            stack.push(self._opened)
            self.recording.__enter__()
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        with self._opened:
            self.recording.__exit__(kind, error, traceback)
            if error is None:
                self.comparison = self._flight.comparison()
        return False
