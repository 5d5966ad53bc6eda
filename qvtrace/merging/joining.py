"""The parts of one value, one from each rank -> the value.

A tensor that every rank has alike is kept once. Parts are joined along the dimension that their
placement names, or that of equal parts seen before. What cannot be joined is kept apart, a part
for each rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvtrace.archive import Archive, ArchiveWriter, Tensor
from qvtrace.trees import (
    Container,
    Node,
    Original,
    TensorLeaf,
    join_path,
)

APART = "ranks"  # the class of the dict that holds what was not joined

_Parts = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class Counts:
    """What became of the tensors, at each of their places."""

    joined: int = 0
    alike: int = 0
    apart: int = 0


@dataclass(frozen=True)
class Whole:
    """How large a dimension is when its parts are together: parts that do not add up to it are no
    parts."""

    dimension: int  # -1: the last
    size: int | None  # None: whatever they add up to


class Joiner:
    """Joins values of the archives of all ranks, in their order, and stores the result."""

    def __init__(self, archives: Sequence[Archive], writer: ArchiveWriter) -> None:
        self.counts = Counts()
        self.apart: list[str] = []  # the places of what was not joined
        self._archives = archives
        self._writer = writer
        self._known: dict[_Parts, int] = {}
        self._keys: set[str] = set()

    def join(
        self, nodes: Sequence[Node], place: str, path: str, whole: Whole | None = None
    ) -> Node:
        """The value at a place, whose tensors' keys begin with `place`."""
        containers = [node for node in nodes if isinstance(node, Container)]
        leaves = [node for node in nodes if isinstance(node, TensorLeaf)]
        if len(containers) == len(nodes) and _are_alike(containers):
            return self._container(containers, place, path, whole)
        if len(leaves) == len(nodes):
            return self._tensor(leaves, place, path, whole)
        if not containers and not leaves and all(node == nodes[0] for node in nodes):
            return nodes[0]
        return self._apart(nodes, place, path)

    def copy(self, node: Node, rank: int, place: str, path: str) -> Node:
        """A value of one rank as it is."""
        if isinstance(node, Container):
            items = (
                (name, self.copy(child, rank, place, join_path(path, name)))
                for name, child in node.items
            )
            return replace(node, items=tuple(items))
        if isinstance(node, TensorLeaf):
            self._store(node, rank, place + path)
        return node

    def dimension_of(self, nodes: Sequence[Node]) -> int | None:
        """The dimension along which these parts were joined before."""
        leaves = [node for node in nodes if isinstance(node, TensorLeaf)]
        return self._known.get(_parts(leaves)) if len(leaves) == len(nodes) else None

    def _container(
        self, containers: Sequence[Container], place: str, path: str, whole: Whole | None
    ) -> Node:
        items = []
        for column in zip(*(container.items for container in containers), strict=True):
            name = column[0][0]
            nodes = [node for _, node in column]
            items.append((name, self.join(nodes, place, join_path(path, name), whole)))
        return replace(containers[0], items=tuple(items))

    def _tensor(
        self, leaves: Sequence[TensorLeaf], place: str, path: str, whole: Whole | None
    ) -> Node:
        dimension = self._dimension(leaves, whole)
        if dimension is not None and _can_be_joined(leaves, dimension):
            self._known[_parts(leaves)] = dimension
            self.counts.joined += 1
            return self._concatenated(leaves, dimension, place + path)
        first = leaves[0]
        if all(_contents(leaf) == _contents(first) for leaf in leaves) and not _is_part(first):
            self.counts.alike += 1
            self._store(first, 0, place + path)
            return _undistributed(first)
        return self._apart(leaves, place, path)

    def _dimension(self, leaves: Sequence[TensorLeaf], whole: Whole | None) -> int | None:
        """The dimension along which the leaves are parts; None where they are none."""
        placed = _placed_dimension(leaves, len(self._archives))
        if placed is not None:
            return placed
        dimensions = {len(leaf.shape) for leaf in leaves}
        if whole is not None and len(dimensions) == 1 and dimensions != {0}:
            dimension = whole.dimension % dimensions.pop()
            size = sum(leaf.shape[dimension] for leaf in leaves)
            if whole.size in (None, size):
                return dimension
        return self._known.get(_parts(leaves))

    def _concatenated(self, leaves: Sequence[TensorLeaf], dimension: int, key: str) -> TensorLeaf:
        arrays = [archive.array(leaf) for archive, leaf in zip(self._archives, leaves, strict=True)]
        together = np.ascontiguousarray(np.concatenate(arrays, dimension))
        described = Tensor(self._unused(key), leaves[0].dtype, together.shape)
        data = together.reshape(-1).view(np.uint8).data
        digest = self._writer.add_tensor(data, described)
        return TensorLeaf(leaves[0].dtype, together.shape, digest)

    def _store(self, leaf: TensorLeaf, rank: int, key: str) -> None:
        self._store_content(leaf, rank, key)
        for name in ("scale", "zero_point"):
            part = getattr(leaf.original, name, None)
            if part is not None:
                self._store_content(part, rank, join_path(key, name))

    def _store_content(self, leaf: TensorLeaf, rank: int, key: str) -> None:
        described = Tensor(self._unused(key), leaf.file_dtype, leaf.file_shape)
        with self._archives[rank].stored(leaf.digest) as data:
            self._writer.add_tensor(data, described)

    def _unused(self, key: str) -> str:
        """The inputs of a root call have the places of those of its call, and may be joined
        otherwise."""
        while key in self._keys:
            key += "'"
        self._keys.add(key)
        return key

    def _apart(self, nodes: Sequence[Node], place: str, path: str) -> Node:
        self.counts.apart += 1
        self.apart.append(place + path)
        names = [f"rank{rank}" for rank in range(len(nodes))]
        items = (
            (name, self.copy(node, rank, place, join_path(path, name)))
            for rank, (name, node) in enumerate(zip(names, nodes, strict=True))
        )
        return Container("dict", APART, tuple(items))


def _are_alike(containers: Sequence[Container]) -> bool:
    """Whether containers have the same kind, class, length and names."""
    forms = [
        (node.kind, node.class_name, node.length, [name for name, _ in node.items])
        for node in containers
    ]
    return all(form == forms[0] for form in forms)


def _contents(leaf: TensorLeaf) -> TensorLeaf:
    original = None if leaf.original is None else replace(leaf.original, placement=None)
    return replace(leaf, original=original)


def _parts(leaves: Sequence[TensorLeaf]) -> _Parts:
    return tuple((leaf.digest, leaf.shape) for leaf in leaves)


def _placed_dimension(leaves: Sequence[TensorLeaf], ranks: int) -> int | None:
    """What the placement says, where one dimension is spread over all ranks."""
    placements = [leaf.original.placement if leaf.original else None for leaf in leaves]
    first = placements[0]
    if first is None or any(placement != first for placement in placements):
        return None
    of = first.of[0] if len(first.of) == 1 and first.mesh == (ranks,) else ""
    number = of.removeprefix("Shard(").removesuffix(")")
    if not number.isdecimal() or not first.shape:
        return None
    return int(number) % len(first.shape)


def _is_part(leaf: TensorLeaf) -> bool:
    """Whether a placement says that the whole is something else: a shard, or a partial sum."""
    placement = leaf.original.placement if leaf.original else None
    return placement is not None and set(placement.of) != {"Replicate"}


def _can_be_joined(leaves: Sequence[TensorLeaf], dimension: int) -> bool:
    shapes = {leaf.shape[:dimension] + leaf.shape[dimension + 1 :] for leaf in leaves}
    as_they_are = all(
        leaf.stored_dtype is None and leaf.stored_shape is None and leaf.added is None
        for leaf in leaves
    )
    return as_they_are and len(shapes) == len({leaf.dtype for leaf in leaves}) == 1


def _undistributed(leaf: TensorLeaf) -> TensorLeaf:
    """A tensor that every process has as a whole is distributed no more."""
    if leaf.original is None or leaf.original.placement is None:
        return leaf
    rest: Original | None = replace(leaf.original, placement=None)
    if leaf.original.scale is None and leaf.original.zero_point is None:
        rest = None
    return replace(leaf, original=rest)
