"""Hooks on a model -> calls -> an archive.

    with qvtrace.record(model, "fp.st"):
        model(**inputs)

A hook never changes an output and never raises into the model: what goes wrong in one ends the
recording, not the forward.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from torch import nn

from qvtrace.archive.destinations import place_of
from qvtrace.archive.dry_run import DryWriter
from qvtrace.errors import ArchiveError, QvtraceError, RecordingError, UsageError
from qvtrace.manifest import Manifest, VariantInfo
from qvtrace.observers import Observer, Watch
from qvtrace.patterns import require_matches, select, shown
from qvtrace.privacy import load_privacy
from qvtrace.recording.budget import Fixed, parse_size, tokens_within
from qvtrace.recording.call_stacks import OpenCall
from qvtrace.recording.calls import CallRecorder
from qvtrace.recording.compilation import eager_stance
from qvtrace.recording.description import Description
from qvtrace.recording.hooks import Hooks
from qvtrace.recording.interrupts import interrupts_put_off
from qvtrace.recording.keeping import Share
from qvtrace.recording.module_entries import ModuleEntries
from qvtrace.recording.module_tree import (
    NamedModule,
    all_names,
    refuse_shared_names,
    walk_modules,
)
from qvtrace.recording.observed_calls import ObservedCalls
from qvtrace.recording.options import RecordingReport, RecordOptions
from qvtrace.recording.position import Position
from qvtrace.recording.skips import skipped_modules
from qvtrace.recording.steps import Ids, step_entry
from qvtrace.recording.values import StoredValues
from qvtrace.recording.writers import open_writer, path_of_process
from qvtrace.redaction import error_line


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    inputs: bool = True,
    kwargs: bool = True,
    caches: bool = False,
    weights: bool = False,
    sample_tokens: int | None = None,
    stats_only: bool = False,
    private: bool = False,
    private_key: str | os.PathLike[str] | None = None,
    max_bytes: int | str | None = None,
    rehearse: Callable[[], object] | None = None,
    observers: Sequence[Observer] = (),
) -> "Recording":
    """Record every call of every module of `model` within a `with` block.

    Leaving the block closes the archive at `path`; an exception inside it closes what there is as
    `path.partial` and goes on its way. `include` and `exclude` are patterns on module names;
    `inputs` and `kwargs` can be left out to store less; `caches` also stores the tensors of Cache
    objects, `weights` the dequantized weights. `observers` are told of each call as it happens.

    `sample_tokens` stores at most so many vectors along the last dimension of each tensor, at the
    same places in every archive; `stats_only` no elements of calls at all, but statistics. What the
    model itself is given is stored whole in both. `max_bytes` (`"200MB"`) is a budget for the file:
    `rehearse` runs the model once, as the block will, to count what there is, and of each tensor as
    many vectors are stored as there is room for.

    `private` keeps what the model is given, texts, and absolute paths out of the archive: keyed
    digests stand for them, under the key in the file `private_key`, else in the environment's
    QVTRACE_PRIVATE_KEY, else the user's own.

    `path` is taken from the folder that is the working one when the block is entered.

    Raises `ExistingFileError` when there is such a file and `overwrite` is not set, `ArchiveError`
    for a folder, `UsageError` for a pattern that fits no module, and on leaving the block
    `RecordingError` when the disk was full, or when an observer raised, which leaves the archive
    whole.
    """
    options = RecordOptions(
        include=_patterns(include, "include"),
        exclude=_patterns(exclude, "exclude"),
        overwrite=overwrite,
        inputs=inputs,
        kwargs=kwargs,
        caches=caches,
        weights=weights,
        share=Share(sample_tokens, stats_only),
        privacy=load_privacy(private_key) if private else None,
        max_bytes=None if max_bytes is None else parse_size(max_bytes, "max_bytes"),
        rehearse=None if rehearse is None else lambda _: rehearse(),
        observers=_observers(observers),
        variant=VariantInfo(name=variant),
    )
    return Recording(model, place_of(path), options)


class Recording(AbstractContextManager["Recording"]):
    """A recording of one model; `report` says what became of it once the block is left."""

    def __init__(self, model: nn.Module, path: Path | None, options: RecordOptions) -> None:
        """Record `model` to `path`; with `options.dry_run` nothing is written."""
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: is {type(model).__name__}; record takes a torch.nn.Module")
        self.report: RecordingReport | None = None
        self._model = model
        self._path = path_of_process(path)
        self._options = options
        self._position = Position()
        self._hooks = Hooks()
        self._watch = Watch(options.observers)
        self._meeting = threading.Lock()

    @property
    def sample(self) -> int:
        """The sample that the calls of now are of."""
        return self._position.sample

    @sample.setter
    def sample(self, sample: int) -> None:
        self._position.sample = sample

    @property
    def step(self) -> int:
        """The step of the sample's generation that the calls of now are of."""
        return self._position.step

    @step.setter
    def step(self, step: int) -> None:
        self._position.step = step

    def given(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Store what a generation is given, so that a second one can be given the same.

        The calls that it makes of the model hold more than that: caches, encoded inputs.
        """
        if self._hooks.active:
            self._description.add_given(self._values.take_given(args, kwargs))
            self._writer.describe(self._description.manifest)

    def next_step(
        self,
        chosen: Ids | None = None,
        taken: Ids | None = None,
    ) -> None:
        """End a step of a loop that calls the model again and again: later calls are of the next.

        `chosen`: the token ids that the model would go on with, one for each sequence of the batch;
        `taken`: those that the text does go on with, where they are others.
        """
        if not self._hooks.active:
            return
        entry = step_entry(self.sample, self.step, chosen, taken)
        if entry is not None and self._options.privacy is None:  # tokens are text
            self._description.add_step(entry)
            self._writer.describe(self._description.manifest)
        self._position.step += 1

    def next_sample(self) -> None:
        """Later calls are of the next sample, a `diff` pools those of all samples."""
        if self._hooks.active:
            self._position.sample += 1
            self._position.step = 0

    def __enter__(self) -> "Recording":
        if self._hooks.active or self.report is not None:
            raise UsageError("record: a recording runs once; make another one")
        modules = walk_modules(self._model)
        names = all_names(modules)
        refuse_shared_names(modules)
        require_matches(names, self._options.include, "--include")
        require_matches(names, self._options.exclude, "--exclude")
        if self._options.max_bytes is not None and not self._options.counts_only:
            self._rehearse(self._options.max_bytes)
        self._watch.begin(names)
        self._started = time.perf_counter()
        self._description = Description(self._model, self._options, modules)
        self._writer = open_writer(self._path, self._description.manifest, self._options)
        self._values = StoredValues(self._writer, self._options, self._watch, self._position)
        self._entries = ModuleEntries(self._writer, self._values)
        self._calls = CallRecorder(
            self._options,
            self._position,
            hooks=self._hooks,
            writer=self._writer,
            description=self._description,
            values=self._values,
            observed=ObservedCalls(self._watch, self._values, self._options),
            meet_modules=self._meet_modules,
        )
        with ExitStack() as stack:
            stack.callback(self._writer.discard)
            self._opened = stack.enter_context(ExitStack())
            self._opened.enter_context(eager_stance())
            self._opened.callback(self._hooks.close)
            chosen = self._chosen(modules)
            self._hooks.put(modules, chosen, self._calls)
            self._read(modules, chosen)
            self._hooks.active = self._hooks.failure is None
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        with interrupts_put_off() as pressed:
            self._close(error)
        if pressed and error is None:
            raise KeyboardInterrupt
        return False

    def _rehearse(self, budget: int) -> None:
        """Run the model once to count, and settle how many vectors of each tensor there is room
        for."""
        options, rehearse = self._options, self._options.rehearse
        if rehearse is None:
            raise UsageError(
                "max_bytes: a first forward has to count; give rehearse=, a function that runs the "
                "model once as the block will"
            )
        unwatched = replace(options, dry_run=True, counts_only=True, progress=None, observers=())
        with Recording(self._model, None, unwatched) as rehearsal:
            rehearse(rehearsal)
        writer = rehearsal._writer
        assert isinstance(writer, DryWriter)
        fixed = Fixed(rehearsal._calls.count, writer.size_with)
        tokens = tokens_within(budget, rehearsal._values.keeper.listed, fixed)
        self._options = replace(options, share=options.share.at_most(tokens))

    def _chosen(self, modules: list[NamedModule]) -> set[str]:
        """Names of the modules that are to be recorded."""
        options = self._options
        return select(set(all_names(modules)), include=options.include, exclude=options.exclude)

    def _read(self, modules: list[NamedModule], chosen: set[str]) -> None:
        """Read what is known of modules before any of them runs, unless the disk is full."""
        try:
            self._entries.begin(modules, chosen, weights=self._options.weights)
        except (OSError, ArchiveError) as error:
            self._hooks.failure = error

    def _meet_modules(self) -> None:
        """Put hooks on modules that were created since the last outermost call."""
        with self._meeting:
            known = len(self._hooks.modules)
            modules = walk_modules(self._model)
            chosen = self._chosen(modules)
            self._hooks.put(modules, chosen, self._calls)
            self._entries.read(modules, chosen)
            if len(self._hooks.modules) > known:
                self._writer.add_modules(self._entries.of(modules))

    def _close(self, error: BaseException | None) -> None:
        self._hooks.active = False
        self._opened.close()
        running = self._calls.close()
        if self._hooks.is_in_child:  # it leaves the block: the file is not its own
            return
        self._finish_weights()
        manifest = self._ending(error or self._hooks.failure, running)
        try:
            ending = self._writer.close(manifest)
        except QvtraceError as trouble:
            if error is None:
                raise
            error.add_note(f"qvtrace: {trouble}")
            return
        complete = ending.error is None
        manifest = replace(manifest, complete=complete, error=ending.error)
        self.report = self._report(manifest, ending.file)
        if error is None and complete:
            self._check_budget(ending.file)
        if error is None and not complete:
            kept = "nothing" if ending.file is None else ending.file
            raise RecordingError(
                f"{self._path or 'in flight'}: the recording ended early: {ending.error}; "
                f"what was recorded until then is in {kept}"
            ) from self._hooks.failure
        if error is None:
            self._tell_of_observers(ending.file)

    def _finish_weights(self) -> None:
        try:
            self._entries.finish()
        except (OSError, ArchiveError) as trouble:
            self._hooks.failure = self._hooks.failure or trouble

    def _ending(self, error: BaseException | None, running: list[OpenCall]) -> Manifest:
        modules, hooked = walk_modules(self._model), self._hooks.modules
        calls = {key: module.calls for key, module in hooked.items()}
        skipped = skipped_modules(modules, hooked, self._calls.bypassed)
        warnings = (
            *skipped.warnings,
            *self._entries.warnings(),
            *(_still_running(running) if error is None else ()),
        )
        opaque = dict(sorted(self._values.snapshots.opaque.items()))
        skipped = replace(skipped, opaque=opaque, warnings=warnings)
        return self._description.ending(error, self._entries.of(modules, calls), skipped)

    def _report(self, manifest: Manifest, file: Path | None) -> RecordingReport:
        skipped, counts = manifest.skipped, self._values.counts
        return RecordingReport(
            file=file,
            size=self._writer.size,
            registered=skipped.registered,
            called=skipped.called,
            recorded=skipped.recorded,
            calls=self._calls.count,
            places=counts.places,
            place_bytes=sum(counts.bytes_by_kind.values()),
            bytes_by_kind=dict(counts.bytes_by_kind),
            distinct_bytes=self._writer.distinct_bytes,
            reasons=skipped.reasons,
            opaque=skipped.opaque,
            warnings=skipped.warnings,
            seconds=time.perf_counter() - self._started,
            complete=manifest.complete,
            error=manifest.error,
            steps=manifest.steps,
        )

    def _check_budget(self, file: Path | None) -> None:
        budget = self._options.max_bytes
        if budget is not None and file is not None and self._writer.size > budget:
            raise RecordingError(
                f"{file}: has {self._writer.size} bytes, not {budget}: the model did more than in "
                "the forward that counted; record with --sample-tokens"
            )

    def _tell_of_observers(self, file: Path | None) -> None:
        for observer, failure in self._watch.failures:
            raise RecordingError(
                f"{file or 'model'}: recorded as a whole, but {observer.label} ended early: "
                f"{error_line(failure)}; record again to have all of it"
            ) from failure


def _patterns(patterns: Sequence[str], name: str) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise UsageError(f"{name}: is one text; give a list of patterns, such as [{patterns!r}]")
    return tuple(patterns)


def _observers(observers: Sequence[Observer]) -> tuple[Observer, ...]:
    if not isinstance(observers, Sequence) or not all(isinstance(o, Observer) for o in observers):
        raise UsageError("observers: are no list of qvtrace.Observer; give one, such as [observer]")
    return tuple(observers)


def _still_running(calls: list[OpenCall]) -> Iterator[str]:
    if calls:
        first = f"{shown(calls[0].hooked.module.name)}#{calls[0].index}"
        yield (
            f"{len(calls)} call{'s' * (len(calls) > 1)} had not returned when the recording ended, "
            f"first {first}: another thread was still running the model; wait for it before "
            "leaving the block"
        )
