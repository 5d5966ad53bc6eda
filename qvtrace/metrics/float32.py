"""The sums over one block in float32, by as few calls into numpy as there can be.

After each call a thread may have to wait for the interpreter's lock, and to be woken up for it can
take longer than the call. Of float32, 256 products at a time are summed as such, everything else in
float64; that costs less than 1e-6 of a norm at the very worst and near 1e-8 as a rule.
"""

import math
from typing import TypeAlias

import numpy as np

from qvtrace.metrics.blocks import Block
from qvtrace.metrics.elements import Floats
from qvtrace.metrics.nonfinite import NOTHING_FOUND
from qvtrace.metrics.norms import CANCELLED, row_products
from qvtrace.metrics.sums import FloatSums, Interval

LARGEST = 2.0**59  # the largest value whose squares can be summed as float32
SMALLEST_SQUARES = 2.0**-80  # a smaller sum of float32 squares may have lost digits

# From 10 000 elements on BLAS starts threads of its own, and numpy holds the interpreter's lock in
# a call of fewer than 500 vectors: so vectors are short.
_SEGMENT = 256
_ONES = np.ones((1, _SEGMENT), np.float32)


def float32_sums(
    reference: Floats, candidate: Floats, error: Floats, block: Block
) -> FloatSums | None:
    """The sums over one block, all of whose positions count; `error` is written to.

    None where float32 has not digits enough. They say nothing where a value is not finite or beyond
    `LARGEST`, which shows in the interval and the peak.
    """
    # Subtracting reads memory ahead better than products do, so it comes first.
    np.subtract(candidate, reference, out=error)
    segments = _Segments(block)
    references, candidates, errors = map(segments.of, (reference, candidate, error))
    segments.add_up(0, errors)
    interval = Interval.of(reference)
    segments.multiply(2, candidates, candidates)
    segments.multiply(3, references, references)
    segments.multiply(4, errors, errors)
    np.abs(error, out=error)
    segments.add_up(1, errors)
    smallest, largest = float(np.minimum.reduce(error)), int(error.argmax())
    sums = segments.row_totals()
    if np.minimum.reduce(sums[3:], axis=None) < SMALLEST_SQUARES:
        _repair(sums[3], reference)
        _repair(sums[4], error)
    signed, absolute, candidate_squares, reference_squares, error_squares = np.add.reduce(
        sums, axis=1
    ).tolist()
    if min(reference_squares, candidate_squares) < SMALLEST_SQUARES:
        return None
    mean_abs_error = absolute / block.size
    squared_deviation = error_squares - mean_abs_error * absolute
    if squared_deviation <= CANCELLED * error_squares and error_squares:
        return None
    norms = np.sqrt(sums[3:])
    sides = math.sqrt(reference_squares), math.sqrt(candidate_squares)
    return FloatSums(
        count=block.size,
        interval=interval,
        peak_error=error.item(largest),
        peak_index=block.start + largest,
        smallest_error=smallest,
        mean_error=signed / block.size,
        mean_abs_error=mean_abs_error,
        deviation_norm=math.sqrt(squared_deviation),
        reference_norms=norms[0],
        error_norms=norms[1],
        reference_norm=sides[0],
        candidate_norm=sides[1],
        error_norm=math.sqrt(error_squares),
        cosine=_cosine(segments, (references, candidates), sides, error_squares),
        nonfinite=NOTHING_FOUND,
        in_float32=True,
    )


_Pieces: TypeAlias = tuple[Floats, Floats]


class _Segments:
    """Five sums over the rows of one block, each in segments of float32."""

    def __init__(self, block: Block) -> None:
        length = block.size // block.rows
        self._rows, self._tail = block.rows, length % _SEGMENT
        self._sums = np.empty((5, block.rows, -(-length // _SEGMENT)), np.float32)
        self._whole = self._sums[..., : length // _SEGMENT]

    def of(self, values: Floats) -> _Pieces:
        """Rows in segments, and what is left of each row."""
        if not self._tail:
            return values.reshape(self._rows, -1, _SEGMENT), values
        rows = values.reshape(self._rows, -1)
        return rows[:, : -self._tail].reshape(self._rows, -1, _SEGMENT), rows[:, -self._tail :]

    def add_up(self, index: int, values: _Pieces) -> None:
        """Sum `index`: of the elements."""
        self.multiply(index, values, (_ONES, _ONES[:, : self._tail]))

    def multiply(self, index: int, left: _Pieces, right: _Pieces) -> None:
        """Sum `index`: of the products of elements."""
        np.vecdot(left[0], right[0], out=self._whole[index])
        if self._tail:
            np.vecdot(left[1], right[1], out=self._sums[index, :, -1])

    def row_totals(self) -> Floats:
        """Each sum by row."""
        sums = self._sums.astype(np.float64)
        # Three times as fast as a reduction along a short axis.
        totals: Floats = sums @ np.ones(sums.shape[-1])
        return totals


def _repair(squares: Floats, values: Floats) -> None:
    """Replace those sums of squares of rows that may have lost digits."""
    doubtful = np.flatnonzero(squares < SMALLEST_SQUARES)
    if doubtful.size:
        exact = values.reshape(squares.size, -1)[doubtful].astype(np.float64)
        squares[doubtful] = row_products(exact, exact)


def _cosine(
    segments: _Segments, sides: tuple[_Pieces, _Pieces], norms: tuple[float, float], errors: float
) -> float:
    """Of sides about as long, from both norms and the squares of the errors; else from products."""
    longest, shortest = max(norms), min(norms)
    if longest < 2.0 * shortest:
        squares = longest * longest + shortest * shortest - errors
        return squares / (2.0 * longest * shortest)
    segments.multiply(0, *sides)
    return float(segments.row_totals()[0].sum()) / (longest * shortest)
