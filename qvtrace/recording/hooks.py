"""Hooks on the modules of a model, that tell of each call.

They never change an output and never raise into the model: what goes wrong in a hook ends all of
them, not the forward.
"""

import contextlib
import os
import sys
import threading
import time
from bdb import BdbQuit
from collections.abc import Callable, Collection, Iterable
from types import FrameType
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from qvtrace.recording.call_stacks import calling_frame
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.skips import HookedModule


class CallListener(Protocol):
    """Who is told of calls, in the thread that makes them."""

    def before(
        self,
        hooked: HookedModule,
        frame: FrameType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """A call begins; `frame` is the one in which the module is called."""

    def after(
        self,
        hooked: HookedModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: object,
    ) -> None:
        """A call has returned, or raised."""


class HookTime(threading.local):
    """How long the hooks of one thread took."""

    def __init__(self) -> None:
        self.overhead = 0.0  # seconds, of the hooks that have ended
        self.entered = 0.0  # when the latest one began


class Hooks:
    """The hooks of one recording; they tell of calls while they are `active`."""

    def __init__(self) -> None:
        self.active = False
        self.failure: Exception | None = None  # what ended the recording early
        self.modules: dict[int, HookedModule] = {}  # those that have hooks, by `id`
        self.time = HookTime()
        self._process = os.getpid()
        self._placed: list[RemovableHandle] = []

    @property
    def is_in_child(self) -> bool:
        """Whether this is a forked child of the process that the recording is of."""
        return os.getpid() != self._process

    def put(
        self, modules: Iterable[NamedModule], chosen: Collection[str], listener: CallListener
    ) -> None:
        """Put hooks on those that have none yet; calls of the `chosen` ones are to be recorded."""
        for module in modules:
            if id(module.module) not in self.modules and not module.is_container:
                recorded = any(name in chosen for name in module.names)
                self._put_on(HookedModule(module, recorded), listener)

    def close(self) -> None:
        """Take all hooks off."""
        self.active = False
        while self._placed:
            self._placed.pop().remove()

    def _put_on(self, hooked: HookedModule, listener: CallListener) -> None:
        module = hooked.module.module
        tell_before, tell_after = listener.before, listener.after

        def before(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._is_ours(caller, module):
                frame = calling_frame(sys._getframe(1))
                self._guarded(tell_before, hooked, frame, args, kwargs)

        def after(
            caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
        ) -> None:
            if self._is_ours(caller, module):
                self._guarded(tell_after, hooked, args, kwargs, output)

        self.modules[id(module)] = hooked
        # By their class: a scripted module hides the method, yet runs what it registers.
        pre = nn.Module.register_forward_pre_hook(
            module, _Hook(before), with_kwargs=True, prepend=True
        )
        self._placed.append(pre)
        post = nn.Module.register_forward_hook(
            module, _Hook(after), with_kwargs=True, always_call=True
        )
        self._placed.append(post)

    def _is_ours(self, caller: nn.Module, module: nn.Module) -> bool:
        """Not of a copy, which has the hooks of its original, nor of a forked child."""
        return self.active and caller is module and os.getpid() == self._process

    def _guarded(self, hook: Callable[..., None], *arguments: object) -> None:
        """Run a hook; the model never sees what it raises."""
        entered = self.time.entered = time.perf_counter()
        try:
            hook(*arguments)
        except BdbQuit:  # somebody stepped here out of a debugger's stop, and has had enough
            raise KeyboardInterrupt from None
        except Exception as error:
            self.active = False
            self.failure = error
        self.time.overhead += time.perf_counter() - entered


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
