"""The same place in several samples: their numbers as if all were one pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

from qvtrace.metrics.differences import (
    NO_TOKENS,
    PAIR_METRICS,
    Difference,
    Outcome,
    Status,
    Sums,
    TokenSqnr,
    Undefined,
    difference_of,
    peir,
    pooled_means,
    pooled_norms,
)
from qvtrace.metrics.nonfinite import NOTHING_FOUND


@dataclass(frozen=True, slots=True)
class Pooled:
    """Several pairs as one; which of them have the largest error and the worst token."""

    difference: Difference
    peak: int | None = None
    token: int | None = None


def pool_samples(differences: Sequence[Difference]) -> Pooled:
    """Differences of floats, each with its sums and token norms, as if they were one.

    PEIR is the largest error of all by the interval of all references; what is made of sums is made
    of those of all, and percentiles are over the tokens of all. What is beyond float64 in one is
    undefined in all.
    """
    nonfinite = reduce(add, (one.nonfinite or NOTHING_FOUND for one in differences))
    status: Status = "nonfinite" if any(one.status == "nonfinite" for one in differences) else "ok"
    counted = [
        (index, one.sums)
        for index, one in enumerate(differences)
        if one.sums is not None and one.sums.count
    ]
    if not counted:
        otherwise = Undefined(next(iter(differences[0].undefined.values()), Undefined.EMPTY))
        return Pooled(difference_of(status, {}, otherwise, nonfinite=nonfinite))
    pairs = [(differences[index].metrics, sums) for index, sums in counted]
    errors = {index: differences[index].metrics.max_abs_error or 0.0 for index, _ in counted}
    peak = max(errors, key=lambda index: errors[index])
    smallest = [metrics.min_abs_error or 0.0 for metrics, _ in pairs]
    intervals = [sums.interval for _, sums in counted if sums.interval is not None]
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    tokens, of = _tokens(differences)
    outcomes: dict[str, Outcome] = {
        "max_abs_error": errors[peak],
        "min_abs_error": min(smallest),
        "peir": peir(errors[peak], high - low),
        "mismatches": Undefined.FLOATING_POINT,
        **pooled_means(pairs),
        **pooled_norms(pairs),
        **tokens.outcomes,
    }
    for metric in PAIR_METRICS:
        if any(one.undefined.get(metric) == Undefined.TOO_LARGE for one in differences):
            outcomes[metric] = Undefined.TOO_LARGE
    difference = difference_of(
        status,
        outcomes,
        Undefined.NO_TOKEN_AXIS,
        peak=differences[peak].peak,
        nonfinite=nonfinite,
        worst_token=None if of is None else differences[of].worst_token,
        zero_tokens=tokens.zeros,
        sums=_sums([sums for _, sums in counted], (low, high)),
    )
    return Pooled(difference, peak, of)


def _sums(parts: Sequence[Sums], interval: tuple[float, float]) -> Sums:
    return Sums(
        sum(part.count for part in parts),
        math.hypot(*(part.error_norm for part in parts)),
        math.hypot(*(part.reference_norm or 0.0 for part in parts)),
        math.hypot(*(part.candidate_norm or 0.0 for part in parts)),
        interval,
    )


def _tokens(differences: Sequence[Difference]) -> tuple[TokenSqnr, int | None]:
    """Over the tokens of all, and which pair the worst of them is in."""
    known = [(index, one.tokens) for index, one in enumerate(differences) if one.tokens is not None]
    if not known:
        return NO_TOKENS, None
    reference = np.concatenate([norms.reference for _, norms in known])
    error = np.concatenate([norms.error for _, norms in known])
    found = TokenSqnr.of(reference, error)
    if found.worst is None:
        return found, None
    ends = np.cumsum([norms.reference.size for _, norms in known])
    return found, known[int(np.searchsorted(ends, found.worst, side="right"))][0]
