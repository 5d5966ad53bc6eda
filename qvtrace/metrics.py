"""Two arrays -> numbers: one definition each."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every metric of a pair; None is undefined, its reason is in `Difference.undefined`."""

    max_abs_error: float | int | None = None
    mean_abs_error: float | None = None
    min_abs_error: float | None = None
    stddev_abs_error: float | None = None
    mean_error: float | None = None
    peir: float | None = None
    sqnr: float | None = None
    cosine: float | None = None
    relative_l2: float | None = None
    token_sqnr_p50: float | None = None
    token_sqnr_p5: float | None = None
    token_sqnr_min: float | None = None
    mismatches: int | None = None


@dataclass(frozen=True, slots=True)
class Peak:
    """Where the largest error is, and both values there."""

    index: tuple[int, ...]
    reference: float | int | bool
    candidate: float | int | bool


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """Counts of what is not finite, never averaged into a number."""

    reference_nan: int = 0
    candidate_nan: int = 0
    new_nan: int = 0
    lost_nan: int = 0
    inf_mismatches: int = 0
    sentinel_mismatches: int = 0


@dataclass(frozen=True, slots=True)
class Sums:
    """What several pairs are pooled from: sums over the counted positions, in float64."""

    count: int
    abs_error: float
    error: float
    squared_error: float
    squared_reference: float
    squared_candidate: float
    product: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The numbers of one pair."""

    status: Literal["ok", "identical", "nonfinite", "exact", "mismatch"]
    metrics: Metrics
    undefined: dict[str, str] = field(default_factory=dict)
    peak: Peak | None = None
    nonfinite: Nonfinite | None = None
    worst_token: tuple[int, ...] | None = None
    zero_tokens: int = 0
    sums: Sums | None = None


def compare(reference: np.ndarray, candidate: np.ndarray) -> Difference:
    """The difference of two arrays of one shape."""
    raise NotImplementedError


def identical(dtype: np.dtype) -> Difference:
    """The difference of a pair of equal digest, dtype and shape; no element is read."""
    raise NotImplementedError
