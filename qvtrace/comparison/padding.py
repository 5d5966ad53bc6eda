"""Which tokens of a call are padding, by the attention mask that its model was given."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.comparison.leaves import Arguments
from qvtrace.manifest import CallEntry, RootCall
from qvtrace.metrics.elements import Flags
from qvtrace.trees import TensorLeaf

_MASK = "attention_mask"
_CallKey: TypeAlias = tuple[str, int]


class Padding:
    """The padding of one archive: where the mask of tokens, batch by sequence, is 0."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    @property
    def is_any(self) -> bool:
        """Whether there is a mask with a 0 in it."""
        return bool(self._masks)

    def kept(self, call: CallEntry, shape: tuple[int, ...]) -> Flags | None:
        """A flag for each token of a tensor of this shape: whether it is none of padding.

        None where the tensor has no axes of batch and sequence, or the call no padding.
        """
        mask = self._mask(call) if self._masks else None
        if mask is None or len(shape) < 2:
            return None
        leading, (batch, length) = shape[:-1], mask.shape
        if leading[:2] == mask.shape:
            axes = (batch, length, *(1 for _ in leading[2:]))
        elif len(leading) == 3 and (leading[0], leading[2]) == mask.shape:  # heads between them
            axes = (batch, 1, length)
        elif leading == (batch * length,):
            axes = leading
        else:
            return None
        flags: Flags = np.broadcast_to(mask.reshape(axes), leading).reshape(-1)
        return flags

    def _mask(self, call: CallEntry) -> Flags | None:
        root: _CallKey | None = (call.module, call.index)
        while root is not None and root not in self._root_calls:
            root = self._parents.get(root)
        if root is None:
            roots = self._roots_of_sample.get(call.sample, [])
            root = roots[0] if len(roots) == 1 else None
        return None if root is None else self._masks.get(root)

    @cached_property
    def _root_calls(self) -> dict[_CallKey, RootCall]:
        calls = self._archive.manifest.inputs.root_calls
        return {(call.module, call.index): call for call in calls}

    @cached_property
    def _roots_of_sample(self) -> dict[int, list[_CallKey]]:
        found: dict[int, list[_CallKey]] = {}
        for key, call in self._root_calls.items():
            found.setdefault(call.sample, []).append(key)
        return found

    @cached_property
    def _parents(self) -> dict[_CallKey, _CallKey | None]:
        calls = self._archive.manifest.calls
        return {(call.module, call.index): call.parent for call in calls}

    @cached_property
    def _masks(self) -> dict[_CallKey, Flags]:
        return dict(self._padded())

    def _padded(self) -> Iterator[tuple[_CallKey, Flags]]:
        parameters = {
            (call.module, call.index): call.parameters
            for call in self._archive.manifest.calls
            if (call.module, call.index) in self._root_calls
        }
        for key, call in self._root_calls.items():
            trees = self._archive.input_trees(call)
            arguments = Arguments(*trees, parameters.get(key, ())).items()
            mask = next((each.node for each in arguments if each.name == _MASK), None)
            if not isinstance(mask, TensorLeaf) or len(mask.shape) != 2:
                continue
            if self._archive.has_elements(mask):  # a private archive does not hold what was given
                kept = _flags(self._archive.array(mask))
                if kept is not None and not kept.all():
                    yield key, kept


def _flags(mask: "np.ndarray[Any, Any]") -> Flags | None:
    """Whether each is 1; None where a mask has other values, which are added to scores."""
    ones: Flags = mask == 1
    return ones if bool(np.all(ones | (mask == 0))) else None
