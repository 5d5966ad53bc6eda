"""What one pass over a pair of float arrays finds, block by block, and how blocks become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvtrace.metrics.elements import Floats
from qvtrace.metrics.nonfinite import NOTHING_FOUND, Nonfinite
from qvtrace.metrics.norms import pooled_cosine, pooled_deviation_norm, pooled_mean, row_norms


@dataclass(slots=True)
class Interval:
    """Smallest and largest value; infinite the wrong way round when there is none."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Floats) -> "Interval":
        """Of all values; NaN where one of them is."""
        return cls(float(np.minimum.reduce(values)), float(np.maximum.reduce(values)))

    @property
    def magnitude(self) -> float:
        """The largest absolute value."""
        return max(self.high, -self.low)

    @property
    def width(self) -> float:
        """The largest value minus the smallest."""
        return self.high - self.low


@dataclass(slots=True)
class FloatSums:
    """What one pass over a pair, or over a block of it, finds at the positions that count.

    An error is candidate minus reference. A row is the vector of one token, or a piece of it.
    """

    count: int
    interval: Interval  # of the reference
    peak_error: float  # absolute; -1 when nothing counts
    peak_index: int  # flat; of the first of equal ones
    smallest_error: float  # absolute
    mean_error: float
    mean_abs_error: float
    deviation_norm: float  # of absolute errors from their mean
    reference_norms: Floats  # by row
    error_norms: Floats
    reference_norm: float
    candidate_norm: float
    error_norm: float
    cosine: float  # 0 when a side is 0
    nonfinite: Nonfinite
    in_float32: bool
    norm_unit: float = 1.0  # of all norms

    def unscaled(self, scale: float) -> "FloatSums":
        """Of arrays that had been multiplied by `scale`; norms would leave the range of float64."""
        return replace(
            self,
            interval=Interval(self.interval.low / scale, self.interval.high / scale),
            peak_error=self.peak_error / scale,
            smallest_error=self.smallest_error / scale,
            mean_error=self.mean_error / scale,
            mean_abs_error=self.mean_abs_error / scale,
            deviation_norm=self.deviation_norm / scale,
            norm_unit=1.0 / scale,
        )


def pooled(blocks: Sequence[FloatSums], rows: int, *, wide: bool) -> FloatSums:
    """The sums of all blocks, always added in their order."""
    counts = [block.count for block in blocks]
    means = [block.mean_abs_error for block in blocks]
    peak = max(blocks, key=lambda block: block.peak_error)
    norms = (
        math.hypot(*(block.reference_norm for block in blocks)),
        math.hypot(*(block.candidate_norm for block in blocks)),
    )
    cosines = [(block.cosine, block.reference_norm, block.candidate_norm) for block in blocks]
    return FloatSums(
        count=sum(counts),
        interval=Interval(
            min(block.interval.low for block in blocks),
            max(block.interval.high for block in blocks),
        ),
        peak_error=peak.peak_error,
        peak_index=peak.peak_index,
        smallest_error=min(block.smallest_error for block in blocks),
        mean_error=pooled_mean([block.mean_error for block in blocks], counts),
        mean_abs_error=pooled_mean(means, counts),
        deviation_norm=pooled_deviation_norm(
            [block.deviation_norm for block in blocks], means, counts
        ),
        reference_norms=_joined_rows([block.reference_norms for block in blocks], rows, wide),
        error_norms=_joined_rows([block.error_norms for block in blocks], rows, wide),
        reference_norm=norms[0],
        candidate_norm=norms[1],
        error_norm=math.hypot(*(block.error_norm for block in blocks)),
        cosine=pooled_cosine(cosines, norms),
        nonfinite=sum((block.nonfinite for block in blocks), NOTHING_FOUND),
        in_float32=any(block.in_float32 for block in blocks),
    )


def _joined_rows(pieces: Sequence[Floats], rows: int, wide: bool) -> Floats:
    """The norms of rows from those of their pieces."""
    norms = np.concatenate(pieces)
    return norms if norms.size == rows else row_norms(norms.reshape(rows, -1), wide=wide)[0]
