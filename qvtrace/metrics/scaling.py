"""Pairs that are equal up to a factor, and what is left of their difference after it."""

import math
from dataclasses import dataclass

from qvtrace.metrics.comparing import compare
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import Readable, format_of
from qvtrace.metrics.factors import (
    ScaleFactor,
    Unscaled,
    find_factor,
    find_factor_of_images,
    fits,
    nearest_factor,
)
from qvtrace.metrics.names import Undefined

# What makes a search for a factor worth its time: from this PEIR on, or below this SQNR in dB.
_PEIR = 0.005
_SQNR = 40.0
_HALVED = 3.0  # dB


@dataclass(frozen=True, slots=True)
class Scaling:
    """The candidate is the reference times a factor, and this is the rest."""

    factor: ScaleFactor
    residual: Difference  # of the reference and the candidate over the factor


def find_scaling(
    reference: Readable, candidate: Readable, difference: Difference, *, is_expected: bool = False
) -> Scaling | None:
    """The factor that explains a difference; a small difference is not looked into.

    Where one is expected, more noise may be beside it.
    """
    if not _is_worth_it(reference, candidate, difference):
        return None
    factor = find_factor(reference, candidate, is_expected=is_expected)
    if factor is None and not is_expected:
        factor = find_factor_of_images(reference, candidate)
    if factor is None:
        return None
    scaling = _scaled_by(factor, reference, candidate)
    return scaling if _serves_most_tokens(difference, scaling.residual) else None


def _serves_most_tokens(difference: Difference, residual: Difference) -> bool:
    """Whether little is left of most tokens' error, not only of that of the few largest tokens: an
    attention sink has nearly all of it, and its error alone is some factor."""
    before, after = (_token_sqnr(one) for one in (difference, residual))
    return before is None or after is None or after == math.inf or after >= before + _HALVED


def _token_sqnr(difference: Difference) -> float | None:
    """The median of all tokens in dB, infinite where these are exact; None where there are none."""
    if difference.undefined.get("token_sqnr_p50") == Undefined.IDENTICAL:
        return math.inf
    return difference.metrics.token_sqnr_p50


def nearest_scaling(reference: Readable, candidate: Readable) -> Scaling | None:
    """The factors that leave least, where it is known that there are some."""
    factor = nearest_factor(reference, candidate)
    return None if factor is None else _scaled_by(factor, reference, candidate)


def scaling_like(
    factor: ScaleFactor, reference: Readable, candidate: Readable, difference: Difference
) -> Scaling | None:
    """The same for a factor that other calls of the module have: here, tokens may be too few."""
    if not _is_worth_it(reference, candidate, difference):
        return None
    is_it = fits(reference, candidate, factor)
    return _scaled_by(factor, reference, candidate) if is_it else None


def is_worth_a_factor(difference: Difference) -> bool:
    """Whether a difference is so large that a factor is looked for."""
    peir, sqnr = difference.metrics.peir, difference.metrics.sqnr
    if difference.status != "ok" or sqnr is None:
        return False
    return sqnr < _SQNR or peir is None or peir >= _PEIR


def _is_worth_it(reference: Readable, candidate: Readable, difference: Difference) -> bool:
    kinds = {format_of(side.dtype).kind for side in (reference, candidate)}
    return kinds == {"float"} and is_worth_a_factor(difference)


def _scaled_by(factor: ScaleFactor, reference: Readable, candidate: Readable) -> Scaling:
    return Scaling(factor, compare(reference, Unscaled(candidate, factor)))
