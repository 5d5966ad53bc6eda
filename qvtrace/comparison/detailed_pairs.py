"""Pairs of contents that are shown in detail: statistics, histograms, where the error is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

from qvtrace.archive import Archive
from qvtrace.comparison.leaf_pairs import Contents, Leaves, contents_of, same_contents
from qvtrace.comparison.portions import Portions
from qvtrace.metrics.details import Details, compare_in_detail, details_all
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import Flags, Readable
from qvtrace.metrics.spreads import Axes
from qvtrace.trees import TensorLeaf

# From a shape to what its axes are.
AxesOf: TypeAlias = Callable[[tuple[int, ...]], Axes]


class DetailedPairs:
    """Those that details are wanted of, and what was found."""

    def __init__(self, reference: Archive, candidate: Archive, portions: Portions) -> None:
        self._reference = reference
        self._candidate = candidate
        self._portions = portions
        self._wanted: dict[Contents, Leaves] = {}
        self._axes: dict[Contents, Axes] = {}  # of these
        self._kept: dict[Contents, Flags] = {}  # of those with padding, which tokens are none
        self._details: dict[Contents, Details] = {}

    def want(self, leaves: Leaves, axes: AxesOf, kept: Flags | None) -> None:
        """Have details of two tensors; `axes` tells what theirs are, and only tokens that are
        `kept` count."""
        contents = contents_of(*leaves)
        self._wanted.setdefault(contents, leaves)
        found = axes(leaves[0].shape)
        known = self._axes.setdefault(contents, found)
        if found.has_heads and not known.has_heads:  # another place knows more
            self._axes[contents] = found
        if kept is not None:
            self._kept.setdefault(contents, kept)

    def forget_wanted(self) -> None:
        """Keep nothing but what was found."""
        self._wanted.clear()

    def found(self, reference: TensorLeaf, candidate: TensorLeaf) -> Details | None:
        """The details of two tensors; None where nothing was to be found."""
        return self._details.get(contents_of(reference, candidate))

    def compare(
        self, pairs: Mapping[Contents, tuple[Readable, Readable]], *, tokens: bool
    ) -> dict[Contents, Difference]:
        """The differences of those of the pairs that details are wanted of, which come with them;
        with `tokens`, they keep the norms of these."""
        wanted = [contents for contents in pairs if contents in self._wanted]
        found = compare_in_detail(
            [
                (*pairs[contents], self._axes_of(contents), self._kept.get(contents))
                for contents in wanted
            ],
            tokens=tokens,
        )
        self._details.update(
            (contents, self._placed(contents, details))
            for contents, (_, details) in zip(wanted, found, strict=True)
        )
        return dict(zip(wanted, (difference for difference, _ in found), strict=True))

    def look_apart(self) -> None:
        """Find the details of contents that are not compared: they are equal, or of other
        shapes."""
        apart = {}
        for contents, (reference, candidate) in self._wanted.items():
            have_elements = self._portions.have_elements(reference, candidate)
            if contents not in self._details and have_elements:
                array = self._reference.array(reference)
                is_one = same_contents(reference, candidate)
                apart[contents] = array, array if is_one else self._candidate.array(candidate)
        self._details.update(zip(apart, details_all(list(apart.values())), strict=True))

    def _axes_of(self, contents: Contents) -> Axes:
        is_sampled = self._portions.are_partial(*self._wanted[contents])
        return self._axes[contents].sampled() if is_sampled else self._axes[contents]

    def _placed(self, contents: Contents, details: Details) -> Details:
        """Details with tokens of a sample at their places in the whole."""
        sample = self._portions.sample(*self._wanted[contents])
        if sample is None or details.spread is None:
            return details
        return replace(details, spread=details.spread.placed(sample.index, sample.counts))
