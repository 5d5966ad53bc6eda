"""Channels that are permuted within a layer: by the weights that give them, and again by those that
take them.

What the taking call gives agrees; so a swap that nothing undoes is no permutation, it is a fault.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from qvtrace.comparison.inner_rotating import Reader, Standing, layer_of
from qvtrace.comparison.leaf_pairs import Leaves
from qvtrace.metrics.permutations import Permutation, find_permutation, permuted_heads

_WEIGHTS_OF_HEADS = 4  # dimensions: batch, heads, queries, keys


@dataclass(frozen=True, eq=False, slots=True)
class Undone:
    """What calls of a layer give and take permuted, by their modules and paths, until a module
    takes it and gives what agrees."""

    given: dict[tuple[str, str], list[Leaves]] = field(default_factory=lambda: defaultdict(list))
    taken: list[Leaves] = field(default_factory=list)

    def permutations(self, read: Reader) -> Iterator[tuple[Leaves, Permutation]]:
        """Of all that it explains. What is as wide as what is taken at last moves as that does."""
        last = find_permutation([read(*leaves) for leaves in self.taken])
        if last is None:
            return
        yield from ((leaves, last) for leaves in self.taken)
        for given in self.given.values():
            sides = [read(*leaves) for leaves in given]
            found = find_permutation(sides, like=last)
            if found is not None:
                yield from ((leaves, found) for leaves in given)


def find_permutations(
    standing: Sequence[Standing], read: Reader
) -> Iterator[tuple[Leaves, Permutation]]:
    """Pairs whose channels are permuted with the permutation that explains each; `standing` in
    order of execution. Weights of attention, which a call gives that makes others, have the heads
    of these permuted."""
    modules = set()
    for module, undone in _undone([one for one in standing if not one.makes_calls]):
        for leaves, permutation in undone.permutations(read):
            modules.add(module.rpartition(".")[0])
            yield leaves, permutation
    for one in standing:
        is_attention = one.makes_calls and one.is_output and one.module in modules
        if is_attention and _are_weights_of_heads(one):
            heads = permuted_heads(read(*one.leaves))
            if heads is not None:
                yield one.leaves, heads


def _are_weights_of_heads(one: Standing) -> bool:
    return one.outcome.status == "ok" and len(one.leaves[0].shape) == _WEIGHTS_OF_HEADS


def _undone(standing: Sequence[Standing]) -> Iterator[tuple[str, Undone]]:
    """By the module that undoes it. What is permuted first in a layer is given: what a layer is
    given permuted, it is not that permutes it."""
    found: dict[str, Undone] = defaultdict(Undone)
    waiting: dict[str, list[Standing]] = defaultdict(list)  # by layer
    for (module, _), places in groupby(standing, key=lambda one: (one.module, one.call)):
        inputs: list[Standing] = []
        outputs: list[Standing] = []
        for one in places:
            (outputs if one.is_output else inputs).append(one)
        taken = [one for one in inputs if one.is_unlike]
        before = waiting[layer_of(module)]
        if taken and before and outputs and all(one.is_undone for one in outputs):
            undone = found[module]
            undone.taken.append(taken[0].leaves)
            for one in before:
                undone.given[one.module, one.path].append(one.leaves)
            before.clear()
        elif before or not taken:
            before.extend(one for one in (*inputs, *outputs) if one.is_unlike)
    yield from found.items()
