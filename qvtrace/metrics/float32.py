"""The sums over one block in float32, by as few calls into numpy as there can be.

After each call a thread may have to wait for the interpreter's lock, and to be woken up for it can
take longer than the call. Of float32, 256 products at a time are summed as such, everything else in
float64; that costs less than 1e-6 of a norm at the very worst and near 1e-8 as a rule.
"""

import math

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
    segments = _Segments(5, block)
    references, candidates, errors = (
        values.reshape(block.rows, -1) for values in (reference, candidate, error)
    )
    segments.add_up(0, errors)
    interval = Interval.of(reference)
    segments.multiply(2, candidates, candidates)
    segments.multiply(3, references, references)
    segments.multiply(4, errors, errors)
    np.abs(error, out=error)
    segments.add_up(1, errors)
    smallest, largest = float(np.minimum.reduce(error)), int(error.argmax())
    signed, absolute, candidate_squares, *_ = segments.totals()
    squares = segments.row_totals(3)
    if np.minimum.reduce(squares, axis=None) < SMALLEST_SQUARES:
        _repair(squares[0], references)
        _repair(squares[1], errors)
    reference_squares, error_squares = np.add.reduce(squares, axis=1).tolist()
    if min(reference_squares, candidate_squares) < SMALLEST_SQUARES:
        return None
    mean_abs_error = absolute / block.size
    squared_deviation = error_squares - mean_abs_error * absolute
    if squared_deviation <= CANCELLED * error_squares and error_squares:
        return None
    reference_norms, error_norms = np.sqrt(squares)
    sides = math.sqrt(reference_squares), math.sqrt(candidate_squares)
    return FloatSums(
        count=block.size,
        interval=interval,
        peak_error=float(error[largest]),
        peak_index=block.start + largest,
        smallest_error=smallest,
        mean_error=signed / block.size,
        mean_abs_error=mean_abs_error,
        deviation_norm=math.sqrt(squared_deviation),
        reference_norms=reference_norms,
        error_norms=error_norms,
        reference_norm=sides[0],
        candidate_norm=sides[1],
        error_norm=math.sqrt(error_squares),
        cosine=_cosine(segments, (references, candidates), sides, error_squares),
        nonfinite=NOTHING_FOUND,
        in_float32=True,
    )


class _Segments:
    """Several sums over the rows of one block, each in segments of float32."""

    def __init__(self, count: int, block: Block) -> None:
        length = block.size // block.rows
        self._whole = length - length % _SEGMENT
        self._sums = np.empty((count, block.rows, -(-length // _SEGMENT)), np.float32)

    def add_up(self, index: int, rows: Floats) -> None:
        """Sum `index`: of the elements."""
        self.multiply(index, rows, _ONES)

    def multiply(self, index: int, left: Floats, right: Floats) -> None:
        """Sum `index`: of the products of elements."""
        whole, sums = self._whole, self._sums[index]
        if whole:
            np.vecdot(_cut(left, whole), _cut(right, whole), out=sums[:, : whole // _SEGMENT])
        if whole < left.shape[1]:
            tail = left.shape[1] - whole
            np.vecdot(left[:, -tail:], right[:, -tail:], out=sums[:, -1])

    def totals(self) -> list[float]:
        """Each sum over all rows."""
        totals: list[float] = np.add.reduce(self._sums, axis=(1, 2), dtype=np.float64).tolist()
        return totals

    def row_totals(self, first: int) -> Floats:
        """The sums from `first` on, by row."""
        sums = self._sums[first:].astype(np.float64)
        # Three times as fast as a reduction along a short axis.
        totals: Floats = sums @ np.ones(sums.shape[-1])
        return totals


def _cut(rows: Floats, whole: int) -> Floats:
    """Rows in segments; what is one segment long stands for all of them."""
    if rows is _ONES:
        return rows
    return rows[:, :whole].reshape(rows.shape[0], -1, _SEGMENT)


def _repair(squares: Floats, rows: Floats) -> None:
    """Replace those sums of squares that may have lost digits."""
    doubtful = np.flatnonzero(squares < SMALLEST_SQUARES)
    if doubtful.size:
        exact = rows[doubtful].astype(np.float64)
        squares[doubtful] = row_products(exact, exact)


def _cosine(
    segments: _Segments, rows: tuple[Floats, Floats], norms: tuple[float, float], errors: float
) -> float:
    """Of sides about as long, from both norms and the squares of the errors; else from products."""
    longest, shortest = max(norms), min(norms)
    if longest < 2.0 * shortest:
        squares = longest * longest + shortest * shortest - errors
        return squares / (2.0 * longest * shortest)
    segments.multiply(0, *rows)
    return segments.totals()[0] / (longest * shortest)
