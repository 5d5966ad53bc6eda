"""What is not finite, or a masking constant: counted, never averaged into a number."""

from dataclasses import dataclass, fields

import numpy as np

from qvtrace.metrics.elements import Flags, Floats, Format


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """Counts of what is not finite, and of masks that differ."""

    reference_nan: int = 0
    candidate_nan: int = 0
    new_nan: int = 0  # NaN only in the candidate
    lost_nan: int = 0  # NaN only in the reference
    inf_mismatches: int = 0  # an infinity against any other number that is no mask
    sentinel_mismatches: int = 0  # a mask against any number but its counterpart
    new_inf: int = 0  # of the mismatches of infinities, those that the candidate has
    equal_inf: int = 0  # the same infinity on both sides, as of a mask: no finding

    def __add__(self, other: "Nonfinite") -> "Nonfinite":
        names = [count.name for count in fields(self)]
        return Nonfinite(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def is_finding(self) -> bool:
        """Whether the two sides differ in what is not finite, or in masks."""
        return bool(
            self.new_nan or self.lost_nan or self.inf_mismatches or self.sentinel_mismatches
        )

    @property
    def introduced(self) -> int:
        """NaN and infinities that only the candidate has."""
        return self.new_nan + self.new_inf

    @property
    def described(self) -> str:
        """The counts in words, those that are not 0."""
        parts = [
            (self.new_nan, "new NaN"),
            (self.lost_nan, "lost NaN"),
            (self.reference_nan - self.lost_nan, "NaN on both sides"),
            (self.new_inf, "new infinities"),
            (self.inf_mismatches - self.new_inf, "infinities that differ"),
            (self.equal_inf, "infinities on both sides"),
            (self.sentinel_mismatches, "masked on one side only"),
        ]
        return ", ".join(f"{count} {what}" for count, what in parts if count)


NOTHING_FOUND = Nonfinite()


def findings(reference: Floats, candidate: Floats, formats: tuple[Format, Format]) -> Nonfinite:
    """Counts of the places where something is not finite or a mask; no place is two mismatches.

    A mask has its counterpart on the other side where that is equal, or where both are masks of
    unequal dtypes that differ by rounding or stand at the same end of their dtypes' ranges.
    """
    nan = np.isnan(reference), np.isnan(candidate)
    numbers = ~(nan[0] | nan[1])
    masks = formats[0].sentinels(reference), formats[1].sentinels(candidate)
    either_mask = (masks[0] | masks[1]) & numbers
    infinities = np.isinf(reference), np.isinf(candidate)
    infinite = (infinities[0] | infinities[1]) & numbers & ~either_mask
    unequal = reference != candidate
    if formats[0] != formats[1]:
        unequal &= ~(masks[0] & masks[1] & _same_constant(reference, candidate, formats))
    places = (
        nan[0],
        nan[1],
        nan[1] & ~nan[0],
        nan[0] & ~nan[1],
        infinite & unequal,
        either_mask & unequal,
        infinities[1] & infinite & unequal,
        infinite & ~unequal,
    )
    return Nonfinite(*(int(np.count_nonzero(place)) for place in places))


def _same_constant(reference: Floats, candidate: Floats, formats: tuple[Format, Format]) -> Flags:
    """Of two masks of unequal dtypes: whether they are one constant, as each dtype writes it."""
    ends = (np.abs(reference) == formats[0].largest) & (np.abs(candidate) == formats[1].largest)
    ends &= np.signbit(reference) == np.signbit(candidate)
    rounding = max(side.epsilon for side in formats)
    same: Flags = ends | (np.abs(candidate / reference - 1.0) <= rounding)
    return same
