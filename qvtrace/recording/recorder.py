"""Hooks on a model -> calls -> an archive. The only code that runs inside the user's forward.

    with qvtrace.record(model, "fp.st"):
        model(**inputs)

A hook never changes an output and never raises into the model: what goes wrong in here ends the
recording, not the forward.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from bdb import BdbQuit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from qvtrace import trees
from qvtrace.archive import ArchiveWriter
from qvtrace.archive.dry_run import DryWriter
from qvtrace.archive.passing import PassingWriter
from qvtrace.digests import digest_json
from qvtrace.errors import ArchiveError, QvtraceError, RecordingError, UsageError
from qvtrace.manifest import (
    DID_NOT_RETURN,
    KEYED_DIGESTS,
    PROMPTS,
    GivenInputs,
    InputsInfo,
    Manifest,
    ModuleEntry,
    RootCall,
    Skipped,
    StepEntry,
    VariantInfo,
)
from qvtrace.observers import ObservedCall, Observer, Watch
from qvtrace.patterns import require_matches, select, shown
from qvtrace.privacy import load_privacy
from qvtrace.qparams.recording import ParameterRecorder
from qvtrace.recording.budget import Fixed, parse_size, tokens_within
from qvtrace.recording.call_stacks import CallStacks, Handled, OpenCall, calling_frame
from qvtrace.recording.compilation import eager_stance
from qvtrace.recording.identity import (
    Questions,
    describe_environment,
    describe_model,
    is_training,
    positional_parameters,
    process_place,
    version,
)
from qvtrace.recording.keeping import Keeper, Share
from qvtrace.recording.module_tree import NamedModule, walk_modules
from qvtrace.recording.options import Progress, RecordingReport, RecordOptions
from qvtrace.recording.placement import module_placement, parallel_plan
from qvtrace.recording.skips import HookedModule, skip_reasons, skip_warnings
from qvtrace.recording.snapshots import Snapshots
from qvtrace.recording.steps import Ids, step_entry
from qvtrace.recording.weight_recording import WeightRecorder
from qvtrace.redaction import error_line
from qvtrace.trees import Json, Node, path_component

Writer: TypeAlias = ArchiveWriter | DryWriter | PassingWriter

_PROGRESS_SECONDS = 0.1
_PARTS_OF_CALLS = frozenset({"inputs", "kwargs", "output"})


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
    return Recording(model, Path(path), options)


class _Thread(threading.local):
    """What the hooks of one thread are doing."""

    def __init__(self) -> None:
        self.overhead = 0.0  # seconds that hooks took
        self.entered = 0.0  # when the latest hook began
        self.kind = "output"  # of the places that are being stored
        self.is_of_model = False  # they are what the model itself is given
        self.contents: dict[str, torch.Tensor] = {}  # just stored, by digest, for observers


class _Hook:
    """A hook of ours on a module.

    torch copies and pickles hooks together with the model and has no way to leave them out. So
    there, something of Python's own stands in their place that does nothing.
    """

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __call__(self, *arguments: Any) -> None:
        self._run(*arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class Recording(AbstractContextManager["Recording"]):
    """A recording of one model; `report` says what became of it once the block is left."""

    def __init__(self, model: nn.Module, path: Path | None, options: RecordOptions) -> None:
        """Record `model` to `path`; with `options.dry_run` nothing is written."""
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: is {type(model).__name__}; record takes a torch.nn.Module")
        self.report: RecordingReport | None = None
        self.sample = 0
        self.step = 0
        self._model = model
        self._path = _ranked(path)
        self._options = options
        self._plan: dict[str, str] = {}
        self._hooked: dict[int, HookedModule] = {}
        self._bypassed: set[str] = set()
        # By name: a module that replaces another one goes on with its count.
        self._indices: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._stacks = CallStacks()
        self._questions = Questions()
        self._process = os.getpid()
        self._active = False
        self._failure: Exception | None = None
        self._counted = _Counts()
        self._watch = Watch(options.observers)
        self._given: GivenInputs | None = None
        self._given_keys: set[str] = set()  # of dicts, where they are private
        self._steps: list[StepEntry] = []

    def given(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Store what a generation is given, so that a second one can be given the same.

        The calls that it makes of the model hold more than that: caches, encoded inputs.
        """
        if not self._active:
            return
        self._thread.is_of_model = True
        inputs = trees.to_json(self._take(tuple(args), "(given)/", "inputs"))
        named = trees.to_json(self._take(dict(kwargs), "(given)/", "kwargs"))
        self._thread.is_of_model = False
        self._thread.contents.clear()
        self._given = GivenInputs(inputs, named, digest_json([inputs, named]))
        self._tells_text(inputs, named)
        self._writer.describe(self._described())

    def next_step(
        self,
        chosen: Ids | None = None,
        taken: Ids | None = None,
    ) -> None:
        """End a step of a loop that calls the model again and again: later calls are of the next.

        `chosen`: the token ids that the model would go on with, one for each sequence of the batch;
        `taken`: those that the text does go on with, where they are others.
        """
        if not self._active:
            return
        entry = step_entry(self.sample, self.step, chosen, taken)
        if entry is not None and self._options.privacy is None:  # tokens are text
            self._steps.append(entry)
            self._writer.describe(self._described())
        self.step += 1

    def next_sample(self) -> None:
        """Later calls are of the next sample, a `diff` pools those of all samples."""
        if self._active:
            self.sample += 1
            self.step = 0

    def _moment(self) -> tuple[int, int]:
        return self.sample, self.step

    def _described(self) -> Manifest:
        """What is known of the trace while it is recorded."""
        inputs = replace(self._manifest.inputs, given=self._given)
        return replace(self._manifest, inputs=inputs, steps=tuple(self._steps))

    def __enter__(self) -> "Recording":
        if self._active or self.report is not None:
            raise UsageError("record: a recording runs once; make another one")
        modules = walk_modules(self._model)
        names = [name for module in modules for name in (module.name, *module.aliases)]
        require_matches(names, self._options.include, "--include")
        require_matches(names, self._options.exclude, "--exclude")
        if self._options.max_bytes is not None and not self._options.counts_only:
            self._rehearse(self._options.max_bytes)
        self._watch.begin(names)
        self._started = time.perf_counter()
        self._manifest = self._beginning(modules)
        self._writer = self._open_writer()
        privacy = self._options.privacy
        self._snapshots = Snapshots(
            self._store,
            caches=self._options.caches,
            moment=self._moment,
            component=self._component,
        )
        self._keeper = Keeper(
            self._writer,
            self._options.share,
            privacy=privacy,
            counts_only=self._options.counts_only,
            forgets=self._options.open_writer is not None,
        )
        self._qparams = ParameterRecorder(self._snapshots)
        self._weights = WeightRecorder(self._snapshots, self._writer.add_weight)
        with ExitStack() as stack:
            stack.callback(self._abandon)
            self._hooks = stack.enter_context(ExitStack())
            self._hooks.enter_context(eager_stance())
            chosen = self._chosen(modules)
            self._hook(modules, chosen)
            self._active = self._describe(modules, chosen)
            stack.pop_all()
        return self

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
        fixed = Fixed(rehearsal._counted.calls, writer.size_with)
        tokens = tokens_within(budget, rehearsal._keeper.listed, fixed)
        self._options = replace(options, share=options.share.at_most(tokens))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        with _interrupts_put_off() as pressed:
            self._close(error)
        if pressed and error is None:
            raise KeyboardInterrupt
        return False

    def _close(self, error: BaseException | None) -> None:
        self._active = False
        self._hooks.close()
        running = [call for call in self._stacks.running() if call.number is not None]
        self._stacks.clear()
        if os.getpid() != self._process:  # a forked child leaves the block: the file is not its own
            return
        self._finish_weights()
        manifest = self._ending(error or self._failure, running)
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
            ) from self._failure
        if error is None:
            self._tell_of_observers(ending.file)

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

    def _finish_weights(self) -> None:
        try:
            self._thread.kind = "weights"
            self._weights.finish()
        except (OSError, ArchiveError) as trouble:
            self._failure = self._failure or trouble

    def _beginning(self, modules: list[NamedModule]) -> Manifest:
        options = self._options
        variant, questions = options.variant or VariantInfo(), self._questions
        weights = variant.name == "fp"
        model = options.model or describe_model(self._model, questions, weights=weights)
        training = questions.ask("training mode", lambda: is_training(self._model)) is True
        environment = describe_environment(self._model, questions)
        manifest = Manifest(
            qvtrace=version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            complete=False,
            error=None,
            recorded_by=options.recorded_by,
            model=replace(model, training=training),
            variant=variant,
            inputs=InputsInfo(source=options.source or {"kind": "given by the caller"}),
            contains=_contents(options),
            environment={**environment, **options.environment},
            settings={
                "include": list(options.include),
                "exclude": list(options.exclude),
                "inputs": options.inputs,
                "kwargs": options.kwargs,
                "caches": options.caches,
                "weights": options.weights,
                **options.share.to_json(),
                **({} if options.privacy is None else options.privacy.to_json()),
                **options.settings,
            },
            modules=tuple(_entry(module) for module in modules),
            calls=(),
            tensors=(),
            skipped=Skipped(),
            weights=() if options.weights else None,
        )
        return manifest if options.privacy is None else options.privacy.scrubbed(manifest)

    def _open_writer(self) -> Writer:
        if self._options.open_writer is not None:
            return self._options.open_writer(self._manifest)
        if self._options.dry_run or self._path is None:
            return DryWriter(self._manifest)
        return ArchiveWriter(self._path, self._manifest, overwrite=self._options.overwrite)

    def _abandon(self) -> None:
        self._writer.discard()

    def _describe(self, modules: list[NamedModule], chosen: set[str]) -> bool:
        """Read what is known of modules before any of them runs; False when the disk is full."""
        try:
            self._read_qparams(modules, chosen)
            self._plan = parallel_plan(modules) if process_place() is not None else {}
            if self._qparams.found_any or process_place() is not None:
                entries = (self._entry(module, calls=0) for module in modules)
                self._writer.add_modules(tuple(entries))
            if self._options.weights:
                self._thread.kind = "weights"
                self._weights.record(modules, chosen)
        except (OSError, ArchiveError) as error:
            self._failure = error
        return self._failure is None

    def _read_qparams(self, modules: list[NamedModule], chosen: set[str]) -> None:
        self._thread.kind = "quantization parameters"
        self._qparams.read(modules, chosen)

    def _chosen(self, modules: list[NamedModule]) -> set[str]:
        """Names of the modules that are to be recorded."""
        names = {name for module in modules for name in (module.name, *module.aliases)}
        return select(names, include=self._options.include, exclude=self._options.exclude)

    def _hook(self, modules: list[NamedModule], chosen: set[str]) -> None:
        """Put hooks on those that have none yet."""
        for module in modules:
            if id(module.module) not in self._hooked and not module.is_container:
                recorded = not chosen.isdisjoint((module.name, *module.aliases))
                self._hook_one(HookedModule(module, recorded))

    def _hook_one(self, hooked: HookedModule) -> None:
        module = hooked.module.module

        def before(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_ours(caller, module):
                frame = calling_frame(sys._getframe(1))
                self._guarded(self._before, hooked, frame, args, kwargs)

        def after(
            caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> None:
            if self._is_ours(caller, module):
                self._guarded(self._after, hooked, args, kwargs, output)

        self._hooked[id(module)] = hooked
        with ExitStack() as hooks:
            # By their class: a scripted module hides the method, yet runs what it registers.
            pre = nn.Module.register_forward_pre_hook(
                module, _Hook(before), with_kwargs=True, prepend=True
            )
            hooks.callback(pre.remove)
            post = nn.Module.register_forward_hook(
                module, _Hook(after), with_kwargs=True, always_call=True
            )
            hooks.callback(post.remove)
            self._hooks.push(hooks.pop_all())

    def _is_ours(self, caller: nn.Module, module: nn.Module) -> bool:
        """Not of a copy, which has the hooks of its original, nor of a forked child."""
        return self._active and caller is module and os.getpid() == self._process

    def _guarded(self, hook: Callable[..., None], *arguments: object) -> None:
        """Run a hook; the model never sees what it raises."""
        entered = self._thread.entered = time.perf_counter()
        try:
            hook(*arguments)
        except BdbQuit:  # somebody stepped here out of a debugger's stop, and has had enough
            raise KeyboardInterrupt from None
        except Exception as error:
            self._active = False
            self._failure = error
        self._thread.overhead += time.perf_counter() - entered

    def _before(
        self,
        hooked: HookedModule,
        frame: FrameType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._end_left(self._stacks.drop_left())
        caller = self._stacks.caller_of(hooked.module)
        if caller.is_root:
            self._meet_modules()
        elif not hooked.calls:
            self._note_bypass(hooked.module, caller.call)
        with self._lock:
            index = self._indices.get(hooked.module.name, 0)
            self._indices[hooked.module.name] = index + 1
            hooked.calls += 1
        place = f"{trees.key_name(hooked.module.name)}#{index}/"
        taken = self._take_inputs(hooked, place, args, kwargs, is_root=caller.is_root)
        if caller.is_root:
            self._add_root_call(_root_call(hooked.module.name, index, *taken, self.sample))
        call = OpenCall(hooked, index, None, caller.call, frame, Handled.now())
        if hooked.recorded:
            call.number = self._begin_call(call, taken, args)
        self._stacks.push(call)
        if self._watch:
            self._tell_before(call, args, kwargs, taken)
        call.started = time.perf_counter()
        call.overhead = self._thread.overhead + call.started - self._thread.entered

    def _meet_modules(self) -> None:
        """Put hooks on modules that were created since the last outermost call."""
        with self._lock:
            known = len(self._hooked)
            modules = walk_modules(self._model)
            chosen = self._chosen(modules)
            self._hook(modules, chosen)
            self._read_qparams(modules, chosen)
            if len(self._hooked) > known:
                entries = tuple(self._entry(module, calls=0) for module in modules)
                self._writer.add_modules(entries)

    def _add_root_call(self, call: RootCall) -> None:
        if self._tells_text(call.inputs, call.kwargs):
            self._writer.describe(self._described())
        self._writer.add_root_call(call)

    def _tells_text(self, *trees: Json) -> bool:
        """Whether text is given away here first; the manifest then says that it is."""
        contains = self._manifest.contains
        if self._options.privacy is not None:
            return False
        if PROMPTS in contains or not any(map(_holds_text, trees)):
            return False
        self._manifest = replace(self._manifest, contains=(*contains, PROMPTS))
        return True

    def _take_inputs(
        self,
        hooked: HookedModule,
        place: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_root: bool,
    ) -> tuple[Node | None, Node | None]:
        """The trees of inputs and kwargs, where they are asked for or compare two runs."""
        inputs = is_root or (hooked.recorded and self._options.inputs)
        named = is_root or (hooked.recorded and self._options.kwargs)
        self._thread.is_of_model = is_root
        taken = (
            self._take(args, place, "inputs") if inputs else None,
            self._take(kwargs, place, "kwargs") if named else None,
        )
        self._thread.is_of_model = False
        return taken

    def _begin_call(
        self, call: OpenCall, taken: tuple[Node | None, Node | None], args: tuple[Any, ...]
    ) -> int:
        parent = call.recorded_parent
        return self._writer.begin_call(
            {
                "module": call.hooked.module.name,
                "index": call.index,
                "sample": self.sample,
                "step": self.step,
                "parent": None if parent is None else [parent.hooked.module.name, parent.index],
                "parameters": _parameters(call.hooked, len(args)),
                "inputs": _json(taken[0]) if self._options.inputs else None,
                "kwargs": _json(taken[1]) if self._options.kwargs else None,
            }
        )

    def _after(
        self,
        hooked: HookedModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: object,
    ) -> None:
        now = time.perf_counter()
        popped = self._stacks.pop(hooked)
        self._end_left(popped[:-1])
        if not popped:
            return
        call = popped[-1]
        raised = call.handled.raised_since(output)
        error = None if raised is None else self._error_line(raised)
        node = None
        if call.number is not None:
            if error is None:
                place = f"{trees.key_name(hooked.module.name)}#{call.index}/"
                node = self._take(output, place, "output")
            seconds = now - call.started - (self._thread.overhead - call.overhead)
            self._end_call(call.number, _json(node), seconds, error)
            self._show_progress()
        if call.observed is not None:
            call.observed.inputs, call.observed.kwargs = args, kwargs
            self._tell_after(call.observed, output, node, error)

    def _error_line(self, error: BaseException) -> str:
        """What is said of an exception: its words may be those of a prompt."""
        return error_line(error) if self._options.privacy is None else type(error).__name__

    def _end_left(self, calls: list[OpenCall]) -> None:
        for call in calls:
            if call.number is not None:
                self._end_call(call.number, None, None, DID_NOT_RETURN)
            if call.observed is not None:
                self._tell_after(call.observed, None, None, DID_NOT_RETURN)

    def _tell_before(
        self,
        call: OpenCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        taken: tuple[Node | None, Node | None],
    ) -> None:
        module, is_recorded = call.hooked.module, call.number is not None
        call.observed = ObservedCall(
            module.module,
            module.name,
            tuple(module.aliases),
            call.index,
            args,
            kwargs,
            is_recorded=is_recorded,
            step=self.step,
            trees={
                "inputs": taken[0] if is_recorded and self._options.inputs else None,
                "kwargs": taken[1] if is_recorded and self._options.kwargs else None,
            },
            contents=self._thread.contents,
        )
        self._watch.before(call.observed)
        self._thread.contents.clear()

    def _tell_after(
        self, observed: ObservedCall, output: object, node: Node | None, error: str | None
    ) -> None:
        observed.output, observed.error = output, error
        observed.trees["output"] = node
        observed.contents = self._thread.contents
        self._watch.after(observed)
        self._thread.contents.clear()

    def _end_call(
        self, number: int, output: Json | None, seconds: float | None, error: str | None
    ) -> None:
        self._counted.calls += 1
        rounded = None if seconds is None else round(seconds, 6)
        self._writer.end_call(number, {"output": output, "seconds": rounded, "error": error})

    def _take(self, value: object, place: str, part: str) -> Node:
        self._thread.kind = part
        node = self._snapshots.take(value, place, part)
        return node if self._options.privacy is None else self._options.privacy.redacted(node)

    def _component(self, key: object, *, is_given: bool) -> str:
        """The component of a path; keys that the model was given are private wherever they go."""
        privacy = self._options.privacy
        if privacy is None:
            return path_component(key)
        plain = path_component(key)
        if is_given and self._thread.is_of_model:
            self._given_keys.add(plain)
        return privacy.component(plain, is_given=is_given or plain in self._given_keys)

    def _store(self, tensor: torch.Tensor, described: Any) -> str:
        self._counted.add(self._thread.kind, tensor.numel() * tensor.element_size())
        is_of_call = self._thread.kind in _PARTS_OF_CALLS
        privacy = self._options.privacy
        if is_of_call and privacy is not None:
            is_given = self._thread.kind != "output"
            digest = self._keeper.keep_private(tensor, described, privacy, is_given=is_given)
        elif is_of_call and not self._thread.is_of_model:
            digest = self._keeper.keep(tensor, described)
        else:
            digest = self._keeper.keep_whole(tensor, described)
        if self._watch and is_of_call:
            self._thread.contents[digest] = tensor
        return digest

    def _note_bypass(self, module: NamedModule, caller: OpenCall | None) -> None:
        """A module is called below a running one, but what lies between them is not running."""
        running = set()
        while caller is not None:
            running.add(id(caller.hooked.module.module))
            caller = caller.parent
        between = []
        above = module.parent
        while above is not None and id(above.module) not in running:
            between.append(above.name)
            above = above.parent
        if above is not None:
            self._bypassed.update(between)

    def _show_progress(self) -> None:
        progress = self._options.progress
        now = time.perf_counter()
        if progress is None or now - self._counted.shown < _PROGRESS_SECONDS:
            return
        self._counted.shown = now
        done = sum(hooked.calls > 0 for hooked in self._hooked.values())
        progress(Progress(done, len(self._hooked), self._writer.distinct_bytes))

    def _ending(self, error: BaseException | None, running: list[OpenCall]) -> Manifest:
        modules = walk_modules(self._model)
        reasons = skip_reasons(modules, self._hooked, self._bypassed)
        calls = {key: hooked.calls for key, hooked in self._hooked.items()}
        recorded = sum(1 for h in self._hooked.values() if h.recorded and h.calls)
        manifest = replace(
            self._described(),
            complete=error is None,
            error=None if error is None else error_line(error),
            modules=tuple(self._entry(m, calls=calls.get(id(m.module), 0)) for m in modules),
            skipped=Skipped(
                registered=len(modules),
                called=sum(1 for module in modules if calls.get(id(module.module))),
                recorded=recorded,
                reasons=reasons,
                opaque=dict(sorted(self._snapshots.opaque.items())),
                warnings=(
                    *self._questions.warnings,
                    *skip_warnings(reasons, recorded),
                    *self._qparams.warnings(),
                    *self._weights.warnings(),
                    *(_still_running(running) if error is None else ()),
                ),
            ),
        )
        privacy = self._options.privacy
        return manifest if privacy is None else privacy.scrubbed(manifest)

    def _entry(self, module: NamedModule, *, calls: int) -> ModuleEntry:
        return replace(
            _entry(module),
            calls=calls,
            quantization=self._qparams.of(module.module),
            placement=module_placement(module, self._plan),
        )

    def _report(self, manifest: Manifest, file: Path | None) -> RecordingReport:
        skipped = manifest.skipped
        return RecordingReport(
            file=file,
            size=self._writer.size,
            registered=skipped.registered,
            called=skipped.called,
            recorded=skipped.recorded,
            calls=self._counted.calls,
            places=self._counted.places,
            place_bytes=sum(self._counted.bytes_by_kind.values()),
            bytes_by_kind=dict(self._counted.bytes_by_kind),
            distinct_bytes=self._writer.distinct_bytes,
            reasons=skipped.reasons,
            opaque=skipped.opaque,
            warnings=skipped.warnings,
            seconds=time.perf_counter() - self._started,
            complete=manifest.complete,
            error=manifest.error,
            steps=manifest.steps,
        )


@dataclass
class _Counts:
    """What was met so far."""

    calls: int = 0
    places: int = 0
    shown: float = 0.0
    bytes_by_kind: dict[str, int] = field(
        default_factory=lambda: {"inputs": 0, "kwargs": 0, "output": 0}
    )

    def add(self, kind: str, nbytes: int) -> None:
        self.places += 1
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + nbytes


def _patterns(patterns: Sequence[str], name: str) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise UsageError(f"{name}: is one text; give a list of patterns, such as [{patterns!r}]")
    return tuple(patterns)


def _observers(observers: Sequence[Observer]) -> tuple[Observer, ...]:
    if not isinstance(observers, Sequence) or not all(isinstance(o, Observer) for o in observers):
        raise UsageError("observers: are no list of qvtrace.Observer; give one, such as [observer]")
    return tuple(observers)


@contextlib.contextmanager
def _interrupts_put_off() -> Iterator[list[int]]:
    """Note Ctrl-C and go on: pressed twice, it would leave a file that only `recover` can read."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    previous = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


def _ranked(path: Path | None) -> Path | None:
    """Under torch.distributed each process writes its own file."""
    place = process_place()
    if path is None or place is None or not path.name:
        return path
    rank, size = place
    return path.with_name(f"{path.stem}.rank{rank}-of-{size}{path.suffix}")


def _entry(module: NamedModule) -> ModuleEntry:
    parent = None if module.parent is None else module.parent.name
    return ModuleEntry(
        module.name,
        module.class_name,
        parent,
        tuple(module.aliases),
        float_name=module.float_name,
    )


def _still_running(calls: list[OpenCall]) -> Iterator[str]:
    if calls:
        first = f"{shown(calls[0].hooked.module.name)}#{calls[0].index}"
        yield (
            f"{len(calls)} call{'s' * (len(calls) > 1)} had not returned when the recording ended, "
            f"first {first}: another thread was still running the model; wait for it before "
            "leaving the block"
        )


def _contents(options: RecordOptions) -> tuple[str, ...]:
    """What the file gives away."""
    share, is_open = options.share, options.privacy is None
    contents = [
        "inputs" if is_open else KEYED_DIGESTS,
        "statistics" if share.statistics_only else "elements",
    ]
    if share.tokens is not None:
        contents.append("statistics")
    if is_open and options.source.get("prompt") is not None:
        contents.append(PROMPTS)
    if is_open and options.model is not None and options.model.name is not None:
        contents.append("paths")
    if options.weights:
        contents.append("weights")
    return tuple(contents)


def _holds_text(tree: Json) -> bool:
    """Whether a text that says something is in what a model was given: it may be a prompt."""
    if "items" in tree:
        return any(_holds_text(child) for _, child in tree["items"])
    return tree.get("class") == "str" and bool(str(tree.get("value")).strip())


def _root_call(
    module: str, index: int, inputs: Node | None, kwargs: Node | None, sample: int
) -> RootCall:
    assert inputs is not None
    assert kwargs is not None
    given, named = trees.to_json(inputs), trees.to_json(kwargs)
    return RootCall(module, index, given, named, digest_json([given, named]), sample)


def _json(node: Node | None) -> Json | None:
    return None if node is None else trees.to_json(node)


def _parameters(hooked: HookedModule, count: int) -> list[str | None]:
    """The names that forward's signature gives to its positional inputs."""
    if hooked.parameters is None:
        hooked.parameters = positional_parameters(hooked.module.module)
    known = hooked.parameters[:count]
    return [*known, *[None] * (count - len(known))]
