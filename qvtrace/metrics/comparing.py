"""Two arrays -> their difference."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qvtrace.metrics.blocks import Job, run
from qvtrace.metrics.definitions import NO_TOKENS, TokenSqnr, cosine, peir, relative_l2, sqnr
from qvtrace.metrics.differences import (
    Difference,
    Peak,
    Status,
    Sums,
    TokenNorms,
    difference_of,
    position,
)
from qvtrace.metrics.elements import Readable, format_of
from qvtrace.metrics.floats import FloatPair
from qvtrace.metrics.integers import IntegerPair, IntegerSums
from qvtrace.metrics.names import Metrics, Outcome, Undefined
from qvtrace.metrics.nonfinite import NOTHING_FOUND
from qvtrace.metrics.sums import FloatSums

SHORTEST_TOKEN = 8  # a shorter last dimension is no token's vector


def compare(reference: Readable, candidate: Readable) -> Difference:
    """The difference of two arrays of one shape, of any dtypes of numbers.

    Two arrays of integers or bools are compared exactly, everything else as floats, complex numbers
    as pairs of reals. Raises `TypeError` for other dtypes and `ValueError` for unequal shapes:
    nothing is ever broadcast.
    """
    return compare_all([(reference, candidate)])[0]


def compare_all(
    pairs: Iterable[tuple[Readable, Readable]], *, tokens: bool = False
) -> list[Difference]:
    """The difference of each pair, as `compare` says it; faster than one by one.

    With `tokens`, differences of floats keep the norms of their tokens.
    """
    return run([comparison_job(*pair, tokens=tokens) for pair in pairs])


def comparison_job(
    reference: Readable, candidate: Readable, *, tokens: bool = False
) -> Job[Difference]:
    """`compare`, to be run with others; raises what that raises."""
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes {reference.shape} and {candidate.shape} differ")
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    if kinds == {"integer"}:
        return _IntegerComparison(reference, candidate)
    return _FloatComparison(reference, candidate, keeps_tokens=tokens)


class _IntegerComparison:
    """The difference of two arrays of integers or bools."""

    def __init__(self, reference: Readable, candidate: Readable) -> None:
        self._sides = reference, candidate
        self._pair = IntegerPair(reference, candidate)
        self.blocks = self._pair.blocks
        self.part = self._pair.part

    def result(self, parts: Sequence[IntegerSums]) -> Difference:
        if not parts:
            outcomes: dict[str, Outcome] = {"max_abs_error": Undefined.EMPTY, "mismatches": 0}
            return difference_of("exact", outcomes, Undefined.INTEGER)
        sums = self._pair.sums(parts)
        values = (_integer(_element(side, sums.peak_index)) for side in self._sides)
        return difference_of(
            "mismatch" if sums.mismatches else "exact",
            {"max_abs_error": sums.peak_error, "mismatches": sums.mismatches},
            Undefined.INTEGER,
            peak=Peak(position(sums.peak_index, self._sides[0].shape), *values),
        )


def _element(side: Readable, flat: int) -> Any:
    if isinstance(side, np.ndarray | np.generic):
        return side.item(flat)
    return side.read(flat, flat + 1)[0]


def _integer(element: Any) -> int | bool:
    return bool(element) if isinstance(element, np.bool_) else int(element)


class _FloatComparison:
    """The difference of two arrays of which one at least is no integer."""

    def __init__(self, reference: Readable, candidate: Readable, *, keeps_tokens: bool) -> None:
        self._sides = reference, candidate
        self._keeps_tokens = keeps_tokens
        self._shape = reference.shape
        self._by_token = len(self._shape) >= 2 and self._shape[-1] >= SHORTEST_TOKEN
        self._pair = FloatPair(reference, candidate, by_token=self._by_token)
        self.blocks = self._pair.blocks
        self.part = self._pair.part

    def result(self, parts: Sequence[FloatSums]) -> Difference:
        if not parts:
            return difference_of("ok", {}, Undefined.EMPTY, nonfinite=NOTHING_FOUND)
        sums = self._pair.sums(parts)
        difference = self._difference(sums)
        if sums.in_float32 and _is_near_zero_decibels(difference.metrics):
            difference = self._difference(self._pair.sums_in_float64())
        return difference

    def _difference(self, sums: FloatSums) -> Difference:
        status: Status = "nonfinite" if sums.nonfinite.is_finding else "ok"
        if not sums.count:
            return difference_of(status, {}, Undefined.NO_FINITE_POSITION, nonfinite=sums.nonfinite)
        peak = self._peak(sums.peak_index)
        outcomes = _float_outcomes(sums, abs(peak.candidate - peak.reference))
        tokens, norms = NO_TOKENS, None
        if self._by_token:
            tokens = TokenSqnr.of(sums.reference_norms, sums.error_norms)
            norms = TokenNorms(sums.reference_norms, sums.error_norms)
        worst = tokens.worst
        return difference_of(
            status,
            outcomes | tokens.outcomes,
            Undefined.NO_TOKEN_AXIS,
            peak=peak,
            nonfinite=sums.nonfinite,
            worst_token=None if worst is None else position(worst, self._shape[:-1]),
            zero_tokens=tokens.zeros,
            sums=Sums.of(sums),
            tokens=norms if self._keeps_tokens else None,
        )

    def _peak(self, flat: int) -> Peak:
        """`flat` counts reals: two to an element of a complex pair."""
        if not self._pair.is_complex:
            index = position(flat, self._shape)
            return Peak(index, *(float(_element(side, flat)) for side in self._sides))
        index = position(flat // 2, self._shape)
        part = np.imag if flat % 2 else np.real
        return Peak(index, *(float(part(_element(side, flat // 2))) for side in self._sides))


def _is_near_zero_decibels(found: Metrics) -> bool:
    """Whether a logarithm is so small that digits of what it was taken of are missing in it."""
    decibels = (found.sqnr, found.token_sqnr_p50, found.token_sqnr_p5, found.token_sqnr_min)
    return any(value is not None and abs(value) < 1.0 for value in decibels)


def _float_outcomes(sums: FloatSums, peak_error: float) -> dict[str, Outcome]:
    """All but the token figures; the peak's error is given exactly."""
    return {
        "max_abs_error": peak_error,
        "mean_abs_error": sums.mean_abs_error,
        "min_abs_error": sums.smallest_error,
        "stddev_abs_error": sums.deviation_norm / math.sqrt(sums.count),
        "mean_error": sums.mean_error,
        "peir": peir(peak_error, sums.interval.width),
        "sqnr": sqnr(sums.reference_norm, sums.error_norm),
        "cosine": cosine(sums.cosine, sums.reference_norm, sums.candidate_norm),
        "relative_l2": relative_l2(sums.reference_norm, sums.error_norm),
        "mismatches": Undefined.FLOATING_POINT,
    }
