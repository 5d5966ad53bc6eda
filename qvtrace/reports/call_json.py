"""Calls of a trace as strict JSON, one object a line."""

import json
import math
from collections.abc import Iterator

from qvtrace.elements import number_json
from qvtrace.manifest import CallEntry
from qvtrace.reports.trace import PARTS, Trace
from qvtrace.trees import Container, Json, Node, OpaqueLeaf, TensorLeaf, ValueLeaf

ELEMENTS_LIMIT = 1 << 16  # of one tensor
_JSON_CLASSES = frozenset({"None", "bool", "int", "float", "str"})
_LISTS = frozenset({"tuple", "list"})


def call_lines(trace: Trace) -> Iterator[str]:
    """Each call as one line of JSON."""
    classes = {entry.name: entry.class_name for entry in trace.archive.manifest.modules}
    for call in trace.calls():
        report = call_json(trace, call, classes.get(call.module))
        yield json.dumps(report, allow_nan=False, separators=(",", ":"))


def call_json(trace: Trace, call: CallEntry, class_name: str | None) -> Json:
    """One call; a part that was not stored is null."""
    parts = {part: trace.tree(call, part) for part in PARTS}
    report: Json = {"module": call.module, "type": class_name, "call": call.index}
    for part, node in parts.items():
        if part != "output" and isinstance(node, Container):
            report[part] = _fields(trace, node, call.module)
        else:
            report[part] = None if node is None else _node_json(trace, node, call.module)
    if call.error is not None:
        report["error"] = call.error
    return report


def _fields(trace: Trace, node: Container, module: str) -> Json:
    return {name: _node_json(trace, child, module) for name, child in node.items}


def _node_json(trace: Trace, node: Node, module: str) -> object:
    """A container as a list or an object, a plain value as itself, the rest by its type's name."""
    match node:
        case TensorLeaf():
            return _tensor_json(trace, node, module)
        case ValueLeaf() if node.class_name in _JSON_CLASSES:
            value = node.value
            return number_json(value) if isinstance(value, float) else value
        case ValueLeaf():
            return {"type": node.class_name, "value": node.value}
        case OpaqueLeaf():
            return {"type": node.class_name}
    if node.kind in _LISTS:
        return [_node_json(trace, child, module) for _, child in node.items]
    if node.kind == "cache":
        cache = {"type": node.class_name, "length": node.length}
        return {**cache, **_fields(trace, node, module)}
    return _fields(trace, node, module)


def _tensor_json(trace: Trace, leaf: TensorLeaf, module: str) -> Json:
    report: Json = {"type": "Tensor", "dtype": leaf.dtype, "shape": list(leaf.shape)}
    report["statistics"] = trace.statistics(leaf).to_json()
    if math.prod(leaf.shape) <= 1 or module in trace.selection.with_elements:
        elements = trace.elements(leaf, ELEMENTS_LIMIT)
        report["values"] = elements.values
        if elements.cut:
            report["values_cut"] = elements.cut
    return report
