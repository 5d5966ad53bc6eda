"""Arrays that are sums or products of others, as a residual stream or what a gate lets through: of
which, and what comes on top."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Literal, TypeAlias

import numpy as np

from qvtrace.metrics.elements import Array, Computed, Floats, format_of, reader

Operation: TypeAlias = Literal["sum", "product"]

_MOST_SUMMANDS = 3  # a block that runs attention and MLP side by side adds both to its input
_FACTORS = 2
_PIECES, _LENGTH = 8, 64  # elements, from all over an array, that tell what it is made of
_ROUNDED = 4.0  # epsilons of the coarsest dtype
_FUNCTIONS: dict[Operation, Callable[[Any, Any], Any]] = {"sum": np.add, "product": np.multiply}


@dataclass(frozen=True)
class Parts:
    """What an array is made of, by the places of these among others."""

    operation: Operation  # of one part: it is that
    places: tuple[int, ...]

    def whole(self, others: Sequence[Array]) -> "Combined":
        """What these of the others make."""
        return Combined(*self._first_and_rest(others), self.operation)

    def on_top(self, whole: Array, others: Sequence[Array], reference: Sequence[Array]) -> "OnTop":
        """A candidate's whole less the error that its parts have, all in one shape."""
        return OnTop(whole, self.whole(others), self.whole(reference))

    def _first_and_rest(self, others: Sequence[Array]) -> tuple[Array, tuple[Array, ...]]:
        first, *rest = (others[place] for place in self.places)
        return first, tuple(rest)


@dataclass(frozen=True, slots=True)
class _InFloat64(Computed):
    """What is computed element by element, without a copy of the whole."""

    @property
    def dtype(self) -> np.dtype[np.float64]:
        """Of what is read."""
        return np.dtype(np.float64)


@dataclass(frozen=True, slots=True)
class Combined(_InFloat64):
    """Arrays of one shape added up, or multiplied."""

    rest: tuple[Array, ...]
    operation: Operation

    def read(self, start: int, stop: int) -> Floats:
        """The elements from one flat index to another."""
        parts = (reader(part)(start, stop).astype(np.float64) for part in (self.array, *self.rest))
        with np.errstate(all="ignore"):
            combined: Floats = reduce(_FUNCTIONS[self.operation], parts)
        return combined


@dataclass(frozen=True, slots=True)
class OnTop(_InFloat64):
    """An array less the error of what it is made of."""

    parts: Combined
    reference: Combined

    def read(self, start: int, stop: int) -> Floats:
        """The elements from one flat index to another."""
        elements = reader(self.array)(start, stop).astype(np.float64)
        with np.errstate(all="ignore"):
            rest: Floats = (
                elements - self.parts.read(start, stop) + self.reference.read(start, stop)
            )
        return rest


def parts_of(whole: Array, others: Sequence[Array]) -> Parts | None:
    """Which few of the others the whole is the sum or the product of, to rounding and as far as
    some elements tell; later ones are tried first. All are floats of one shape."""
    total = _some_elements(whole)
    if not np.isfinite(total).all() or not total.any():
        return None
    epsilon = max(format_of(array.dtype).epsilon for array in (whole, *others))
    some = [_some_elements(array) for array in others]
    latest_first = range(len(others) - 1, -1, -1)
    tried: list[tuple[Operation, int]] = [("sum", 1), ("sum", 2), ("product", _FACTORS)]
    tried += [("sum", count) for count in range(3, _MOST_SUMMANDS + 1)]
    for operation, count in tried:
        for places in combinations(latest_first, count):
            parts = [some[place] for place in places]
            if _is_made_of(total, parts, operation, _ROUNDED * epsilon):
                return Parts(operation, tuple(sorted(places)))
    return None


def _is_made_of(
    total: Floats, parts: Sequence[Floats], operation: Operation, tolerance: float
) -> bool:
    function = _FUNCTIONS[operation]
    with np.errstate(all="ignore"):
        size = reduce(function, map(np.abs, parts))
        return bool((np.abs(reduce(function, parts) - total) <= tolerance * size).all())


def _some_elements(array: Array) -> Floats:
    read = reader(array)
    length = min(array.size, _LENGTH)
    starts = np.linspace(0, array.size - length, _PIECES).astype(int)
    return np.concatenate([read(start, start + length).astype(np.float64) for start in starts])
