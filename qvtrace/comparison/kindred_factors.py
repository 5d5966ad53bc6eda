"""Factors that are made up for, as those of most modules of the same kind are.

Where quantization makes what is around a scaled output about as noisy as the factor itself, nothing
there tells whether the factor is gone. But two calls side by side of which one is scaled by what
the other is divided by, as queries and keys are, take that out of each other. And a quantizer folds
the same factors in all layers: where most of them are made up for, the others are too; where they
are no one number, unless what is around one is noisier than is usual.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from qvtrace.comparison.noise import CallKey, CallNoise
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.surroundings import Judgement
from qvtrace.patterns import kind_of

_ENOUGH = 3  # modules of one kind
_SAME_FACTOR = 0.2  # of its distance from 1: the noise around makes it smaller by some percent
_UNUSUAL = 10.0**0.8  # a ratio of powers, from which on noise is more than is usual for a kind


def kindred_factors(calls: Sequence[CallNoise]) -> dict[Place, Judgement]:
    """By the first place of what is scaled, how it is to be judged by others of its kind."""
    noises, inverses = _Noises(calls), _Inverses(calls)
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in _scaled(calls):
        by_kind[kind_of(row.module)].append(row)
    found = {}
    for rows in by_kind.values():
        for row in rows:
            judged = row.judgement
            if judged is None or judged.agrees or judged.module is None:
                continue
            is_one = isinstance(row.scale_factor, float)
            are_made_up_for = _are_made_up_for(row, rows) and (
                is_one or noises.is_usual(judged.module)
            )
            if are_made_up_for or inverses.of(row):
                found[row.first_place] = Judgement(True, judged.module)
    return found


def _scaled(calls: Iterable[CallNoise]) -> Iterator[Row]:
    """What modules without others in them give: one with others may hand a factor on."""
    for call in calls:
        if not call.held:
            yield from (row for row in call.outputs if row.scale_factor is not None)


def _are_made_up_for(row: Row, rows: Sequence[Row]) -> bool:
    """Whether most of a kind are that have the factor: the same number, or one for each channel."""
    alike = [other for other in rows if _are_alike(row, other)]
    agreeing = {other.module for other in alike if other.is_made_up_for}
    modules = {other.module for other in alike}
    return len(modules) >= _ENOUGH and 2 * len(agreeing) >= len(modules)


def _are_alike(row: Row, other: Row) -> bool:
    factor, its = row.scale_factor, other.scale_factor
    if isinstance(factor, float) and isinstance(its, float):
        return abs(factor - its) <= _SAME_FACTOR * abs(factor - 1.0)
    return type(factor) is type(its)


class _Inverses:
    """What calls side by side are scaled by."""

    def __init__(self, calls: Iterable[CallNoise]) -> None:
        self._parents = {call.key: call.parent for call in calls}
        self._within: dict[CallKey | None, list[Row]] = defaultdict(list)
        for row in _scaled(calls):
            self._within[self._parents[row.module, row.call]].append(row)

    def of(self, row: Row) -> bool:
        """Whether a call beside one is divided by its factor."""
        factor, parent = row.scale_factor, self._parents[row.module, row.call]
        if not isinstance(factor, float) or parent is None:
            return False
        most = _SAME_FACTOR * abs(factor - 1.0)
        others = (other.scale_factor for other in self._within[parent] if other is not row)
        return any(isinstance(its, float) and abs(its * factor - 1.0) <= most for its in others)


class _Noises:
    """How noisy what modules give is, beside that of others of their kind."""

    def __init__(self, calls: Iterable[CallNoise]) -> None:
        self._by_module: dict[str, float] = {}
        by_kind: dict[str, list[float]] = defaultdict(list)
        for call in calls:
            if call.noise_out is not None:
                known = self._by_module.get(call.module, 0.0)
                self._by_module[call.module] = max(known, call.noise_out)
                by_kind[kind_of(call.module)].append(call.noise_out)
        self._usual = {kind: median(noises) for kind, noises in by_kind.items()}

    def is_usual(self, module: str) -> bool:
        noise = self._by_module.get(module)
        return noise is not None and noise <= _UNUSUAL * self._usual[kind_of(module)]
