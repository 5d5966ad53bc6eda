"""What a report shows of two arrays beside their difference, from the same look at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qvtrace.metrics.blocks import Block, run
from qvtrace.metrics.differences import Difference, comparison_job
from qvtrace.metrics.elements import Readable
from qvtrace.metrics.histograms import Histograms, histograms
from qvtrace.metrics.spreads import Spread, spread_of_some
from qvtrace.metrics.statistics import Known, Statistics, StatisticsJob
from qvtrace.metrics.sums import FloatSums


@dataclass(frozen=True, slots=True)
class Details:
    """Both sides in numbers, and how their elements and the error are spread; shapes that differ
    have neither histograms nor a spread, and equal contents have no spread."""

    reference: Statistics
    candidate: Statistics
    histograms: Histograms | None
    spread: Spread | None = None


def compare_in_detail(
    pairs: Sequence[tuple[Readable, Readable, int]], *, tokens: bool = False
) -> list[tuple[Difference, Details]]:
    """The difference of each pair of one shape, as `compare_all` has it, and its details; with the
    axis of its channels."""
    return run([_Detailed(*pair, tokens=tokens) for pair in pairs])


def details_all(pairs: Sequence[tuple[Readable, Readable]]) -> list[Details]:
    """The details of each pair, whatever their shapes; the two may be one array."""
    return run([_Apart(*pair) for pair in pairs])


class _Detailed:
    """A comparison, and both statistics from the same blocks while these are in the cache."""

    def __init__(
        self, reference: Readable, candidate: Readable, channel_axis: int, *, tokens: bool
    ) -> None:
        self._arrays = reference, candidate
        self._channel_axis = channel_axis
        self._comparison = comparison_job(reference, candidate, tokens=tokens)
        self._sides = StatisticsJob(reference), StatisticsJob(candidate)
        self.blocks = self._comparison.blocks
        # The blocks of a complex array and of a real one do not have the same indices.
        self._together = all(_end(side.blocks) == _end(self.blocks) for side in self._sides)

    def part(self, block: Block) -> tuple[Any, ...]:
        """What one block says."""
        own = self._comparison.part(block)
        if not self._together:
            return (own,)
        known = _known(own, block)
        return own, *(
            side.part(block, found) for side, found in zip(self._sides, known, strict=True)
        )

    def result(self, parts: Sequence[tuple[Any, ...]]) -> tuple[Difference, Details]:
        """What all of them say."""
        difference = self._comparison.result([part[0] for part in parts])
        reference, candidate = (
            side.result(
                [part[index] for part in parts]
                if self._together
                else [side.part(block) for block in side.blocks]
            )
            for index, side in enumerate(self._sides, start=1)
        )
        spread_of = spread_of_some(*self._arrays, channel_axis=self._channel_axis)
        return difference, Details(reference, candidate, histograms(*self._arrays), spread_of)


class _Apart:
    """The details of arrays that are not compared."""

    def __init__(self, reference: Readable, candidate: Readable) -> None:
        self._arrays = reference, candidate
        self._sides = [StatisticsJob(reference)]
        if candidate is not reference:
            self._sides.append(StatisticsJob(candidate))
        whole = sum(_end(side.blocks) for side in self._sides)
        self.blocks = [Block(0, whole, 1)] if whole else []

    def part(self, block: Block) -> list[Statistics]:
        """Everything at once: there are many such pairs, and each is small work."""
        return [side.result([side.part(block) for block in side.blocks]) for side in self._sides]

    def result(self, parts: Sequence[list[Statistics]]) -> Details:
        """What was found."""
        found = parts[0] if parts else [side.result(()) for side in self._sides]
        return Details(found[0], found[-1], histograms(*self._arrays))


def _known(sums: object, block: Block) -> tuple[Known | None, Known | None]:
    """What a comparison has found of a block of both sides, where it has looked at all of it."""
    if not isinstance(sums, FloatSums) or not sums.in_float32 or sums.count < block.size:
        return None, None
    return Known(sums.reference_norm, sums.interval), Known(sums.candidate_norm)


def _end(blocks: Sequence[Block]) -> int:
    return blocks[-1].stop if blocks else 0
