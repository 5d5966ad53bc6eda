"""What comes in between two calls, where the reference hands on, adds up or multiplies what was
there.

Of such a place it is known what the candidate should have: the same of its own parts, however noisy
they are. What it has beside that came in there, and nowhere before.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.noise import CallKey, CallNoise, noise
from qvtrace.comparison.rows import Place, Row
from qvtrace.metrics.additions import Operation
from qvtrace.trees import TensorLeaf

_TRIED = 8  # of what was there last

_Tensors: TypeAlias = tuple[TensorLeaf, TensorLeaf]


@dataclass(frozen=True)
class Addition:
    """What the candidate has at a place beside what the reference has there too."""

    noise: float  # a ratio of powers
    parts: tuple[Place, ...] = ()  # what the reference has made it of; one: it is that
    operation: Operation = "sum"


def find_additions(
    calls: Sequence[CallNoise], tensors: Mapping[Place, _Tensors], contents: ContentPairs
) -> dict[Place, Addition]:
    """By the places of what calls within others receive and these give, so far as they are noisy.

    `tensors` are those of all rows. Elements are read again, of each place and its parts.
    """
    found = {}
    for row, before in _handed_on(calls):
        whole = tensors.get(row.place)
        if whole is None or not noise(row) or not _can_be_added(row):
            continue
        parts = _parts(row, before, tensors)
        on_top = contents.on_top(whole, list(parts.values()))
        if on_top is not None:
            own, chosen = on_top
            places = list(parts)
            made_of = tuple(places[number] for number in chosen.places)
            found[row.place] = Addition(own, made_of, chosen.operation)
    return found


def _handed_on(calls: Sequence[CallNoise]) -> Iterator[tuple[Row, Sequence[Row]]]:
    """What the calls within each call receive, and what that gives; with all that was there."""
    children: dict[CallKey | None, list[CallNoise]] = defaultdict(list)
    for call in calls:
        children[call.parent].append(call)
    for parent in calls:
        before = list(parent.inputs)
        for child in children.get(parent.key, ()):
            yield from ((row, before) for row in child.inputs)
            before += (*child.inputs, *child.outputs)
        if parent.key in children:
            yield from ((row, before) for row in parent.outputs)


def _parts(
    row: Row, before: Sequence[Row], tensors: Mapping[Place, _Tensors]
) -> dict[Place, _Tensors]:
    """The last things of its form that were there, each once, in order."""
    found: dict[Place, _Tensors] = {}
    met = set()
    for other in before:
        known = tensors.get(other.place)
        if known is None or other.shape != row.shape or not _can_be_added(other):
            continue
        contents = tuple(leaf.digest for leaf in known)
        if contents not in met:
            met.add(contents)
            found[other.place] = known
    return dict(list(found.items())[-_TRIED:])


def _can_be_added(row: Row) -> bool:
    """Whether the elements of both sides stand for the same, as they are."""
    is_plain = row.status in ("ok", "identical") and row.shape[0] == row.shape[1]
    return is_plain and row.layout is None and not row.is_made_up_for
