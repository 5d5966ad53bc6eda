"""How far a candidate is from its reference end to end: the distributions over the vocabulary that
a language model gives, token by token, pooled over all calls, samples and steps."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.language_models import LogitsCall, logits_calls
from qvtrace.manifest import Manifest
from qvtrace.metrics.elements import Array, Flags, Floats
from qvtrace.metrics.logits import NO_TARGET, Ids, TokenLogits

ENOUGH = 1000  # tokens; fewer tell too little
PADDING = "padding"
OTHER_IDS = "other input ids"

_Scored: TypeAlias = tuple[LogitsCall, NDArray[np.intp]]  # and the scored tokens by flat index


@dataclass(frozen=True)
class TokenPlace:
    """One token of one call."""

    sample: int
    step: int
    call: int
    sequence: int  # of the batch
    token: int  # of the input ids, where they are known

    @property
    def text(self) -> str:
        """The place in words, without what says nothing."""
        around = f"step {self.step} " if self.step else f"call {self.call} " if self.call else ""
        sequence = f"sequence {self.sequence} " if self.sequence else ""
        return f"sample {self.sample} {around}{sequence}token {self.token}"


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
        """Whether there are too few tokens to judge a model by."""
        return self.tokens < ENOUGH


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
    if not calls:
        return None
    scored, not_scored = _scored(calls)
    targets = _Targets(reference.manifest, candidate.manifest)
    is_read = any(not call.is_identical for call, _ in scored)
    if is_read:
        found = contents.logits(
            [(call.reference, call.candidate, targets.of(call)) for call, _ in scored]
        )
    else:
        found = [_identical(call, targets.of(call)) for call, _ in scored]
    return _pooled(scored, found, not_scored, is_read=is_read)


def _pooled(
    scored: Sequence[_Scored],
    found: Sequence[TokenLogits],
    not_scored: dict[str, int],
    *,
    is_read: bool,
) -> Logits:
    def pool(name: str) -> Array:
        arrays = [getattr(one, name)[at] for one, (_, at) in zip(found, scored, strict=True)]
        return np.concatenate([np.empty(0), *arrays])

    divergence = pool("divergence")
    finite = np.isfinite(divergence)
    count = int(finite.sum())
    surprisals = pool("reference_surprisal"), pool("candidate_surprisal")
    return Logits(
        divergence.size,
        _divergence(divergence, finite, scored) if count else None,
        Agreement(*_mean(pool("agrees")[finite]), count) if count else None,
        _perplexity(*surprisals, is_read=is_read),
        divergence.size - count,
        not_scored,
    )


def _divergence(divergence: Floats, finite: Flags, scored: Sequence[_Scored]) -> Divergence:
    values = divergence[finite]
    worst = int(np.where(finite, divergence, -1.0).argmax())
    p99 = float(np.sort(values)[math.ceil(0.99 * values.size) - 1])
    return Divergence(
        *_mean(values), p99, float(divergence[worst]), _place(worst, scored), values.size
    )


def _place(position: int, scored: Sequence[_Scored]) -> TokenPlace:
    """Of one of the scored tokens, counted over all calls."""
    for call, at in scored:
        if position < at.size:
            length = call.reference.shape[-2]
            sequence, token = divmod(int(at[position]), length)
            ids = call.given.ids
            before = 0 if ids is None else ids.shape[-1] - length
            entry = call.call
            return TokenPlace(entry.sample, entry.step, entry.index, sequence, before + token)
        position -= at.size
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


class _Targets:
    """The id that came next after each token."""

    def __init__(self, reference: Manifest, candidate: Manifest) -> None:
        others = {(step.sample, step.step): step.taken for step in candidate.steps}
        self._taken = {
            (step.sample, step.step): step.taken
            for step in reference.steps
            if others.get((step.sample, step.step)) == step.taken
        }

    def of(self, call: LogitsCall) -> Ids:
        """Of all tokens of a call; `NO_TARGET` where there is none that counts."""
        *batch, length, vocabulary = call.reference.shape
        targets = np.full((*batch, length), NO_TARGET)
        given = call.given
        if given.ids is None or not call.predicts_next:
            return targets
        ids = given.ids.astype(np.int64)
        for counts in (given.kept, given.is_text):
            if counts is not None:
                ids = np.where(counts, ids, NO_TARGET)
        targets[..., :-1] = ids[..., ids.shape[-1] - length + 1 :]
        taken = self._taken.get((call.call.sample, call.call.step))
        if taken is not None and len(taken) == math.prod(batch):
            ids_taken = [min(token, vocabulary) for token in taken]  # a file may say anything
            targets[..., -1] = np.array(ids_taken).reshape(batch)
        targets[targets < 0] = NO_TARGET  # labels that do not count
        return targets


def _scored(calls: Sequence[LogitsCall]) -> tuple[list[_Scored], dict[str, int]]:
    """Which tokens of each call are scored, and how many are not and why."""
    scored = []
    left_out: Counter[str] = Counter()
    parted: set[int] = set()  # samples in which the two sides went on with other ids
    for call in calls:
        if not call.same_ids:
            parted.add(call.call.sample)
        if not call.same_ids or (call.call.step and call.call.sample in parted):
            left_out[OTHER_IDS] += call.tokens
            continue
        tokens = np.flatnonzero(_kept(call))
        left_out[PADDING] += call.tokens - tokens.size
        scored.append((call, tokens))
    return scored, {reason: count for reason, count in left_out.items() if count}


def _kept(call: LogitsCall) -> Flags:
    shape = call.reference.shape[:-1]
    kept = call.given.kept
    if kept is None:
        return np.ones(shape, np.bool_)
    return kept[..., kept.shape[-1] - shape[-1] :]


def _identical(call: LogitsCall, targets: Ids) -> TokenLogits:
    """What need not be read: where there is a target, its surprisal is the same, whatever it is."""
    surprisal = np.where(targets.reshape(-1) == NO_TARGET, np.nan, 0.0)
    nothing = np.zeros(call.tokens)
    return TokenLogits(nothing, np.ones(call.tokens, np.bool_), surprisal, surprisal)


def logits_text(logits: Logits) -> str:
    """All of it in one line."""
    left_out = _left_out(logits)
    if logits.kl is None or logits.top1 is None:
        return f"logits not compared: {left_out or 'no token'}"
    kl, top1 = logits.kl, logits.top1
    counted = "1 token" if kl.tokens == 1 else f"{kl.tokens} tokens"
    parts = [
        f"KL {_with_error(kl.mean, kl.error)} nats (p99 {kl.p99:.3g}, worst {kl.max:.3g} at "
        f"{kl.worst.text})",
        f"top-1 {_with_error(100 * top1.share, _times(100, top1.error), digits=4)} % in {counted}"
        + (f" ({left_out})" if left_out else ""),
        *_perplexity_text(logits.perplexity),
    ]
    return ", ".join(parts) + (": too few to judge" if logits.too_few else "")


def _perplexity_text(perplexity: Perplexity | None) -> Iterator[str]:
    if perplexity is None:
        return
    told = "the same perplexity"
    if perplexity.reference is not None and perplexity.candidate is not None:
        change = _with_error(100 * (perplexity.ratio - 1), _times(100, perplexity.error), sign="+")
        told = f"perplexity {perplexity.reference:.4g} -> {perplexity.candidate:.4g} ({change} %)"
    yield f"{told} in {perplexity.tokens}"


def _left_out(logits: Logits) -> str:
    told = [f"{logits.nonfinite} not finite"] if logits.nonfinite else []
    told += [f"{count} of {reason}" for reason, count in logits.not_scored.items()]
    return ", ".join(told)


def _with_error(value: float, error: float | None, *, sign: str = "", digits: int = 3) -> str:
    text = f"{value:{sign}.{digits}g}"
    return text if error is None else f"{text} ± {error:.2g}"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
