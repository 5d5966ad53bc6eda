"""Edits in place that a call of one side makes, and the same call of the other side does not.

Who reads what was edited, from then on, is given something else: the edit is to blame for that, and
not the gap between calls, nor the call, that it shows in.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.edited_contents import EditedContents, names_of
from qvtrace.comparison.noise import CallKey
from qvtrace.comparison.noise_steps import Edit, Step
from qvtrace.manifest import CallEntry
from qvtrace.patterns import kind_of


class Edits:
    """The edits of one side only, and the places that each may show at."""

    def __init__(self, contents: EditedContents | None = None) -> None:
        self._contents = contents
        self._found: list[Edit] = []  # in the order in which their calls returned
        self._own: dict[CallKey, Edit] = {}
        self._behind: dict[tuple[CallKey, CallKey], list[Edit]] = defaultdict(list)
        self._given: dict[CallKey, Edit] = {}
        self._not_at: set[tuple[Edit, Hashable]] = set()  # places that it is not to blame for

    def add(
        self, edit: Edit, at_hand: Iterable[tuple[CallKey, CallKey]], given: Iterable[CallKey]
    ) -> None:
        """Take one in. `at_hand` are the calls in which what was edited still is, each with the one
        in it that edited it; `given` those that are given it later."""
        self._found.append(edit)
        self._own[edit.call] = edit
        for place in at_hand:
            self._behind[place].append(edit)
        self._given.update(dict.fromkeys(given, edit))

    def on(self, step: Step) -> Step:
        """The place with the latest edit that may show at it."""
        if not self._found:
            return step
        edit = next((one for one in self._at(step) if (one, step.place) not in self._not_at), None)
        return step if edit is None else replace(step, edit=edit)

    def doubt(self, steps: Iterable[Step], told: Iterable[Step]) -> bool:
        """Take back what edits are blamed for where something is `told` that is made of other
        things, or that may be, where an earlier edit of the same kind changed nothing. Returns
        whether there is any: then places may have other edits."""
        may_show = {step.edit for step in steps}
        blamed = [(step.edit, step) for step in told if step.edit is not None]
        shown = {edit for edit, _ in blamed}
        harmless: set[tuple[str, str, bool]] = set()
        after_harmless = set()
        for edit in self._found:
            kind = kind_of(edit.call[0]), edit.path, edit.by_reference
            if edit in may_show and edit not in shown:
                harmless.add(kind)
            elif kind in harmless:
                after_harmless.add(edit)
        doubted = set()
        for _, step in blamed:
            for edit in self._at(step):
                if (edit, step.place) in self._not_at:
                    continue
                is_read = self._is_read(edit, step)
                if is_read or (is_read is None and edit not in after_harmless):
                    break
                doubted.add((edit, step.place))
        self._not_at |= doubted
        return bool(doubted)

    def _is_read(self, edit: Edit, step: Step) -> bool | None:
        """Whether what shows is made of what was edited; None: not known."""
        takers = {step.call.key} if step.taker is None else {step.call.key, step.taker.key}
        if any(self._given.get(key) == edit for key in takers):
            return True
        if self._contents is None or edit.call == step.call.key:
            return None
        return self._contents.is_read(edit, step)

    def _at(self, step: Step) -> Iterator[Edit]:
        """Those that may show at a place: of who returned before it, the surest and latest first,
        then that of its own call."""
        if not (step.is_local or step.source):
            takers = () if step.taker is None else (step.taker.key,)
            yield from (self._given[key] for key in (*takers, step.call.key) if key in self._given)
            for before in reversed(step.calls_before):
                yield from reversed(self._behind.get((step.call.key, before), ()))
        if step.call.key in self._own:
            yield self._own[step.call.key]


def find_edits(reference: Archive, candidate: Archive, pairs: Sequence[Pair]) -> Edits:
    """The edits that one side makes and the other is known not to make.

    Raises `DamagedArchiveError` for a tree that no writer writes.
    """
    contents = EditedContents((reference, candidate), pairs)
    edits = Edits(contents)
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
    known = {name for path in other.edited or () for name in names_of(other, path)}
    for path in call.edited or ():
        if known.isdisjoint(names_of(call, path)):
            yield path
