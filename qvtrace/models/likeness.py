"""A request and a sample taken from an archive, so that a second recording is like the first.

An archive is not to be trusted: nothing in it makes this code import a function, run code that
comes with a model, or look up a class by name.
"""

import ast
import re
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.models.functions import FunctionName
from qvtrace.models.origins import parse_origin
from qvtrace.models.placement import ATTENTIONS, DTYPES
from qvtrace.models.request import ModelRequest, Sample
from qvtrace.trees import (
    Container,
    Node,
    OpaqueLeaf,
    Original,
    TensorLeaf,
    ValueLeaf,
    leaves,
)

_SCALARS = frozenset({"None", "bool", "int", "float", "str"})
_SPARSE = frozenset({"sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"})
_DEVICE = re.compile(r"device\(type='(\w+)'(?:, index=(\d+))?\)")
_RANGE = re.compile(r"range\((-?\d+(?:, -?\d+){1,2})\)")


def resembling(request: ModelRequest, archive: Archive) -> ModelRequest:
    """The request with what it leaves open taken from the archive: model, seed, dtype, attention.

    Raises `UsageError` where the archive's model must be named again.
    """
    recorded = archive.manifest.model
    same = request.model is None or request.model == recorded.name
    if request.model is None:
        request = replace(request, model=_trusted_name(archive))
    if same:
        layers = recorded.modifications.get("num_layers")
        layers = layers if isinstance(layers, int) else None
        request = replace(
            request,
            from_config=request.from_config or recorded.modifications.get("from_config") is True,
            num_layers=layers if request.num_layers is None else request.num_layers,
            revision=request.revision or recorded.revision,
        )
    function = isinstance(parse_origin(request.model), FunctionName)
    # A function chose its dtypes itself, which may be several.
    dtype = recorded.modifications.get("dtype") if function else recorded.dtype
    dtype = dtype if dtype in DTYPES else None
    return replace(
        request,
        seed=recorded.seed if request.seed is None else request.seed,
        dtype=request.dtype or dtype,
        attn=request.attn or _attention(archive, request, function=function),
        generate=_steps(archive) if request.generate is None else request.generate,
    )


def rebuild_inputs(archive: Archive) -> Sample:
    """What the archive's generation was given, or else the inputs of its first root call.

    Raises `UsageError` for inputs that the archive could not store.
    """
    given = archive.manifest.inputs.given
    first = next((call for call in archive.manifest.inputs.root_calls if call.module == ""), None)
    root = given or first
    if root is None:
        raise _cannot(archive, "it holds no inputs of the whole model")
    try:
        inputs, kwargs = root.input_trees()
    except ValueError as error:
        raise DamagedArchiveError(
            f"{archive.file}: the tree of its inputs is damaged ({error}); record it again"
        ) from error
    args, named = _rebuild(inputs, archive, "inputs"), _rebuild(kwargs, archive, "kwargs")
    if not isinstance(args, tuple | list) or not isinstance(named, dict):
        raise DamagedArchiveError(
            f"{archive.file}: its inputs are no arguments of a call; record it again"
        )
    source = {**archive.manifest.inputs.source, "like": archive.file.name}
    more = () if given is not None else _more_calls(archive)
    told = *more, *_dequantized((inputs, "inputs"), (kwargs, "kwargs"))
    return Sample(tuple(args), named, source, told)


def _trusted_name(archive: Archive) -> str:
    name = archive.manifest.model.name
    if name is None:
        raise UsageError(
            f"--like {archive.file}: was recorded from a Python program, which names no model; "
            "name it with --model"
        )
    if FunctionName.parse(name) is not None:
        raise UsageError(
            f"--like {archive.file}: its model is the function {name}, which is not run on the "
            f"archive's word; give --model {name}"
        )
    return name


def _attention(archive: Archive, request: ModelRequest, *, function: bool) -> str | None:
    """The attention implementation of the archive, where the model can be told to use it."""
    if function or request.attention_maps:
        return None
    attention = archive.manifest.environment.get("attention")
    return attention if attention in ATTENTIONS else None


def _steps(archive: Archive) -> int | None:
    """How many tokens the archive's generation has; None: it holds none that can be repeated."""
    if archive.manifest.inputs.given is None:
        return None
    return sum(entry.sample == 0 for entry in archive.manifest.steps) or None


def _more_calls(archive: Archive) -> list[str]:
    calls = len(archive.manifest.inputs.root_calls)
    return [f"{archive.file.name} has {calls} root calls; its first is repeated"] * (calls > 1)


def _dequantized(*trees: tuple[Node, str]) -> Iterator[str]:
    for path, leaf in chain.from_iterable(leaves(*tree) for tree in trees):
        kind = leaf.original.class_name if isinstance(leaf, TensorLeaf) and leaf.original else None
        if kind is not None and kind not in _SPARSE:
            yield f"{path} was a {kind}; it is given as plain numbers"


def _rebuild(node: Node, archive: Archive, path: str) -> Any:
    match node:
        case TensorLeaf():
            return _tensor(node, archive, path)
        case ValueLeaf():
            return _value(node, archive, path)
        case OpaqueLeaf():
            raise _cannot(archive, f"{path} was a {node.class_name}, which it could not store")
        case Container():
            return _container(node, archive, path)


def _container(node: Container, archive: Archive, path: str) -> Any:
    values = [_rebuild(child, archive, f"{path}.{name}") for name, child in node.items]
    names = [name for name, _ in node.items]
    match node.kind:
        case "tuple":
            return tuple(values)
        case "list":
            return values
        case "dict":
            keys = (_key(name, archive, path) for name in names)
            return dict(zip(keys, values, strict=True))
        case "named_tuple":
            return _named_tuple(node.class_name, names, archive, path)(*values)
        case _:
            raise _cannot(archive, f"{path} was a {node.class_name}, which cannot be built again")


def _named_tuple(
    name: str, fields: list[str], archive: Archive, path: str
) -> Callable[..., tuple[Any, ...]]:
    try:
        return namedtuple(name, fields)
    except (ValueError, TypeError) as error:
        raise _cannot(archive, f"{path} was a {name}, which cannot be built again") from error


def _tensor(leaf: TensorLeaf, archive: Archive, path: str) -> torch.Tensor:
    dtype = getattr(torch, leaf.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise _cannot(archive, f"a tensor of it has the dtype {leaf.dtype}, unknown to this torch")
    data = bytearray(archive.contents(leaf))
    try:
        if not data:
            return torch.empty(leaf.shape, dtype=dtype)
        tensor = torch.frombuffer(data, dtype=dtype).reshape(leaf.shape)
        return _in_layout(tensor, leaf.original)
    except (RuntimeError, ValueError, TypeError) as error:  # of a dtype or a layout
        kind = leaf.original.class_name if leaf.original else leaf.dtype
        raise _cannot(archive, f"{path} was a {kind}, which cannot be built again") from error


def _in_layout(tensor: torch.Tensor, original: Original | None) -> torch.Tensor:
    """What was stored with its zeros is sparse again; raises `ValueError` for blocks, whose size
    is not known."""
    if original is None or original.class_name not in _SPARSE:
        return tensor
    layout: torch.layout = getattr(torch, original.class_name)
    if layout in (torch.sparse_bsr, torch.sparse_bsc):
        raise ValueError("blocks of unknown size")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch may still change such tensors
        return tensor.to_sparse(layout=layout)


def _value(leaf: ValueLeaf, archive: Archive, path: str) -> Any:
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
    raise _cannot(archive, f"{path} was a {name}, which cannot be built again")


def _key(component: str, archive: Archive, path: str) -> Any:
    """The key of a dict that a component of a path names."""
    text = _unescaped(component)
    if component.startswith("["):
        try:
            return ast.literal_eval(text[1:-1])
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise _cannot(archive, f"{path} has the key {text}") from error
    return text


def _unescaped(component: str) -> str:
    characters = iter(component)
    return "".join(next(characters, "") if c == "\\" else c for c in characters)


def _cannot(archive: Archive, reason: str) -> UsageError:
    return UsageError(
        f"--like {archive.file}: {reason}; give the inputs with --inputs, --prompt or --image"
    )
