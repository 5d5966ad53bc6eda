"""What a replay tells of modules that are scaled or turned in the candidate, as a fold leaves them.

A replay gives every module the reference's inputs. One whose weights take a factor out of its
inputs is given inputs without it, and computes something else: nothing is told of its error. What
is a factor off as it is in the candidate, where that is made up for, is no error either.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from qvtrace.comparison.noise import CallKey, is_output
from qvtrace.comparison.rows import Row
from qvtrace.metrics.factors import ChannelFactors

_SAME_FACTOR = 0.05  # relative


def judged_alike(rows: Iterable[Row], replayed: Iterable[Row]) -> list[Row]:
    """Those of a replay, with factors judged as the candidate's own at the same places.

    `rows` are those of the candidate's calls.
    """
    made_up_for = {row.place: row for row in rows if row.is_made_up_for and is_output(row)}
    return [_judged_as(made_up_for.get(row.place), row) for row in replayed]


def telling(rows: Iterable[Row], replayed: Iterable[Row]) -> list[Row]:
    """Those of a replay that tell of errors: not of calls whose inputs are scaled or turned in the
    candidate. `rows` are those of its calls."""
    transformed: set[CallKey] = {
        (row.module, row.call) for row in rows if row.is_made_up_for and not is_output(row)
    }
    return [row for row in replayed if (row.module, row.call) not in transformed]


def _judged_as(own: Row | None, replayed: Row) -> Row:
    if own is None or not _have_one_factor(own, replayed):
        return replayed
    return replace(replayed, judgement=own.judgement)


def _have_one_factor(one: Row, other: Row) -> bool:
    factor, its = one.scale_factor, other.scale_factor
    if isinstance(factor, float) and isinstance(its, float):
        return abs(factor - its) <= _SAME_FACTOR * abs(factor)
    if isinstance(factor, ChannelFactors) and isinstance(its, ChannelFactors):
        if factor.values.size != its.values.size:
            return False
        apart = np.abs(factor.values - its.values)
        return bool(np.median(apart / np.abs(factor.values)) <= _SAME_FACTOR)
    return False
