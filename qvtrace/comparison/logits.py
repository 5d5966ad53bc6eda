"""How far a candidate is from its reference end to end: the distributions over the vocabulary that
a language model gives, token by token, pooled over all calls, samples and steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.language_models import logits_calls
from qvtrace.comparison.scored_tokens import (
    NOT_STORED,
    OTHER_IDS,
    PADDING,
    Scored,
    ScoredTokens,
    TokenPlace,
    score,
)
from qvtrace.errors import NotAtHandError
from qvtrace.metrics.elements import Array, Flags, Floats

ENOUGH = 1000  # tokens; fewer tell too little
_LEAST_DIVERGENCE = 1e-12  # nats, smaller ones are what rounding makes
_LEAST_CHANGE = 1e-4  # per cent of perplexity, as float32 has it
_LEFT_OUT = {PADDING: "of padding", OTHER_IDS: "of other input ids", NOT_STORED: "not stored"}


@dataclass(frozen=True)
class Divergence:
    """KL(reference || candidate) over tokens, in nats."""

    mean: float
    error: float | None  # standard error of the mean; None of a single token
    p99: float  # by nearest rank
    max: float
    worst: TokenPlace
    tokens: int


@dataclass(frozen=True)
class Agreement:
    """How often both sides have their largest logit at the same id."""

    share: float
    error: float | None  # standard error
    tokens: int


@dataclass(frozen=True)
class Perplexity:
    """e to the mean surprisal of the id that came next; the sides are None where all logits are
    identical, since none is then read."""

    reference: float | None
    candidate: float | None
    ratio: float  # candidate over reference
    error: float | None  # standard error of the ratio, from paired tokens
    tokens: int


@dataclass(frozen=True)
class Logits:
    """The figures of all scored tokens together; None where there is no token to tell by."""

    tokens: int  # scored
    kl: Divergence | None
    top1: Agreement | None
    perplexity: Perplexity | None
    nonfinite: int = 0  # scored tokens without a finite divergence; part of no figure
    not_scored: dict[str, int] = field(default_factory=dict)  # reason -> tokens

    @property
    def too_few(self) -> bool:
        """Whether there are too few tokens to judge a model by: those that carry figures."""
        return self.tokens - self.nonfinite < ENOUGH


def logits_of(contents: ContentPairs, pairs: Sequence[Pair]) -> Logits | None:
    """The logits of two archives compared; None where they hold none of a language model, or one is
    a replay, in which nothing goes from end to end.

    Padding (an `attention_mask` of 0) is not scored, nor what follows other input ids. The next
    token's id is that of the inputs, or what a step of a generation went on with, where both sides
    went on with the same. Where all digests are equal, no logits are read. Raises
    `DamagedArchiveError` for trees and tensors that no writer writes.
    """
    reference, candidate = contents.reference, contents.candidate
    if "replay" in (reference.manifest.recorded_by, candidate.manifest.recorded_by):
        return None
    calls = logits_calls(reference, candidate, pairs)
    try:
        return _pooled(score(contents, calls)) if calls else None
    except NotAtHandError:  # of a trace that is not stored, and is not recorded from its root on
        return None


def _pooled(scored: Scored) -> Logits:
    def pool(name: str) -> Array:
        return np.concatenate([np.empty(0), *(getattr(one.found, name) for one in scored.calls)])

    divergence = pool("divergence")
    finite = np.isfinite(divergence)
    count = int(finite.sum())
    surprisals = pool("reference_surprisal"), pool("candidate_surprisal")
    return Logits(
        divergence.size,
        _divergence(divergence, finite, scored.calls) if count else None,
        Agreement(*_mean(pool("agrees")[finite]), count) if count else None,
        _perplexity(*surprisals, is_read=scored.is_read),
        divergence.size - count,
        scored.left_out,
    )


def _divergence(divergence: Floats, finite: Flags, calls: Sequence[ScoredTokens]) -> Divergence:
    values = divergence[finite]
    worst = int(np.where(finite, divergence, -1.0).argmax())
    p99 = float(np.sort(values)[math.ceil(0.99 * values.size) - 1])
    place = _place(worst, calls)
    return Divergence(*_mean(values), p99, float(divergence[worst]), place, values.size)


def _place(position: int, calls: Sequence[ScoredTokens]) -> TokenPlace:
    """Of one of the scored tokens, counted over all calls."""
    for scored in calls:
        if position < scored.at.size:
            return scored.place(position)
        position -= scored.at.size
    raise IndexError(position)


def _perplexity(reference: Floats, candidate: Floats, *, is_read: bool) -> Perplexity | None:
    """Of the tokens that have a target; None where there is none, or no float is as large."""
    counted = np.isfinite(reference) & np.isfinite(candidate)
    count = int(counted.sum())
    if not count:
        return None
    if not is_read:
        return Perplexity(None, None, 1.0, 0.0, count)
    mean, error = _mean(candidate[counted] - reference[counted])
    with np.errstate(over="ignore"):
        sides = [float(np.exp(side[counted].mean())) for side in (reference, candidate)]
        ratio = float(np.exp(mean))
    if not all(map(math.isfinite, (*sides, ratio))):
        return None
    return Perplexity(sides[0], sides[1], ratio, None if error is None else ratio * error, count)


def _mean(values: Array) -> tuple[float, float | None]:
    """The mean and its standard error, `s / sqrt(n)` with n - 1 degrees of freedom."""
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else None
    return float(values.mean()), error


def logits_text(logits: Logits) -> str:
    """All of it in one line."""
    left_out = _left_out(logits)
    if logits.kl is None or logits.top1 is None:
        return f"logits not compared: {left_out or 'no token'}"
    kl, top1 = logits.kl, logits.top1
    counted = "1 token" if kl.tokens == 1 else f"{kl.tokens} tokens"
    parts = [
        f"KL {_divergence_text(kl)}",
        f"top-1 {_with_error(100 * top1.share, _times(100, top1.error), digits=4)} % in {counted}"
        + (f" ({left_out})" if left_out else ""),
        *_perplexity_text(logits.perplexity),
    ]
    return ", ".join(parts) + (": too few to judge" if logits.too_few else "")


def _divergence_text(divergence: Divergence) -> str:
    if 0 < divergence.max < _LEAST_DIVERGENCE:
        return f"below {_LEAST_DIVERGENCE:g} nats"
    mean = _with_error(divergence.mean, divergence.error)
    worst = f"worst {divergence.max:.3g} at {divergence.worst.text}"
    return f"{mean} nats (p99 {divergence.p99:.3g}, {worst})"


def _perplexity_text(perplexity: Perplexity | None) -> Iterator[str]:
    if perplexity is None:
        return
    told = "the same perplexity"
    if perplexity.reference is not None and perplexity.candidate is not None:
        change = 100 * (perplexity.ratio - 1)
        size = _with_error(change, _times(100, perplexity.error), sign="+")
        if 0 < abs(change) < _LEAST_CHANGE:
            size = f"below {_LEAST_CHANGE:g}"
        told = f"perplexity {perplexity.reference:.4g} -> {perplexity.candidate:.4g} ({size} %)"
    yield f"{told} in {perplexity.tokens}"


def _left_out(logits: Logits) -> str:
    told = [f"{logits.nonfinite} not finite"] if logits.nonfinite else []
    told += [
        f"{count} {_LEFT_OUT.get(reason, reason)}" for reason, count in logits.not_scored.items()
    ]
    return ", ".join(told)


def _with_error(value: float, error: float | None, *, sign: str = "", digits: int = 3) -> str:
    text = f"{value:{sign}.{digits}g}"
    return text if error is None else f"{text} ± {error:.2g}"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
