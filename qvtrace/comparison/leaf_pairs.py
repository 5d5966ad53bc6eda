"""What is known of two leaves without a look at any element."""

import math
from typing import TypeAlias

from qvtrace.comparison.outcomes import equal_values
from qvtrace.trees import Node, TensorLeaf, ValueLeaf

Leaves: TypeAlias = tuple[TensorLeaf, TensorLeaf]
# The digests, the dtypes and the shapes of both.
Contents: TypeAlias = tuple[str, str, str, str, tuple[int, ...], tuple[int, ...]]


def same_contents(reference: Node | None, candidate: Node | None) -> bool:
    """Whether two leaves are told equal without a look at any element."""
    if isinstance(reference, TensorLeaf) and isinstance(candidate, TensorLeaf):
        keys = [(leaf.digest, leaf.dtype, leaf.shape) for leaf in (reference, candidate)]
        return keys[0] == keys[1]
    if isinstance(reference, ValueLeaf) and isinstance(candidate, ValueLeaf):
        return equal_values(reference, candidate)
    return reference == candidate


def contents_of(reference: TensorLeaf, candidate: TensorLeaf) -> Contents:
    """What two leaves have in common with all that are compared alike."""
    dtypes = reference.dtype, candidate.dtype
    return reference.digest, candidate.digest, *dtypes, reference.shape, candidate.shape


def has_to_be_read(reference: TensorLeaf, candidate: TensorLeaf) -> bool:
    """Whether two tensors can be compared, and digests do not tell how."""
    may_correspond = _may_correspond(reference.shape, candidate.shape)
    return may_correspond and not same_contents(reference, candidate)


def _may_correspond(reference: tuple[int, ...], candidate: tuple[int, ...]) -> bool:
    size = math.prod(reference)
    return reference == candidate or (size > 0 and size == math.prod(candidate))
