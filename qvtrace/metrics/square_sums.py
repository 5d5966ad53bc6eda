"""Squares of an error and of its reference, summed by token and by channel.

Several small pairs of one shape are looked at together: each has few elements, and a call into
numpy takes longer than the work on them. A large one is looked at block by block.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import Block, cut
from qvtrace.metrics.elements import Array, Flags, Floats, Readable, format_of, reader

Sums = NDArray[np.float64]
Counts = NDArray[np.int64]

_GROUP = 256  # squares of float32 that are summed as such
_WIDE = 1024  # elements of a line, along which a reduction over lines is fast


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
    def of_float32(
        cls, reference: Floats, error: Floats, norms: tuple[Floats, Floats]
    ) -> "SquareSums":
        """Of one pair all of whose positions count: tokens and channels of a reference and of its
        error, absolute or not, within the range of float32; with the norms of both by token."""
        sums = cls(1, *reference.shape)
        np.square(norms[0], out=sums.token_signal[0])
        np.square(norms[1], out=sums.token[0])
        for lines in _lines(reference):
            peak = np.maximum(np.maximum.reduce(lines), -np.minimum.reduce(lines))
            folded = peak.reshape(-1, reference.shape[1]).max(axis=0)
            np.maximum(sums.channel_peak[0], folded, out=sums.channel_peak[0])
        sums.channel_signal[0] = _column_squares(reference)
        sums.channel[0] = _column_squares(error)
        sums.channel_counted[0] = len(reference)
        return sums

    @classmethod
    def together(cls, several: Sequence["SquareSums"]) -> "SquareSums":
        """Those of pairs of one shape, a row for each."""
        sums = cls(0, 0, 0)
        for name in vars(sums):
            setattr(sums, name, np.concatenate([getattr(one, name) for one in several]))
        return sums

    def take_in(self, part: "SquareSums", rows: slice, columns: slice) -> None:
        """Add the sums of these tokens and channels."""
        for name in ("token", "token_signal", "token_broken"):
            getattr(self, name)[:, rows] += getattr(part, name)
        for name in ("channel", "channel_signal", "channel_broken", "channel_counted"):
            getattr(self, name)[:, columns] += getattr(part, name)
        peak = self.channel_peak[:, columns]
        np.maximum(peak, part.channel_peak, out=peak)
        self.left_out += part.left_out

    def add(self, reference: Array, candidate: Array) -> None:
        """All pairs: arrays of pairs, tokens and channels."""
        with np.errstate(all="ignore"):
            if _is_plain(reference) and _is_plain(candidate):
                one = reference.astype(np.float64)
                self._add(one, one - candidate)
                self.channel_counted += one.shape[1]
            else:
                self._add_finite(_floats(reference), _floats(candidate))

    def is_finite(self) -> NDArray[np.bool_]:
        """Of which pairs no sum of squared errors leaves the range of float64."""
        token, channel = (np.isfinite(of).min(axis=1) for of in (self.token, self.channel))
        finite: NDArray[np.bool_] = token & channel
        return finite

    def _add_finite(self, reference: Array, candidate: Array) -> None:
        finite = np.isfinite(reference), np.isfinite(candidate)
        valid = finite[0] & finite[1]
        valid &= np.abs(reference) < format_of(reference.dtype).sentinel
        broken = finite[0] != finite[1]
        wide = np.complex128 if "c" in (reference.dtype.kind, candidate.dtype.kind) else np.float64
        one, other = (np.where(valid, side.astype(wide), 0) for side in (reference, candidate))
        self._add(np.abs(one), np.abs(one - other))
        self.token_broken += broken.sum(axis=2)
        self.channel_broken += broken.sum(axis=1)
        self.channel_counted += valid.sum(axis=1)
        self.left_out += (~valid).sum(axis=(1, 2))

    def _add(self, reference: Sums, error: Sums) -> None:
        peak = self.channel_peak
        np.maximum(peak, reference.max(axis=1, initial=0), out=peak)
        np.maximum(peak, -reference.min(axis=1, initial=0), out=peak)
        for values, token, channel in (
            (error, self.token, self.channel),
            (reference, self.token_signal, self.channel_signal),
        ):
            token += np.einsum("kij,kij->ki", values, values)
            channel += np.einsum("kij,kij->kj", values, values)


_Part: TypeAlias = tuple[SquareSums, slice, slice]


class SquareSumsJob:
    """The sums of one pair, to be run with others; channels lie along one axis, and of tokens only
    those that are `kept` count, a flag for each."""

    def __init__(
        self, reference: Readable, candidate: Readable, axis: int = -1, kept: Flags | None = None
    ) -> None:
        shape = reference.shape
        axis %= len(shape)
        self._readers = reader(reference), reader(candidate)
        self._channels, self._inner = shape[axis], math.prod(shape[axis + 1 :])
        self._outer = math.prod(shape[:axis])
        self.blocks = self._cut()
        self._kept = kept
        self._before = None if kept is None else np.concatenate([[0], np.cumsum(kept)])

    @property
    def of_whole_tokens(self) -> bool:
        """Whether the channels of a token stand one after the other."""
        return self._inner == 1

    def _cut(self) -> list[Block]:
        """Of tokens where these are whole, else of channels side by side."""
        if self.of_whole_tokens:
            return cut(self._outer, self._channels)
        size = self._channels * self._inner
        return [
            Block(start + block.start, start + block.stop, block.rows)
            for start in range(0, self._outer * size, size)
            for block in cut(self._channels, self._inner)
        ]

    def part(self, block: Block) -> _Part:
        """The sums over one block, and of which tokens and channels they are."""
        rows, columns = self._places(block)
        one, other = (self._kept_of(read(block.start, block.stop), block) for read in self._readers)
        sums = SquareSums(1, *one.shape)
        sums.add(one[np.newaxis], other[np.newaxis])
        return sums, rows, columns

    def part_of_float32(
        self, block: Block, errors: Floats, values: Floats, norms: tuple[Floats, Floats]
    ) -> _Part:
        """The same where channels are last, of `SquareSums.of_float32`."""
        one, error = self._kept_of(values, block), self._kept_of(errors, block)
        if self._kept is not None:
            kept = self._kept[self._rows(block)]
            norms = norms[0][kept], norms[1][kept]
        return SquareSums.of_float32(one, error, norms), *self._places(block)

    def result(self, parts: Sequence[_Part]) -> SquareSums:
        """The sums over all blocks."""
        if len(parts) == 1:
            return parts[0][0]
        tokens = self._outer * self._inner if self._before is None else int(self._before[-1])
        sums = SquareSums(1, tokens, self._channels)
        for part in parts:
            sums.take_in(*part)
        return sums

    def _rows(self, block: Block) -> slice:
        first = block.start // self._channels
        return slice(first, first + block.rows)

    def _places(self, block: Block) -> tuple[slice, slice]:
        width = block.size // block.rows
        if self._inner == 1:
            rows, column = self._rows(block), block.start % self._channels
            if self._before is not None:
                rows = slice(int(self._before[rows.start]), int(self._before[rows.stop]))
            return rows, slice(column, column + width)
        line, place = divmod(block.start, self._inner)
        outer, channel = divmod(line, self._channels)
        first = outer * self._inner + place
        return slice(first, first + width), slice(channel, channel + block.rows)

    def _kept_of(self, elements: Array, block: Block) -> Array:
        """Those of a block, as tokens and channels."""
        values = elements.reshape(block.rows, -1)
        if self._inner > 1:
            return values.T
        return values if self._kept is None else values[self._kept[self._rows(block)]]


def _lines(values: Floats) -> Iterator[Floats]:
    """Rows, as many side by side as make a line that is not short; then those that are left."""
    count, length = values.shape
    beside = max(1, min(count, _WIDE // max(1, length)))
    whole = count - count % beside
    if whole:
        yield values[:whole].reshape(-1, beside * length)
    if whole < count:
        yield values[whole:]


def _column_squares(values: Floats) -> Sums:
    """The sum of the squares of each column of float32."""
    length = values.shape[1]
    squares: Sums = np.zeros(length)
    for lines in _lines(values):
        for start in range(0, len(lines), _GROUP):
            group = lines[start : start + _GROUP]
            summed = np.einsum("ij,ij->j", group, group)
            squares += summed.reshape(-1, length).sum(axis=0, dtype=np.float64)
    return squares


def _is_plain(array: Array) -> bool:
    """Whether every element is a real number that counts."""
    if array.dtype not in (np.float32, np.float64):
        return False
    limit = format_of(array.dtype).sentinel
    return bool(-limit < array.min() and array.max() < limit)  # neither holds of NaN


def _floats(elements: Array) -> Array:
    """Eight-bit floats, of which numpy knows little, as float64."""
    return elements.astype(np.float64) if elements.dtype.itemsize == 1 else elements
