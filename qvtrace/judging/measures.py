"""What a row has of one metric, and whether anything may be concluded from it."""

import math
from dataclasses import dataclass
from typing import TypeAlias

from qvtrace.comparison.rows import (
    COMPARED,
    NOT_STORED,
    PRIVATE,
    STATISTICS_ONLY,
    Row,
    Samples,
)
from qvtrace.metrics.names import AS_GOOD_AS_CAN_BE, Undefined

Number: TypeAlias = float | int


@dataclass(frozen=True)
class Measure:
    """A number, or a fault in place of one; neither: as good as can be."""

    value: Number | None = None
    fault: str | None = None  # why the row is within no limit
    where: str | None = None  # in which sample


BEST = Measure()

_UNKNOWN = "unknown"
_NOT_TO_BE_HAD = frozenset(
    {
        _UNKNOWN,
        NOT_STORED,
        STATISTICS_ONLY,
        PRIVATE,
        Undefined.NOISE_NOT_KNOWN.value,
        Undefined.NOT_REPLAYED.value,
    }
)


def measure(row: Row, metric: str, *, of_worst_sample: bool = False) -> Measure | None:
    """What the row has of a metric; None where nothing could be said: the metric is about integers
    and this is none, or both sides are objects of one type, which nobody could have stored.

    `of_worst_sample`: of the worst of the samples that the row pools.
    """
    value = getattr(row.metrics, metric)
    undefined = row.undefined.get(metric)
    if is_unjudged(row) or undefined == Undefined.FLOATING_POINT:
        return None
    if row.status not in COMPARED:
        return Measure(fault=row.reason or row.status)
    if row.status == "nonfinite":
        return Measure(fault=not_finite(row))
    if row.status in ("identical", "exact") or undefined in AS_GOOD_AS_CAN_BE:
        return BEST
    if row.status == "mismatch" and metric != "mismatches":
        return Measure(fault=row.reason or "values differ")
    if of_worst_sample and row.samples is not None:
        return _of_worst_sample(row.samples, metric)
    if value is None:
        return Measure(fault=f"undefined: {undefined or _UNKNOWN}")
    return Measure(value)


def _of_worst_sample(samples: Samples, metric: str) -> Measure:
    figures = samples.figures.get(metric)
    if figures is None:
        return Measure(fault="undefined: unknown in every sample")
    where = f"in sample {figures.worst_sample}"
    if figures.worst is None:
        is_best = figures.undefined in AS_GOOD_AS_CAN_BE
        return BEST if is_best else Measure(fault=f"undefined {where}: {figures.undefined}")
    return Measure(figures.worst, where=where)


def is_unjudged(row: Row) -> bool:
    """Whether both sides are objects of one type, which nobody could have stored."""
    return row.status == "opaque" and row.undefined.get("peir") == NOT_STORED


def is_not_to_be_had(row: Row, metric: str) -> bool:
    """Whether the archives do not tell a figure that there is: what was not stored, is private, or
    known by statistics alone. A figure that is undefined is told."""
    if row.status in ("opaque", "nonfinite"):
        return row.status == "opaque" and (is_unjudged(row) or row.has_no_elements)
    if row.status in ("identical", "exact") or getattr(row.metrics, metric) is not None:
        return False
    return row.undefined.get(metric, _UNKNOWN) in _NOT_TO_BE_HAD


def not_finite(row: Row) -> str:
    """What of the row is not finite, in words."""
    return "not finite" if row.nonfinite is None else row.nonfinite.described


def number_text(metric: str, value: Number) -> str:
    """Three significant digits; of a cosine as many as tell how far from 1 it is."""
    if metric != "cosine":
        return f"{value:.3g}"
    distance = 1.0 - abs(value)
    digits = max(6, 2 - math.floor(math.log10(distance))) if 0.0 < distance < 1.0 else 6
    return f"{value:.{digits}f}"


def size(metric: str, value: Number) -> Number:
    """What counts of a number: of `mean_error`, which has a sign, how far it is from 0."""
    return abs(value) if metric == "mean_error" else value
