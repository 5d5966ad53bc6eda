"""Two arrays -> numbers: one definition each.

`reference` is the left array, `candidate` the right one; an error is relative to the reference. Of
floats, only these positions count: both sides are finite, and the reference is no masking constant.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np

from qvtrace.metrics.blocks import Job, run
from qvtrace.metrics.elements import Flags, Floats, Readable, format_of
from qvtrace.metrics.floats import FloatPair
from qvtrace.metrics.integers import IntegerPair, IntegerSums
from qvtrace.metrics.nonfinite import NOTHING_FOUND, Nonfinite
from qvtrace.metrics.norms import pooled_cosine, pooled_deviation_norm, pooled_mean
from qvtrace.metrics.sums import FloatSums

__all__ = [
    "AS_GOOD_AS_CAN_BE",
    "DECIBELS",
    "HIGHER_IS_BETTER",
    "LOCAL_METRICS",
    "METRICS",
    "NOISE_METRICS",
    "PAIR_METRICS",
    "Difference",
    "Metrics",
    "Nonfinite",
    "Peak",
    "Sums",
    "TokenNorms",
    "Undefined",
    "badness",
    "compare",
    "compare_all",
    "comparison_job",
    "difference_of",
    "identical",
    "pool",
    "pooled_means",
    "pooled_norms",
    "position",
]

SHORTEST_TOKEN = 8  # a shorter last dimension is no token's vector

Status = Literal["ok", "identical", "nonfinite", "exact", "mismatch"]


class Undefined(StrEnum):
    """Why a metric has no value."""

    IDENTICAL = "identical"  # as good as can be
    EQUAL_WHERE_SAMPLED = "equal where sampled"  # as good, of what both hold of two that differ
    INTEGER = "integer"  # does not apply
    FLOATING_POINT = "floating point"  # does not apply
    CONSTANT_REFERENCE = "constant reference"
    ZERO_REFERENCE = "zero reference"
    ZERO_CANDIDATE = "zero candidate"
    NO_TOKEN_AXIS = "no token axis"
    NO_FINITE_POSITION = "no finite position"
    EMPTY = "empty"
    TOO_LARGE = "too large"  # beyond the range of float64
    INPUT = "input"  # does not apply
    NO_NOISE_IN = "no noise in"
    NOT_REPLAYED = "not replayed"
    PADDING = "padding"  # every token is
    NOISE_NOT_KNOWN = "noise not known"  # a place was not stored, or could not be compared


AS_GOOD_AS_CAN_BE = frozenset({Undefined.IDENTICAL, Undefined.EQUAL_WHERE_SAMPLED})
_DOES_NOT_APPLY = frozenset(
    {Undefined.INTEGER, Undefined.FLOATING_POINT, Undefined.INPUT, Undefined.NOT_REPLAYED}
)
NOT_APPLICABLE = (-2, 0.0)  # as a badness
_WORST_PEIR = frozenset({Undefined.CONSTANT_REFERENCE, Undefined.TOO_LARGE})

Outcome: TypeAlias = float | int | Undefined


@dataclass(frozen=True, slots=True)
class Metrics:
    """Every metric of a pair; None is undefined, its reason is in `Difference.undefined`.

    The last six are of a call; `compare` knows none and leaves them out of the reasons.
    """

    max_abs_error: float | int | None = None
    mean_abs_error: float | None = None
    min_abs_error: float | None = None
    stddev_abs_error: float | None = None  # population
    mean_error: float | None = None  # signed, candidate - reference
    peir: float | None = None  # a ratio: 0.03 is 3 %
    sqnr: float | None = None  # dB
    cosine: float | None = None
    relative_l2: float | None = None
    token_sqnr_p50: float | None = None  # dB
    token_sqnr_p5: float | None = None  # dB
    token_sqnr_min: float | None = None  # dB
    mismatches: int | None = None
    # Of the call that the pair belongs to, see `qvtrace.comparison.noise`:
    noise_in: float | None = None  # a ratio of powers
    noise_out: float | None = None  # a ratio of powers
    added: float | None = None  # a ratio of powers
    gain: float | None = None  # dB
    # Of a replay, where one is given:
    local_noise: float | None = None  # a ratio of powers
    local_peir: float | None = None  # a ratio


METRICS = tuple(metric.name for metric in fields(Metrics))
NOISE_METRICS = ("noise_in", "noise_out", "added", "gain")
LOCAL_METRICS = ("local_noise", "local_peir")
PAIR_METRICS = tuple(name for name in METRICS if name not in (*NOISE_METRICS, *LOCAL_METRICS))
TOKEN_METRICS = ("token_sqnr_p50", "token_sqnr_p5", "token_sqnr_min")
HIGHER_IS_BETTER = frozenset({"sqnr", "cosine", *TOKEN_METRICS})
DECIBELS = frozenset({"sqnr", "gain", *TOKEN_METRICS})


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
    unit vectors. A side of zeros: undefined."""
    if reference_norm == 0.0:
        return Undefined.ZERO_REFERENCE
    if candidate_norm == 0.0:
        return Undefined.ZERO_CANDIDATE
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


def position(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The multi-index of a flat one."""
    index: list[int] = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.insert(0, position)
    return tuple(index)


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


def pool(differences: Iterable[Difference]) -> Metrics:
    """The figures of several pairs as one, such as all calls of a module.

    The maximum of `max_abs_error` and `peir`, the minimum of `min_abs_error` and `token_sqnr_min`,
    the sum of `mismatches`; everything else as if the pairs were one, but for the percentiles,
    which cannot be pooled. Identical pairs were not read: they count in means, but not in `sqnr`,
    `cosine` and `relative_l2`, which without them are never better than the truth. A PEIR that is
    undefined in one pair is undefined for all, so that no finding hides.
    """
    together = tuple(differences)
    outcomes = _pooled_extremes(together)
    pairs = [
        (difference.metrics, difference.sums)
        for difference in together
        if difference.sums is not None and difference.sums.count
    ]
    if pairs:
        outcomes |= pooled_means(pairs) | pooled_norms(pairs)
    return difference_of("ok", outcomes, Undefined.EMPTY).metrics


Pairs: TypeAlias = list[tuple[Metrics, Sums]]


def _pooled_extremes(differences: tuple[Difference, ...]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for metric, choose in (
        ("max_abs_error", max),
        ("peir", max),
        ("min_abs_error", min),
        ("token_sqnr_min", min),
        ("mismatches", sum),
    ):
        found = [getattr(difference.metrics, metric) for difference in differences]
        values = [value for value in found if value is not None]
        if values:
            outcomes[metric] = choose(values)
    if any(difference.undefined.get("peir") in _WORST_PEIR for difference in differences):
        outcomes["peir"] = Undefined.CONSTANT_REFERENCE
    return outcomes


def pooled_means(pairs: Pairs) -> dict[str, Outcome]:
    """The means and the deviation of absolute errors over all pairs."""
    counts = [sums.count for _, sums in pairs]
    means = [metrics.mean_abs_error or 0.0 for metrics, _ in pairs]
    deviations = [
        (metrics.stddev_abs_error or 0.0) * math.sqrt(sums.count) for metrics, sums in pairs
    ]
    deviation = pooled_deviation_norm(deviations, means, counts)
    return {
        "mean_abs_error": pooled_mean(means, counts),
        "stddev_abs_error": deviation / math.sqrt(sum(counts)),
        "mean_error": pooled_mean([metrics.mean_error or 0.0 for metrics, _ in pairs], counts),
    }


def pooled_norms(pairs: Pairs) -> dict[str, Outcome]:
    """What is made of norms, over all pairs of which they are known."""
    parts = [
        (metrics.cosine or 0.0, sums.reference_norm, sums.candidate_norm)
        for metrics, sums in pairs
        if sums.reference_norm is not None and sums.candidate_norm is not None
    ]
    error_norm = math.hypot(*(sums.error_norm for _, sums in pairs))
    reference_norm = math.hypot(*(part[1] for part in parts))
    candidate_norm = math.hypot(*(part[2] for part in parts))
    if not parts:
        return {}
    product = pooled_cosine(parts, (reference_norm, candidate_norm))
    return {
        "sqnr": sqnr(reference_norm, error_norm),
        "cosine": cosine(product, reference_norm, candidate_norm),
        "relative_l2": relative_l2(reference_norm, error_norm),
    }


def badness(metric: str, value: float | None, reason: str | None) -> tuple[int, float]:
    """A key that sorts worst last; `reason` says why `value` is None.

    Undefined is worse than any number, `identical` and `equal where sampled` better, and what does
    not apply to a pair (a PEIR of integers) comes before everything. `mean_error` counts by its
    absolute value.
    """
    if value is not None:
        if metric in HIGHER_IS_BETTER:
            return 0, -value
        return 0, abs(value) if metric == "mean_error" else value
    if reason in _DOES_NOT_APPLY:
        return NOT_APPLICABLE
    return (-1, 0.0) if reason in AS_GOOD_AS_CAN_BE else (1, 0.0)
