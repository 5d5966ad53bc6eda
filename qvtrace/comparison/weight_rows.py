"""Rows of weights: a vector along the last dimension is an output channel, and where the weight is
quantized in groups each of them is a vector too."""

import math
from collections.abc import Iterable
from dataclasses import replace

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Alignment, Pair
from qvtrace.comparison.leaves import LeafPair
from qvtrace.comparison.row_building import RowBuilder
from qvtrace.comparison.rows import WEIGHTS, Groups, Place, Row, is_weight
from qvtrace.comparison.weight_pairs import WeightPair, WeightPairs
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import CallEntry, WeightEntry
from qvtrace.metrics.names import NOISE_METRICS
from qvtrace.patterns import shown
from qvtrace.qparams.findings import parameters_of
from qvtrace.trees import Node, TensorLeaf, join_path


def require_weights(*archives: Archive) -> None:
    """Raise `UsageError` where weights are asked for and an archive has none."""
    for archive in archives:
        if archive.manifest.weights is None:
            raise UsageError(
                f"{archive.file}: holds no weights, which --path weights compares; "
                "record it again with --weights"
            )


class WeightRows:
    """Adds the weights of two archives to the rows that are to be compared."""

    def __init__(
        self, built: RowBuilder, reference: Archive, candidate: Archive, alignment: Alignment
    ) -> None:
        self._built = built
        self._calls: dict[str, Pair] = {}
        for pair in alignment.pairs:
            self._calls.setdefault(pair.reference.module, pair)
        self._archives = reference, candidate
        self._parameters = parameters_of(reference), parameters_of(candidate)
        self._classes = {m.name: m.class_name for m in reference.manifest.modules}
        self._groups: dict[Place, tuple[int, TensorLeaf, TensorLeaf]] = {}

    def add(self, weights: WeightPairs) -> None:
        """Take in every weight; raises `DamagedArchiveError` for a tree that no writer writes."""
        calls = len(self._archives[0].manifest.calls)
        for pair in weights.pairs:
            self._add(pair, calls + pair.order)
        self._built.only_in_reference += map(_place, weights.only_in_reference)
        self._built.only_in_candidate += map(_place, weights.only_in_candidate)

    def finish(self, rows: Iterable[Row]) -> list[Row]:
        """The compared rows, those of weights with the figures of their groups: a weight has no
        noise in and out."""
        return [self._with_groups(_without_noise(row)) if is_weight(row) else row for row in rows]

    def _add(self, pair: WeightPair, order: int) -> None:
        nodes = _node(self._archives[0], pair.reference), _node(self._archives[1], pair.candidate)
        leaves, note = _alike(*nodes), None
        if leaves is not None and self._is_convolution(pair) and len(leaves[0].shape) > 2:
            note = f"{list(leaves[0].shape)}, flattened: a vector for each channel"
            nodes = leaves = _shaped(leaves, (leaves[0].shape[0], -1))
        path = join_path(WEIGHTS, pair.name)
        calls = self._as_calls(pair, order)
        self._built.add_leaves(calls, LeafPair(path, *nodes, note))
        size = self._group_size(pair)
        if leaves is not None and size and leaves[0].shape and leaves[0].shape[-1] % size == 0:
            grouped = _shaped(leaves, (*leaves[0].shape[:-1], -1, size))
            self._groups[Place(calls.reference.module, calls.reference.index, path)] = (
                size,
                *grouped,
            )
            self._built.contents.want(*grouped)

    def _as_calls(self, pair: WeightPair, order: int) -> Pair:
        """A weight stands in the first call of its module, around which others can be looked at."""
        calls = self._calls.get(pair.module)
        if calls is not None:
            return replace(calls, order=order, rule=pair.rule)
        return Pair(order, _call(pair.module), _call(pair.candidate.module), pair.rule)

    def _is_convolution(self, pair: WeightPair) -> bool:
        return "Conv" in self._classes.get(pair.module, "")

    def _group_size(self, pair: WeightPair) -> int | None:
        sides = (self._parameters[1], pair.candidate), (self._parameters[0], pair.reference)
        for parameters, entry in sides:
            for found in parameters.of(entry.module):
                if found.of == entry.name and found.group_size is not None:
                    return found.group_size
        return None

    def _with_groups(self, row: Row) -> Row:
        size, *leaves = self._groups.get(row.place, (0,))
        if not size:
            return row
        outcome = self._built.contents.found(*leaves)
        found = None if outcome is None else outcome.difference
        if found is None:
            return row
        metrics = found.metrics
        return replace(
            row,
            groups=Groups(
                size,
                metrics.token_sqnr_p50,
                metrics.token_sqnr_p5,
                metrics.token_sqnr_min,
                found.worst_token,
            ),
        )


def _without_noise(row: Row) -> Row:
    nothing = dict.fromkeys(NOISE_METRICS)
    undefined = dict.fromkeys(NOISE_METRICS, "weight")
    return replace(
        row, metrics=replace(row.metrics, **nothing), undefined=row.undefined | undefined
    )


def _node(archive: Archive, entry: WeightEntry) -> Node:
    try:
        return entry.node()
    except ValueError as error:
        raise DamagedArchiveError(
            f"{archive.file}: the {entry.name} of {shown(entry.module)}: {error}; "
            "the file is damaged, record again"
        ) from error


def _call(module: str) -> CallEntry:
    """What stands for a module that was not called."""
    return CallEntry(module, 0, 0, 0, None, None, None, None, (), None)


def _place(entry: WeightEntry) -> Place:
    return Place(entry.module, 0, join_path(WEIGHTS, entry.name))


def _alike(reference: Node, candidate: Node) -> tuple[TensorLeaf, TensorLeaf] | None:
    """Both, where they are tensors of one shape that are stored as they are."""
    match reference, candidate:
        case TensorLeaf(stored_shape=None), TensorLeaf(stored_shape=None):
            return (reference, candidate) if reference.shape == candidate.shape else None
    return None


def _shaped(
    leaves: tuple[TensorLeaf, TensorLeaf], shape: tuple[int, ...]
) -> tuple[TensorLeaf, TensorLeaf]:
    """Both in another shape, of which one size may be -1: whatever is left."""
    known = math.prod(size for size in shape if size >= 0)
    rest = math.prod(leaves[0].shape) // known if known else 0
    sizes = tuple(rest if size < 0 else size for size in shape)
    reference, candidate = (replace(leaf, shape=sizes) for leaf in leaves)
    return reference, candidate
