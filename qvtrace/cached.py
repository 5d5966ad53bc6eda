"""Tensors of a Cache, put together again from what each step of a generation added."""

from collections import defaultdict
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

    Raises `UsageError` where no such tensor is stored, or only a part of it, and
    `DamagedArchiveError` where the earlier steps that it builds upon are not in the archive.
    """
    leaves, axis = CachedTensors(archive).parts(call, path)
    for leaf in leaves:
        portion = archive.portion(leaf)
        if portion is not None:
            raise UsageError(
                f"{archive.file}: {path} was not stored whole ({portion.portion}); record it "
                "without --sample-tokens, --stats-only and --private"
            )
    parts = [archive.array(leaf) for leaf in leaves]
    return np.concatenate(parts, axis=axis) if parts[1:] else parts[0]


class CachedTensors:
    """The tensors of the Caches of an archive, found again where several are wanted."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._pieces: dict[tuple[int, _Held], list[tuple[int, TensorLeaf]]] | None = None

    def parts(self, call: CallEntry, path: str) -> tuple[list[TensorLeaf], int]:
        """What the whole of a tensor is put together from, in order, and along which axis; raises
        what `cached_tensor` raises."""
        try:
            return self._parts(call, path)
        except ValueError as error:
            raise DamagedArchiveError(
                f"{self._archive.file}: {path} of {call.module}#{call.index}: {error}; "
                "the file is damaged, record again"
            ) from error

    def _parts(self, call: CallEntry, path: str) -> tuple[list[TensorLeaf], int]:
        piece = next((piece for piece in _pieces(call) if piece.path == path), None)
        if piece is None:
            raise UsageError(
                f"{self._archive.file}: holds no tensor of a Cache at "
                f"{call.module}#{call.index} {path}; record it with --caches (caches=True)"
            )
        leaves = [piece.leaf]
        leaf, step = piece.leaf, call.step
        while leaf.added is not None and leaf.added.after:
            earlier = self._at_the_end_before(call.sample, step, piece.held, leaf)
            if earlier is None:
                raise DamagedArchiveError(
                    f"{self._archive.file}: the first {leaf.added.after} positions of {path} were "
                    f"recorded in no step before {step}; record all of them"
                )
            step, leaf = earlier
            leaves.append(leaf)
        axis = 0 if piece.leaf.added is None else piece.leaf.added.axis
        if len({(part.dtype, _across(part, axis)) for part in leaves}) > 1:
            raise ValueError("its parts do not fit together")
        return leaves[::-1], axis

    def _at_the_end_before(
        self, sample: int, step: int, held: _Held, leaf: TensorLeaf
    ) -> tuple[int, TensorLeaf] | None:
        """The last place before a step where the tensor is as long as the step found it, with its
        step."""
        assert leaf.added is not None
        if self._pieces is None:
            self._pieces = _all_pieces(self._archive)
        found = None
        for at, other in self._pieces.get((sample, held), ()):
            fits = at < step and _length(other, leaf.added.axis) == leaf.added.after
            if fits and (found is None or at >= found[0]):
                found = at, other
        return found


def _all_pieces(archive: Archive) -> dict[tuple[int, _Held], list[tuple[int, TensorLeaf]]]:
    """Every tensor of a Cache over time, each with its step."""
    pieces = defaultdict(list)
    for call in archive.manifest.calls:
        for piece in _pieces(call):
            pieces[call.sample, piece.held].append((call.step, piece.leaf))
    return pieces


def _across(leaf: TensorLeaf, axis: int) -> tuple[int, ...]:
    """The shape but for one axis."""
    return leaf.shape[:axis] + leaf.shape[axis + 1 :]


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
