"""Calls that have not returned, thread by thread, and which of them made a call that begins."""

import sys
import threading
from dataclasses import dataclass, field
from types import FrameType, TracebackType

from qvtrace.observers import ObservedCall
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.skips import HookedModule


@dataclass(eq=False)
class OpenCall:
    """A call that has not returned."""

    hooked: HookedModule
    index: int
    number: int | None  # in the archive; None when the call is not recorded
    parent: "OpenCall | None"  # the call that made this one, where there is one and it is known
    python_frame: FrameType  # in which the module is called
    handled: "Handled"
    observed: ObservedCall | None = None  # where somebody is told of it
    started: float = 0.0
    overhead: float = 0.0
    versions: list[int] | None = None  # of the tensors that it was given; None: not known
    holds_unknown_edits: bool = False  # of a recorded call in it
    # By storage, how often recorded calls in it have edited that in place.
    edits: dict[int, int] = field(default_factory=dict)

    @property
    def recorded_parent(self) -> "OpenCall | None":
        """The nearest call around this one that is in the archive."""
        above = self.parent
        while above is not None and above.number is None:
            above = above.parent
        return above


@dataclass(frozen=True)
class Handled:
    """The exception that is being handled at some moment, and how far it had come by then."""

    error: BaseException | None
    traceback: TracebackType | None

    @classmethod
    def now(cls) -> "Handled":
        """What the caller's `except` block has caught."""
        error = sys.exception()
        return cls(error, None if error is None else error.__traceback__)

    def raised_since(self, output: object) -> BaseException | None:
        """What a call raised that began at that moment and ends now with `output`.

        One exception may go through several calls that raise it again: each adds to its traceback.
        """
        error = sys.exception()
        if error is None or (error is self.error and output is not None):
            return None
        same = error is self.error and error.__traceback__ is self.traceback
        return None if same else error


@dataclass(frozen=True)
class Caller:
    """What made a call that begins."""

    call: OpenCall | None  # None for an outermost call, or where it cannot be known
    is_root: bool = False  # an outermost call


class CallStacks:
    """The stacks of all threads.

    A thread that a module's forward starts does not say who started it. What is called there is
    taken for a part of the call of a module around it, if one runs; which that is does not hang on
    which thread comes first.
    """

    def __init__(self) -> None:
        self._own = _Own()
        self._of_thread: dict[int, list[OpenCall]] = {}  # those that are not empty

    def caller_of(self, module: NamedModule) -> Caller:
        """What makes the call of `module` that begins on this thread."""
        if self._own.stack:
            return Caller(self._own.stack[-1])
        if module.parent is None:
            return Caller(None, is_root=True)
        return self._caller_on_other_thread(module)

    def push(self, call: OpenCall) -> None:
        """A call begins on this thread."""
        stack = self._own.stack
        if not stack:
            self._of_thread[threading.get_ident()] = stack
        stack.append(call)

    def drop_left(self) -> list[OpenCall]:
        """Take off this thread's calls that Ctrl-C or the like has left: no hook hears of those."""
        left = []
        while self._own.stack and not _is_running(self._own.stack[-1].python_frame):
            left.append(self._pop())
        return left

    def pop(self, hooked: HookedModule) -> list[OpenCall]:
        """Take off the call of this module that returns; it is the last of those that come back,
        before it those that were left. Nothing, where no such call began while it was recorded."""
        stack = self._own.stack
        if not any(call.hooked is hooked and _is_running(call.python_frame) for call in stack):
            return []
        popped = [self._pop()]
        while popped[-1].hooked is not hooked or not _is_running(popped[-1].python_frame):
            popped.append(self._pop())
        return popped

    def running(self) -> list[OpenCall]:
        """The calls of all threads that were not left, the outermost of each first."""
        latest = sys._current_frames()
        return [
            call
            for thread, stack in list(self._of_thread.items())
            for call in list(stack)
            if _is_below(latest.get(thread), call.python_frame)
        ]

    def clear(self) -> None:
        """Forget all calls, and with them what their frames hold in memory."""
        for stack in list(self._of_thread.values()):
            stack.clear()
        self._of_thread.clear()

    def _pop(self) -> OpenCall:
        stack = self._own.stack
        call = stack.pop()
        if not stack:
            self._of_thread.pop(threading.get_ident(), None)
        return call

    def _caller_on_other_thread(self, module: NamedModule) -> Caller:
        running = self.running()
        above = module.parent
        while above is not None:
            calls = [call for call in running if call.hooked.module.module is above.module]
            if calls:
                return Caller(calls[0] if len(calls) == 1 else None)
            above = above.parent
        return Caller(None, is_root=True)


class _Own(threading.local):
    """The stack of one thread, the innermost call last."""

    def __init__(self) -> None:
        self.stack: list[OpenCall] = []


def bypassed_by(module: NamedModule, caller: OpenCall | None) -> list[str]:
    """The names of modules that are not running, though they lie between `module`, which is called,
    and a running one further up."""
    running = set()
    while caller is not None:
        running.add(id(caller.hooked.module.module))
        caller = caller.parent
    between = []
    above = module.parent
    while above is not None and id(above.module) not in running:
        between.append(above.name)
        above = above.parent
    return between if above is not None else []


def calling_frame(hook: FrameType) -> FrameType:
    """The frame in which torch calls the module that `hook` belongs to.

    torch runs hooks and forward in a function within it, but hooks after an exception in itself.
    """
    caller = hook.f_back
    assert caller is not None
    if caller.f_code.co_name == "inner" and caller.f_back is not None:
        return caller.f_back
    return caller


def _is_running(frame: FrameType) -> bool:
    """Whether this thread is in `frame`, or in what that has called."""
    return _is_below(sys._getframe(1), frame)


def _is_below(latest: FrameType | None, frame: FrameType) -> bool:
    while latest is not None and latest is not frame:
        latest = latest.f_back
    return latest is not None
