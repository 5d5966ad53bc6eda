"""What the numbers of a pair are called, why one has no value, and which of two is the worse."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TypeAlias


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

Outcome: TypeAlias = float | int | Undefined  # of a metric


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
