"""The places of two calls that belong together."""

from collections.abc import Iterator

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.leaves import (
    Arguments,
    LeafPair,
    pair_arguments,
    pair_nodes,
    pair_stored,
)
from qvtrace.failures import failure
from qvtrace.manifest import CallEntry
from qvtrace.trees import TensorLeaf


def has_arguments(call: CallEntry) -> bool:
    """Whether all that a call was given is stored."""
    return call.inputs is not None and call.kwargs is not None


def call_leaves(reference: Archive, candidate: Archive, pair: Pair) -> Iterator[LeafPair]:
    """What both calls were given and what they gave.

    Raises `DamagedArchiveError` for a tree that no writer writes, as the others here do.
    """
    yield from argument_leaves(reference, candidate, pair)
    yield from output_leaves(reference, candidate, pair)


def argument_leaves(reference: Archive, candidate: Archive, pair: Pair) -> Iterator[LeafPair]:
    """What both calls were given."""
    return pair_arguments(
        _arguments(reference, pair.reference), _arguments(candidate, pair.candidate)
    )


def output_leaves(reference: Archive, candidate: Archive, pair: Pair) -> Iterator[LeafPair]:
    """What both calls gave, or how they failed."""
    failures = failure(pair.reference), failure(pair.candidate)
    if None not in failures:
        return iter([LeafPair("output", *failures)])
    tree = reference.tree(pair.reference, "output")
    if tree is not None and pair.reference.output == pair.candidate.output:
        return pair_nodes(tree, tree, "output")  # parsing twice would tell no more
    return pair_stored(tree, candidate.tree(pair.candidate, "output"), "output")


def tensors_of(leaves: LeafPair) -> tuple[TensorLeaf, TensorLeaf] | None:
    """Both, where they are tensors."""
    reference, candidate = leaves.reference, leaves.candidate
    if isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf):
        return reference, candidate
    return None


def have_other_tokens(leaves: LeafPair) -> bool:
    """Whether two tensors have the same shape but for the number of vectors."""
    tensors = tensors_of(leaves)
    if tensors is None:
        return False
    one, other = (leaf.shape for leaf in tensors)
    return one != other and len(one) == len(other) >= 2 and one[-1] == other[-1]


def _arguments(archive: Archive, call: CallEntry) -> Arguments:
    return Arguments(archive.tree(call, "inputs"), archive.tree(call, "kwargs"), call.parameters)
