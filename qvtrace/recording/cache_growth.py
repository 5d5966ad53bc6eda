"""What a step of a generation adds to the tensors of a Cache, so that no step stores them whole.

A Cache holds what every step before has put into it: stored whole at each of them, 32 steps would
take 32 times the room. What stands at a place is therefore told beside the end of the step before:
where the old part is as it was, only the rest is stored.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qvtrace.trees import Added

Moment = tuple[int, int]  # sample and step

# Where transformers' layers put further positions: keys and values are [..., positions, features].
_GROWING = frozenset({"keys", "values"})
_POSITIONS = -2


@dataclass(frozen=True)
class _Contents:
    """What a tensor of a Cache held at some time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str


@dataclass
class _Slot:
    """One tensor of one Cache over time."""

    moment: Moment
    latest: _Contents
    before: _Contents | None = None  # at the end of the step before the one of `moment`


class CacheGrowth:
    """Remembers what each Cache held when it was last looked at."""

    def __init__(self, digest: Callable[[Tensor], str]) -> None:
        self._digest = digest
        self._numbers: dict[int, tuple[weakref.ref[object], int]] = {}
        self._count = 0
        self._slots: dict[tuple[int, str], _Slot] = {}
        self._lock = threading.Lock()

    def number(self, cache: object) -> int:
        """Which Cache of the recording it is, in order of appearance."""
        with self._lock:
            known, number = self._numbers.get(id(cache), (None, 0))
            if known is None or known() is not cache:  # an address can be used again
                number, self._count = self._count, self._count + 1
                self._numbers[id(cache)] = weakref.ref(cache), number
            return number

    def added(self, number: int, path: str, tensor: Tensor, moment: Moment) -> Added | None:
        """What is new in the tensor at `path` of a Cache since the step before `moment`; None where
        it is to be stored whole: it is new itself, or not only longer than it was."""
        contents = _Contents(tensor.dtype, tuple(tensor.shape), self._digest(tensor))
        with self._lock:
            slot = self._slots.setdefault((number, path), _Slot(moment, contents))
            if slot.moment != moment:
                slot.moment, slot.before = moment, slot.latest
            slot.latest = contents
            before = slot.before
        if before is None:
            return None
        axis = _growing_axis(before, contents, path)
        if axis is None:
            return None
        length = before.shape[axis]
        kept = tensor.narrow(axis, 0, length)
        return Added(axis, length) if self._digest(kept) == before.digest else None


def _growing_axis(before: _Contents, now: _Contents, path: str) -> int | None:
    """The one axis that is longer now; of what grows but has not, the one along which it would."""
    if before.dtype != now.dtype or len(before.shape) != len(now.shape):
        return None
    sizes = enumerate(zip(before.shape, now.shape, strict=True))
    different = [axis for axis, (old, new) in sizes if old != new]
    if len(different) == 1 and now.shape[different[0]] > before.shape[different[0]]:
        return different[0]
    grows = path.rpartition(".")[2] in _GROWING and len(now.shape) > 1
    return len(now.shape) + _POSITIONS if grows and not different else None
