"""The numbers of one pair of arrays.

`reference` is the left array, `candidate` the right one; an error is relative to the reference. Of
floats, only these positions count: both sides are finite, and the reference is no masking constant.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qvtrace.metrics.elements import Flags, Floats, format_of
from qvtrace.metrics.names import PAIR_METRICS, Metrics, Outcome, Undefined
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.metrics.sums import FloatSums

Status = Literal["ok", "identical", "nonfinite", "exact", "mismatch"]


@dataclass(frozen=True, slots=True)
class Peak:
    """Where the largest error is (the first of equal ones), and both values there.

    Of complex numbers, the values are the parts (real or imaginary) that differ most.
    """

    index: tuple[int, ...]
    reference: float | int | bool
    candidate: float | int | bool


@dataclass(frozen=True, slots=True)
class Sums:
    """What several pairs are pooled from, beside their metrics.

    Sums of squares over the counted positions are kept as their roots, since the squares of
    float64 values can leave its range. None: the elements were not read.
    """

    count: int
    error_norm: float
    reference_norm: float | None
    candidate_norm: float | None
    interval: tuple[float, float] | None = None  # smallest and largest value of the reference

    @classmethod
    def of(cls, sums: FloatSums) -> "Sums":
        """From everything that was found."""
        norms = (sums.error_norm, sums.reference_norm, sums.candidate_norm)
        error, reference, candidate = (size * sums.norm_unit for size in norms)
        interval = sums.interval.low, sums.interval.high
        return cls(sums.count, error, reference, candidate, interval)


@dataclass(frozen=True, slots=True)
class TokenNorms:
    """The norm of each vector along the last dimension, and that of its error, in one unit."""

    reference: Floats
    error: Floats

    def of(self, kept: Flags) -> "TokenNorms":
        """Those of some vectors."""
        return TokenNorms(self.reference[kept], self.error[kept])


@dataclass(frozen=True, slots=True)
class Difference:
    """The numbers of one pair."""

    status: Status
    metrics: Metrics
    undefined: dict[str, str] = field(default_factory=dict)
    peak: Peak | None = None
    nonfinite: Nonfinite | None = None
    worst_token: tuple[int, ...] | None = None
    zero_tokens: int = 0
    sums: Sums | None = None
    tokens: TokenNorms | None = field(default=None, repr=False, compare=False)  # where asked for


def identical(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Difference:
    """The difference of a pair of equal digest, dtype and shape; no element is read.

    This comes before every other rule: empty arrays and those with NaN are identical too.
    """
    if format_of(dtype).kind == "integer":
        return difference_of("identical", {"max_abs_error": 0, "mismatches": 0}, Undefined.INTEGER)
    zero = ("mean_abs_error", "min_abs_error", "stddev_abs_error", "mean_error", "peir")
    outcomes: dict[str, Outcome] = dict.fromkeys(("max_abs_error", *zero, "relative_l2"), 0.0)
    outcomes["mismatches"] = Undefined.FLOATING_POINT
    sums = Sums(math.prod(shape), 0.0, None, None)
    return difference_of("identical", outcomes, Undefined.IDENTICAL, sums=sums)


def difference_of(
    status: Status, outcomes: dict[str, Outcome], otherwise: Undefined, **rest: Any
) -> Difference:
    """Each outcome under its metric, or its reason; `otherwise` is the reason of all the others."""
    values: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    for metric in PAIR_METRICS:
        outcome = outcomes.get(metric, otherwise)
        if not isinstance(outcome, Undefined) and not math.isfinite(outcome):
            outcome = Undefined.TOO_LARGE
        if isinstance(outcome, Undefined):
            undefined[metric] = outcome.value
        else:
            values[metric] = outcome
    return Difference(status, Metrics(**values), undefined, **rest)


def position(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The multi-index of a flat one."""
    index: list[int] = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.insert(0, position)
    return tuple(index)
