"""The token figures of a pair over some of its tokens."""

from dataclasses import replace
from typing import Any

import numpy as np

from qvtrace.metrics.definitions import TokenSqnr
from qvtrace.metrics.differences import Difference, position
from qvtrace.metrics.elements import Flags
from qvtrace.metrics.names import TOKEN_METRICS, Undefined


def over_tokens(difference: Difference, kept: Flags, shape: tuple[int, ...]) -> Difference:
    """The difference of a pair of this shape with its token figures over those that are `kept`, a
    flag for each; every other number stays over all elements."""
    if difference.tokens is None:
        return difference
    tokens = difference.tokens.of(kept)
    found = TokenSqnr.of(tokens.reference, tokens.error)
    outcomes = found.outcomes if kept.any() else dict.fromkeys(TOKEN_METRICS, Undefined.PADDING)
    values: dict[str, Any] = {
        name: None if isinstance(outcome, Undefined) else outcome
        for name, outcome in outcomes.items()
    }
    undefined = {
        name: reason for name, reason in difference.undefined.items() if name not in TOKEN_METRICS
    }
    undefined |= {
        name: outcome.value for name, outcome in outcomes.items() if isinstance(outcome, Undefined)
    }
    worst = None
    if found.worst is not None:
        worst = position(int(np.flatnonzero(kept)[found.worst]), shape[:-1])
    return replace(
        difference,
        metrics=replace(difference.metrics, **values),
        undefined=undefined,
        worst_token=worst,
        zero_tokens=found.zeros,
        tokens=tokens,
    )
