"""Looks at logits call by call, before all calls are known: with every target that there may be."""

from collections.abc import Sequence

from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.language_models import (
    LogitsCall,
    is_head,
    logits_call_of_head,
    logits_calls,
)
from qvtrace.comparison.scored_tokens import Targets
from qvtrace.manifest import Manifest


class LogitsLook:
    """What a call gave, where that may be logits; targets are those that the reference has."""

    def __init__(self, reference: Manifest) -> None:
        calls = reference.inputs.root_calls
        self._root_calls = {(call.module, call.index): call for call in calls}
        self._in_order = calls
        self._targets = Targets(reference, reference)
        self._roots_recorded = any(
            (call.module, call.index) in self._root_calls and call.output is not None
            for call in reference.calls
        )
        self._heads: list[Pair] = []  # in the root call that runs
        self._count = 0  # of heads

    def look(self, contents: ContentPairs, pair: Pair) -> None:
        """Look at what a call gave, if that may be logits."""
        if (pair.reference.module, pair.reference.index) in self._root_calls:
            calls = logits_calls(contents.reference, contents.candidate, [*self._heads, pair])
            self._look(contents, calls)
            self._heads.clear()
        elif is_head(pair.reference):
            self._heads.append(pair)
            if not self._roots_recorded:
                self._look_at_head(contents, pair)

    def _look_at_head(self, contents: ContentPairs, pair: Pair) -> None:
        others = contents.candidate.manifest.inputs.root_calls
        position = self._count
        self._count += 1
        known = [
            calls[position] if position < len(calls) else None for calls in (self._in_order, others)
        ]
        call = logits_call_of_head(contents.reference, contents.candidate, pair, known)
        self._look(contents, [] if call is None else [call])

    def _look(self, contents: ContentPairs, calls: Sequence[LogitsCall]) -> None:
        for call in calls:
            can_be_read = contents.portions.can_be_read(call.reference, call.candidate)
            if can_be_read and not call.is_identical:
                contents.logits([(call.reference, call.candidate, self._targets.of(call))])
