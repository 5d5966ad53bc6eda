"""One definition of each number that norms and extremes give, with its edge cases."""

import math
from dataclasses import dataclass

import numpy as np

from qvtrace.metrics.elements import Floats
from qvtrace.metrics.names import TOKEN_METRICS, Outcome, Undefined


def peir(peak_error: float, interval: float) -> Outcome:
    """The Peak Error to Interval Ratio: the largest absolute error over the reference's interval,
    its largest minus its smallest value.

    An interval of 0: 0 when there is no error, else undefined (`constant reference`).
    """
    if peak_error == 0.0:
        return 0.0
    return peak_error / interval if interval else Undefined.CONSTANT_REFERENCE


def sqnr(reference_norm: float, error_norm: float) -> Outcome:
    """The signal to quantization noise ratio in dB: 20 log10(|r| / |r - c|).

    No error: undefined (`identical`); else a reference of zeros: undefined (`zero reference`).
    """
    if error_norm == 0.0:
        return Undefined.IDENTICAL
    if reference_norm == 0.0:
        return Undefined.ZERO_REFERENCE
    return 20.0 * (math.log10(reference_norm) - math.log10(error_norm))


def cosine(product: float, reference_norm: float, candidate_norm: float) -> Outcome:
    """The cosine of the angle between both sides, within [-1, 1], from the scalar product of their
    unit vectors. A side of zeros, or one whose norm is out of range: undefined."""
    if reference_norm == 0.0:
        return Undefined.ZERO_REFERENCE
    if candidate_norm == 0.0:
        return Undefined.ZERO_CANDIDATE
    if not (math.isfinite(reference_norm) and math.isfinite(candidate_norm)):
        return Undefined.TOO_LARGE
    return max(-1.0, min(1.0, product))


def relative_l2(reference_norm: float, error_norm: float) -> Outcome:
    """|r - c| / |r|; undefined for a reference of zeros, even when there is no error."""
    return error_norm / reference_norm if reference_norm else Undefined.ZERO_REFERENCE


@dataclass(frozen=True, slots=True)
class TokenSqnr:
    """The SQNR of each vector along the last dimension, in dB, as its percentiles.

    An exact vector counts as better than any number. Vectors whose reference is all zeros are left
    out and counted.
    """

    outcomes: dict[str, Outcome]
    worst: int | None  # the first of the worst vectors; None when that one is exact
    zeros: int

    @classmethod
    def of(cls, reference_norms: Floats, error_norms: Floats) -> "TokenSqnr":
        """From the norms of each vector and of its error."""
        count = int(np.count_nonzero(reference_norms))
        zeros = reference_norms.size - count
        if not count:
            reason = Undefined.ZERO_REFERENCE if error_norms.any() else Undefined.IDENTICAL
            return cls(dict.fromkeys(TOKEN_METRICS, reason), None, zeros)
        counted = np.flatnonzero(reference_norms) if zeros else None
        if counted is not None:
            reference_norms, error_norms = reference_norms[counted], error_norms[counted]
        with np.errstate(divide="ignore"):  # an exact vector becomes infinity
            ratios = reference_norms / error_norms
        worst = int(ratios.argmin())
        ranks = [-(-count // 2) - 1, -(-count // 20) - 1, 0]  # the nearest to 50 and 5 percent
        ratios.partition(ranks)
        outcomes = [_decibels(float(ratios[rank])) for rank in ranks]
        is_exact = outcomes[-1] is Undefined.IDENTICAL
        position = worst if counted is None else int(counted[worst])
        found = dict(zip(TOKEN_METRICS, outcomes, strict=True))
        return cls(found, None if is_exact else position, zeros)


NO_TOKENS = TokenSqnr({}, None, 0)


def _decibels(ratio: float) -> Outcome:
    if ratio == math.inf:
        return Undefined.IDENTICAL
    return 20.0 * math.log10(ratio) if ratio else -math.inf
