"""Greedy generation of text, token by token, by the `generate` of transformers."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.errors import UsageError
from qvtrace.recording.steps import Stepping, TokenSteps


class Listener(Stepping, Protocol):
    """What is told of a generation: a `Recording`."""

    def given(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """What the generation starts from."""

    def next_sample(self) -> None:
        """What comes now is of the next sample."""


@dataclass(frozen=True)
class Generation:
    """How many tokens are generated, and which; always as many, whatever ends the text."""

    tokens: int
    feed: tuple[tuple[int, ...], ...] | None = None  # of each step; None: the model's own
    fed_from: str | None = None  # the archive
    ends: frozenset[int] = frozenset()  # tokens with which the model ends a text

    def run(self, model: Any, kwargs: Mapping[str, Any], listener: Listener) -> None:
        """Generate from `kwargs`, and tell each step.

        Nothing is sampled, penalized or suppressed, whatever the model's own settings say: the
        token of a step is the one with the highest logit.
        """
        listener.given((), kwargs)
        steps = TokenSteps(listener, self.feed, source=f"--like {self.fed_from}")
        with _plain_settings(model, kwargs, self.tokens) as settings:
            _generate(model)(
                model,
                **kwargs,
                generation_config=settings,
                logits_processor=[steps],
            )


def check_generates(model: Any, name: str) -> None:
    """Raise `UsageError` for a model that has no text to go on with."""
    if not (hasattr(model, "generate") and hasattr(model, "can_generate") and model.can_generate()):
        raise UsageError(
            f"--generate: {type(model).__name__} of {name} cannot generate; leave the option out, "
            "or mark the steps of a loop of your own with recording.next_step() in Python"
        )


def starting_point(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The inputs of a forward as a generation takes them: all by name, the cache left to it."""
    named = inspect.signature(model.forward).bind_partial(*args).arguments
    given = {**named, **kwargs}
    given.pop("use_cache", None)
    return given


def tokens_to_feed(archive: Archive, tokens: int) -> tuple[tuple[int, ...], ...] | None:
    """The tokens that the generation in an archive went on with; None where it holds none.

    Raises `UsageError` where it holds fewer than `tokens` steps.
    """
    taken = tuple(entry.taken for entry in archive.manifest.steps if entry.sample == 0)
    if not taken:
        return None
    if len(taken) < tokens:
        raise UsageError(
            f"--generate {tokens}: {archive.file} has {len(taken)} steps to feed; "
            f"give at most {len(taken)}, or leave the option out"
        )
    return taken[:tokens]


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens with which a model ends a text, by its own settings."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


@contextmanager
def _plain_settings(model: Any, kwargs: Mapping[str, Any], tokens: int) -> Iterator[Any]:
    """Settings of a greedy generation that does not stop, as the only ones: what a call leaves
    open is otherwise taken from the model's own."""
    from transformers import GenerationConfig

    own = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        bos_token_id=getattr(own, "bos_token_id", None),
        decoder_start_token_id=_decoder_start(own, kwargs),
    )
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own


def _decoder_start(own: Any, kwargs: Mapping[str, Any]) -> int | None:
    ids = kwargs.get("decoder_input_ids")
    if isinstance(ids, Tensor) and ids.numel():
        return int(ids.reshape(-1)[0])
    start: int | None = getattr(own, "decoder_start_token_id", None)
    return start


def _generate(model: Any) -> Any:
    """The function that generates; Whisper's own cuts sounds into pieces and starts over."""
    from transformers import GenerationMixin

    whisper = getattr(model.config, "model_type", None) == "whisper"
    return GenerationMixin.generate if whisper else type(model).generate
