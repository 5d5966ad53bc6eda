"""Calls -> an archive: what is stored of each, and when.

This runs inside the user's forward; `hooks` keeps from the model what is raised here.
"""

import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from qvtrace import trees
from qvtrace.digests import digest_json
from qvtrace.manifest import DID_NOT_RETURN, RootCall
from qvtrace.recording.call_stacks import CallStacks, Handled, OpenCall, bypassed_by
from qvtrace.recording.description import Description
from qvtrace.recording.edits import edited_by, versions
from qvtrace.recording.hooks import Hooks
from qvtrace.recording.identity import positional_parameters
from qvtrace.recording.observed_calls import ObservedCalls
from qvtrace.recording.options import Progress, RecordOptions
from qvtrace.recording.position import Position
from qvtrace.recording.skips import HookedModule
from qvtrace.recording.values import StoredValues
from qvtrace.recording.writers import Writer
from qvtrace.redaction import error_line
from qvtrace.trees import Json, Node

_PROGRESS_SECONDS = 0.1


class CallRecorder:
    """Hears of each call from hooks, and hands it to the writer."""

    def __init__(
        self,
        options: RecordOptions,
        position: Position,
        *,
        hooks: Hooks,
        writer: Writer,
        description: Description,
        values: StoredValues,
        observed: ObservedCalls,
        meet_modules: Callable[[], None],
    ) -> None:
        """`meet_modules` looks for modules that are new; an outermost call begins with it."""
        self.count = 0  # calls that have ended
        self.bypassed: set[str] = set()  # names of modules that run without being called
        self._options = options
        self._position = position
        self._hooks = hooks
        self._time = hooks.time
        self._writer = writer
        self._description = description
        self._values = values
        self._observed = observed
        self._watch = observed.watch
        self._meet_modules = meet_modules
        self._stacks = CallStacks()
        # By name: a module that replaces another one goes on with its count.
        self._indices: dict[str, int] = {}
        self._lock = threading.Lock()
        self._shown = 0.0  # when progress was

    def before(
        self,
        hooked: HookedModule,
        frame: FrameType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """A call begins: store what it is given."""
        self._end_left(self._stacks.drop_left())
        caller = self._stacks.caller_of(hooked.module)
        if caller.is_root:
            self._meet_modules()
        elif not hooked.calls:
            self.bypassed.update(bypassed_by(hooked.module, caller.call))
        with self._lock:
            index = self._indices.get(hooked.module.name, 0)
            self._indices[hooked.module.name] = index + 1
            hooked.calls += 1
        place = f"{trees.key_name(hooked.module.name)}#{index}/"
        taken = self._values.take_inputs(hooked, place, args, kwargs, is_root=caller.is_root)
        if caller.is_root:
            self._add_root_call(hooked.module.name, index, *taken)
        call = OpenCall(hooked, index, None, caller.call, frame, Handled.now())
        if hooked.recorded:
            call.number = self._begin_call(call, taken, args)
            call.versions = versions(args, kwargs)
        self._stacks.push(call)
        if self._watch:
            self._observed.before(call, args, kwargs, taken, self._position.step)
        call.started = time.perf_counter()
        call.overhead = self._time.overhead + call.started - self._time.entered

    def after(
        self,
        hooked: HookedModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: object,
    ) -> None:
        """A call has returned or raised: store what came of it."""
        now = time.perf_counter()
        popped = self._stacks.pop(hooked)
        self._end_left(popped[:-1])
        if not popped:
            return
        call = popped[-1]
        raised = call.handled.raised_since(output)
        error = None if raised is None else self._error_line(raised)
        node = None
        edited = edited_by(call, args, kwargs, self._values.component)
        if call.number is not None:
            if error is None:
                place = f"{trees.key_name(hooked.module.name)}#{call.index}/"
                node = self._values.take(output, place, "output")
            seconds = now - call.started - (self._time.overhead - call.overhead)
            self._end_call(call.number, _json(node), seconds, error, edited)
            self._show_progress()
        if call.observed is not None:
            call.observed.inputs, call.observed.kwargs = args, kwargs
            call.observed.edited = edited or ()
            self._observed.after(call.observed, output, node, error)

    def close(self) -> list[OpenCall]:
        """The recorded calls that have not returned yet; from now on they are forgotten."""
        running = [call for call in self._stacks.running() if call.number is not None]
        self._stacks.clear()
        return running

    def _add_root_call(
        self, module: str, index: int, inputs: Node | None, kwargs: Node | None
    ) -> None:
        assert inputs is not None
        assert kwargs is not None
        given, named = trees.to_json(inputs), trees.to_json(kwargs)
        digest = digest_json([given, named])
        if self._description.notes_text(given, named):
            self._writer.describe(self._description.manifest)
        self._writer.add_root_call(
            RootCall(module, index, given, named, digest, self._position.sample)
        )

    def _begin_call(
        self, call: OpenCall, taken: tuple[Node | None, Node | None], args: tuple[Any, ...]
    ) -> int:
        parent = call.recorded_parent
        return self._writer.begin_call(
            {
                "module": call.hooked.module.name,
                "index": call.index,
                "sample": self._position.sample,
                "step": self._position.step,
                "parent": None if parent is None else [parent.hooked.module.name, parent.index],
                "parameters": _parameters(call.hooked, len(args)),
                "inputs": _json(taken[0]) if self._options.inputs else None,
                "kwargs": _json(taken[1]) if self._options.kwargs else None,
            }
        )

    def _end_call(
        self,
        number: int,
        output: Json | None,
        seconds: float | None,
        error: str | None,
        edited: list[str] | None = None,
    ) -> None:
        self.count += 1
        rounded = None if seconds is None else round(seconds, 6)
        end: Json = {"output": output, "seconds": rounded, "error": error}
        if edited is not None:
            end["edited"] = edited
        self._writer.end_call(number, end)

    def _end_left(self, calls: list[OpenCall]) -> None:
        for call in calls:
            if call.number is not None:
                self._end_call(call.number, None, None, DID_NOT_RETURN)
            if call.observed is not None:
                self._observed.after(call.observed, None, None, DID_NOT_RETURN)

    def _error_line(self, error: BaseException) -> str:
        """What is said of an exception: its words may be those of a prompt."""
        return error_line(error) if self._options.privacy is None else type(error).__name__

    def _show_progress(self) -> None:
        progress = self._options.progress
        now = time.perf_counter()
        if progress is None or now - self._shown < _PROGRESS_SECONDS:
            return
        self._shown = now
        modules = self._hooks.modules
        done = sum(hooked.calls > 0 for hooked in modules.values())
        progress(Progress(done, len(modules), self._writer.distinct_bytes))


def _json(node: Node | None) -> Json | None:
    return None if node is None else trees.to_json(node)


def _parameters(hooked: HookedModule, count: int) -> list[str | None]:
    """The names that forward's signature gives to its positional inputs."""
    if hooked.parameters is None:
        hooked.parameters = positional_parameters(hooked.module.module)
    known = hooked.parameters[:count]
    return [*known, *[None] * (count - len(known))]
