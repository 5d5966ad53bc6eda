"""Nested values of a call, as they stand in the manifest: nodes, their JSON, and the paths of
leaves.

A tree keeps the structure that a module was given or returned. Its leaves are tensors (by digest;
the elements are in the archive), plain values, and opaque leaves: what cannot be stored, by its
type's name.
"""

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

MAX_DEPTH = 64  # deeper values are written as opaque leaves; a deeper tree in a file is damage

Json: TypeAlias = dict[str, Any]
PlainValue: TypeAlias = bool | int | float | str | None
ContainerKind = Literal[
    "tuple", "list", "dict", "named_tuple", "dataclass", "model_output", "cache"
]

_CONTAINER_KINDS = frozenset(get_args(ContainerKind))
_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\./#"})
_FLOATS = frozenset({"float", "float16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class Placement:
    """Which part of a distributed tensor one process holds."""

    of: tuple[str, ...]  # `Shard(0)`, `Replicate`, `Partial(sum)`: one for each axis of the mesh
    mesh: tuple[int, ...]  # how many processes there are along each axis
    shape: tuple[int, ...]  # of the whole tensor

    def to_json(self) -> Json:
        """The placement as it stands in the manifest."""
        return {"of": list(self.of), "mesh": list(self.mesh), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, json: object) -> "Placement":
        """What `to_json` wrote; raises `ValueError` for anything else."""
        if not isinstance(json, dict):
            raise ValueError("a placement that is not an object")
        of = json.get("of")
        if not isinstance(of, list) or not all(isinstance(name, str) for name in of):
            raise ValueError("a placement that is not a list of names")
        return cls(tuple(of), _shape(json.get("mesh")), _shape(json.get("shape")))


@dataclass(frozen=True, slots=True)
class Original:
    """What a tensor was before it was brought into a form that safetensors can hold."""

    class_name: str  # `ActivationQBytesTensor`, `quint8`, `sparse_coo`, `DTensor`
    scale: "TensorLeaf | None" = None
    zero_point: "TensorLeaf | None" = None
    placement: Placement | None = None  # of a distributed tensor, of which this is a part


@dataclass(frozen=True, slots=True)
class Added:
    """Of a tensor that grows from step to step: only what a step added is stored. What comes before
    it is what the tensor was at the end of the step before."""

    axis: int  # along which it grew
    after: int  # how long it was


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """One tensor at one place; equal contents at other places have the same digest."""

    dtype: str  # torch's name without its prefix: `float32`, `bfloat16`, `float8_e4m3fn`
    shape: tuple[int, ...]
    digest: str  # xxh3-128 of the stored bytes, 32 hexadecimal digits
    stored_dtype: str | None = None  # where the file holds another dtype (complex128 as float64)
    stored_shape: tuple[int, ...] | None = None
    original: Original | None = None
    added: Added | None = None  # of a Cache in a generation; None: the tensor is whole

    @property
    def file_dtype(self) -> str:
        """The dtype of the stored bytes."""
        return self.stored_dtype or self.dtype

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the stored elements."""
        return self.shape if self.stored_shape is None else self.stored_shape


@dataclass(frozen=True, slots=True)
class ValueLeaf:
    """A plain Python value; what JSON cannot say (a dtype, a device, a range) is its `repr`."""

    value: PlainValue
    class_name: str  # `None`, `bool`, `int`, `float`, `str`, `dtype`, `device`, `range`, ...

    @classmethod
    def of(cls, value: PlainValue) -> "ValueLeaf":
        """A leaf for a value that JSON knows."""
        return cls(value, "None" if value is None else type(value).__name__)


@dataclass(frozen=True, slots=True)
class OpaqueLeaf:
    """A value that cannot be stored: only the name of its type is known."""

    class_name: str
    reason: str | None = None
    digest: str | None = None  # keyed, of a value that is private


@dataclass(frozen=True, slots=True)
class Container:
    """A tuple, list, dict, named tuple, dataclass, ModelOutput or Cache and what it holds."""

    kind: ContainerKind
    class_name: str
    items: tuple[tuple[str, "Node"], ...]  # path component (escaped) and value, in order
    length: int | None = None  # of a Cache: the number of cached positions
    number: int | None = None  # of a Cache whose tensors are stored: which of the recording's


Leaf: TypeAlias = TensorLeaf | ValueLeaf | OpaqueLeaf
Node: TypeAlias = Leaf | Container


def path_component(key: object) -> str:
    """The component of a path that names `key`: a field, an index, or the key of a dict.

    `.`, `/`, `#` and `\\` are escaped with `\\`; a key that is no string is written `[repr]`, and a
    string that would look like one has its bracket escaped, so that no two places share a path.
    Two processes write the same: a `repr` with an address in it is the name of the class instead.
    """
    if isinstance(key, str):
        escaped = escape_name(key.translate(_SPECIAL))
        return "\\" + escaped if escaped.startswith("[") else escaped
    return f"[{escape_name(_stable_repr(key).translate(_SPECIAL))}]"


def _stable_repr(key: object) -> str:
    """The `repr` of `key` as every process writes it: a set in order, no address in memory."""
    try:
        if type(key) is tuple:
            items = [_stable_repr(item) for item in key]
            return f"({', '.join(items)}{',' * (len(items) == 1)})"
        if isinstance(key, AbstractSet):
            return f"{type(key).__name__}({{{', '.join(sorted(map(_stable_repr, key)))}}})"
        text = repr(key)
        address = id(key)
        if " at 0x" in text or f"{address:x}" in text.lower() or str(address) in text:
            return type(key).__name__
    except Exception:  # a class of the user's
        return type(key).__name__
    return text


def escape_name(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate, which safetensors readers refuse in a name, is
    written `\\udxxx`."""
    return text.encode("utf-8", "backslashreplace").decode()


def key_name(module: str) -> str:
    """A module's name in the key of a tensor: its first unescaped `#` ends it."""
    return escape_name(module.replace("\\", "\\\\").replace("#", "\\#"))


def join_path(base: str, component: str) -> str:
    """The path of a child of `base`."""
    return f"{base}.{component}"


def leaves(node: Node, path: str) -> Iterator[tuple[str, Leaf]]:
    """Each leaf below `node` with its path, depth first; an empty container has none."""
    if isinstance(node, Container):
        for component, child in node.items:
            yield from leaves(child, join_path(path, component))
    else:
        yield path, node


def tensor_leaves(node: Node, path: str) -> Iterator[tuple[str, TensorLeaf]]:
    """Each tensor below `node` with its path, those that describe a quantized one included."""
    for place, leaf in leaves(node, path):
        if isinstance(leaf, TensorLeaf):
            yield place, leaf
            if leaf.original is not None:
                for name in ("scale", "zero_point"):
                    part = getattr(leaf.original, name)
                    if part is not None:
                        yield join_path(place, name), part


def to_json(node: Node) -> Json:
    """The node as it stands in the manifest."""
    match node:
        case TensorLeaf():
            return _tensor_to_json(node)
        case ValueLeaf():
            return _value_to_json(node)
        case OpaqueLeaf():
            opaque: Json = {"type": "opaque", "class": node.class_name}
            if node.reason is not None:
                opaque["reason"] = node.reason
            if node.digest is not None:
                opaque["digest"] = node.digest
            return opaque
        case Container():
            container: Json = {"type": node.kind, "class": node.class_name}
            if node.length is not None:
                container["length"] = node.length
            if node.number is not None:
                container["number"] = node.number
            container["items"] = [[component, to_json(child)] for component, child in node.items]
            return container


def from_json(json: object, *, depth: int = 0) -> Node:
    """The node that `to_json` wrote.

    Raises `ValueError` for anything that it could not have written: a file is not to be trusted.
    """
    if depth > MAX_DEPTH + 1:  # the scale of a tensor at the deepest place
        raise ValueError(f"a tree nested deeper than {MAX_DEPTH} levels")
    if not isinstance(json, dict):
        raise ValueError(f"a tree node that is {type(json).__name__}, not an object")
    kind = json.get("type")
    if kind == "tensor":
        return _tensor_from_json(json, depth)
    if kind == "value":
        return _value_from_json(json)
    if kind == "opaque":
        return OpaqueLeaf(
            _text(json, "class"), _optional_text(json, "reason"), _optional_text(json, "digest")
        )
    if not isinstance(kind, str) or kind not in _CONTAINER_KINDS:
        raise ValueError(f"a tree node of the unknown type {kind!r}")
    return Container(
        cast(ContainerKind, kind),
        _text(json, "class"),
        tuple(_items_from_json(json.get("items"), depth)),
        None if json.get("length") is None else _count(json["length"]),
        None if json.get("number") is None else _count(json["number"]),
    )


def _tensor_to_json(leaf: TensorLeaf) -> Json:
    tensor: Json = {
        "type": "tensor",
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
        "digest": leaf.digest,
    }
    if leaf.stored_dtype is not None or leaf.stored_shape is not None:
        tensor["stored"] = {"dtype": leaf.file_dtype, "shape": list(leaf.file_shape)}
    if leaf.original is not None:
        original: Json = {"class": leaf.original.class_name}
        for name in ("scale", "zero_point"):
            part = getattr(leaf.original, name)
            if part is not None:
                original[name] = _tensor_to_json(part)
        if leaf.original.placement is not None:
            original["placement"] = leaf.original.placement.to_json()
        tensor["original"] = original
    if leaf.added is not None:
        tensor["added"] = {"axis": leaf.added.axis, "after": leaf.added.after}
    return tensor


def _tensor_from_json(json: Json, depth: int) -> TensorLeaf:
    stored = json.get("stored")
    original = json.get("original")
    if not isinstance(stored, dict | None) or not isinstance(original, dict | None):
        raise ValueError("a tensor whose description is not an object")
    shape = _shape(json.get("shape"))
    return TensorLeaf(
        _text(json, "dtype"),
        shape,
        _text(json, "digest"),
        None if stored is None else _text(stored, "dtype"),
        None if stored is None else _shape(stored.get("shape")),
        None if original is None else _original_from_json(original, depth),
        None if json.get("added") is None else _added_from_json(json["added"], len(shape)),
    )


def _added_from_json(json: object, dimensions: int) -> Added:
    if not isinstance(json, dict):
        raise ValueError("what a step added is not an object")
    added = Added(_count(json.get("axis")), _count(json.get("after")))
    if added.axis >= dimensions:
        raise ValueError(f"a tensor of {dimensions} dimensions that grew along axis {added.axis}")
    return added


def _original_from_json(json: Json, depth: int) -> Original:
    parts: dict[str, TensorLeaf | None] = {}
    for name in ("scale", "zero_point"):
        part = None if json.get(name) is None else from_json(json[name], depth=depth + 1)
        if not isinstance(part, TensorLeaf | None):
            raise ValueError(f"a {name} that is no tensor")
        parts[name] = part
    placement = None if json.get("placement") is None else Placement.from_json(json["placement"])
    return Original(_text(json, "class"), parts["scale"], parts["zero_point"], placement)


def _value_to_json(leaf: ValueLeaf) -> Json:
    value = leaf.value
    if isinstance(value, float) and not math.isfinite(value):
        value = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return {"type": "value", "class": leaf.class_name, "value": value}


def _value_from_json(json: Json) -> ValueLeaf:
    value = json.get("value")
    class_name = _text(json, "class")
    if not isinstance(value, PlainValue):
        raise ValueError(f"a value that is {type(value).__name__}")
    if class_name in _FLOATS and not isinstance(value, bool) and value is not None:
        value = _float(value)
    return ValueLeaf(value, class_name)


def _float(value: int | float | str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("a float beyond the range of floats") from error


def _items_from_json(items: object, depth: int) -> Iterator[tuple[str, Node]]:
    if not isinstance(items, list):
        raise ValueError("a container without a list of items")
    for item in items:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError("an item of a container that is not a pair of name and node")
        yield item[0], from_json(item[1], depth=depth + 1)


def _text(json: Json, name: str) -> str:
    value = json.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {type(value).__name__}, not text")
    return value


def _optional_text(json: Json, name: str) -> str | None:
    return None if json.get(name) is None else _text(json, name)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a count should be")
    return value


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DEPTH:
        raise ValueError("a shape that is not a short list")
    return tuple(_count(size) for size in value)
