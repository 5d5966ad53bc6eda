"""Where in the tensors of a module their error is, and what of its inputs stands out."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qvtrace.comparison.call_leaves import tensors_of
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.leaves import LeafPair
from qvtrace.comparison.rows import COMPARED, Place, Row
from qvtrace.manifest import Manifest, RootCall
from qvtrace.metrics.spreads import Spread
from qvtrace.trees import TensorLeaf, tensor_leaves

# Of classes such as Conv2d, the number of axes behind the one of channels.
_CHANNELS_FIRST = re.compile(r"(?:Conv|ConvTranspose|BatchNorm|InstanceNorm)([123])d$")
_HEADS_AXES = 1, 2  # of four: batch, heads and tokens in either order, channels


@dataclass(frozen=True)
class Explanation:
    """How the error of one row, or of what a row's module was given, is spread."""

    place: Place
    sample: int
    shape: tuple[int, ...]  # as the axes of tokens and channels are numbered
    channel_axis: int
    spread: Spread | None
    reason: str | None = None  # why there is none

    @property
    def is_input(self) -> bool:
        """Whether the module was given it."""
        return self.place.path.partition(".")[0] in ("inputs", "kwargs")


class Explainer:
    """Looks at pairs of leaves once more, by token and by channel."""

    def __init__(self, contents: ContentPairs, reference: Manifest) -> None:
        self._contents = contents
        self._lengths = set(_lengths(reference.inputs.root_calls))

    def explain(self, places: Iterable[tuple[Row, LeafPair]]) -> tuple[Explanation, ...]:
        """Each pair of tensors of floats among the places."""
        pairs = ((row, tensors_of(leaves)) for row, leaves in places)
        found = (self._explanation(row, *tensors) for row, tensors in pairs if tensors is not None)
        return tuple(explanation for explanation in found if explanation is not None)

    def _explanation(
        self, row: Row, reference: TensorLeaf, candidate: TensorLeaf
    ) -> Explanation | None:
        shape, sample = reference.shape, row.sample or 0
        if row.status in ("exact", "mismatch"):
            return None
        portions = self._contents.portions
        if row.status not in COMPARED or not portions.can_be_read(reference, candidate):
            why = row.undefined.get("max_abs_error") or row.status
            return Explanation(row.place, sample, shape, -1, None, why)
        is_sampled = portions.are_partial(reference, candidate)
        axis = -1 if is_sampled else channel_axis(row.type[0], len(shape))
        heads = None if is_sampled or axis != -1 else self._head_axis(shape)
        found = self._contents.spread(reference, candidate, axis, heads)
        return None if found is None else Explanation(row.place, sample, shape, axis, found)

    def _head_axis(self, shape: tuple[int, ...]) -> int | None:
        """That of four dimensions which is not as long as the sequence; None if that is unclear."""
        if len(shape) != 4:
            return None
        others = [axis for axis in _HEADS_AXES if shape[axis] not in self._lengths]
        return others[0] if len(others) == 1 else None


def channel_axis(class_name: str, dimensions: int) -> int:
    """-1, but for modules whose channels come before places in a picture or a sequence."""
    known = _CHANNELS_FIRST.search(class_name)
    behind = int(known[1]) if known else 0
    return -1 - behind if behind and dimensions > behind + (dimensions == 2) else -1


def _lengths(calls: Iterable[RootCall]) -> Iterator[int]:
    """How many tokens there are in sequences that the model is given."""
    for call in calls:
        for tree, name in zip(call.input_trees(), ("inputs", "kwargs"), strict=True):
            for _, leaf in tensor_leaves(tree, name):
                yield from leaf.shape[1:2]
