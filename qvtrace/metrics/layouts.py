"""The layout in which one array has another's elements: found by shape, believed by value.

Layouts are reshapes and transposes. One is taken only where it explains the values: a sample of
both sides is held together under each that the shapes allow.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from qvtrace.metrics.elements import Array, Floats, Rearranged, format_of

_MOST_AXES = 5  # longer than 1, that are put in every order
_SAMPLE = 2048  # elements
_FEWEST = 8  # elements, from which on a correlation says something
_LARGEST = 1e300  # infinities count as this
_EXACT = 1e-9  # a correlation so close to 1 leaves nothing to explain
_DEVIATIONS = 5.0  # by which the best is above the next, in standard deviations of chance
_LOWEST = 0.5  # correlation
_LEFT = 0.8  # of what the next best leaves unexplained, the best leaves no more
# Where shapes are equal, the elements are taken to be in their places unless this says otherwise.
_LOWEST_IN_EQUAL_SHAPES = 0.9
_LEFT_IN_EQUAL_SHAPES = 0.1


@dataclass(frozen=True, slots=True)
class Layout:
    """What gives the candidate the reference's layout: a reshape, a transpose, a reshape."""

    candidate: tuple[int, ...]  # shape
    split: tuple[int, ...]
    order: tuple[int, ...]  # of the axes after the split
    reference: tuple[int, ...]  # shape

    def __str__(self) -> str:
        """As methods of a torch tensor: `permute(0, 2, 1, 3)`, `reshape(1, 280, 64)`."""
        calls = []
        if self.split != self.candidate:
            calls.append(f"reshape{_arguments(self.split)}")
        if self.order != tuple(range(len(self.order))):
            calls.append(f"permute{_arguments(self.order)}")
        if tuple(self.split[axis] for axis in self.order) != self.reference:
            calls.append(f"reshape{_arguments(self.reference)}")
        return ".".join(calls)

    def of(self, candidate: Array) -> Rearranged:
        """The candidate in the reference's layout; it is not copied."""
        return Rearranged(candidate.reshape(self.split).transpose(self.order), self.reference)


def find_layout(reference: Array, candidate: Array) -> Layout | None:
    """The layout of the candidate that explains the reference's values.

    Of arrays of equal shape: a transposed one, and only where it explains them far better than
    their own layout does. None where there is none, or where several do equally well.
    """
    sample = _Sample.of(reference)
    scores = [
        (sample.correlation(candidate, layout), layout)
        for layout in _layouts(reference.shape, candidate.shape)
    ]
    if not scores:
        return None
    own = scores[0]  # elements in the order that they have
    best = max(scores, key=lambda scored: scored[0])
    others = max((score for score, layout in scores if layout is not best[1]), default=0.0)
    if reference.shape == candidate.shape:
        is_found = best is not own and _is_far_better(best[0], own[0])
    else:
        is_found = best[0] > _LOWEST
    return best[1] if is_found and sample.tells(best[0], others) else None


def reshaped(reference: Sequence[int], candidate: Sequence[int]) -> Layout:
    """The layout of elements that are in the same order on both sides."""
    return Layout(
        tuple(candidate), tuple(reference), tuple(range(len(reference))), tuple(reference)
    )


def may_be_transposed(shape: Sequence[int]) -> bool:
    """Whether an array of this shape can have the same shape with axes exchanged."""
    sizes = [size for size in shape if size != 1]
    return len(set(sizes)) < len(sizes) <= _MOST_AXES


def _is_far_better(best: float, own: float) -> bool:
    left = _LEFT_IN_EQUAL_SHAPES * _unexplained(own)
    return best > _LOWEST_IN_EQUAL_SHAPES and _unexplained(best) <= left


def _unexplained(correlation: float) -> float:
    return 1.0 - max(correlation, 0.0) ** 2


@dataclass(frozen=True, slots=True)
class _Sample:
    """Elements of the reference from all over it, and where they are."""

    positions: Array  # flat
    values: Array

    @classmethod
    def of(cls, reference: Array) -> "_Sample":
        size = reference.size
        count = min(size, _SAMPLE)
        # By about the golden section of the size, which falls into step with no axis.
        step = next(
            n for n in range(round(0.618 * size) | 1, 2 * size + 3) if math.gcd(n, size) == 1
        )
        positions = np.arange(count) * step % max(size, 1)
        return cls(positions, _taken(reference, positions))

    def correlation(self, candidate: Array, layout: Layout) -> float:
        """Between the sample and the same places of the candidate in a layout; of integers, the
        share of equal ones."""
        taken = _taken(layout.of(candidate).array, self.positions)
        if {format_of(side.dtype).kind for side in (self.values, taken)} == {"integer"}:
            return _equal_share(self.values, taken)
        return _correlation(self.values, taken)

    def tells(self, best: float, next_best: float) -> bool:
        """Whether the best of several correlations is so by more than chance."""
        if best > 1.0 - _EXACT:
            return True
        if _unexplained(best) > _LEFT * _unexplained(next_best):
            return False
        # Fisher's transform of a correlation has this standard deviation, whatever the correlation.
        deviation = math.sqrt(2.0 / max(len(self.positions) - 3, 1))
        better = math.atanh(best) - math.atanh(max(next_best, 0.0))
        return len(self.positions) >= _FEWEST and better > _DEVIATIONS * deviation


def _taken(view: Array, positions: Array) -> Array:
    return view[np.unravel_index(positions, view.shape)] if view.ndim else view.reshape(1)


def _equal_share(reference: Array, candidate: Array) -> float:
    """Of integers, which are equal where they belong: numbers that grow along with others, as those
    of positions do, prove nothing."""
    return float(np.mean(reference == candidate))


def _correlation(reference: Array, candidate: Array) -> float:
    """Pearson's, of values whose size is told by its order of magnitude, so that a few large ones
    do not decide; 1 where all are equal, or where too few are to correlate."""
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    one, other = (_reals(side, "complex" in kinds) for side in (reference, candidate))
    counted = ~(np.isnan(one) | np.isnan(other))
    one, other = one[counted], other[counted]
    if np.array_equal(one, other):
        return 1.0 if one.size else 0.0
    if one.size < _FEWEST:
        return 0.0
    one, other = _compressed(one), _compressed(other)
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    # Rounding leaves no correlation short of 1 that is really smaller than that.
    return min(float(one @ other) / norms, 1.0 - _EXACT) if norms else 0.0


def _reals(values: Array, are_parts: bool) -> Floats:
    """As real numbers, those without end as the largest; each as two where one side is complex."""
    if are_parts:
        values = values.astype(np.complex128).view(np.float64)
    return np.clip(values.astype(np.float64), -_LARGEST, _LARGEST)


def _compressed(values: Floats) -> Floats:
    size = np.abs(values)
    median = float(np.median(size[size > 0])) if size.any() else 1.0
    with np.errstate(over="ignore"):
        compressed = np.arcsinh(np.clip(values / median, -_LARGEST, _LARGEST))
    centered: Floats = compressed - compressed.mean()
    return centered


def _layouts(reference: tuple[int, ...], candidate: tuple[int, ...]) -> Iterator[Layout]:
    """Every layout that the shapes allow; the first one leaves elements in their order."""
    if math.prod(reference) != math.prod(candidate) or not math.prod(reference):
        return
    yield reshaped(reference, candidate)
    sizes = [tuple(size for size in shape if size != 1) for shape in (reference, candidate)]
    fine, coarse = sorted(sizes, key=len, reverse=True)
    if len(fine) > _MOST_AXES:
        return
    for order in list(permutations(range(len(fine))))[1:]:
        if not _merges([fine[axis] for axis in order], coarse):
            continue
        if len(sizes[1]) > len(sizes[0]):
            yield Layout(candidate, fine, order, reference)
        else:
            split = tuple(fine[axis] for axis in order)
            inverse = tuple(map(order.index, range(len(fine))))
            yield _with_ones(Layout(candidate, split, inverse, reference))


def _with_ones(layout: Layout) -> Layout:
    """The same with its axes of size 1 where that makes it one transpose."""
    candidate, reference = layout.candidate, layout.reference
    if sorted(candidate) != sorted(reference):
        return layout
    ones = iter([axis for axis, size in enumerate(candidate) if size == 1])
    others = [axis for axis, size in enumerate(candidate) if size != 1]
    places = iter(layout.order)
    order = [next(ones) if size == 1 else others[next(places)] for size in reference]
    return Layout(candidate, candidate, tuple(order), reference)


def _merges(sizes: Sequence[int], merged: Sequence[int]) -> bool:
    """Whether neighbouring sizes multiply to these."""
    left = iter(sizes)
    for whole in merged:
        size = 1
        while size < whole:
            size *= next(left, whole + 1)
        if size != whole:
            return False
    return next(left, None) is None


def _arguments(numbers: Sequence[int]) -> str:
    return f"({', '.join(map(str, numbers))})"
