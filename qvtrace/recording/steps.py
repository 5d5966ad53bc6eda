"""The steps of a generation while it is recorded: which token each chose, which one was taken.

A step ends when its token is chosen, not when the model returns: an encoder that runs before the
first token belongs to the first step, whichever module calls it.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from qvtrace.errors import UsageError
from qvtrace.manifest import StepEntry

Ids: TypeAlias = Tensor | Sequence[int]  # one for each sequence of a batch


class Stepping(Protocol):
    """What goes from step to step: a `Recording`."""

    def next_step(
        self,
        chosen: Ids | None = None,
        taken: Ids | None = None,
    ) -> None:
        """End the step that runs."""


class TokenSteps:
    """A logits processor for the `generate` of transformers that marks the steps of a recording.

        with qvtrace.record(model, "fp.st") as recording:
            model.generate(
                **inputs,
                max_new_tokens=8,
                do_sample=False,
                logits_processor=[qvtrace.TokenSteps(recording)],
            )

    For greedy generation: the token of a step is the one with the highest logit. With `feed`, the
    tokens of each step for each sequence of the batch, those are taken whatever the model chooses.
    """

    def __init__(
        self,
        recording: Stepping,
        feed: Sequence[Sequence[int]] | None = None,
        *,
        source: str = "feed",
    ) -> None:
        """`source` is what errors call the place that `feed` comes from."""
        self._recording = recording
        self._feed = None if feed is None else list(feed)
        self._step = 0
        self._source = source

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [batch, vocabulary], or with `feed` ones that leave a single token each.

        Raises `UsageError` where `feed` has no token for a step or a sequence, or one that the
        vocabulary does not have.
        """
        chosen = scores.argmax(dim=-1)
        taken = chosen if self._feed is None else self._fed(scores)
        self._recording.next_step(chosen, taken)
        self._step += 1
        if self._feed is None:
            return scores
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter(1, taken[:, None], 0.0)

    def _fed(self, scores: Tensor) -> Tensor:
        assert self._feed is not None
        batch, vocabulary = scores.shape
        if self._step >= len(self._feed):
            raise UsageError(
                f"{self._source}: has {len(self._feed)} steps; generate no more tokens than that"
            )
        tokens = self._feed[self._step]
        if len(tokens) != batch:
            raise UsageError(
                f"{self._source}: has {len(tokens)} sequences, the model runs {batch}; "
                "give it the same inputs"
            )
        outside = [token for token in tokens if not 0 <= token < vocabulary]
        if outside:
            raise UsageError(
                f"{self._source}: the token {outside[0]} is none of the model's {vocabulary}; "
                "take the tokens of a model with the same vocabulary"
            )
        return torch.tensor(tokens, device=scores.device)


def step_entry(
    sample: int,
    step: int,
    chosen: Ids | None,
    taken: Ids | None,
) -> StepEntry | None:
    """What a manifest says of a step that has ended; None where no token is known."""
    if chosen is None and taken is None:
        return None
    own = _tokens(taken if chosen is None else chosen)
    return StepEntry(sample, step, own, own if taken is None else _tokens(taken))


def _tokens(tokens: Ids | None) -> tuple[int, ...]:
    flat = torch.as_tensor(tokens).reshape(-1)
    if flat.is_floating_point() or flat.is_complex():
        raise UsageError(
            f"next_step: the tokens are {flat.dtype}; give ids, such as logits[:, -1].argmax(-1)"
        )
    return tuple(map(int, flat.tolist()))
