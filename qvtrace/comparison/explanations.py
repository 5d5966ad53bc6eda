"""Where in the tensors of a module their error is, and what of its inputs stands out."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from qvtrace.comparison.call_leaves import tensors_of
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.leaves import LeafPair
from qvtrace.comparison.rows import COMPARED, Place, Row
from qvtrace.manifest import Manifest, ModuleEntry, RootCall
from qvtrace.metrics.spreads import Channels, Spread
from qvtrace.trees import TensorLeaf, tensor_leaves

# Of classes such as Conv2d, the number of axes behind the one of channels.
_CHANNELS_FIRST = re.compile(r"(?:Conv|ConvTranspose|BatchNorm|InstanceNorm)([123])d$")
_PARTS = {"inputs": "inputs", "kwargs": "inputs", "output": "output"}  # of `head_widths`
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
        self._modules = {entry.name: entry for entry in reference.modules}
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
        channels = channels_of(self._modules, row.module, row.path, shape)
        if is_sampled:
            channels = replace(channels, axis=-1)
        heads = None if is_sampled or channels.axis != -1 else self._head_axis(shape)
        found = self._contents.spread(reference, candidate, channels, heads)
        if found is None:
            return None
        return Explanation(row.place, sample, shape, channels.axis, found)

    def _head_axis(self, shape: tuple[int, ...]) -> int | None:
        """That of four dimensions which is not as long as the sequence; None if that is unclear."""
        if len(shape) != 4:
            return None
        others = [axis for axis in _HEADS_AXES if shape[axis] not in self._lengths]
        return others[0] if len(others) == 1 else None


def channels_of(
    modules: Mapping[str, ModuleEntry], module: str, path: str, shape: tuple[int, ...]
) -> Channels:
    """Where in a tensor of a module, which stands at `path`, its channels are."""
    entry = modules.get(module)
    if entry is None:
        return Channels()
    width = (entry.head_widths or {}).get(_PARTS.get(path.partition(".")[0], ""))
    are_heads = width is not None and bool(shape) and shape[-1] % width == 0
    return Channels(_channel_axis(entry.class_name, len(shape)), width if are_heads else None)


def _channel_axis(class_name: str, dimensions: int) -> int:
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
