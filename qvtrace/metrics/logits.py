"""Two arrays of logits: for each token, how far the two distributions over the vocabulary are
apart.

Vocabularies are large: rows are read block by block, nothing of the size of an array is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvtrace.metrics.blocks import BLOCK, Block, run, scratch
from qvtrace.metrics.elements import Flags, Floats, Readable, reader, upcast
from qvtrace.metrics.norms import row_products, row_sums

Ids = NDArray[np.int64]
NO_TARGET = -1
_SMALL_LOGIT = 30.0  # e to this and its inverse leave float32 all digits that matter
_SMALL_DIVERGENCE = 1e-4  # the difference of sums in float32 is off by up to 1e-7
_SMALL_RATIO = 0.1  # of log-probabilities: a few terms of the series of e^x are enough

_Part = tuple[Floats, Flags, Floats, Floats]


@dataclass(frozen=True, slots=True)
class TokenLogits:
    """What the logits of each token say, an element a token in each array."""

    # KL(reference || candidate) in nats; infinite where the candidate rules out what the reference
    # does not, NaN where a side has NaN or +inf or rules out everything.
    divergence: Floats
    agrees: Flags  # both have their largest logit at the same id, the first of equal ones
    # -log of the probability of the target, in nats; NaN where there is none.
    reference_surprisal: Floats
    candidate_surprisal: Floats

    def of(self, tokens: NDArray[np.intp]) -> "TokenLogits":
        """Those of some tokens."""
        return TokenLogits(
            self.divergence[tokens],
            self.agrees[tokens],
            self.reference_surprisal[tokens],
            self.candidate_surprisal[tokens],
        )


@dataclass(frozen=True, slots=True)
class LogitsPair:
    """Logits [..., vocabulary] of both sides, of one shape, and for each token the id that really
    came next, or `NO_TARGET`; without `targets` no token has one."""

    reference: Readable
    candidate: Readable
    targets: Ids | None = None


def compare_logits(pairs: Sequence[LogitsPair]) -> list[TokenLogits]:
    """The figures of each pair, from float32 log-softmax with sums in float64.

    The divergence of a token is `sum_i p_i (log p_i - log q_i)` with p of the reference and q of
    the candidate; an id with p_i = 0 adds nothing. Where it is small, it is the same sum as
    `sum_i p_i (e^d_i - 1 - d_i) + q(p_i = 0)` with d = log q - log p, no term of which is negative:
    of the other, rounding would be left, and only that above 0.
    """
    return run([_Comparison(pair) for pair in pairs])


class _Comparison:
    """One pair, in blocks of whole tokens."""

    def __init__(self, pair: LogitsPair) -> None:
        self._readers = reader(pair.reference), reader(pair.candidate)
        self._vocabulary = pair.reference.shape[-1]
        tokens = pair.reference.size // self._vocabulary if self._vocabulary else 0
        targets = np.full(tokens, NO_TARGET) if pair.targets is None else pair.targets.reshape(-1)
        self._targets = np.where(targets < self._vocabulary, targets, NO_TARGET)
        step = max(1, BLOCK // max(1, self._vocabulary))
        self.blocks = [
            self._block(start, min(start + step, tokens)) for start in range(0, tokens, step)
        ]

    def _block(self, start: int, stop: int) -> Block:
        return Block(start * self._vocabulary, stop * self._vocabulary, stop - start)

    def part(self, block: Block) -> _Part:
        """The tokens of one block."""
        with np.errstate(all="ignore"):
            return self._part(block)

    def result(self, parts: Sequence[_Part]) -> TokenLogits:
        """All tokens, in order."""
        nothing = np.empty(0), np.empty(0, np.bool_), np.empty(0), np.empty(0)
        return TokenLogits(*map(np.concatenate, zip(nothing, *parts, strict=True)))

    def _part(self, block: Block) -> _Part:
        memory = _Memory(block.size)
        reference, candidate = (
            _float32(read(block.start, block.stop), copy).reshape(block.rows, -1)
            for read, copy in zip(self._readers, memory.copies, strict=True)
        )
        weights, work = (array.reshape(block.rows, -1) for array in memory.work)
        tops = reference.argmax(axis=1), candidate.argmax(axis=1)
        rows = np.arange(block.rows)
        # Of likely ids the difference is exact, as that of two log-probabilities would not be.
        np.subtract(reference, candidate, out=work)
        shift, total = _softmax(reference, tops[0], weights)
        difference = row_products(weights, work) / total
        other_shift, other_total = _softmax(candidate, tops[1], work)
        ends = shift + np.log(total), other_shift + np.log(other_total)
        divergence = difference - (ends[0] - ends[1])
        if not np.isfinite(divergence).all():
            np.subtract(reference, candidate, out=work)
            np.copyto(work, 0.0, where=weights == 0.0)  # ruled out, whatever the candidate says
            divergence = row_products(weights, work) / total - (ends[0] - ends[1])
        small = divergence < _SMALL_DIVERGENCE
        if small.any():
            beside = _where_ruled_out(weights, candidate, other_shift) / other_total
            np.subtract(candidate, reference, out=work)
            work -= (ends[1] - ends[0]).astype(np.float32)[:, np.newaxis]
            np.copyto(work, 0.0, where=weights == 0.0)
            exact = row_products(weights, _beyond_linear(work)) / total + beside
            divergence = np.where(small, exact, divergence)
        first = block.start // self._vocabulary
        targets = self._targets[first : first + block.rows]
        surprisals = [
            np.where(targets == NO_TARGET, np.nan, end - side[rows, targets])
            for side, end in zip((reference, candidate), ends, strict=True)
        ]
        return divergence, tops[0] == tops[1], surprisals[0], surprisals[1]


def _where_ruled_out(weights: Floats, other: Floats, shift: Floats) -> Floats | float:
    """The sum of e^(logit - shift) over the ids that have no weight."""
    if weights.all():
        return 0.0
    ruled_out = weights == 0.0
    logits = np.where(ruled_out, other, -np.inf)
    likely: Floats = np.exp(logits - shift[:, np.newaxis], dtype=np.float64).sum(axis=1)
    return likely


def _beyond_linear(ratios: Floats) -> Floats:
    """e^d - 1 - d of each, in place."""
    if max(ratios.max(initial=0.0), -ratios.min(initial=0.0)) > _SMALL_RATIO:
        np.subtract(np.expm1(ratios), ratios, out=ratios)
        return ratios
    series: Floats = ratios * np.float32(1 / 24)
    for coefficient in (1 / 6, 1 / 2):
        series += np.float32(coefficient)
        series *= ratios
    ratios *= series
    return ratios


class _Memory:
    """Float32 arrays for one block; of a vocabulary that no block of this thread holds, new ones.

    The copies are for sides that are not float32 as they lie in the file."""

    def __init__(self, size: int) -> None:
        if size <= BLOCK:
            self.copies = scratch.narrow[0][:size], scratch.narrow[1][:size]
            self.work = scratch.error32[:size], scratch.error64.view(np.float32)[:size]
        else:
            first, second, third, fourth = np.empty((4, size), np.float32)
            self.copies, self.work = (first, second), (third, fourth)


def _float32(elements: Any, copy: Floats) -> Floats:
    if elements.dtype == np.float32 and elements.flags.aligned:
        return elements  # type: ignore[no-any-return]
    upcast(elements, copy)
    return copy


def _softmax(logits: Floats, tops: NDArray[np.intp], out: Floats) -> tuple[Floats, Floats]:
    """Write e^(logit - shift) of each token; returns the shift and the sum.

    The shift is the largest logit; 0 where all of those are small, which saves a pass."""
    shift = logits[np.arange(len(logits)), tops]
    if np.abs(shift).max(initial=0.0) <= _SMALL_LOGIT:
        np.exp(logits, out=out)
        return np.zeros(len(logits)), row_sums(out)
    np.subtract(logits, shift[:, np.newaxis], out=out)
    np.exp(out, out=out)
    return shift.astype(np.float64), row_sums(out)
