"""Which tokens of a language model are scored, and what was found of each."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.language_models import LogitsCall
from qvtrace.manifest import Manifest
from qvtrace.metrics.elements import Flags
from qvtrace.metrics.logits import NO_TARGET, Ids, TokenLogits

# Why tokens are not scored.
PADDING = "padding"
OTHER_IDS = "other input ids"
NOT_STORED = "not stored"


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
class ScoredTokens:
    """Those of one call, and what was found of them, in their order."""

    call: LogitsCall
    at: NDArray[np.intp]  # flat indices
    found: TokenLogits

    def place(self, number: int) -> TokenPlace:
        """Of one of the scored tokens."""
        length = self.call.reference.shape[-2]
        sequence, token = divmod(int(self.at[number]), length)
        ids = self.call.given.ids
        before = 0 if ids is None else ids.shape[-1] - length
        entry = self.call.call
        return TokenPlace(entry.sample, entry.step, entry.index, sequence, before + token)


@dataclass(frozen=True)
class Scored:
    """The scored tokens of all calls."""

    calls: tuple[ScoredTokens, ...]
    left_out: dict[str, int]  # reason -> tokens
    is_read: bool  # else all logits are identical, and surprisals are not known but alike


def score(contents: ContentPairs, calls: Sequence[LogitsCall]) -> Scored:
    """Look at the logits of these calls, unless all their digests are equal.

    Raises `DamagedArchiveError` for tensors that no writer writes.
    """
    left_out: Counter[str] = Counter()
    wanted = list(_fed_alike(calls, left_out))
    targets = Targets(contents.reference.manifest, contents.candidate.manifest)
    is_read = not all(call.is_identical for call in wanted)
    if is_read:
        wanted = list(_stored(wanted, contents, left_out))
        found = contents.logits(
            [(call.reference, call.candidate, targets.of(call)) for call in wanted]
        )
    else:
        found = [(_identical(call, targets.of(call)), None) for call in wanted]
    scored = []
    for call, (logits, places) in zip(wanted, found, strict=True):
        rows = at = np.flatnonzero(_kept(call))
        left_out[PADDING] += call.tokens - at.size
        if places is not None:
            kept = at.size
            at, _, rows = np.intersect1d(at, places, assume_unique=True, return_indices=True)
            left_out[NOT_STORED] += kept - at.size
        scored.append(ScoredTokens(call, at, logits.of(rows)))
    return Scored(tuple(scored), {why: count for why, count in left_out.items() if count}, is_read)


def _fed_alike(calls: Sequence[LogitsCall], left_out: Counter[str]) -> Iterator[LogitsCall]:
    """Calls that continue the same text on both sides."""
    parted: set[int] = set()  # samples in which the two went on with other ids
    for call in calls:
        if not call.same_ids:
            parted.add(call.call.sample)
        if not call.same_ids or (call.call.step and call.call.sample in parted):
            left_out[OTHER_IDS] += call.tokens
        else:
            yield call


def _stored(
    calls: Sequence[LogitsCall], contents: ContentPairs, left_out: Counter[str]
) -> Iterator[LogitsCall]:
    """Calls of whose logits both sides hold something."""
    for call in calls:
        if contents.portions.can_be_read(call.reference, call.candidate):
            yield call
        else:
            left_out[NOT_STORED] += call.tokens


class Targets:
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
