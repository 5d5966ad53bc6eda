"""Two arrays compared as floats: everything that metrics are made of, from one pass over both.

Large arrays of float32 or bfloat16 are worked on in float32, block by block. A block beyond its
range, a result that would lose digits, small arrays and other dtypes are done in float64. There,
only float64's own extremes need care (`wide`): sums of squares are handed on as their roots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qvtrace.blocks import Block, cut, scratch
from qvtrace.elements import Array, Flags, Floats, format_of, part_reader, reader, upcast
from qvtrace.nonfinite import NOTHING_FOUND, Nonfinite, findings
from qvtrace.norms import (
    LARGEST_FLOAT32,
    cosine_of,
    exact_total,
    mean,
    norm,
    pooled_cosine,
    pooled_deviation_norm,
    pooled_mean,
    row_norms,
    total,
)

_SMALL = 32 * 1024  # elements up to which float64 costs nothing that anyone would notice
_SAFE_VALUES = 2.0**-400, 2.0**900  # beyond, the norm of a float64 vector can be out of range
_CANCELLED = 0.05  # a sum that is a smaller share of its terms needs more digits than they have


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
    deviation_norm: float  # of absolute errors from their mean; NaN: cannot be had from float32
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


class FloatPair:
    """Two arrays of one shape, cut into rows along the last dimension where those are tokens."""

    def __init__(self, reference: Array, candidate: Array, *, by_token: bool) -> None:
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
        if abs(sums.cosine) < _CANCELLED:
            return self.sums_in_float64()
        # Rounding each difference to float32 costs their sum 2^-25 of the norm of its terms.
        if abs(sums.mean_error) * sums.count < _CANCELLED * sums.error_norm:
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
            return _pooled(parts, self._rows, wide=self._wide)

    def _float32_block(self, block: Block) -> FloatSums:
        with np.errstate(all="ignore"):  # holds for one thread only
            reference, candidate = self._as_float32(block)
            error = scratch.error32[: block.size]
            sums = _Counted(reference, candidate, error, block).sums()
            limits = [min(side.sentinel, LARGEST_FLOAT32) for side in self.formats]
            # All false for NaN; a candidate is not larger than a reference and its error together.
            if (
                sums.interval.magnitude < limits[0]
                and sums.interval.magnitude + sums.peak_error < limits[1]
                and sums.deviation_norm >= 0.0
            ):
                return sums
        return self._float64_block(block)

    def _float64_block(self, block: Block) -> FloatSums:
        with np.errstate(all="ignore"):
            reference, candidate = self._as_float64(block)
            self._rescale(reference, candidate)
            error = scratch.error64[: block.size]
            sums = _Counted(reference, candidate, error, block, self._wide).sums()
            limits = [side.sentinel * self._scale for side in self.formats]
            if (
                sums.interval.magnitude < limits[0]
                and sums.interval.magnitude + sums.peak_error < limits[1]
            ):
                return sums
            return self._masked_block(block)

    def _mean_error(self, block: Block) -> float:
        """Of a block all of whose positions count, from differences in float64."""
        reference, candidate = self._as_float32(block)
        error = scratch.error64[: block.size]
        np.subtract(candidate, reference, out=error, dtype=np.float64)
        return total(error) / block.size

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
        counted = _Counted(
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


@dataclass(slots=True)
class _Counted:
    """One block in float32 or float64, with 0 at the positions that do not count."""

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
        # Subtracting reads memory ahead better than products do, so it comes first.
        np.subtract(self.candidate, self.reference, out=error)
        mean_error = mean(exact_total(error), error, count)
        interval = self.interval or Interval.of(self.reference)
        error_norms, error_norm = self._row_norms(error)
        np.abs(error, out=error)
        mean_abs_error = mean(total(error), error, count)
        reference_norms, reference_norm = self._row_norms(self.reference)
        norms = reference_norm, norm(self.candidate, wide=self.wide)
        cosine = self._cosine(norms, error_norm)
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
            in_float32=error.dtype == np.float32,
        )

    def _row_norms(self, values: Floats) -> tuple[Floats, float]:
        return row_norms(values.reshape(self.block.rows, -1), wide=self.wide)

    def _cosine(self, norms: tuple[float, float], error_norm: float) -> float:
        """In float32, of sides about as long: from the three norms, without another pass."""
        longest, shortest = max(norms), min(norms)
        if self.error.dtype == np.float32 and longest < 2.0 * shortest:
            squares = longest * longest + shortest * shortest - error_norm * error_norm
            return squares / (2.0 * longest * shortest)
        return cosine_of(self.reference, self.candidate, norms, wide=self.wide)

    def _deviation_norm(self, center: float, error_norm: float, count: int) -> float:
        """Of absolute errors: from their sums where those have digits enough, else one by one."""
        squares = error_norm * error_norm
        squared_deviation = squares - count * center * center
        if squared_deviation > _CANCELLED * squares and not self.wide:
            return math.sqrt(squared_deviation)
        if error_norm == 0.0:
            return 0.0
        if self.error.dtype == np.float32:
            return math.nan
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


def _pooled(blocks: Sequence[FloatSums], rows: int, *, wide: bool) -> FloatSums:
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
