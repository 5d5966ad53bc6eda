"""The noise floor: differences that a run without any change has as well."""

import math

from qvtrace.comparison.rows import Row
from qvtrace.judging.measures import Number, size
from qvtrace.metrics.names import DECIBELS, HIGHER_IS_BETTER, NOISE_METRICS

# What sums of float32 in another order differ by, relative to the size of a tensor.
ROUNDING = 1e-6
_ROUNDING_DECIBELS = 120.0
_MOST_DECIBELS = 6000.0  # a ratio of more is beyond float64
_ROUNDING_COSINE = 1.0 - ROUNDING**2
_RATIOS = frozenset({"peir", "relative_l2"})


def is_noise(row: Row, metric: str, value: Number) -> bool:
    """Whether a metric is no worse than the floor that was measured for the row, or than rounding
    in float32: 1e-6 of the reference's interval, 120 dB."""
    if _no_worse(metric, value, _rounding(row, metric)):
        return True
    measured = None if row.floor is None else getattr(row.floor, metric)
    return measured is not None and _no_worse(metric, value, measured)


def times_floor(row: Row, metric: str = "peir") -> float | None:
    """How many times as large as the noise a difference is, measured by one metric.

    Decibels become a ratio of amplitudes, a cosine its distance from 1. None where a number is
    missing, or there was no noise to measure by.
    """
    value = getattr(row.metrics, metric)
    floor = None if row.floor is None else getattr(row.floor, metric)
    if value is None or floor is None:
        return None
    if metric in DECIBELS:
        worse = floor - value if metric in HIGHER_IS_BETTER else value - floor
        return _ratio(10.0 ** (min(worse, _MOST_DECIBELS) / 20.0), 1.0)
    if metric == "cosine":
        return _ratio(1.0 - value, 1.0 - floor)
    return _ratio(size(metric, value), size(metric, floor))


def _ratio(value: float, floor: float) -> float | None:
    ratio = value / floor if floor else math.inf
    return ratio if math.isfinite(ratio) else None


def _no_worse(metric: str, value: Number, floor: Number) -> bool:
    if metric in HIGHER_IS_BETTER:
        return value >= floor
    return size(metric, value) <= size(metric, floor)


def _rounding(row: Row, metric: str) -> float:
    if metric in _RATIOS:
        return ROUNDING
    if metric in DECIBELS:
        return _ROUNDING_DECIBELS if metric in HIGHER_IS_BETTER else -math.inf
    if metric in NOISE_METRICS:  # ratios of powers
        return ROUNDING**2
    if metric == "cosine":
        return _ROUNDING_COSINE
    error, peir = row.metrics.max_abs_error, row.metrics.peir
    if metric == "mismatches" or not error or not peir:
        return 0.0
    return ROUNDING * error / peir  # of the reference's interval
