"""One tensor in numbers: its range, mean and spread, and what in it is not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qvtrace.metrics.blocks import Block, cut, run, scratch
from qvtrace.metrics.elements import Array, Floats, Readable, format_of, part_reader, reader, upcast
from qvtrace.metrics.float32 import LARGEST, SMALLEST_SQUARES
from qvtrace.metrics.norms import CANCELLED, exact_total, mean, norm, pooled_mean, product, total
from qvtrace.metrics.sums import Interval

_LARGE = 2.0**900  # from here on, sums of differences can leave the range of float64
_SMALL = 32 * 1024  # elements up to which float64 costs nothing that anyone would notice


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics over the finite elements, in float64; those of a complex tensor are its parts.

    `min` and `max` of integers are exact. Where no element is finite, all four are None.
    """

    count: int  # of all elements
    min: float | int | None
    max: float | int | None
    mean: float | None
    stddev: float | None  # population
    nan: int = 0
    positive_inf: int = 0
    negative_inf: int = 0
    zeros: int = 0

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: every number is finite; counts of what is not are left out where 0."""
        core = {"mean": self.mean, "min": self.min, "max": self.max, "stddev": self.stddev}
        counts = {
            "nan": self.nan,
            "positive_inf": self.positive_inf,
            "negative_inf": self.negative_inf,
            "zeros": self.zeros,
        }
        return core | {name: count for name, count in counts.items() if count}

    @classmethod
    def from_json(cls, json: dict[str, Any], count: int) -> "Statistics":
        """What `to_json` wrote of an array of `count` elements; raises `ValueError` for anything
        else."""
        numbers = [json.get(name) for name in ("min", "max", "mean", "stddev")]
        names = ("nan", "positive_inf", "negative_inf", "zeros")
        counts: list[int] = [json.get(name, 0) for name in names]
        if not all(value is None or type(value) in (int, float) for value in numbers):
            raise ValueError("statistics that are no numbers")
        if not all(type(found) is int and 0 <= found <= count for found in counts):
            raise ValueError("statistics that count what is not there")
        low, high, center, spread = numbers
        return cls(count, low, high, center, spread, *counts)


def statistics(array: Readable) -> Statistics:
    """The statistics of an array of any dtype of numbers; `TypeError` for others."""
    return run([StatisticsJob(array)])[0]


@dataclass(frozen=True, slots=True)
class Known:
    """What has been found of the elements of one block already: all of them are finite."""

    norm: float
    interval: Interval | None = None
    total: float | None = None


@dataclass(slots=True)
class _Part:
    """What one block says of its finite elements."""

    finite: int
    low: float | int
    high: float | int
    mean: float
    stddev: float
    nan: int
    positive_inf: int
    negative_inf: int
    zeros: int

    def statistics(self, count: int) -> Statistics:
        """Of an array that is this block."""
        counts = self.nan, self.positive_inf, self.negative_inf, self.zeros
        return Statistics(count, self.low, self.high, self.mean, self.stddev, *counts)


class StatisticsJob:
    """`statistics` of one array, to be run with others; complex elements are two reals. Any blocks
    will do that together cover the array."""

    def __init__(self, array: Readable) -> None:
        form = format_of(array.dtype)
        self._is_integer = form.kind == "integer"
        is_complex = form.kind == "complex"
        self._count = array.size
        self._fits_float32 = form.fits_float32
        self._read = part_reader(array) if is_complex else reader(array)
        self._size = array.size * (1 + is_complex)

    @cached_property
    def blocks(self) -> list[Block]:
        """Of the whole array."""
        return cut(1, self._size)

    def part(self, block: Block, known: Known | None = None) -> _Part:
        """What one block says; what is known of it is not computed again."""
        elements = self._read(block.start, block.stop)
        with np.errstate(all="ignore"):
            if self._fits_float32 and block.size > _SMALL:
                part = _float32_part(_as_float32(elements), known)
                if part is not None:
                    return part
            values = scratch.wide[0][: block.size]
            upcast(elements, values)
            finite = np.isfinite(values)
            part = _part(values if finite.all() else values[finite])
            part.positive_inf = int(np.count_nonzero(values == math.inf))
            part.negative_inf = int(np.count_nonzero(values == -math.inf))
        part.nan = block.size - part.finite - part.positive_inf - part.negative_inf
        if self._is_integer:
            part.low, part.high = _exact_range(elements)
        return part

    def result(self, parts: Sequence[_Part]) -> Statistics:
        """What all of them say."""
        if len(parts) == 1 and parts[0].finite:
            return parts[0].statistics(self._count)
        counted = [part for part in parts if part.finite]
        counts = [part.finite for part in counted]
        weights = [math.sqrt(count / sum(counts)) for count in counts]
        center = pooled_mean([part.mean for part in counted], counts)
        spreads = [weight * part.stddev for weight, part in zip(weights, counted, strict=True)]
        shifts = [
            weight * (part.mean - center) for weight, part in zip(weights, counted, strict=True)
        ]
        return Statistics(
            count=self._count,
            min=min((part.low for part in counted), default=None),
            max=max((part.high for part in counted), default=None),
            mean=center if counted else None,
            stddev=math.hypot(*spreads, *shifts) if counted else None,
            nan=sum(part.nan for part in parts),
            positive_inf=sum(part.positive_inf for part in parts),
            negative_inf=sum(part.negative_inf for part in parts),
            zeros=sum(part.zeros for part in parts),
        )


def _as_float32(elements: Array) -> Floats:
    """The elements themselves where they are that, else a copy."""
    if elements.dtype == np.float32 and elements.flags.aligned:
        return elements
    values = scratch.narrow[0][: elements.size]
    upcast(elements, values)
    return values


def _float32_part(values: Floats, known: Known | None) -> _Part | None:
    """Of finite values, several times as fast as in float64; None where one is not finite or where
    the digits of float32 are not enough."""
    interval = known.interval if known and known.interval else Interval.of(values)
    low, high = interval.low, interval.high
    if not interval.magnitude < LARGEST:  # NaN is not below anything
        return None
    summed = total(values) if known is None or known.total is None else known.total
    squares = known.norm * known.norm if known else product(values, values)
    # Adding up float32 costs their sum up to 2^-23 of the norm of its terms.
    if abs(summed) < 4 * CANCELLED * math.sqrt(squares):
        wide = scratch.error64[: values.size]
        np.copyto(wide, values)
        summed = total(wide)
    squared_deviation = squares - summed * (summed / values.size)
    if squares < SMALLEST_SQUARES or squared_deviation <= CANCELLED * squares:
        return None
    zeros = 0
    if low <= 0.0 <= high:
        flags = scratch.error64.view(np.bool_)[: values.size]
        zeros = int(np.count_nonzero(np.equal(values, 0.0, out=flags)))
    center, deviation = summed / values.size, math.sqrt(squared_deviation / values.size)
    return _Part(values.size, low, high, center, deviation, 0, 0, 0, zeros)


def _part(values: Floats) -> _Part:
    """Of finite values; the counts of others are still to be set."""
    if not values.size:
        return _Part(0, math.inf, -math.inf, 0.0, 0.0, 0, 0, 0, 0)
    low, high = float(values.min()), float(values.max())
    center = mean(exact_total(values), values, values.size)
    unit = 2.0**-64 if max(high, -low) > _LARGE else 1.0
    deviation = norm(values * unit - center * unit, wide=True) / math.sqrt(values.size) / unit
    zeros = values.size - int(np.count_nonzero(values))
    return _Part(values.size, low, high, center, deviation, 0, 0, 0, zeros)


def _exact_range(elements: Array) -> tuple[int, int]:
    if elements.dtype.kind not in "biu":  # ml_dtypes' small integers cannot be reduced
        elements = elements.astype(np.int64)
    return int(elements.min()), int(elements.max())
