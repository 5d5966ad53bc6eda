"""Calls as strict JSON, one object a line: of an archive, and of a model that is running."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qvtrace.metrics.elements import ELEMENTS_LIMIT, ElementsJson, number_json
from qvtrace.metrics.statistics import Statistics
from qvtrace.reports.trace import PARTS, Part, Trace
from qvtrace.trees import Container, Json, Node, OpaqueLeaf, TensorLeaf, ValueLeaf

_JSON_CLASSES = frozenset({"None", "bool", "int", "float", "str"})
_LISTS = frozenset({"tuple", "list"})


class Contents(Protocol):
    """Where the tensors of a call can be looked at."""

    def statistics(self, leaf: TensorLeaf) -> Statistics:
        """The statistics of a tensor."""

    def sampled(self, leaf: TensorLeaf) -> tuple[int, int] | None:
        """How many vectors are stored, of how many, where not all of them are."""

    def elements(self, leaf: TensorLeaf, limit: int | None) -> ElementsJson | None:
        """The elements of a tensor, at most `limit` of them; None where none is stored."""


@dataclass(frozen=True)
class CallWriter:
    """Writes the parts of calls; of a tensor at most `limit` elements, None being all."""

    contents: Contents
    limit: int | None = ELEMENTS_LIMIT

    def part(self, part: Part, node: Node | None, *, with_elements: bool) -> object:
        """One part of a call; None for one that was not stored."""
        if node is None:
            return None
        if part != "output" and isinstance(node, Container):
            return self._fields(node, with_elements)
        return self._node(node, with_elements)

    def _fields(self, node: Container, with_elements: bool) -> Json:
        return {name: self._node(child, with_elements) for name, child in node.items}

    def _node(self, node: Node, with_elements: bool) -> object:
        """A container as a list or an object, a plain value as itself, the rest by its type."""
        match node:
            case TensorLeaf():
                return self._tensor(node, with_elements)
            case ValueLeaf():
                value = number_json(node.value) if isinstance(node.value, float) else node.value
                is_plain = node.class_name in _JSON_CLASSES
                return value if is_plain else {"type": node.class_name, "value": value}
            case OpaqueLeaf():
                return {"type": node.class_name}
        if node.kind in _LISTS:
            return [self._node(child, with_elements) for _, child in node.items]
        if node.kind == "cache":
            cache = {"type": node.class_name, "length": node.length}
            return {**cache, **self._fields(node, with_elements)}
        return self._fields(node, with_elements)

    def _tensor(self, leaf: TensorLeaf, with_elements: bool) -> Json:
        report: Json = {"type": "Tensor", "dtype": leaf.dtype, "shape": list(leaf.shape)}
        if leaf.added is not None:
            report["added"] = {"axis": leaf.added.axis, "after": leaf.added.after}
        sampled = self.contents.sampled(leaf)
        if sampled is not None:
            report["sampled"] = list(sampled)
        report["statistics"] = self.contents.statistics(leaf).to_json()
        if with_elements or math.prod(leaf.shape) <= 1:
            elements = self.contents.elements(leaf, self.limit)
            report |= {} if elements is None else elements.to_json()
        return report


def call_lines(trace: Trace, limit: int | None = ELEMENTS_LIMIT) -> Iterator[str]:
    """Each call as one line of JSON."""
    classes = {entry.name: entry.class_name for entry in trace.archive.manifest.modules}
    writer = CallWriter(trace, limit)
    for call in trace.calls():
        with_elements = call.module in trace.selection.with_elements
        parts: Json = {
            part: writer.part(part, trace.tree(call, part), with_elements=with_elements)
            for part in PARTS
        }
        name = CallName(call.module, classes.get(call.module), call.index, call.step)
        yield call_line(name, parts, call.edited or (), call.error)


@dataclass(frozen=True)
class CallName:
    """Which call a line tells of."""

    module: str
    class_name: str | None
    index: int
    step: int = 0  # of a generation: the first one has no need to be named


def call_line(name: CallName, parts: Json, edited: Sequence[str], error: str | None) -> str:
    """One call as a line of JSON: `parts` by name and in order, then the places that it edited in
    place, and the error that ended it."""
    report: Json = {"module": name.module, "type": name.class_name, "call": name.index}
    if name.step:
        report["step"] = name.step
    report |= parts
    if edited:
        report["edited"] = list(edited)
    if error is not None:
        report["error"] = error
    return json.dumps(report, allow_nan=False, separators=(",", ":"))
