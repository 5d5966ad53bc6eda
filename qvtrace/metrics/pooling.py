"""Several pairs -> their numbers as if all were one: calls of a module, samples of a place."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TypeAlias

import numpy as np

from qvtrace.metrics.definitions import NO_TOKENS, TokenSqnr, cosine, peir, relative_l2, sqnr
from qvtrace.metrics.differences import Difference, Status, Sums, difference_of
from qvtrace.metrics.names import PAIR_METRICS, Metrics, Outcome, Undefined
from qvtrace.metrics.nonfinite import NOTHING_FOUND
from qvtrace.metrics.norms import pooled_cosine, pooled_deviation_norm, pooled_mean

_WORST_PEIR = frozenset({Undefined.CONSTANT_REFERENCE, Undefined.TOO_LARGE})

_Pairs: TypeAlias = list[tuple[Metrics, Sums]]


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
        **_pooled_means(pairs),
        **_pooled_norms(pairs),
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


def pool(differences: Iterable[Difference]) -> Metrics:
    """The figures of several pairs as one, such as all calls of a module.

    The maximum of `max_abs_error` and `peir`, the minimum of `min_abs_error` and `token_sqnr_min`,
    the sum of `mismatches`; everything else as if the pairs were one, but for the percentiles,
    which cannot be pooled. Identical pairs were not read: they count in means, but not in `sqnr`,
    `cosine` and `relative_l2`, which without them are never better than the truth. A PEIR that is
    undefined in one pair is undefined for all, so that no finding hides.
    """
    together = tuple(differences)
    outcomes = _pooled_extremes(together)
    pairs = [
        (difference.metrics, difference.sums)
        for difference in together
        if difference.sums is not None and difference.sums.count
    ]
    if pairs:
        outcomes |= _pooled_means(pairs) | _pooled_norms(pairs)
    return difference_of("ok", outcomes, Undefined.EMPTY).metrics


def _pooled_extremes(differences: tuple[Difference, ...]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for metric, choose in (
        ("max_abs_error", max),
        ("peir", max),
        ("min_abs_error", min),
        ("token_sqnr_min", min),
        ("mismatches", sum),
    ):
        found = [getattr(difference.metrics, metric) for difference in differences]
        values = [value for value in found if value is not None]
        if values:
            outcomes[metric] = choose(values)
    if any(difference.undefined.get("peir") in _WORST_PEIR for difference in differences):
        outcomes["peir"] = Undefined.CONSTANT_REFERENCE
    return outcomes


def _pooled_means(pairs: _Pairs) -> dict[str, Outcome]:
    """The means and the deviation of absolute errors over all pairs."""
    counts = [sums.count for _, sums in pairs]
    means = [metrics.mean_abs_error or 0.0 for metrics, _ in pairs]
    deviations = [
        (metrics.stddev_abs_error or 0.0) * math.sqrt(sums.count) for metrics, sums in pairs
    ]
    deviation = pooled_deviation_norm(deviations, means, counts)
    return {
        "mean_abs_error": pooled_mean(means, counts),
        "stddev_abs_error": deviation / math.sqrt(sum(counts)),
        "mean_error": pooled_mean([metrics.mean_error or 0.0 for metrics, _ in pairs], counts),
    }


def _pooled_norms(pairs: _Pairs) -> dict[str, Outcome]:
    """What is made of norms, over all pairs of which they are known."""
    parts = [
        (metrics.cosine or 0.0, sums.reference_norm, sums.candidate_norm)
        for metrics, sums in pairs
        if sums.reference_norm is not None and sums.candidate_norm is not None
    ]
    error_norm = math.hypot(*(sums.error_norm for _, sums in pairs))
    reference_norm = math.hypot(*(part[1] for part in parts))
    candidate_norm = math.hypot(*(part[2] for part in parts))
    if not parts:
        return {}
    product = pooled_cosine(parts, (reference_norm, candidate_norm))
    return {
        "sqnr": sqnr(reference_norm, error_norm),
        "cosine": cosine(product, reference_norm, candidate_norm),
        "relative_l2": relative_l2(reference_norm, error_norm),
    }
