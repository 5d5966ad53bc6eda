"""Pairs of contents that are at hand only once on one side: what was found is remembered."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.archive.passing import PassingTrace
from qvtrace.comparison.contents import ContentPairs, Found, summand_key
from qvtrace.comparison.leaf_pairs import Contents, contents_of
from qvtrace.comparison.portions import Portions
from qvtrace.comparison.rotating import is_like_a_turned_one
from qvtrace.comparison.surroundings import Output
from qvtrace.errors import NotAtHandError
from qvtrace.metrics.additions import Parts
from qvtrace.metrics.elements import Flags, Floats
from qvtrace.metrics.factors import ScaleFactor
from qvtrace.metrics.logits import NO_TARGET, Ids, TokenLogits
from qvtrace.metrics.scaling import Scaling
from qvtrace.metrics.sharing import errors_of, holds
from qvtrace.recording.keeping import Share
from qvtrace.sampling import Places
from qvtrace.trees import TensorLeaf

_Logits: TypeAlias = tuple[TokenLogits, Places | None]


class PassingContents(ContentPairs):
    """Everything that is looked at while it is at hand can be asked for again."""

    candidate: PassingTrace

    def __init__(self, reference: Archive, candidate: PassingTrace) -> None:
        portions = Portions(reference, candidate, may_come=_is_partial(reference))
        super().__init__(reference, candidate, portions)
        self.missed = 0  # questions that came too late, and were answered as if nothing was found
        self.turned: set[Contents] = set()  # that look as if a rotation explained them
        self._remembered: dict[Hashable, Any] = {}
        self._logits: dict[Contents, list[tuple[Ids, _Logits]]] = defaultdict(list)

    def compare(self) -> None:
        """Look at everything that is wanted and was not looked at yet."""
        super().compare()
        self.turned.update(
            contents
            for contents, leaves in self._wanted.items()
            if contents in self._outcomes
            and is_like_a_turned_one(self._outcomes[contents], *leaves)
        )
        self._wanted.clear()
        self.detailed.forget_wanted()

    def errors(self, output: Output) -> Floats:
        """The error of an output in some of its tokens."""
        return errors_of(self._sides(output))

    def note_summand(self, part: Output, error: Floats, whole: Output) -> None:
        """Remember whether an output that is at hand has an error in it that was so before."""
        self._once(summand_key(part, whole), lambda: holds(self.errors(whole), error))

    def note_vectors(self, leaf: TensorLeaf) -> None:
        """Remember the vectors of a tensor, if they are at hand."""
        with suppress(NotAtHandError):
            super()._candidate_vectors(leaf)

    def is_summand(self, part: Output, whole: Output) -> bool:
        """Whether the error of the whole has that of the part in it; False where it is too late."""
        try:
            return super().is_summand(part, whole)
        except NotAtHandError:
            self.missed += 1
            return False

    def on_top(
        self, whole: tuple[TensorLeaf, TensorLeaf], others: Sequence[tuple[TensorLeaf, TensorLeaf]]
    ) -> tuple[float, Parts] | None:
        """What a whole has on top of what it is made of; None where it is too late."""
        try:
            return super().on_top(whole, others)
        except NotAtHandError:
            self.missed += 1
            return None

    def scaled_by(
        self, factor: ScaleFactor, reference: TensorLeaf, candidate: TensorLeaf
    ) -> Scaling | None:
        """What is left of a difference after a factor; None where it is too late."""
        try:
            return super().scaled_by(factor, reference, candidate)
        except NotAtHandError:
            self.missed += 1
            return None

    def logits(self, wanted: Sequence[tuple[TensorLeaf, TensorLeaf, Ids]]) -> list[_Logits]:
        """How far the distributions of each two leaves are apart, and what they say of targets.

        Raises `NotAtHandError` where it is too late.
        """
        try:
            return [self._logits_of(*one) for one in wanted]
        except NotAtHandError:
            self.missed += 1
            raise

    def _logits_of(self, reference: TensorLeaf, candidate: TensorLeaf, targets: Ids) -> _Logits:
        known = self._logits[contents_of(reference, candidate)]
        for others, found in known:
            if others.shape == targets.shape and _are_among(targets, others):
                return _of_targets(found, targets.reshape(-1) != NO_TARGET)
        (found,) = super().logits([(reference, candidate, targets)])
        known.append((targets, found))
        return found

    def _candidate_vectors(self, leaf: TensorLeaf) -> list[str]:
        try:
            return super()._candidate_vectors(leaf)
        except NotAtHandError:
            self.missed += 1
            return [""] * prod(leaf.shape[:-1])  # found nowhere

    def _once(self, key: Hashable, look: Callable[[], Found]) -> Found:
        if key not in self._remembered:
            self._remembered[key] = look()
        found: Found = self._remembered[key]
        return found


def _are_among(targets: Ids, others: Ids) -> bool:
    """Whether some are left out at most."""
    return not ((targets != others) & (targets != NO_TARGET)).any()


def _of_targets(found: _Logits, counted: Flags) -> _Logits:
    """The same for fewer targets."""
    logits, places = found
    if places is not None:
        counted = counted[places]
    return (
        replace(
            logits,
            reference_surprisal=np.where(counted, logits.reference_surprisal, np.nan),
            candidate_surprisal=np.where(counted, logits.candidate_surprisal, np.nan),
        ),
        places,
    )


def _is_partial(archive: Archive) -> bool:
    """Whether not all tensors are recorded whole, there and in what is recorded alike."""
    settings = archive.manifest.settings
    return bool(archive.manifest.portions) or not Share.from_settings(settings).is_whole
