"""The tokens of two generations: where the candidate would have gone on otherwise."""

from collections.abc import Iterator
from dataclasses import dataclass

from qvtrace.manifest import Manifest, StepEntry


@dataclass(frozen=True)
class TokenDifference:
    """Two tokens of one step that should be the same."""

    sample: int
    step: int
    sequence: int  # of the batch
    reference: int
    candidate: int


@dataclass(frozen=True)
class Tokens:
    """What two generations chose in the steps that both have."""

    compared: int  # tokens: a step has one for each sequence of its batch
    agreed: int
    first: TokenDifference | None  # that the candidate chose otherwise
    parted: TokenDifference | None  # from which on both went on with another text


def compare_tokens(reference: Manifest, candidate: Manifest) -> Tokens | None:
    """Hold the tokens of two traces against each other; None where one of them knows none."""
    pairs = list(_paired(reference, candidate))
    if not pairs:
        return None
    chosen = [_differences(one, other, one.chosen, other.chosen) for one, other in pairs]
    taken = [_differences(one, other, one.taken, other.taken) for one, other in pairs]
    compared = sum(len(one.chosen) for one, _ in pairs)
    return Tokens(
        compared,
        compared - sum(map(len, chosen)),
        next((found[0] for found in chosen if found), None),
        next((found[0] for found in taken if found), None),
    )


def _paired(reference: Manifest, candidate: Manifest) -> Iterator[tuple[StepEntry, StepEntry]]:
    """The steps that both sides have, of batches of one size."""
    others = {(entry.sample, entry.step): entry for entry in candidate.steps}
    for entry in reference.steps:
        other = others.get((entry.sample, entry.step))
        if other is not None and len(other.chosen) == len(entry.chosen):
            yield entry, other


def _differences(
    entry: StepEntry, other: StepEntry, tokens: tuple[int, ...], candidates: tuple[int, ...]
) -> list[TokenDifference]:
    pairs = zip(tokens, candidates, strict=False)
    return [
        TokenDifference(entry.sample, entry.step, sequence, token, candidate)
        for sequence, (token, candidate) in enumerate(pairs)
        if token != candidate
    ]
