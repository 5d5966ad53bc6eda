"""Two arrays compared as integers, exactly: nothing goes through floats, nothing wraps around."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import Block, cut
from qvtrace.metrics.elements import Array, Readable, reader


@dataclass(frozen=True, slots=True)
class IntegerSums:
    """What one pass over a pair, or over a block of it, finds."""

    mismatches: int
    peak_error: int
    peak_index: int  # flat; of the first of equal ones


class IntegerPair:
    """Two arrays of integers or bools of one shape."""

    def __init__(self, reference: Readable, candidate: Readable) -> None:
        self._readers = reader(reference), reader(candidate)
        self.blocks = cut(1, reference.size)

    def part(self, block: Block) -> IntegerSums:
        """The sums over one block."""
        error = _absolute_error(*(read(block.start, block.stop) for read in self._readers))
        peak = int(error.argmax())
        return IntegerSums(int(np.count_nonzero(error)), int(error[peak]), block.start + peak)

    def sums(self, parts: Sequence[IntegerSums]) -> IntegerSums:
        """The sums over everything, from those over all blocks, of which there is one at least."""
        peak = max(parts, key=lambda part: part.peak_error)
        mismatches = sum(part.mismatches for part in parts)
        return IntegerSums(mismatches, peak.peak_error, peak.peak_index)


def _absolute_error(reference: Array, candidate: Array) -> NDArray[Any]:
    reference, candidate = _widened(reference), _widened(candidate)
    if reference.dtype != candidate.dtype:
        # The difference of uint64 and int64 can need 65 bits: Python's integers have them.
        error: NDArray[Any] = np.abs(reference.astype(object) - candidate.astype(object))
        return error
    high = np.maximum(reference, candidate).view(np.uint64)
    low = np.minimum(reference, candidate).view(np.uint64)
    return np.subtract(high, low, out=high)  # modulo 2^64, which the true difference is below


def _widened(elements: Array) -> NDArray[Any]:
    return elements.astype(np.uint64 if elements.dtype == np.uint64 else np.int64)
