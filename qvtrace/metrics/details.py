"""What a report shows of two arrays beside their difference, from the same look at them."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, TypeVar

from qvtrace.metrics.blocks import Block, run
from qvtrace.metrics.comparing import comparison_job
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import Readable, format_of
from qvtrace.metrics.histograms import Histograms, SomeElements, histograms, some_elements
from qvtrace.metrics.norms import CANCELLED
from qvtrace.metrics.spreads import Axes, SomeTokens, Spread, some_tokens, spreads
from qvtrace.metrics.statistics import Known, Statistics, StatisticsJob
from qvtrace.metrics.sums import FloatSums

_TOGETHER = 32  # pairs looked at before what was kept of them is worked on
_DRAWN = 64 * 1024  # elements of a sample that are worked on at once


@dataclass(frozen=True, slots=True)
class Details:
    """Both sides in numbers, and how their elements and the error are spread; shapes that differ
    have neither histograms nor a spread, and equal contents have no spread."""

    reference: Statistics
    candidate: Statistics
    histograms: Histograms | None
    spread: Spread | None = None


def compare_in_detail(
    pairs: Sequence[tuple[Readable, Readable, Axes]], *, tokens: bool = False
) -> list[tuple[Difference, Details]]:
    """The difference of each pair of one shape, as `compare_all` has it, and its details; with
    what its axes are."""
    found: list[tuple[Difference, Details]] = []
    for some in _pieces(pairs, _TOGETHER):
        seen = run([_Detailed(*pair, tokens=tokens) for pair in some])
        details = _details([looks for _, looks in seen])
        found += zip((difference for difference, _ in seen), details, strict=True)
    return found


def details_all(pairs: Sequence[tuple[Readable, Readable]]) -> list[Details]:
    """The details of each pair, whatever their shapes; the two may be one array."""
    found: list[Details] = []
    for some in _pieces(pairs, _TOGETHER):
        found += _details(run([_Apart(*pair) for pair in some]))
    return found


@dataclass(frozen=True, slots=True)
class _Looks:
    """What was kept of a pair when it was looked at."""

    statistics: tuple[Statistics, Statistics]
    elements: SomeElements | None
    tokens: SomeTokens | None = None

    @property
    def form(self) -> Hashable:
        """What those have in common that can be worked on together."""
        return self.elements and self.elements.form, self.tokens and self.tokens.form

    @property
    def size(self) -> int:
        """Elements of the larger sample."""
        samples = self.elements, self.tokens
        return max((sample.reference.size for sample in samples if sample is not None), default=0)


class _Detailed:
    """A comparison, and both statistics from the same blocks while these are in the cache."""

    def __init__(
        self, reference: Readable, candidate: Readable, axes: Axes, *, tokens: bool
    ) -> None:
        self._arrays = reference, candidate
        self._axes = axes
        self._comparison = comparison_job(reference, candidate, tokens=tokens)
        self._sides = StatisticsJob(reference), StatisticsJob(candidate)
        self.blocks = self._comparison.blocks
        # The blocks of a complex array and of a real one do not have the same indices.
        self._together = (
            len({format_of(side.dtype).kind == "complex" for side in self._arrays}) == 1
        )

    def part(self, block: Block) -> tuple[Any, ...]:
        """What one block says."""
        own = self._comparison.part(block)
        if not self._together:
            return (own,)
        one, other = self._sides
        if not (isinstance(own, FloatSums) and own.in_float32 and own.count == block.size):
            return own, one.part(block), other.part(block)
        reference = one.part(block, Known(own.reference_norm, own.interval))
        known = Known(own.candidate_norm, total=_candidate_total(own, reference.mean))
        return own, reference, other.part(block, known)

    def result(self, parts: Sequence[tuple[Any, ...]]) -> tuple[Difference, _Looks]:
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
        elements = some_elements(*self._arrays)
        tokens = some_tokens(*self._arrays, self._axes)
        return difference, _Looks((reference, candidate), elements, tokens)


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

    def result(self, parts: Sequence[list[Statistics]]) -> _Looks:
        """What was found."""
        found = parts[0] if parts else [side.result(()) for side in self._sides]
        return _Looks((found[0], found[-1]), some_elements(*self._arrays))


_Drawn: TypeAlias = tuple[Histograms | None, Spread | None]


class _Drawing:
    """The histograms and the spreads of pairs of one form: together, for each pair alone is little
    work and many calls into numpy."""

    def __init__(self, seen: Sequence[_Looks]) -> None:
        self._elements = [looks.elements for looks in seen if looks.elements is not None]
        self._tokens = [looks.tokens for looks in seen if looks.tokens is not None]
        self._nothing: list[None] = [None] * len(seen)
        self.blocks = [Block(0, 1 + sum(4 * looks.size for looks in seen), 1)]

    def part(self, block: Block) -> list[_Drawn]:
        """Everything at once."""
        drawn = histograms(self._elements) if self._elements else self._nothing
        spread = spreads(self._tokens) if self._tokens else self._nothing
        return list(zip(drawn, spread, strict=True))

    def result(self, parts: Sequence[list[_Drawn]]) -> list[_Drawn]:
        """Of each pair."""
        return parts[0]


def _details(seen: Sequence[_Looks]) -> list[Details]:
    of_form: dict[Hashable, list[int]] = defaultdict(list)
    for index, looks in enumerate(seen):
        of_form[looks.form].append(index)
    groups = [
        group
        for alike in of_form.values()
        for group in _pieces(alike, max(1, _DRAWN // max(1, seen[alike[0]].size)))
    ]
    found = run([_Drawing([seen[index] for index in group]) for group in groups])
    drawn = dict(zip(chain(*groups), chain(*found), strict=True))
    return [Details(*looks.statistics, *drawn[index]) for index, looks in enumerate(seen)]


Item = TypeVar("Item")


def _pieces(items: Sequence[Item], length: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + length] for start in range(0, len(items), length))


def _candidate_total(sums: FloatSums, reference_mean: float) -> float | None:
    """The sum of the candidate's elements, unless digits of it are lost in that of the others."""
    found = (reference_mean + sums.mean_error) * sums.count
    norms = sums.reference_norm + sums.error_norm
    return found if abs(found) >= 4 * CANCELLED * norms else None


def _end(blocks: Sequence[Block]) -> int:
    return blocks[-1].stop if blocks else 0
