"""Values of a running model -> trees, each tensor's bytes handed to a store at that very moment.

What a tree says was true when it was made: in-place work that follows cannot change it.
"""

import dataclasses
import enum
import re
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from qvtrace.archive import Tensor
from qvtrace.archive.layout import DTYPES
from qvtrace.digests import digest_bytes
from qvtrace.errors import ArchiveError
from qvtrace.recording.cache_growth import CacheGrowth, Moment
from qvtrace.recording.placement import placement_of
from qvtrace.trees import (
    MAX_DEPTH,
    Container,
    ContainerKind,
    Leaf,
    Node,
    OpaqueLeaf,
    Original,
    TensorLeaf,
    ValueLeaf,
    join_path,
    path_component,
)

# More would be data, not structure.
MAX_ITEMS = 10_000  # of one container
MAX_VALUES = 20_000  # of one value; a list within itself twice, again and again, doubles each time

Store = Callable[[torch.Tensor, Tensor], str]

_GIVEN = ("inputs.", "kwargs.")  # below the names of parameters


class Component(Protocol):
    """Names a key in a path; `is_given`: it is one of a dict that a call was given."""

    def __call__(self, key: object, *, is_given: bool) -> str: ...


def _plain_component(key: object, *, is_given: bool) -> str:
    return path_component(key)


PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_KNOWN_TO_NUMPY = frozenset({torch.float32, torch.float16, torch.int64})
_BUILT_IN_KINDS: dict[type, ContainerKind] = {tuple: "tuple", list: "list", dict: "dict"}
_BY_REPR = (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice, complex)
_SCALES = ("scale", "_scale", "scales")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
_ZERO_POINTS = ("zero_point", "_zero_point", "_zeropoint", "_shift", "zero_points")


@dataclasses.dataclass
class _Taking:
    """One snapshot that is being taken."""

    place: str
    values: int = 0  # met so far


class _StoreFailedError(Exception):
    """What the store raised: a value of the user's may raise the same, and is none of its."""

    def __init__(self, error: OSError | ArchiveError) -> None:
        self.error = error


class Snapshots:
    """Takes snapshots of values; counts what could not be stored, by reason."""

    def __init__(
        self,
        store: Store,
        *,
        caches: bool = False,
        moment: Callable[[], Moment] = lambda: (0, 0),
        component: Component = _plain_component,
    ) -> None:
        """`caches`: also the tensors of Caches, after the first of a `moment` what it added.
        `component` names the key of a container in a path."""
        self._component = component
        self.opaque: dict[str, int] = {}
        self._store = store
        self._growth = CacheGrowth(_digest) if caches else None
        self._moment = moment

    def take(self, value: object, place: str, path: str) -> Node:
        """The tree of `value`; tensors are stored under keys that start with `place`.

        Raises only what the store raises as `OSError` or `ArchiveError`: anything else that goes
        wrong with a value makes it an opaque leaf.
        """
        try:
            return self._node(value, _Taking(place), path, ())
        except _StoreFailedError as failure:
            raise failure.error from None

    def _node(self, value: object, taking: "_Taking", path: str, above: tuple[int, ...]) -> Node:
        taking.values += 1
        if taking.values > MAX_VALUES:
            return self._opaque(value, f"beyond the first {MAX_VALUES} values")
        try:
            return self._known(value, taking, path, above)
        except _StoreFailedError:
            raise
        except (Exception, SystemExit) as error:  # a class of the user's whose methods raise
            return self._opaque(value, _described_error(error))

    def _known(self, value: object, taking: "_Taking", path: str, above: tuple[int, ...]) -> Node:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, taking.place + path)
        if type(value) not in _BUILT_IN_KINDS:  # most are: every call is given a tuple and a dict
            leaf = self._value(value, taking.place + path)
            if leaf is not None:
                return leaf
        described = self._described(value)
        if described is None:
            return self._opaque(value, None)
        if id(value) in above or len(above) >= MAX_DEPTH:
            return self._opaque(value, "contains itself, or nests too deeply")
        kind, items, length = described
        return self._container(value, kind, items, length, taking, path, above)

    def _value(self, value: object, key: str) -> Leaf | None:
        """The leaf of what is no tensor; None where it may be a container."""
        if isinstance(value, _Held):
            return self._held(value, key)
        if value is None or isinstance(value, bool | int | float | str | np.generic | enum.Enum):
            return _plain_value(value)
        if isinstance(value, _BY_REPR):
            return ValueLeaf(repr(value), type(value).__name__)
        return self._array(value, key) if isinstance(value, np.ndarray) else None

    def _container(
        self,
        value: object,
        kind: ContainerKind,
        items: list[tuple[object, object]],
        length: int | None,
        taking: "_Taking",
        path: str,
        above: tuple[int, ...],
    ) -> Node:
        if len(items) > MAX_ITEMS:
            return self._opaque(value, f"more than {MAX_ITEMS} items")
        is_given = is_key_given(kind, path)
        nodes: dict[str, Node] = {}
        for key, child in items:
            component = self._component(key, is_given=is_given)
            while component in nodes:  # two keys with one repr
                component += "'"
            nodes[component] = self._node(
                child, taking, join_path(path, component), (*above, id(value))
            )
        number = self._number(value) if kind == "cache" and nodes else None
        return Container(kind, type(value).__name__, tuple(nodes.items()), length, number)

    def _described(
        self, value: object
    ) -> tuple[ContainerKind, list[tuple[object, object]], int | None] | None:
        """Kind, items and cached length of a container; None for everything else.

        Generators and iterators are no containers here: looking at them would use them up.
        """
        kind = _BUILT_IN_KINDS.get(type(value))
        if kind is None and _is_cache(value):
            return "cache", self._cache_items(value), _cached_length(value)
        kind = kind or container_kind(value)
        if kind is None:
            return None
        return kind, list(islice(container_items(value, kind), MAX_ITEMS + 1)), None

    def _cache_items(self, cache: Any) -> list[tuple[object, object]]:
        if self._growth is None:
            return []
        number = self._growth.number(cache)
        return [(name, _holding(part, number, str(name))) for name, part in _cache_parts(cache)]

    def _number(self, cache: object) -> int | None:
        return None if self._growth is None else self._growth.number(cache)

    def _held(self, held: "_Held", key: str) -> Leaf:
        """A tensor of a Cache, or what the step has added to it."""
        tensor = held.tensor.detach()
        if self._growth is None or type(tensor) not in PLAIN_TENSORS or not _is_strided(tensor):
            return self._tensor(held.tensor, key)
        added = self._growth.added(held.number, held.path, tensor, self._moment())
        if added is None:
            return self._tensor(tensor, key)
        rest = tensor.shape[added.axis] - added.after
        leaf = self._tensor(tensor.narrow(added.axis, added.after, rest), key)
        return replace(leaf, added=added) if isinstance(leaf, TensorLeaf) else leaf

    def _opaque(self, value: object, reason: str | None) -> OpaqueLeaf:
        class_name = type(value).__name__
        counted = f"{class_name}: {reason}" if reason else class_name
        self.opaque[counted] = self.opaque.get(counted, 0) + 1
        return OpaqueLeaf(class_name, reason)

    def _array(self, array: np.ndarray[Any, Any], key: str) -> Leaf:
        try:
            tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape).copy())
        except (TypeError, ValueError):
            return self._opaque(array, f"dtype {array.dtype}")
        return self._tensor(tensor, key)

    def _tensor(self, tensor: torch.Tensor, key: str) -> Leaf:
        try:
            if type(tensor) in PLAIN_TENSORS and _is_strided(tensor):
                return self._leaf(tensor.detach(), key, None)
            with torch.no_grad():
                return self._plain_leaf(tensor, key)
        except _StoreFailedError:
            raise
        except MemoryError:
            return self._opaque(tensor, "no memory for a copy")
        except Exception as error:  # what a subclass or a backend without storage may raise
            return self._opaque(tensor, _described_error(error))

    def _leaf(self, tensor: torch.Tensor, key: str, original: Original | None) -> Leaf:
        if tensor.is_meta:
            return self._opaque(tensor, "on the meta device, without data")
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        dtype, shape = _dtype_name(tensor), tuple(tensor.shape)
        if dtype in DTYPES:
            digest = self._stored(tensor, Tensor(key, dtype, shape))
            return TensorLeaf(dtype, shape, digest, original=original)
        stored = _storable(tensor)
        stored_dtype, stored_shape = _stored_form(stored)
        whole_shape = None if shape == stored_shape else shape
        digest = self._stored(stored, Tensor(key, stored_dtype, stored_shape, whole_shape))
        return TensorLeaf(
            dtype,
            shape,
            digest,
            stored_dtype if stored_dtype != dtype else None,
            stored_shape if stored_shape != shape else None,
            original,
        )

    def _stored(self, tensor: torch.Tensor, described: Tensor) -> str:
        try:
            return self._store(tensor, described)
        except (OSError, ArchiveError) as error:
            raise _StoreFailedError(error) from error

    def _plain_leaf(self, tensor: torch.Tensor, key: str) -> Leaf:
        plain, original = self._plain(tensor, key)
        return self._leaf(plain.detach(), key, original)

    def _plain(self, tensor: torch.Tensor, key: str) -> tuple[torch.Tensor, Original | None]:
        """A subclass, a quantized or a sparse tensor as a plain one, and what it was."""
        class_name = type(tensor).__name__
        if tensor.is_nested:
            raise ValueError("a nested tensor")
        if tensor.is_quantized:
            return tensor.dequantize(), self._natively_quantized(tensor, key)
        if not _is_strided(tensor):
            return _dense(tensor), Original(str(tensor.layout).removeprefix("torch."))
        if hasattr(tensor, "to_local"):
            return self._local(tensor, key)
        if class_name == "AsyncCollectiveTensor":  # the result of what was sent off before
            return tensor.wait(), None  # type: ignore[attr-defined]
        if type(tensor).dequantize is not torch.Tensor.dequantize or _has_parts(tensor):
            parts = Original(
                class_name,
                self._part(tensor, _SCALES, f"{key}.scale"),
                self._part(tensor, _ZERO_POINTS, f"{key}.zero_point"),
            )
            plain = tensor.dequantize()
            return plain.as_subclass(torch.Tensor), parts
        return tensor.as_subclass(torch.Tensor), Original(class_name)

    def _local(self, tensor: Any, key: str) -> tuple[torch.Tensor, Original]:
        """This process's part of a distributed tensor; no other process is asked for anything."""
        original = Original(type(tensor).__name__, placement=placement_of(tensor))
        local = tensor.to_local()
        if type(local) in PLAIN_TENSORS and _is_strided(local):
            return local, original
        plain, inner = self._plain(local, key)
        if inner is not None:
            original = replace(original, scale=inner.scale, zero_point=inner.zero_point)
        return plain, original

    def _natively_quantized(self, tensor: torch.Tensor, key: str) -> Original:
        class_name = _dtype_name(tensor)
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scale = torch.tensor(tensor.q_scale(), dtype=torch.float64)
            zero_point = torch.tensor(tensor.q_zero_point())
        else:
            scale, zero_point = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return Original(
            class_name,
            self._as_part(scale, f"{key}.scale"),
            self._as_part(zero_point, f"{key}.zero_point"),
        )

    def _part(self, tensor: torch.Tensor, names: Iterable[str], key: str) -> TensorLeaf | None:
        for name in names:
            part = getattr(tensor, name, None)
            if isinstance(part, torch.Tensor):
                return self._as_part(part, key)
        return None

    def _as_part(self, part: torch.Tensor, key: str) -> TensorLeaf | None:
        """A scale or zero point; one that is quantized itself is not described any further."""
        if type(part) not in PLAIN_TENSORS:
            part = part.dequantize().as_subclass(torch.Tensor)
        leaf = self._tensor(part, key)
        return leaf if isinstance(leaf, TensorLeaf) else None


@dataclass(frozen=True)
class _Held:
    """A tensor within a Cache."""

    tensor: torch.Tensor
    number: int  # of the Cache
    path: str  # of the tensor within it


def _holding(part: object, number: int, path: str) -> object:
    """A part of a Cache with its tensors marked as such; a Cache within it is one of its own."""
    if isinstance(part, torch.Tensor):
        return _Held(part, number, path)
    if isinstance(part, list):
        return [_holding(item, number, f"{path}.{index}") for index, item in enumerate(part)]
    if isinstance(part, dict):
        return {key: _holding(item, number, f"{path}.{key}") for key, item in part.items()}
    return part


def _digest(tensor: torch.Tensor) -> str:
    return digest_bytes(host_bytes(tensor.cpu()))


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a plain tensor in host memory, copied only where they are not contiguous."""
    if tensor.dtype in _KNOWN_TO_NUMPY and tensor.is_contiguous() and tensor.numel():
        return tensor.numpy().data.cast("B")  # with less work than for the others
    return memoryview(flat_bytes(tensor).numpy().data)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a plain tensor in one dimension, copied only where they are not contiguous."""
    contiguous = tensor.contiguous()
    # Empty tensors and those of one element are contiguous whatever their strides say.
    return contiguous.as_strided((contiguous.numel(),), (1,)).view(torch.uint8)


def _plain_value(value: object) -> ValueLeaf:
    if isinstance(value, enum.Enum):
        return ValueLeaf(str(value), type(value).__name__)
    if isinstance(value, np.generic):
        item = value.item()
        plain = item if isinstance(item, bool | int | float | str) else repr(item)
        return ValueLeaf(plain, type(value).__name__)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4096:
        return ValueLeaf(hex(value), "int")  # more digits than Python's own JSON reader takes
    for base in (bool, int, float, str):
        if isinstance(value, base):
            return ValueLeaf(base(value), base.__name__)
    return ValueLeaf(None, "None")


def is_key_given(kind: ContainerKind, path: str) -> bool:
    """Whether the keys of a container at a place are the user's: fields and the names of parameters
    are code."""
    return kind == "dict" and path.startswith(_GIVEN)


def container_kind(value: object) -> ContainerKind | None:
    """The kind of a container that is no Cache; None for everything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "model_output" if isinstance(value, Mapping) else "dataclass"
    if isinstance(value, tuple):
        return "named_tuple" if hasattr(value, "_fields") else "tuple"
    if isinstance(value, list):
        return "list"
    return "dict" if isinstance(value, Mapping | UserDict) else None


def container_items(value: Any, kind: ContainerKind) -> Iterator[tuple[object, object]]:
    """Keys, fields or indices of a container, with what it holds there."""
    if kind in ("dataclass", "model_output"):
        names = [field.name for field in dataclasses.fields(value)]
        yield from ((name, getattr(value, name, None)) for name in names)
        if kind == "model_output":
            yield from ((name, value[name]) for name in value if name not in names)
    elif kind == "named_tuple":
        yield from zip(value._fields, value, strict=True)
    elif kind == "dict":
        yield from value.items()
    else:
        yield from ((str(index), item) for index, item in enumerate(value))


def _is_cache(value: object) -> bool:
    """Whether it is a key-value or state cache of transformers: its own class does not help, since
    asking for it would import the library."""
    if "transformers" not in sys.modules:
        return False
    return any(
        base.__name__.endswith("Cache") and base.__module__.startswith("transformers")
        for base in type(value).__mro__
    )


def _cached_length(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except Exception:  # caches of states have no length; a custom one may raise anything
        return None


def _cache_parts(cache: Any) -> Iterator[tuple[object, object]]:
    """What a Cache holds: its layers' tensors, and caches within it."""
    for name, part in vars(cache).items():
        if isinstance(part, torch.Tensor) or _is_cache(part):
            yield name, part
        elif name == "layers" and isinstance(part, list):
            yield name, [_tensors_of(layer) for layer in part]
        elif isinstance(part, list | dict) and _holds_tensors(part):
            yield name, part


def _tensors_of(layer: object) -> dict[str, object]:
    """The tensors of one layer of a Cache; a state space model has dicts of them."""
    tensors: dict[str, object] = {}
    for name, part in vars(layer).items():
        if isinstance(part, torch.Tensor):
            tensors[name] = part
        elif isinstance(part, dict) and _holds_tensors(part):
            tensors[name] = {k: v for k, v in part.items() if isinstance(v, torch.Tensor)}
    return tensors


def _holds_tensors(part: list[Any] | dict[Any, Any]) -> bool:
    values = part.values() if isinstance(part, dict) else part
    return any(isinstance(value, torch.Tensor) for value in values)


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _has_parts(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A sparse tensor with its zeros; refused where they would outgrow it by far."""
    held = sum(part.numel() for part in (tensor.values(),)) if tensor.is_sparse_csr else 0
    held = held or (tensor._nnz() if tensor.is_sparse else tensor.numel())
    if tensor.numel() > 1024 * max(held, 1024):
        raise ValueError("a sparse tensor too large to be stored with its zeros")
    return tensor.to_dense()


def _dtype_name(tensor: torch.Tensor) -> str:
    return _name_of(tensor.dtype)


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """The nearest form that safetensors has: pairs of reals, or the bytes as they are."""
    if tensor.dtype in (torch.complex128, torch.complex32):
        return torch.view_as_real(tensor)
    is_float4 = _dtype_name(tensor) == "float4_e2m1fn_x2"
    return tensor if is_float4 else tensor.contiguous().view(torch.uint8)


def _stored_form(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    name, shape = _dtype_name(tensor), tuple(tensor.shape)
    if name == "float4_e2m1fn_x2":  # safetensors counts the two elements of a byte
        return "float4_e2m1fn", (*shape[:-1], 2 * shape[-1])
    return name, shape


def _described_error(error: BaseException) -> str:
    try:
        lines = str(error).splitlines()
    except Exception:  # an exception of the user's
        lines = []
    # An address would make two equal runs differ.
    return _ADDRESS.sub("0x...", lines[0])[:120] if lines else type(error).__name__
