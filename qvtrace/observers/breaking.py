"""A stop in the debugger, inside the hook of a module."""

import os
import signal
import sys
import threading
from bdb import BdbQuit
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any, TextIO

from qvtrace.errors import UsageError
from qvtrace.observers.observer import ObservedCall, Observer
from qvtrace.patterns import Selector, shown
from qvtrace.reports.formatting import printable

HOOK = "PYTHONBREAKPOINT"  # names the debugger, as for Python's `breakpoint()`; 0: none


class BreakAt(Observer):
    """Stops in the debugger after each call of the modules that fit a pattern, recorded or not.

    The debugger is the one of `breakpoint()`; what the variable PYTHONBREAKPOINT names comes first.
    Its frame has the locals `module`, `name`, `call` (the index), `inputs`, `kwargs` and `output`:
    what the module was given and returned, not copies, so that work in place reaches the model
    (the archive has them as they were before). Another value for `output` does not.
    Leaving the debugger by quitting raises `KeyboardInterrupt`.
    """

    def __init__(self, *patterns: str, before: bool = False, output: TextIO | None = None) -> None:
        """With `before`, also before each call; its `output` is None. `output` is what the
        debugger takes for standard output, by default that of the moment."""
        self.stops = 0
        self._patterns = patterns
        self._stops_before = before
        self._output = output
        self._selected = Selector(frozenset(), ())
        self._lock = threading.RLock()  # one debugger at a time; a call made in it may stop again

    @property
    def label(self) -> str:
        """What an error message calls it."""
        return "the debugger"

    def begin(self, names: Collection[str]) -> None:
        """Raise `UsageError` for a pattern that fits no module, and for a debugger that is not
        there."""
        refuse_missing_debugger()
        self._selected = Selector.of(self._patterns, names, "--break")

    def before(self, call: ObservedCall) -> None:
        """Stop, if that was asked for."""
        if self._stops_before:
            self._stop(before_call, call)

    def after(self, call: ObservedCall) -> None:
        """Stop."""
        self._stop(after_call, call)

    def _stop(self, stop: Callable[..., None], call: ObservedCall) -> None:
        if not is_enabled() or not any(name in self._selected for name in call.names):
            return
        with self._lock, self._redirected(), _ctrl_c_as_before():
            self.stops += 1
            print(_where(call, "before" if stop is before_call else "after"))
            try:
                stop(call.module, call.name, call.index, call.inputs, call.kwargs, call.output)
            except (BdbQuit, SystemExit):
                raise KeyboardInterrupt from None

    def _redirected(self) -> AbstractContextManager[object]:
        return nullcontext() if self._output is None else redirect_stdout(self._output)


def is_enabled() -> bool:
    """Whether a breakpoint would stop at all."""
    return os.environ.get(HOOK) != "0"


def needs_terminal() -> bool:
    """Whether the debugger is Python's own, which somebody must type into."""
    return not os.environ.get(HOOK)


def refuse_missing_debugger() -> None:
    """Raise `UsageError` where the variable names what cannot be imported: `breakpoint()` would
    only warn, and never stop."""
    named = os.environ.get(HOOK, "")
    if not named or not is_enabled():
        return
    module, _, function = named.rpartition(".")
    try:
        is_there = callable(getattr(import_module(module or "builtins"), function, None))
    except Exception:  # whatever the module does when it is imported
        is_there = False
    if not is_there:
        raise UsageError(
            f"{HOOK} {named!r}: cannot be imported; name a function, such as pdb.set_trace, "
            "or unset it"
        )


# What a person sees of these two are the line where the debugger stops and the names of arguments.


def before_call(module: Any, name: str, call: int, inputs: Any, kwargs: Any, output: Any) -> None:
    debugger()()
    return  # inspect module, name, call, inputs, kwargs; c goes on, q ends the recording


def after_call(module: Any, name: str, call: int, inputs: Any, kwargs: Any, output: Any) -> None:
    debugger()()
    return  # inspect module, name, call, inputs, kwargs, output; c goes on, q ends the recording


def debugger() -> Callable[[], Any]:
    """What stops: as the environment says, else whatever has been put in the place of Python's."""
    return sys.__breakpointhook__ if os.environ.get(HOOK) else sys.breakpointhook


def _where(call: ObservedCall, moment: str) -> str:
    text = f"{moment} {shown(call.name)}, call {call.index}, {type(call.module).__name__}"
    return printable(text if call.error is None else f"{text}: {call.error}")


@contextmanager
def _ctrl_c_as_before() -> Iterator[None]:
    """pdb takes Ctrl-C for itself when one goes on from it; here it ends the recording."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
