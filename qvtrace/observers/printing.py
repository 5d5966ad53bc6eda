"""Each call as a line of JSON, as it happens."""

import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO
from weakref import WeakKeyDictionary

from qvtrace.archive.arrays import array_of
from qvtrace.metrics.elements import ELEMENTS_LIMIT, Array, ElementsJson, elements_json
from qvtrace.metrics.statistics import Statistics, statistics
from qvtrace.observers.observer import ObservedCall, Observer
from qvtrace.patterns import Selector
from qvtrace.recording.snapshots import host_bytes
from qvtrace.reports.call_json import CallName, CallWriter, call_line
from qvtrace.reports.trace import Part
from qvtrace.trees import Json, TensorLeaf

if TYPE_CHECKING:
    from torch import Tensor


class PrintCalls(Observer):
    """Writes each call that is recorded as one strict JSON object on a line.

    The line is written when the call returns or raises, so that inner calls come before those that
    made them; what stands in it was true when the call began, and for `output` when it returned.
    It is the line that `qvtrace show --json` has for this call. `values` are patterns on names of
    modules whose elements are written too, at most `limit` of each tensor (None: all).

    When nobody reads `stream` any more (a closed pipe), it writes no further and sets `is_cut`.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        values: Sequence[str] = (),
        limit: int | None = ELEMENTS_LIMIT,
    ) -> None:
        """`stream` is standard output by default."""
        self.is_cut = False
        self._stream = sys.stdout if stream is None else stream
        self._values = (values,) if isinstance(values, str) else tuple(values)
        self._valued = Selector(frozenset(), ())
        self._contents = _LiveContents()
        self._writer = CallWriter(self._contents, limit)
        self._begun: WeakKeyDictionary[ObservedCall, Json] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """What an error message calls it."""
        return "the printing of calls"

    def begin(self, names: Collection[str]) -> None:
        """Raise `UsageError` for a pattern that fits no module."""
        self._valued = Selector.of(self._values, names, "--values")

    def before(self, call: ObservedCall) -> None:
        """Note what the call is given, before it can change it."""
        if call.is_recorded and not self.is_cut:
            with self._lock:
                self._begun[call] = self._parts(call, ("inputs", "kwargs"))

    def after(self, call: ObservedCall) -> None:
        """Write the line."""
        if call not in self._begun or self.is_cut:
            return
        with self._lock:
            name = CallName(call.name, type(call.module).__name__, call.index, call.step)
            parts = self._begun.pop(call) | self._parts(call, ("output",))
            self._write(call_line(name, parts, call.edited, call.error))

    def _parts(self, call: ObservedCall, parts: Sequence[Part]) -> Json:
        self._contents.tensors = call.contents
        with_elements = any(name in self._valued for name in call.names)
        return {
            part: self._writer.part(part, call.trees[part], with_elements=with_elements)
            for part in parts
        }

    def _write(self, line: str) -> None:
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except BrokenPipeError:
            self.is_cut = True


class _LiveContents:
    """The tensors of one moment of a call; what is learnt of one is not asked for again."""

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}  # by digest, in the form that is stored
        self._statistics: dict[tuple[str, str], Statistics] = {}

    def statistics(self, leaf: TensorLeaf) -> Statistics:
        key = leaf.digest, leaf.dtype
        if key not in self._statistics:
            self._statistics[key] = statistics(self._array(leaf))
        return self._statistics[key]

    def sampled(self, leaf: TensorLeaf) -> None:
        """All elements are at hand."""

    def elements(self, leaf: TensorLeaf, limit: int | None) -> ElementsJson:
        return elements_json(self._array(leaf), limit)

    def _array(self, leaf: TensorLeaf) -> Array:
        return array_of(leaf, host_bytes(self.tensors[leaf.digest].cpu()))
