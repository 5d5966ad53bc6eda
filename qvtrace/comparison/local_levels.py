"""How much noise modules make by themselves, as a replay tells: what is usual for each.

Modules of one kind make as much noise as they round. In what steps, is one of three things: such
of their weights alone, or also of each token that they are given, or of all tokens. Where few
elements of these are far larger than the rest, steps are as much coarser; where a module gives less
than its like do of as much, they weigh more. Which one it is shows in the run: by it, modules of
one kind are most alike.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, median_low
from typing import TypeAlias

from qvtrace.comparison.noise import CallKey
from qvtrace.comparison.noise_steps import Step, local_within
from qvtrace.comparison.replayed_sizes import CallSizes
from qvtrace.metrics.sizes import Sizes

ENOUGH_ALIKE = 3  # places of one kind that tell what is usual

_Rounded: TypeAlias = Callable[[Sizes], float]  # to steps of this size
_ROUNDED: tuple[_Rounded, ...] = (
    lambda given: given.mean,
    lambda given: given.largest,
    lambda given: given.largest_of_all,
)


class LocalLevels:
    """What is usual for each place that was replayed."""

    def __init__(self, steps: Sequence[Step], sizes: Mapping[CallKey, CallSizes]) -> None:
        self._sizes = sizes
        self._by_kind: dict[str, list[Step]] = defaultdict(list)
        self._by_class: dict[str, list[Step]] = defaultdict(list)
        self._within = local_within(steps)
        for step in steps:
            if step.is_local and step.noise_out is not None:
                self._by_kind[step.kind].append(step)
                self._by_class[step.class_name].append(step)
        noises = sorted(step.noise_out or 0.0 for step in steps if step.is_local)
        self.is_known = bool(noises)
        # For a class of one: most modules are not quantized, and have no noise of their own.
        self.typical = noises[len(noises) * 3 // 4] if noises else 0.0
        self._rounded = min(_ROUNDED, key=self._unlikeness)

    def usual(self, step: Step, *, without_like: float) -> float:
        """The noise that its like would make there, `without_like` at least where it has none.
        Nothing was handed on, so that a class tells as much as a kind of few."""
        kind, same_class = self._by_kind[step.kind], self._by_class[step.class_name]
        groups = [kind] if len(kind) >= ENOUGH_ALIKE else [kind, same_class]
        levels = [self._of_like(step, group) for group in groups if len(group) > 1]
        # What comes in within a call adds up.
        level = max(levels, default=max(self.typical, without_like))
        return max(level, self._within.get(step.call.key, 0.0))

    def _of_like(self, step: Step, group: Sequence[Step]) -> float:
        """By what they are given, or by what they give: rounding explains the larger of the two."""
        noisy = [one for one in group if one.noise_out]
        are_known = all(one.call.key in self._sizes for one in (step, *noisy))
        if not are_known or 2 * len(noisy) <= len(group):
            return median_low([one.noise_out or 0.0 for one in group])
        levels = []
        for by_output in (False, True):
            typical = median_low([self._per_size(one, by_output=by_output) for one in noisy])
            levels.append(typical * self._size(step, self._rounded, by_output=by_output))
        return max(levels)

    def _per_size(self, step: Step, *, by_output: bool) -> float:
        return (step.noise_out or 0.0) / self._size(step, self._rounded, by_output=by_output)

    def _size(self, step: Step, rounded: _Rounded, *, by_output: bool = False) -> float:
        """What rounding makes, but for how many steps there are and how large weights are."""
        sizes = self._sizes[step.call.key]
        return rounded(sizes.given) / (sizes.gave if by_output else sizes.given).mean

    def _unlikeness(self, rounded: _Rounded) -> float:
        """How far modules are from others of their kind that round so."""
        distances = []
        for group in self._by_kind.values():
            known = [one for one in group if one.noise_out and one.call.key in self._sizes]
            noises = [(one.noise_out or 0.0) / self._size(one, rounded) for one in known]
            if len(noises) >= ENOUGH_ALIKE:
                typical = median(noises)
                distances += [abs(math.log(noise / typical)) for noise in noises]
        return fmean(distances) if distances else 0.0
