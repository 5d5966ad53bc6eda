"""Factors that seem to be made up for, and are not: what takes them shows them.

A factor that the next weights, or a norm, take out again is no fault. But where what comes next
gives noise that it was not given, and no more than the factor itself is, this is what became of the
factor: a nonlinear function has bent it, or something was added that has it not. A factor that
other modules of its kind have as well was made on purpose.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from qvtrace.comparison.noise import CallKey, CallNoise, first_in_kind
from qvtrace.comparison.noise_steps import Step
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.surroundings import Judgement
from qvtrace.metrics.factors import are_one
from qvtrace.patterns import kind_of

# Of the power of the error that a factor is: less than the least is what the epsilon of a norm,
# which takes it out, leaves of it.
_LEAST, _MOST = 1e-4, 2.0


def refuted_factors(
    told: Iterable[Step], called: Mapping[CallKey, CallNoise]
) -> dict[Place, Judgement]:
    """By the first place of what is scaled, that the factor shows, and in which module.

    `told` are places where error comes in by two archives, `called` all calls.
    """
    refuted: dict[Place, Judgement] = {}
    chosen = _Chosen(called.values())
    for step in told:
        if step.is_local or step.breaks or step.noise_out is None:
            continue
        if step.edit is not None or first_in_kind(step.call.inputs) is not None:
            continue
        for row in _taken(step, called):
            factor = _made_up_for(row)
            if factor is None or chosen.are_alike(row):
                continue
            if _LEAST <= step.noise_out / (factor - 1.0) ** 2 <= _MOST:
                for scaled in _handed_on(row, called):
                    refuted.setdefault(scaled.first_place, Judgement(False, step.call.module))
    return refuted


class _Chosen:
    """What modules of a kind give, which may have one factor on purpose."""

    def __init__(self, calls: Iterable[CallNoise]) -> None:
        self._by_kind: dict[str, list[Row]] = defaultdict(list)
        for call in calls:
            self._by_kind[kind_of(call.module)] += call.outputs

    def are_alike(self, row: Row) -> bool:
        """Whether another module of the kind that gave it has the factor too."""
        giver = row.first_place.module
        return any(
            other.module != giver and _have_one_factor(row, other)
            for other in self._by_kind[kind_of(giver)]
        )


def _taken(step: Step, called: Mapping[CallKey, CallNoise]) -> list[Row]:
    """What a place computes its noise from."""
    if not step.after:
        return list(step.call.inputs)
    before = (called[key] for key in step.calls_before if key in called)
    return [*step.call.inputs, *(row for call in before for row in call.outputs)]


def _handed_on(row: Row, called: Mapping[CallKey, CallNoise]) -> Iterator[Row]:
    """What is scaled, and all that it got this one factor from."""
    met: set[Place] = set()
    waiting = [row]
    while waiting:
        row = waiting.pop()
        if row.first_place in met:
            continue
        met.add(row.first_place)
        yield row
        giver = called.get((row.first_place.module, row.first_place.call))
        if giver is not None:
            within = (call for call in called.values() if call.parent == giver.key)
            given = [*giver.inputs, *(inner for call in within for inner in call.outputs)]
            waiting += [other for other in given if _have_one_factor(row, other)]


def _made_up_for(row: Row) -> float | None:
    """The one factor of all elements, where it is made up for."""
    factor = row.scale_factor
    return (
        factor if isinstance(factor, float) and row.is_made_up_for and not row.transform else None
    )


def _have_one_factor(row: Row, other: Row) -> bool:
    return are_one(_made_up_for(row), _made_up_for(other))
