"""What the axes of recorded tensors are: channels, heads, tokens."""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

from qvtrace.manifest import Manifest, RootCall
from qvtrace.metrics.spreads import Axes
from qvtrace.trees import tensor_leaves

# Of classes such as Conv2d, the number of axes behind the one of channels.
_CHANNELS_FIRST = re.compile(r"(?:Conv|ConvTranspose|BatchNorm|InstanceNorm)([123])d$")
_HEADS_AXES = 1, 2  # of four: batch, heads and tokens in either order, channels
_SEQUENCE = 2, 3  # axes of ids and of embeddings, the second of which is tokens
_PARTS = {"inputs": "inputs", "kwargs": "inputs", "output": "output"}  # of `head_widths`


class TensorAxes:
    """Told by the modules of a trace and by what its model was given."""

    def __init__(self, manifest: Manifest) -> None:
        self._modules = {entry.name: entry for entry in manifest.modules}
        self._root_calls = manifest.inputs.root_calls

    def of(self, module: str, path: str, shape: tuple[int, ...]) -> Axes:
        """Those of a tensor of a module, which stands at `path`."""
        entry = self._modules.get(module)
        if entry is None:
            return Axes()
        channels = _channel_axis(entry.class_name, len(shape))
        width = (entry.head_widths or {}).get(_PARTS.get(path.partition(".")[0], ""))
        if width is not None and shape and shape[-1] % width == 0:
            return Axes(channels, of_a_head=width)
        return Axes(channels, self._head_axis(shape) if channels == -1 else None)

    def _head_axis(self, shape: tuple[int, ...]) -> int | None:
        """That of four dimensions which is not as long as the sequence; None if that is unclear."""
        if len(shape) != 4:
            return None
        others = [axis for axis in _HEADS_AXES if shape[axis] not in self._lengths]
        return others[0] if len(others) == 1 else None

    @cached_property
    def _lengths(self) -> set[int]:
        return set(_lengths(self._root_calls))


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
                if len(leaf.shape) in _SEQUENCE:
                    yield leaf.shape[1]
