"""Where what a call edits in place is at hand afterwards, who is given it, and what is made of it.

Calls have the reference's keys on both sides.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.noise import CallKey
from qvtrace.comparison.noise_steps import Edit, Step, showing
from qvtrace.comparison.rows import PARTS, Row
from qvtrace.manifest import CallEntry
from qvtrace.metrics.additions import parts_of
from qvtrace.metrics.elements import format_of
from qvtrace.trees import TensorLeaf, leaves

_GIVEN = "inputs", "kwargs"
_TRIED = 8  # of what was there last


def names_of(call: CallEntry, path: str) -> tuple[str, ...]:
    """A place by position and by name, as far as they are known."""
    part, _, rest = path.partition(".")
    number, dot, below = rest.partition(".")
    if part != "inputs" or not number.isdecimal() or int(number) >= len(call.parameters):
        return (path,)
    name = call.parameters[int(number)]
    return (path,) if name is None else (path, f"kwargs.{name}{dot}{below}")


class EditedContents:
    """What calls are given on both sides, by digests; calls have the reference's keys."""

    def __init__(self, archives: tuple[Archive, Archive], pairs: Sequence[Pair]) -> None:
        self._archives = archives
        self._pairs = pairs
        self._unedited: dict[Edit, TensorLeaf | None] = {}  # as the other side has it

    def reach(self, edit: Edit, pair: Pair) -> tuple[list[tuple[CallKey, CallKey]], list[CallKey]]:
        """Where what was edited is at hand afterwards, and who is given it."""
        editing, other = (0, 1) if edit.by_reference else (1, 0)
        calls = pair.reference, pair.candidate
        names = names_of(calls[editing], edit.path)
        edited, unedited = (self._tensor_at(side, calls[side], names) for side in (editing, other))
        self._unedited[edit] = unedited
        digests = [None if leaf is None else leaf.digest for leaf in (edited, unedited)]
        around = self._around(edit.call)
        at_hand = []
        for inner, outer in pairwise(around):
            at_hand.append((outer, inner))
            if digests[1] not in self._given[other].get(outer, ()):
                break  # it was made in there
        later = () if unedited is None else self._takers[other].get(unedited.digest, ())
        given = [
            key
            for key in later
            if self._orders[key] > self._orders[edit.call]
            and key not in around
            and digests[0] not in self._given[editing][key]
        ]
        return at_hand, given

    def is_read(self, edit: Edit, step: Step) -> bool | None:
        """Whether what shows at a gap is made of what was edited; None: not known.

        The reference's is looked at, which has it as it was.
        """
        unedited = self._unedited.get(edit)
        if edit.by_reference or unedited is None:
            return None
        there = self._there(step)
        read = {self._is_made_of(unedited, row, there) for row in showing(step)}
        return True if True in read else None if None in read or not read else False

    def _is_made_of(
        self, unedited: TensorLeaf, row: Row, there: Sequence[TensorLeaf]
    ) -> bool | None:
        """Whether a place is the sum or the product of it and others that were there, or it."""
        reference = self._archives[0]
        whole = self._tensors((row.module, row.call), PARTS["all"]).get(row.path)
        alike = {leaf.digest: leaf for leaf in there if whole and leaf.shape == whole.shape}
        tried = [*alike.values()][-_TRIED:]
        if whole is None or not all(map(reference.has_elements, (whole, *tried))):
            return None
        arrays = [reference.array(leaf) for leaf in (whole, *tried)]
        if any(format_of(array.dtype).kind != "float" for array in arrays):
            return None
        parts = parts_of(arrays[0], arrays[1:])
        if parts is None:
            return None
        if any(tried[place].digest == unedited.digest for place in parts.places):
            return True
        return False if unedited.shape == whole.shape else None  # of another form it may be a view

    def _there(self, step: Step) -> list[TensorLeaf]:
        """What the reference had in a call before a gap, by and by."""
        found = [*self._tensors(step.call.key, _GIVEN).values()]
        for key in step.calls_before:
            found += self._tensors(key, PARTS["all"]).values()
        return found

    def _tensors(self, key: CallKey, parts: Sequence[str]) -> dict[str, TensorLeaf]:
        """Those of a call of the reference, by path."""
        call = self._calls.get(key)
        return {} if call is None else dict(self._leaves(0, call, parts))

    def _around(self, key: CallKey) -> list[CallKey]:
        """A call and those that it was made in."""
        found = [key]
        while key in self._calls:
            above = self._calls[key].parent
            if above is None or above in found:  # a file may hold a circle
                break
            found.append(above)
            key = above
        return found

    def _tensor_at(self, side: int, call: CallEntry, names: Sequence[str]) -> TensorLeaf | None:
        """What a call was given at a place, however it was given."""
        found = {
            name: leaf
            for path, leaf in self._leaves(side, call, _GIVEN)
            for name in names_of(call, path)
        }
        return next((found[name] for name in names if name in found), None)

    def _leaves(
        self, side: int, call: CallEntry, parts: Sequence[str]
    ) -> Iterator[tuple[str, TensorLeaf]]:
        for part in parts:
            tree = self._archives[side].tree(call, part)
            for path, leaf in () if tree is None else leaves(tree, part):
                if isinstance(leaf, TensorLeaf):
                    yield path, leaf

    @cached_property
    def _calls(self) -> dict[CallKey, CallEntry]:
        return {(call.module, call.index): call for call in self._archives[0].manifest.calls}

    @cached_property
    def _orders(self) -> dict[CallKey, int]:
        return {_key(pair): pair.order for pair in self._pairs}

    @cached_property
    def _given(self) -> tuple[Mapping[CallKey, frozenset[str]], ...]:
        """Of each side, by call, the digests of what it is given."""
        return tuple(
            {
                _key(pair): frozenset(
                    leaf.digest
                    for _, leaf in self._leaves(
                        side, (pair.reference, pair.candidate)[side], _GIVEN
                    )
                )
                for pair in self._pairs
            }
            for side in (0, 1)
        )

    @cached_property
    def _takers(self) -> tuple[Mapping[str, list[CallKey]], ...]:
        """Of each side, by digest, the calls that are given it."""
        found = []
        for given in self._given:
            takers: dict[str, list[CallKey]] = defaultdict(list)
            for key, digests in given.items():
                for digest in digests:
                    takers[digest].append(key)
            found.append(takers)
        return tuple(found)


def _key(pair: Pair) -> CallKey:
    return pair.reference.module, pair.reference.index
