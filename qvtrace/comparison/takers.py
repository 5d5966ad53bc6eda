"""The calls that are given what stands at a place."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from qvtrace.comparison.noise import CallNoise, calls_around
from qvtrace.comparison.rows import Place, Row


class Takers:
    """Of each pair of contents, the innermost calls that take it."""

    def __init__(self, calls: Sequence[CallNoise]) -> None:
        self._taking: dict[Place, list[CallNoise]] = defaultdict(list)
        for call in calls:
            for place in dict.fromkeys(row.first_place for row in call.inputs):
                self._taking[place].append(call)
        self._called = {call.key: call for call in calls}

    def of(self, rows: Iterable[Row]) -> list[CallNoise]:
        """Those that take any of these, but for calls that only hand it on to others in them."""
        found = {call.key: call for row in rows for call in self._taking.get(row.first_place, ())}
        holding = {
            above.key for call in found.values() for above in calls_around(call, self._called)
        }
        return [call for key, call in found.items() if key not in holding]
