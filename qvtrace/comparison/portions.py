"""Tensors of which an archive holds a part: what of two of them can be held against each other.

Of a sample on either side, the vectors that both sides hold; where a side holds none, statistics
and digests are all that there is to tell by.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvtrace.archive import Archive
from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.outcomes import Outcome
from qvtrace.comparison.rows import NOT_STORED, PRIVATE, STATISTICS_ONLY, Row
from qvtrace.errors import DamagedArchiveError
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.elements import Array, format_of
from qvtrace.metrics.names import METRICS, PAIR_METRICS, Undefined
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.metrics.statistics import Statistics, statistics
from qvtrace.privacy import same_key
from qvtrace.sampling import Places, count_vectors, every_place
from qvtrace.trees import TensorLeaf

_TOLD = ("mean", "min", "max", "stddev")


@dataclass(frozen=True)
class Sample:
    """The vectors along the last dimension that both sides hold of two tensors."""

    read: Callable[[], tuple[Array, Array]]
    places: Places
    shape: tuple[int, ...]  # of the whole reference

    @property
    def sides(self) -> tuple[Array, Array]:
        """Both, of two dimensions: a vector after the other."""
        return self.read()

    @property
    def counts(self) -> tuple[int, int]:
        """How many vectors there are in the sample, and in the whole."""
        return len(self.places), count_vectors(self.shape)

    def index(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Where in the whole an element, or a vector, of the sample stands."""
        place = np.unravel_index(int(self.places[index[0]]), self.shape[:-1])
        return (*map(int, place), *index[1:])

    def peak(self, peak: Peak) -> Peak:
        """A peak of the sample by its place in the whole."""
        return replace(peak, index=self.index(peak.index))


class Portions:
    """What two archives hold of tensors that they do not hold whole."""

    def __init__(self, reference: Archive, candidate: Archive, *, may_come: bool = False) -> None:
        """`may_come`: the candidate is still being recorded, in part."""
        self._archives = reference, candidate
        self._are_any = may_come or any(archive.manifest.portions for archive in self._archives)
        self._statistics: dict[tuple[object, ...], Statistics | None] = {}

    def are_partial(self, *leaves: TensorLeaf) -> bool:
        """Whether a side does not hold all of its tensor."""
        return self._are_any and any(
            archive.portion(leaf) is not None
            for archive, leaf in zip(self._archives, leaves, strict=True)
        )

    def have_elements(self, *leaves: TensorLeaf) -> bool:
        """Whether elements of both tensors are there."""
        return not self._are_any or all(
            archive.has_elements(leaf) for archive, leaf in zip(self._archives, leaves, strict=True)
        )

    def can_be_read(self, *leaves: TensorLeaf) -> bool:
        """Whether there are elements of both that stand at the same places."""
        if not self.are_partial(*leaves):
            return True
        forms = [(count_vectors(leaf.shape), leaf.shape[-1:]) for leaf in leaves]
        return self.have_elements(*leaves) and forms[0] == forms[1]

    def sample(self, *leaves: TensorLeaf) -> Sample | None:
        """What both sides hold of two tensors; None where that is all of them, or where nothing is
        held of both."""
        if not self.are_partial(*leaves) or not self.can_be_read(*leaves):
            return None
        count = count_vectors(leaves[0].shape)
        places = [
            every_place(count) if found is None else found
            for found in (
                archive.places(leaf) for archive, leaf in zip(self._archives, leaves, strict=True)
            )
        ]
        common: Places = np.intersect1d(places[0], places[1], assume_unique=True)

        def read() -> tuple[Array, Array]:
            one, other = (
                _rows(archive.array(leaf), held, common)
                for archive, leaf, held in zip(self._archives, leaves, places, strict=True)
            )
            return one, other

        return Sample(read, common, leaves[0].shape)

    def with_hidden(self, outcome: Outcome, *leaves: TensorLeaf) -> Outcome:
        """What was found in a sample, and what the whole has beside it that is not finite."""
        if outcome.status != "ok" or not self.are_partial(*leaves):
            return outcome
        counts = _counted(self._known_statistics(leaves))
        if counts is None or not counts.is_finding:
            return outcome
        return replace(outcome, status="nonfinite", nonfinite=counts)

    def without_elements(self, *leaves: TensorLeaf) -> Outcome:
        """What can be told of two tensors of unequal digest where a side has no elements."""
        portions = [self._why(*side) for side in zip(self._archives, leaves, strict=True)]
        why = next(filter(None, portions), NOT_STORED)
        side = "" if all(portions) else f" in the {'reference' if portions[0] else 'candidate'}"
        told = self._known_statistics(leaves)
        reason = f"{why}{side}{_shown(*told)}"
        if all(_is_integer(leaf) for leaf in leaves):
            differ = leaves[0].dtype == leaves[1].dtype and _are_told_apart(portions, leaves)
            undefined = dict.fromkeys(METRICS, Undefined.INTEGER.value)
            undefined |= dict.fromkeys(("mismatches", "max_abs_error"), why)
            return Outcome("mismatch" if differ else "opaque", reason, undefined=undefined)
        counts = _counted(told)
        found = counts is not None and counts.is_finding
        undefined = dict.fromkeys(METRICS, why)
        undefined["mismatches"] = Undefined.FLOATING_POINT.value
        return Outcome(
            "nonfinite" if found else "opaque", reason, undefined=undefined, nonfinite=counts
        )

    def _why(self, archive: Archive, leaf: TensorLeaf) -> str | None:
        """What is stored in place of elements; None where they are there."""
        portion = archive.portion(leaf)
        return None if portion is None or portion.stored is not None else portion.portion

    def _known_statistics(
        self, leaves: Sequence[TensorLeaf]
    ) -> tuple[Statistics | None, Statistics | None]:
        """Those of whole tensors, as far as the archives tell."""
        one, other = map(self._statistics_of, self._archives, leaves)
        return one, other

    def _statistics_of(self, archive: Archive, leaf: TensorLeaf) -> Statistics | None:
        key = archive is self._archives[0], leaf.digest, leaf.dtype, leaf.shape
        if key not in self._statistics:
            self._statistics[key] = stored_statistics(archive, leaf)
        return self._statistics[key]


def stored_statistics(archive: Archive, leaf: TensorLeaf) -> Statistics | None:
    """The statistics of a whole tensor, from its elements or from what is stored of it; None where
    neither is there. Raises `DamagedArchiveError` for statistics that no writer writes."""
    portion = archive.portion(leaf)
    if portion is None:
        return statistics(archive.array(leaf))
    if portion.statistics is None:
        return None
    try:
        return Statistics.from_json(portion.statistics, math.prod(leaf.shape))
    except ValueError as error:
        raise DamagedArchiveError(
            f"{archive.file}: {error}; the file is damaged, record again"
        ) from error


def portion_texts(rows: Iterable[Row]) -> tuple[str, ...]:
    """What of the compared tensors was sampled, and of which there are no elements, in words."""
    rows = tuple(rows)
    samples = Counter(row.sampled for row in rows if row.sampled is not None)
    texts = []
    for (stored, of), count in samples.most_common(1):
        others = samples.total() - count
        texts.append(
            f"sampled: {stored} of {of} tokens in {count} of {len(rows)} pairs"
            f"{f', other numbers in {others}' if others else ''}; metrics are of those tokens"
        )
    for why in (STATISTICS_ONLY, PRIVATE):
        without = [row for row in rows if row.undefined.get("max_abs_error") == why]
        if without:
            missing = (name for name in PAIR_METRICS if without[0].undefined.get(name) == why)
            differ = "differ" if why == STATISTICS_ONLY else "are not known to be equal"
            texts.append(
                f"{why}: {len(without)} of {len(rows)} pairs {differ}, and of these are not to be "
                f"had: {', '.join(missing)}"
            )
    return tuple(texts)


def told_of_samples(rows: Iterable[Row]) -> list[Row]:
    """The rows; those of samples do not call identical what is equal in the sample."""
    return [row if row.sampled is None else _told_of_sample(row) for row in rows]


def _told_of_sample(row: Row) -> Row:
    undefined = {metric: _of_sample(reason) for metric, reason in row.undefined.items()}
    samples = row.samples
    if samples is not None:
        figures = {
            metric: replace(found, undefined=found.undefined and _of_sample(found.undefined))
            for metric, found in samples.figures.items()
        }
        samples = replace(samples, figures=figures)
    told = replace(row, undefined=undefined, samples=samples)
    if not row.is_equal_where_sampled:
        return told
    reason = f"{Undefined.EQUAL_WHERE_SAMPLED}, not in the whole: its digests differ"
    return replace(told, reason="; ".join(filter(None, (row.reason, reason))))


def _of_sample(reason: str) -> str:
    is_identical = reason == Undefined.IDENTICAL
    return Undefined.EQUAL_WHERE_SAMPLED.value if is_identical else reason


def _rows(array: Array, held: Places, wanted: Places) -> Array:
    """The wanted ones of the held vectors."""
    rows = array.reshape(len(held), -1)
    return rows if len(held) == len(wanted) else rows[np.searchsorted(held, wanted)]


def _are_told_apart(portions: Sequence[str | None], leaves: Sequence[TensorLeaf]) -> bool:
    """Whether unequal digests mean unequal contents: no keyed one stands against another kind."""
    are_keyed = [portion == PRIVATE for portion in portions]
    if not any(are_keyed):
        return True
    return all(are_keyed) and same_key(leaves[0].digest, leaves[1].digest)


def _is_integer(leaf: TensorLeaf) -> bool:
    known = DTYPES.get(leaf.dtype)
    return known is not None and format_of(known.numpy).kind == "integer"


def _counted(told: tuple[Statistics | None, Statistics | None]) -> Nonfinite | None:
    """What is not finite, at least; None where counts alone cannot tell."""
    reference, candidate = told
    if reference is None or candidate is None:
        return None
    infinities = (
        candidate.positive_inf - reference.positive_inf,
        candidate.negative_inf - reference.negative_inf,
    )
    found = Nonfinite(
        reference.nan,
        candidate.nan,
        max(0, candidate.nan - reference.nan),
        max(0, reference.nan - candidate.nan),
        max(map(abs, infinities)),
        new_inf=max(0, *infinities),
    )
    is_finite = not (reference.nan or reference.positive_inf or reference.negative_inf)
    return found if found.is_finding or is_finite else None


def _shown(reference: Statistics | None, candidate: Statistics | None) -> str:
    """Both sides' statistics, where they are known."""
    if reference is None or candidate is None:
        return ""
    pairs = ((name, getattr(reference, name), getattr(candidate, name)) for name in _TOLD)
    known = [
        f"{name} {one:.4g} against {other:.4g}"
        for name, one, other in pairs
        if one is not None and other is not None
    ]
    return f": {', '.join(known)}" if known else ""
