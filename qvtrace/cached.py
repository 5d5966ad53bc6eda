"""Tensors of a Cache, put together again from what each step of a generation added."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import CallEntry
from qvtrace.trees import Container, Node, TensorLeaf, join_path

_PARTS = ("inputs", "kwargs", "output")

_Held: TypeAlias = tuple[int | None, str]  # which Cache, and the path of the tensor within it


@dataclass(frozen=True)
class _Piece:
    """A tensor of a Cache at one place."""

    path: str  # of the place
    held: _Held
    leaf: TensorLeaf


def cached_tensor(archive: Archive, call: CallEntry, path: str) -> "np.ndarray[Any, Any]":
    """The whole of a tensor that a Cache held at a place of a call, such as
    `kwargs.past_key_values.layers.0.keys`.

    Raises `UsageError` where no such tensor is stored, and `DamagedArchiveError` where the earlier
    steps that it builds upon are not in the archive.
    """
    try:
        return _whole(archive, call, path)
    except ValueError as error:
        raise DamagedArchiveError(
            f"{archive.file}: {path} of {call.module}#{call.index}: {error}; "
            "the file is damaged, record again"
        ) from error


def _whole(archive: Archive, call: CallEntry, path: str) -> "np.ndarray[Any, Any]":
    piece = next((piece for piece in _pieces(call) if piece.path == path), None)
    if piece is None:
        raise UsageError(
            f"{archive.file}: holds no tensor of a Cache at {call.module}#{call.index} {path}; "
            "record it with --caches (caches=True)"
        )
    parts = [_array(archive, piece.leaf, path)]
    leaf, step = piece.leaf, call.step
    while leaf.added is not None and leaf.added.after:
        earlier = _at_the_end_before(archive, call.sample, step, piece.held, leaf)
        if earlier is None:
            raise DamagedArchiveError(
                f"{archive.file}: the first {leaf.added.after} positions of {path} were recorded "
                f"in no step before {step}; record all of them"
            )
        step, leaf = earlier
        parts.append(_array(archive, leaf, path))
    axis = 0 if piece.leaf.added is None else piece.leaf.added.axis
    return np.concatenate(parts[::-1], axis=axis) if parts[1:] else parts[0]


def _array(archive: Archive, leaf: TensorLeaf, path: str) -> "np.ndarray[Any, Any]":
    portion = archive.portion(leaf)
    if portion is not None:
        raise UsageError(
            f"{archive.file}: {path} was not stored whole ({portion.portion}); record it without "
            "--sample-tokens and --stats-only"
        )
    return archive.array(leaf)


def _at_the_end_before(
    archive: Archive, sample: int, step: int, held: _Held, leaf: TensorLeaf
) -> tuple[int, TensorLeaf] | None:
    """The last place before a step where the tensor is as long as the step found it, with its
    step."""
    assert leaf.added is not None
    found = None
    for call in archive.manifest.calls:
        if call.sample != sample or call.step >= step:
            continue
        for piece in _pieces(call):
            fits = piece.held == held and _length(piece.leaf, leaf.added.axis) == leaf.added.after
            if fits and (found is None or call.step >= found[0]):
                found = call.step, piece.leaf
    return found


def _length(leaf: TensorLeaf, axis: int) -> int | None:
    """How long the whole tensor is along an axis."""
    if axis >= len(leaf.shape):
        return None
    before = 0 if leaf.added is None else leaf.added.after
    return before + leaf.shape[axis]


def _pieces(call: CallEntry) -> Iterator[_Piece]:
    for part in _PARTS:
        node = call.tree(part)
        if node is not None:
            yield from _walk(node, part, None)


def _walk(node: Node, path: str, within: _Held | None) -> Iterator[_Piece]:
    if isinstance(node, TensorLeaf) and within is not None:
        yield _Piece(path, within, node)
    if isinstance(node, Container):
        for component, child in node.items:
            yield from _walk(child, join_path(path, component), _within(node, within, component))


def _within(node: Container, within: _Held | None, component: str) -> _Held | None:
    if node.kind == "cache":
        return node.number, component
    return None if within is None else (within[0], join_path(within[1], component))
