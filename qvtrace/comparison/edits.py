"""Edits in place that a call of one side makes, and the same call of the other side does not.

Who reads what was edited, from then on, is given something else: the edit is to blame for that, and
not the gap between calls, nor the call, that it shows in.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.noise import CallKey
from qvtrace.comparison.noise_steps import Edit, Step
from qvtrace.manifest import CallEntry
from qvtrace.patterns import kind_of
from qvtrace.trees import TensorLeaf, leaves


class Edits:
    """The edits of one side only, and the places that each may show at."""

    def __init__(self) -> None:
        self._found: list[Edit] = []  # in the order in which their calls returned
        self._own: dict[CallKey, Edit] = {}
        self._behind: dict[tuple[CallKey, CallKey], Edit] = {}
        self._given: dict[CallKey, Edit] = {}

    def add(
        self, edit: Edit, at_hand: Iterable[tuple[CallKey, CallKey]], given: Iterable[CallKey]
    ) -> None:
        """Take one in. `at_hand` are the calls in which what was edited still is, each with the one
        in it that edited it; `given` those that are given it later."""
        self._found.append(edit)
        self._own[edit.call] = edit
        self._behind.update(dict.fromkeys(at_hand, edit))
        self._given.update(dict.fromkeys(given, edit))

    def on(self, step: Step) -> Step:
        """The place with the latest edit that may show at it."""
        if not self._found:
            return step
        edit = None
        if not (step.is_local or step.source):
            edit = self._read_at(step) or self._last_before(step)
        edit = edit or self._own.get(step.call.key)
        return step if edit is None else replace(step, edit=edit)

    def but_harmless(self, steps: Iterable[Step], told: Iterable[Step]) -> "Edits | None":
        """Those that are left without the ones that may show where something is `told`, though
        what a call of the same kind edits earlier changes nothing; None: all are left."""
        may_show = {step.edit for step in steps}
        shown = {step.edit for step in told}
        harmless: set[tuple[str, str, bool]] = set()
        doubted = set()
        for edit in self._found:
            kind = kind_of(edit.call[0]), edit.path, edit.by_reference
            if edit in shown and kind in harmless:
                doubted.add(edit)
            elif edit in may_show and edit not in shown:
                harmless.add(kind)
        return self._without(doubted) if doubted else None

    def _without(self, doubted: Collection[Edit]) -> "Edits":
        left = Edits()
        left._found = [edit for edit in self._found if edit not in doubted]
        for name in ("_own", "_behind", "_given"):
            known: dict[object, Edit] = getattr(self, name)
            setattr(left, name, {key: edit for key, edit in known.items() if edit not in doubted})
        return left

    def _read_at(self, step: Step) -> Edit | None:
        taken = None if step.taker is None else self._given.get(step.taker.key)
        return taken or self._given.get(step.call.key)

    def _last_before(self, step: Step) -> Edit | None:
        places = ((step.call.key, before) for before in reversed(step.calls_before))
        return next((self._behind[place] for place in places if place in self._behind), None)


def find_edits(reference: Archive, candidate: Archive, pairs: Sequence[Pair]) -> Edits:
    """The edits that one side makes and the other is known not to make.

    Raises `DamagedArchiveError` for a tree that no writer writes.
    """
    edits = Edits()
    contents = _Contents((reference, candidate), pairs)
    for pair in pairs:
        for edit in _made_alone(pair):
            edits.add(edit, *contents.reach(edit, pair))
    return edits


def _made_alone(pair: Pair) -> Iterator[Edit]:
    reference, candidate = pair.reference, pair.candidate
    if reference.edited is None or candidate.edited is None:
        return  # it is not known of both
    key = pair.reference.module, pair.reference.index
    yield from (Edit(key, path, False) for path in _edited_by_one(candidate, reference))
    yield from (Edit(key, path, True) for path in _edited_by_one(reference, candidate))


def _edited_by_one(call: CallEntry, other: CallEntry) -> Iterator[str]:
    known = {name for path in other.edited or () for name in _names(other, path)}
    for path in call.edited or ():
        if known.isdisjoint(_names(call, path)):
            yield path


def _names(call: CallEntry, path: str) -> tuple[str, ...]:
    """A place by position and by name, as far as they are known."""
    part, _, rest = path.partition(".")
    number, dot, below = rest.partition(".")
    if part != "inputs" or not number.isdecimal() or int(number) >= len(call.parameters):
        return (path,)
    name = call.parameters[int(number)]
    return (path,) if name is None else (path, f"kwargs.{name}{dot}{below}")


class _Contents:
    """What calls are given on both sides, by digests; calls have the reference's keys."""

    def __init__(self, archives: tuple[Archive, Archive], pairs: Sequence[Pair]) -> None:
        self._archives = archives
        self._pairs = pairs

    def reach(self, edit: Edit, pair: Pair) -> tuple[list[tuple[CallKey, CallKey]], list[CallKey]]:
        """Where what was edited is at hand afterwards, and who is given it."""
        editing, other = (0, 1) if edit.by_reference else (1, 0)
        calls = pair.reference, pair.candidate
        names = _names(calls[editing], edit.path)
        edited = self._digest_at(editing, calls[editing], names)
        unedited = self._digest_at(other, calls[other], names)
        around = self._around(edit.call)
        at_hand = []
        for inner, outer in pairwise(around):
            at_hand.append((outer, inner))
            if unedited not in self._given[other].get(outer, ()):
                break  # it was made in there
        later = () if unedited is None else self._takers[other].get(unedited, ())
        given = [
            key
            for key in later
            if self._orders[key] > self._orders[edit.call]
            and key not in around
            and edited not in self._given[editing][key]
        ]
        return at_hand, given

    def _around(self, key: CallKey) -> list[CallKey]:
        """A call and those that it was made in."""
        found = [key]
        above = self._parents.get(key)
        while above is not None and above not in found:  # a file may hold a circle
            found.append(above)
            above = self._parents.get(above)
        return found

    def _digest_at(self, side: int, call: CallEntry, names: Sequence[str]) -> str | None:
        """Of the tensor at a place, however it was given there."""
        found = {
            name: digest
            for path, digest in self._given_to(side, call)
            for name in _names(call, path)
        }
        return next((found[name] for name in names if name in found), None)

    def _given_to(self, side: int, call: CallEntry) -> Iterator[tuple[str, str]]:
        for part in ("inputs", "kwargs"):
            tree = self._archives[side].tree(call, part)
            for path, leaf in () if tree is None else leaves(tree, part):
                if isinstance(leaf, TensorLeaf):
                    yield path, leaf.digest

    @cached_property
    def _parents(self) -> dict[CallKey, CallKey | None]:
        calls = self._archives[0].manifest.calls
        return {(call.module, call.index): call.parent for call in calls}

    @cached_property
    def _orders(self) -> dict[CallKey, int]:
        return {_key(pair): pair.order for pair in self._pairs}

    @cached_property
    def _given(self) -> tuple[Mapping[CallKey, frozenset[str]], ...]:
        """Of each side, by call, the digests of what it is given."""
        return tuple(
            {
                _key(pair): frozenset(
                    digest
                    for _, digest in self._given_to(side, (pair.reference, pair.candidate)[side])
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
