"""Squares of an error and of its reference, summed by token and by channel.

Several pairs of one shape are looked at together: each has few elements, and a call into numpy
takes longer than the work on them.
"""

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import cut
from qvtrace.metrics.elements import Array, Readable, format_of, reader

Sums = NDArray[np.float64]
Counts = NDArray[np.int64]


class SquareSums:
    """Sums over the positions where both sides are finite and the reference is no mask; a pair is a
    row of each."""

    def __init__(self, pairs: int, tokens: int, channels: int) -> None:
        self.token, self.token_signal = np.zeros((2, pairs, tokens))
        self.token_broken: Counts = np.zeros((pairs, tokens), dtype=np.int64)
        self.channel, self.channel_signal, self.channel_peak = np.zeros((3, pairs, channels))
        self.channel_broken, self.channel_counted = np.zeros((2, pairs, channels), dtype=np.int64)
        self.left_out: Counts = np.zeros(pairs, dtype=np.int64)

    @classmethod
    def of(cls, reference: Readable, candidate: Readable) -> "SquareSums":
        """Of one pair, block by block; channels lie along the last axis."""
        channels = reference.shape[-1]
        tokens = reference.size // channels
        sums = cls(1, tokens, channels)
        sides = reader(reference), reader(candidate)
        for block in cut(tokens, channels):
            first, column = divmod(block.start, channels)
            shape = 1, block.rows, block.size // block.rows
            one, other = (read(block.start, block.stop).reshape(shape) for read in sides)
            rows, columns = slice(first, first + shape[1]), slice(column, column + shape[2])
            sums.add(one, other, rows, columns)
        return sums

    def add(
        self,
        reference: Array,
        candidate: Array,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> None:
        """These tokens and channels of all pairs: arrays of pairs, tokens and channels."""
        with np.errstate(all="ignore"):
            if _is_plain(reference) and _is_plain(candidate):
                one = reference.astype(np.float64)
                self._add(rows, columns, one, one - candidate)
                self.channel_counted[:, columns] += one.shape[1]
            else:
                self._add_finite(rows, columns, _floats(reference), _floats(candidate))

    def is_finite(self) -> NDArray[np.bool_]:
        """Of which pairs no sum of squared errors leaves the range of float64."""
        token, channel = (np.isfinite(of).min(axis=1) for of in (self.token, self.channel))
        finite: NDArray[np.bool_] = token & channel
        return finite

    def _add_finite(self, rows: slice, columns: slice, reference: Array, candidate: Array) -> None:
        finite = np.isfinite(reference), np.isfinite(candidate)
        valid = finite[0] & finite[1]
        valid &= np.abs(reference) < format_of(reference.dtype).sentinel
        broken = finite[0] != finite[1]
        wide = np.complex128 if "c" in (reference.dtype.kind, candidate.dtype.kind) else np.float64
        one, other = (np.where(valid, side.astype(wide), 0) for side in (reference, candidate))
        self._add(rows, columns, np.abs(one), np.abs(one - other))
        self.token_broken[:, rows] += broken.sum(axis=2)
        self.channel_broken[:, columns] += broken.sum(axis=1)
        self.channel_counted[:, columns] += valid.sum(axis=1)
        self.left_out += (~valid).sum(axis=(1, 2))

    def _add(self, rows: slice, columns: slice, reference: Sums, error: Sums) -> None:
        peak = self.channel_peak[:, columns]
        np.maximum(peak, reference.max(axis=1), out=peak)
        np.maximum(peak, -reference.min(axis=1), out=peak)
        for values, token, channel in (
            (error, self.token, self.channel),
            (reference, self.token_signal, self.channel_signal),
        ):
            token[:, rows] += np.einsum("kij,kij->ki", values, values)
            channel[:, columns] += np.einsum("kij,kij->kj", values, values)


def _is_plain(array: Array) -> bool:
    """Whether every element is a real number that counts."""
    if array.dtype not in (np.float32, np.float64):
        return False
    limit = format_of(array.dtype).sentinel
    return bool(-limit < array.min() and array.max() < limit)  # neither holds of NaN


def _floats(elements: Array) -> Array:
    """Eight-bit floats, of which numpy knows little, as float64."""
    return elements.astype(np.float64) if elements.dtype.itemsize == 1 else elements
