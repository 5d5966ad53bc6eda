"""The sums over one block in float64, of all positions or of those that count."""

import math
from dataclasses import dataclass

import numpy as np

from qvtrace.metrics.blocks import Block
from qvtrace.metrics.elements import Flags, Floats
from qvtrace.metrics.nonfinite import NOTHING_FOUND, Nonfinite
from qvtrace.metrics.norms import CANCELLED, cosine_of, exact_total, mean, norm, row_norms, total
from qvtrace.metrics.sums import FloatSums, Interval


@dataclass(slots=True)
class Counted:
    """One block, with 0 at the positions that do not count."""

    reference: Floats
    candidate: Floats
    error: Floats  # to be written
    block: Block
    wide: bool = False
    interval: Interval | None = None  # of the reference, where not all positions count
    valid: Flags | None = None  # which positions count, where not all do
    nonfinite: Nonfinite = NOTHING_FOUND

    def sums(self) -> FloatSums:
        """The sums over this block."""
        error = self.error
        count = self.block.size if self.valid is None else int(np.count_nonzero(self.valid))
        np.subtract(self.candidate, self.reference, out=error)
        mean_error = mean(exact_total(error), error, count)
        interval = self.interval or Interval.of(self.reference)
        error_norms, error_norm = self._row_norms(error)
        np.abs(error, out=error)
        mean_abs_error = mean(total(error), error, count)
        reference_norms, reference_norm = self._row_norms(self.reference)
        norms = reference_norm, norm(self.candidate, wide=self.wide)
        cosine = cosine_of(self.reference, self.candidate, norms, wide=self.wide)
        deviation_norm = self._deviation_norm(mean_abs_error, error_norm, count)
        smallest, largest = self._extremes()
        return FloatSums(
            count=count,
            interval=interval,
            peak_error=float(error[largest]),
            peak_index=self.block.start + largest,
            smallest_error=smallest,
            mean_error=mean_error,
            mean_abs_error=mean_abs_error,
            deviation_norm=deviation_norm,
            reference_norms=reference_norms,
            error_norms=error_norms,
            reference_norm=norms[0],
            candidate_norm=norms[1],
            error_norm=error_norm,
            cosine=cosine,
            nonfinite=self.nonfinite,
            in_float32=False,
        )

    def _row_norms(self, values: Floats) -> tuple[Floats, float]:
        return row_norms(values.reshape(self.block.rows, -1), wide=self.wide)

    def _deviation_norm(self, center: float, error_norm: float, count: int) -> float:
        """Of absolute errors: from their sums where those have digits enough, else one by one,
        which overwrites the reference."""
        squares = error_norm * error_norm
        squared_deviation = squares - count * center * center
        if squared_deviation > CANCELLED * squares and not self.wide:
            return math.sqrt(squared_deviation)
        if error_norm == 0.0:
            return 0.0
        deviation = np.subtract(self.error, center, out=self.reference)
        if self.valid is not None:
            np.copyto(deviation, 0.0, where=~self.valid)
        return norm(deviation, wide=self.wide)

    def _extremes(self) -> tuple[float, int]:
        """The smallest absolute error, and the position of the largest one."""
        if self.valid is None:
            return float(np.minimum.reduce(self.error)), int(self.error.argmax())
        smallest = float(np.min(self.error, where=self.valid, initial=math.inf))
        np.copyto(self.error, -1.0, where=~self.valid)
        return smallest, int(self.error.argmax())
