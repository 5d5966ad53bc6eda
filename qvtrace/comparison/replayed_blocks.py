"""Blocks that were replayed as a whole: what they tell of the places within them.

A block that gives what its like give for the reference's inputs is innocent of what only two
archives tell within it: that came in with its inputs. One that gives more noise is an origin,
unless a place within it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from qvtrace.comparison.noise import CallKey, CallNoise, calls_around, first_in_kind
from qvtrace.comparison.noise_levels import Excess
from qvtrace.comparison.noise_steps import Step

_AS_MUCH = 0.5  # of a noise that is in another

Told: TypeAlias = tuple[Excess, Step]


class ReplayedBlocks:
    """The blocks of a replay among all places."""

    def __init__(self, excesses: Sequence[Told], calls: Mapping[CallKey, CallNoise]) -> None:
        """`calls` are in order of execution."""
        self._calls = calls
        self._blocks = {
            step.call.key: (excess, step) for excess, step in excesses if step.is_of_block
        }

    def settle(self, told: Sequence[Told]) -> list[Told]:
        """What is left of what is told, in order of execution."""
        if not self._blocks:
            return list(told)
        kept = [one for one in told if not one[1].is_of_block and not self._is_handed_on(*one)]
        for block in reversed([one for one in told if one[1].is_of_block]):
            self._settle_block(block, kept)
        kept = [(excess, self._seen_in_replay(excess, step)) for excess, step in kept]
        order = {key: number for number, key in enumerate(self._calls)}
        return sorted(kept, key=lambda one: order[one[1].call.key])

    def _is_handed_on(self, excess: Excess, step: Step) -> bool:
        """Whether a place is noisy since the innermost replayed block around it was given noise."""
        if step.is_local or excess.on_top is not None or first_in_kind(step.call.inputs):
            return False
        keys = step.call.key, *self._beyond(step.call.key)
        around = (self._blocks[key] for key in keys if key in self._blocks)
        innermost = next(around, None)
        return innermost is not None and not innermost[0].is_told

    def _settle_block(self, block: Told, kept: list[Told]) -> None:
        """Tell of a block itself, or else raise what is told within it to its importance."""
        excess, key = block[0], block[1].call.key
        inner = [n for n, one in enumerate(kept) if key in self._beyond(one[1].call.key)]
        between = [n for n, one in enumerate(kept) if one[1].call.key == key]
        places = [n for n in inner if not kept[n][1].is_local] if inner else between
        if not inner and not between:
            kept.append(block)
        if not places:
            return
        first = max(places, key=lambda number: kept[number][0].importance)
        own, place = kept[first]
        kept[first] = replace(own, importance=max(own.importance, excess.importance)), place

    def _seen_in_replay(self, excess: Excess, step: Step) -> Step:
        """What comes in within a block by itself, as its replay shows it where that has as much."""
        if step.is_local or step.call.key not in self._blocks:
            return step
        block, whole = self._blocks[step.call.key]
        least = _AS_MUCH * excess.on_top.noise if excess.on_top is not None else math.inf
        if not block.is_told and (whole.noise_out or 0.0) < least:
            return step
        return replace(step, is_local=True, noise_in=whole.noise_in, noise_out=whole.noise_out)

    def _beyond(self, key: CallKey) -> list[CallKey]:
        """The calls around a call, from the inside out."""
        return [call.key for call in calls_around(self._calls[key], self._calls)]
