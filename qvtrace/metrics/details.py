"""What a report shows of two arrays beside their difference, from the same look at them."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias, TypeGuard, TypeVar

from qvtrace.metrics.blocks import Block, run, scratch
from qvtrace.metrics.comparing import comparison_job
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import Flags, Readable, format_of, reader, upcast
from qvtrace.metrics.histograms import Histograms, SomeElements, histograms, some_elements
from qvtrace.metrics.norms import CANCELLED
from qvtrace.metrics.spreads import Axes, LookedAt, PairTokens, Spread, has_a_spread, spreads
from qvtrace.metrics.statistics import Known, Statistics, StatisticsJob
from qvtrace.metrics.sums import FloatSums

_TOGETHER = 32  # pairs looked at before what was kept of them is worked on
_DRAWN = 64 * 1024  # elements of a sample that are worked on at once
_FEWEST_SQUARES = 2.0**-60  # a smaller sum of those of an error may lose some in float32


@dataclass(frozen=True, slots=True)
class Details:
    """Both sides in numbers, and how their elements and the error are spread; shapes that differ
    have neither histograms nor a spread, and equal contents have no spread."""

    reference: Statistics
    candidate: Statistics
    histograms: Histograms | None
    spread: Spread | None = None


def compare_in_detail(
    pairs: Sequence[tuple[Readable, Readable, Axes, Flags | None]], *, tokens: bool = False
) -> list[tuple[Difference, Details]]:
    """The difference of each pair of one shape, as `compare_all` has it, and its details; with
    what its axes are, and which of its tokens count in its spread, None: all."""
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
    tokens: LookedAt | None = None

    @property
    def form(self) -> Hashable:
        """What those have in common that can be worked on together."""
        return self.elements and self.elements.form, self.tokens and self.tokens.form

    @property
    def size(self) -> int:
        """Numbers of what there is more of."""
        elements = 0 if self.elements is None else self.elements.reference.size
        return max(elements, 0 if self.tokens is None else self.tokens.size)


class _Detailed:
    """A comparison, and both statistics from the same blocks while these are in the cache."""

    def __init__(
        self,
        reference: Readable,
        candidate: Readable,
        axes: Axes,
        kept: Flags | None,
        *,
        tokens: bool,
    ) -> None:
        self._arrays = reference, candidate
        self._tokens = None
        if has_a_spread(reference, candidate):
            self._tokens = PairTokens(reference, candidate, axes, kept)
        self._comparison = comparison_job(reference, candidate, tokens=tokens)
        self._sides = StatisticsJob(reference), StatisticsJob(candidate)
        self.blocks = self._comparison.blocks
        # The blocks of a complex array and of a real one do not have the same indices.
        self._together = (
            len({format_of(side.dtype).kind == "complex" for side in self._arrays}) == 1
        )

        # Small pairs are looked at together, others with the comparison where blocks are the same.
        self._squares = None
        if self._tokens is not None and not self._tokens.is_small and self._tokens.chosen.size:
            self._squares = self._tokens.job
        self._with_squares = (
            self._squares is not None
            and self._squares.of_whole_tokens
            and self._squares.blocks == self.blocks
        )

    def part(self, block: Block) -> tuple[Any, ...]:
        """What one block says."""
        own = self._comparison.part(block)
        squares = self._squares_of(block, own) if self._with_squares else None
        if not self._together:
            return own, squares
        one, other = self._sides
        if not _is_in_float32(own, block):
            return own, squares, one.part(block), other.part(block)
        reference = one.part(block, Known(own.reference_norm, own.interval))
        known = Known(own.candidate_norm, total=_candidate_total(own, reference.mean))
        return own, squares, reference, other.part(block, known)

    def result(self, parts: Sequence[tuple[Any, ...]]) -> tuple[Difference, _Looks]:
        """What all of them say."""
        difference = self._comparison.result([part[0] for part in parts])
        reference, candidate = (
            side.result(
                [part[index] for part in parts]
                if self._together
                else [side.part(block) for block in side.blocks]
            )
            for index, side in enumerate(self._sides, start=2)
        )
        elements = some_elements(*self._arrays)
        tokens = self._looked_at([part[1] for part in parts])
        return difference, _Looks((reference, candidate), elements, tokens)

    def _squares_of(self, block: Block, own: Any) -> Any:
        """Of the block that was compared last."""
        job = self._squares
        assert job is not None
        if not _is_in_float32(own, block) or own.error_norm**2 < _FEWEST_SQUARES:
            return job.part(block)
        values = reader(self._arrays[0])(block.start, block.stop)
        if values.dtype != scratch.error32.dtype or not values.flags.aligned:
            upcast(values, scratch.narrow[0][: block.size])
            values = scratch.narrow[0][: block.size]
        # That is where the comparison left the errors.
        errors = scratch.error32[: block.size]
        return job.part_of_float32(block, errors, values, (own.reference_norms, own.error_norms))

    def _looked_at(self, squares: Sequence[Any]) -> LookedAt | None:
        tokens, job = self._tokens, self._squares
        if tokens is None or not tokens.chosen.size:
            return None
        if job is None:
            return tokens.copied()
        parts = squares if self._with_squares else [job.part(block) for block in job.blocks]
        return tokens.looked_at(job.result(parts))


def _is_in_float32(sums: object, block: Block) -> TypeGuard[FloatSums]:
    """Whether all positions of a block count, and it was compared in float32."""
    return isinstance(sums, FloatSums) and sums.in_float32 and sums.count == block.size


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
