"""Trees of an archive -> the Python values that they were.

An archive is not to be trusted: nothing in it makes this code import, evaluate, or look up a class
by name.
"""

import ast
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

from qvtrace.archive import Archive
from qvtrace.trees import Container, Node, OpaqueLeaf, Original, TensorLeaf, ValueLeaf, join_path

_SCALARS = frozenset({"None", "bool", "int", "float", "str"})
SPARSE = frozenset({"sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"})
_DEVICE = re.compile(r"device\(type='(\w+)'(?:, index=(\d+))?\)")
_RANGE = re.compile(r"range\((-?\d+(?:, -?\d+){1,2})\)")


class NotRebuiltError(ValueError):
    """A value of a kind that an archive does not hold whole; says which and where."""


# Builds a Cache that stood at a path.
BuildCache = Callable[[Container, str], Any]


def rebuild(node: Node, archive: Archive, path: str, build_cache: BuildCache | None = None) -> Any:
    """The value; tensors are copies in memory of their own.

    `path` names the place in what is raised: `NotRebuiltError` for a value that was not stored or
    whose class is unknown, and `DamagedArchiveError` for contents that are missing. Without
    `build_cache`, a Cache is of the former.
    """
    match node:
        case TensorLeaf():
            return rebuild_tensor(node, archive, path)
        case ValueLeaf():
            return _value(node, path)
        case OpaqueLeaf():
            raise NotRebuiltError(f"{path} was a {node.class_name}, which was not stored")
        case Container(kind="cache") if build_cache is not None:
            return build_cache(node, path)
        case Container():
            return _container(node, archive, path, build_cache)


def _container(node: Container, archive: Archive, path: str, build_cache: BuildCache | None) -> Any:
    values = [
        rebuild(child, archive, join_path(path, name), build_cache) for name, child in node.items
    ]
    names = [name for name, _ in node.items]
    match node.kind:
        case "tuple":
            return tuple(values)
        case "list":
            return values
        case "dict":
            keys = (_key(name, path) for name in names)
            return dict(zip(keys, values, strict=True))
        case "named_tuple":
            return _named_tuple(node.class_name, names, path)(*values)
        case _:
            raise NotRebuiltError(f"{path} was a {node.class_name}, which cannot be built again")


def _named_tuple(name: str, fields: list[str], path: str) -> Callable[..., tuple[Any, ...]]:
    try:
        return namedtuple(name, fields)
    except (ValueError, TypeError) as error:
        raise NotRebuiltError(f"{path} was a {name}, which cannot be built again") from error


def rebuild_tensor(leaf: TensorLeaf, archive: Archive, path: str) -> torch.Tensor:
    """A tensor as it was; raises as `rebuild` does."""
    dtype = getattr(torch, leaf.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise NotRebuiltError(f"a tensor of it has the dtype {leaf.dtype}, unknown to this torch")
    portion = archive.portion(leaf)
    if portion is not None:
        raise NotRebuiltError(f"{path} was not stored whole ({portion.portion})")
    data = bytearray(archive.contents(leaf))
    try:
        if not data:
            return torch.empty(leaf.shape, dtype=dtype)
        tensor = torch.frombuffer(data, dtype=dtype).reshape(leaf.shape)
        return _in_layout(tensor, leaf.original)
    except (RuntimeError, ValueError, TypeError) as error:  # of a dtype or a layout
        kind = leaf.original.class_name if leaf.original else leaf.dtype
        raise NotRebuiltError(f"{path} was a {kind}, which cannot be built again") from error


def _in_layout(tensor: torch.Tensor, original: Original | None) -> torch.Tensor:
    """What was stored with its zeros is sparse again; raises `ValueError` for blocks, whose size
    is not known."""
    if original is None or original.class_name not in SPARSE:
        return tensor
    layout: torch.layout = getattr(torch, original.class_name)
    if layout in (torch.sparse_bsr, torch.sparse_bsc):
        raise ValueError("blocks of unknown size")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch may still change such tensors
        return tensor.to_sparse(layout=layout)


def _value(leaf: ValueLeaf, path: str) -> Any:
    """The plain value; what stands there as its `repr` is parsed, never evaluated."""
    text, name = str(leaf.value), leaf.class_name
    if name == "int" and isinstance(leaf.value, str):
        return int(text, 16)
    if name in _SCALARS:
        return leaf.value
    named = getattr(torch, text.removeprefix("torch."), None)
    if name in ("dtype", "layout", "memory_format") and type(named).__name__ == name:
        return named
    device, numbers = _DEVICE.fullmatch(text), _RANGE.fullmatch(text)
    if name == "device" and device is not None:
        return torch.device(":".join(filter(None, device.groups())))
    if name == "range" and numbers is not None:
        return range(*map(int, numbers[1].split(", ")))
    raise NotRebuiltError(f"{path} was a {name}, which cannot be built again")


def _key(component: str, path: str) -> Any:
    """The key of a dict that a component of a path names."""
    text = _unescaped(component)
    if component.startswith("["):
        try:
            return ast.literal_eval(text[1:-1])
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise NotRebuiltError(f"{path} has the key {text}") from error
    return text


def _unescaped(component: str) -> str:
    characters = iter(component)
    return "".join(next(characters, "") if c == "\\" else c for c in characters)
