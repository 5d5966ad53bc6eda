"""Two arrays compared as floats: everything that metrics are made of, from one pass over both.

Large arrays of float32 or bfloat16 are worked on in float32, block by block. A block beyond its
range, a result that would lose digits, small arrays and other dtypes are done in float64. There,
only float64's own extremes need care (`wide`): sums of squares are handed on as their roots.
"""

import math
from collections.abc import Sequence

import numpy as np

from qvtrace.metrics.blocks import Block, cut, scratch
from qvtrace.metrics.elements import Floats, Readable, format_of, part_reader, reader, upcast
from qvtrace.metrics.float32 import LARGEST, float32_sums
from qvtrace.metrics.float64 import Counted
from qvtrace.metrics.nonfinite import findings
from qvtrace.metrics.norms import CANCELLED, exact_total, pooled_mean
from qvtrace.metrics.sums import FloatSums, Interval, pooled

_SMALL = 32 * 1024  # elements up to which float64 costs nothing that anyone would notice
_SAFE_VALUES = 2.0**-400, 2.0**900  # beyond, the norm of a float64 vector can be out of range


class FloatPair:
    """Two arrays of one shape, cut into rows along the last dimension where those are tokens."""

    def __init__(self, reference: Readable, candidate: Readable, *, by_token: bool) -> None:
        """Complex numbers become pairs of reals. Without `by_token`, everything is one row."""
        self.formats = format_of(reference.dtype), format_of(candidate.dtype)
        self.is_complex = any(side.kind == "complex" for side in self.formats)
        make_reader = part_reader if self.is_complex else reader
        self._readers = make_reader(reference), make_reader(candidate)
        self._wide = any(side.is_wide for side in self.formats)
        size = reference.size * (1 + self.is_complex)
        self._rows = math.prod(reference.shape[:-1]) if by_token else 1
        self._in_float32 = size > _SMALL and all(side.fits_float32 for side in self.formats)
        self.blocks = cut(self._rows, size // self._rows) if size else []
        self._scale = self._safe_scale() if self._wide else 1.0

    def part(self, block: Block) -> FloatSums:
        """The sums over one block."""
        return self._float32_block(block) if self._in_float32 else self._float64_block(block)

    def sums(self, parts: Sequence[FloatSums]) -> FloatSums:
        """The sums over all positions that count, from those over all blocks."""
        sums = self._pooled(parts)
        if not sums.in_float32:
            return self._unscaled(sums)
        if abs(sums.cosine) < CANCELLED:
            return self.sums_in_float64()
        # Adding up differences of float32 costs their sum 2^-23 of the norm of its terms.
        if abs(sums.mean_error) * sums.count < 4 * CANCELLED * sums.error_norm:
            means = [
                self._mean_error(block) if part.in_float32 else part.mean_error
                for block, part in zip(self.blocks, parts, strict=True)
            ]
            sums.mean_error = pooled_mean(means, [part.count for part in parts])
        return sums

    def sums_in_float64(self) -> FloatSums:
        """The same, with all the digits that there are."""
        return self._unscaled(self._pooled([self._float64_block(block) for block in self.blocks]))

    def _unscaled(self, sums: FloatSums) -> FloatSums:
        return sums if self._scale == 1.0 else sums.unscaled(self._scale)

    def _pooled(self, parts: Sequence[FloatSums]) -> FloatSums:
        if len(parts) == 1:
            return parts[0]
        with np.errstate(all="ignore"):
            return pooled(parts, self._rows, wide=self._wide)

    def _float32_block(self, block: Block) -> FloatSums:
        with np.errstate(all="ignore"):  # holds for one thread only
            reference, candidate = self._as_float32(block)
            sums = float32_sums(reference, candidate, scratch.error32[: block.size], block)
        if sums is not None and self._all_count(sums, [LARGEST, LARGEST]):
            return sums
        return self._float64_block(block)

    def _float64_block(self, block: Block) -> FloatSums:
        with np.errstate(all="ignore"):
            reference, candidate = self._as_float64(block)
            self._rescale(reference, candidate)
            error = scratch.error64[: block.size]
            sums = Counted(reference, candidate, error, block, self._wide).sums()
            if self._all_count(sums, [side.sentinel * self._scale for side in self.formats]):
                return sums
            return self._masked_block(block)

    def _all_count(self, sums: FloatSums, limits: Sequence[float]) -> bool:
        """Whether no value of a side is NaN, infinite or as large as the side's limit."""
        # All false for NaN; a candidate is not larger than a reference and its error together.
        magnitude = sums.interval.magnitude
        return magnitude < limits[0] and magnitude + sums.peak_error < limits[1]

    def _mean_error(self, block: Block) -> float:
        """Of a block all of whose positions count, from differences in float64."""
        reference, candidate = self._as_float32(block)
        error = scratch.error64[: block.size]
        np.subtract(candidate, reference, out=error, dtype=np.float64)
        return exact_total(error) / block.size

    def _masked_block(self, block: Block) -> FloatSums:
        """Where something is NaN, infinite or a mask: these positions become 0 on both sides."""
        reference, candidate = self._as_float64(block)
        error = scratch.error64[: block.size]
        nonfinite = findings(reference, candidate, self.formats)
        valid = np.isfinite(reference) & np.isfinite(candidate)
        valid &= ~self.formats[0].sentinels(reference)
        interval = Interval(
            float(np.min(reference, where=valid, initial=math.inf)) * self._scale,
            float(np.max(reference, where=valid, initial=-math.inf)) * self._scale,
        )
        np.copyto(reference, 0.0, where=~valid)
        np.copyto(candidate, 0.0, where=~valid)
        self._rescale(reference, candidate)
        counted = Counted(
            reference, candidate, error, block, self._wide, interval, valid, nonfinite
        )
        return counted.sums()

    def _as_float32(self, block: Block) -> tuple[Floats, Floats]:
        """The elements, where they are float32 already, else copies."""
        arrays = []
        for read, array in zip(self._readers, scratch.narrow, strict=True):
            elements = read(block.start, block.stop)
            if elements.dtype != np.float32 or not elements.flags.aligned:
                upcast(elements, array[: block.size])
                elements = array[: block.size]
            arrays.append(elements)
        return arrays[0], arrays[1]

    def _as_float64(self, block: Block) -> tuple[Floats, Floats]:
        reference, candidate = (array[: block.size] for array in scratch.wide)
        for read, array in zip(self._readers, (reference, candidate), strict=True):
            upcast(read(block.start, block.stop), array)
        return reference, candidate

    def _rescale(self, *arrays: Floats) -> None:
        if self._scale != 1.0:
            for array in arrays:
                np.multiply(array, self._scale, out=array)

    def _safe_scale(self) -> float:
        """A power of two that keeps all norms in range and all their digits."""
        largest = 0.0
        for block in self.blocks:
            for values, side in zip(self._as_float64(block), self.formats, strict=True):
                magnitudes = np.abs(values)
                largest = np.max(magnitudes, where=magnitudes < side.sentinel, initial=largest)
        if largest > _SAFE_VALUES[1]:
            return 2.0**-64
        return 2.0**600 if largest < _SAFE_VALUES[0] else 1.0
