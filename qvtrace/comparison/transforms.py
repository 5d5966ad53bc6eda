"""What explains differences without any fault: layouts, factors and rotations, in words."""

import math
from collections.abc import Iterator, Sequence

from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.rotating import Rotations
from qvtrace.comparison.rows import INNER_ROTATION, PERMUTATION, ROTATION, Row
from qvtrace.judging.noise_floor import is_noise
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.elements import format_of
from qvtrace.metrics.names import Metrics, Undefined

_MARGIN = 15.0  # dB, by which what a model sums up may be worse than the rounding of one element
_ENOUGH = 80.0  # dB
_JUDGED_BY = ("sqnr", "token_sqnr_p50")
_EQUAL = frozenset({"identical", "exact", "opaque"})


def are_equal_after_transform(rows: Sequence[Row], rotations: Rotations) -> bool:
    """Whether there are transforms, and beyond these nothing differs."""
    return any(_counts(rows, rotations)) and all(map(is_equal, rows))


def transforms_text(rows: Sequence[Row], rotations: Rotations, *, equal: bool) -> Iterator[str]:
    """Which transforms there are, in how many rows; `equal`: nothing is left but for these."""
    told = list(_counts(rows, rotations))
    if equal:
        yield f"equal after transform: {', '.join(told)}"
    else:
        yield from told
    for few in rotations.too_few:
        yield (
            f"vectors of {few.channels} channels look rotated: too few tokens to find a rotation "
            f"({few.tokens} of {few.channels}), give it with --transform"
        )


def is_equal(row: Row) -> bool:
    """Whether nothing is left of a row's difference but rounding, or the floor's noise, after what
    is made up for."""
    if row.status != "ok":
        return row.status in _EQUAL
    found: Row | Difference = row
    if row.is_made_up_for and row.residual is not None:
        found = row.residual
    return all(_is_rounding(row, found, metric) for metric in _JUDGED_BY)


def _is_rounding(row: Row, found: Row | Difference, metric: str) -> bool:
    value = getattr(found.metrics, metric)
    if value is not None:
        return value >= _enough(row) or (found is row and is_noise(row, metric, value))
    if found.undefined.get(metric) in (Undefined.IDENTICAL, Undefined.NO_TOKEN_AXIS):
        return True
    return _has_no_error(found.metrics)


def _has_no_error(metrics: Metrics) -> bool:
    return metrics.max_abs_error == 0


def _enough(row: Row) -> float:
    """The SQNR from which on a difference is rounding, by the coarser dtype."""
    dtypes = [DTYPES[name].numpy for name in row.dtype if name in DTYPES]
    epsilon = max((format_of(dtype).epsilon for dtype in dtypes), default=0.0)
    return min(_ENOUGH, -20.0 * math.log10(epsilon) - _MARGIN) if epsilon else _ENOUGH


def _counts(rows: Sequence[Row], rotations: Rotations) -> Iterator[str]:
    layouts = sum(row.layout is not None for row in rows)
    if layouts:
        yield f"{_rows(layouts)} compared in another layout"
    factors = sum(row.is_made_up_for and row.transform is None for row in rows)
    if factors:
        yield f"{_rows(factors)} equal up to a factor"
    for rotation in rotations.known:
        turned = [row for row in rows if _is_turned(row, rotation.channels)]
        how = "equal" if all(map(is_equal, turned)) else "compared"
        what = f"a rotation of {rotation.channels} channels"
        if rotation.is_centered:
            what += ", without the vectors' means"
        source = "found" if rotation.tokens else "declared"
        if turned:
            yield f"{_rows(len(turned))} {how} after {what} ({source})"
        elif not rotation.tokens:
            yield f"{what} that was declared explains no row"
    for transform, what in ((INNER_ROTATION, "rotations"), (PERMUTATION, "permutations")):
        inner = [row for row in rows if row.transform == transform]
        how = "equal" if all(map(is_equal, inner)) else "compared"
        if inner:
            yield f"{_rows(len(inner))} {how} after {what} within layers (found)"


def _is_turned(row: Row, channels: int) -> bool:
    return row.transform == ROTATION and row.shape[0] is not None and row.shape[0][-1] == channels


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
