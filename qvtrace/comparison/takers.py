"""The calls that are given what stands at a place."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from qvtrace.comparison.noise import CallKey, CallNoise
from qvtrace.comparison.rows import Place, Row


class Takers:
    """Of each pair of contents, the innermost calls that take it."""

    def __init__(self, calls: Sequence[CallNoise]) -> None:
        self._taking: dict[Place, list[CallNoise]] = defaultdict(list)
        for call in calls:
            for place in dict.fromkeys(map(_first, call.inputs)):
                self._taking[place].append(call)
        self._parents = {call.key: call.parent for call in calls}

    def of(self, rows: Iterable[Row]) -> list[CallNoise]:
        """Those that take any of these, but for calls that only hand it on to others in them."""
        found = {call.key: call for row in rows for call in self._taking.get(_first(row), ())}
        holding = {above for key in found for above in self._above(key)}
        return [call for key, call in found.items() if key not in holding]

    def _above(self, key: CallKey) -> Iterator[CallKey]:
        met = {key}
        parent = self._parents[key]
        while parent is not None and parent not in met:  # a file may hold calls in a circle
            yield parent
            met.add(parent)
            parent = self._parents.get(parent)


def _first(row: Row) -> Place:
    """Where these contents stand first."""
    return row.place if row.same_as is None else row.same_as
