"""Rows of the same place in several samples -> one row, pooled, with what stands behind it."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from qvtrace.comparison.rows import (
    COMPARED,
    Place,
    Row,
    SampleFigures,
    Samples,
    Status,
    is_weight,
)
from qvtrace.manifest import CallEntry
from qvtrace.metrics.differences import Difference
from qvtrace.metrics.names import PAIR_METRICS, Metrics, Undefined, badness
from qvtrace.metrics.pooling import pool_samples

# What decides for all samples, the most telling first.
_SEVERITY: tuple[Status, ...] = (
    "structure",
    "shape",
    "routing",
    "nonfinite",
    "opaque",
    "mismatch",
    "ok",
    "exact",
    "identical",
)
_DOES_NOT_APPLY = frozenset({Undefined.INTEGER.value, Undefined.FLOATING_POINT.value})

_Slot: TypeAlias = tuple[str, int, int, str]  # module, count within sample and step, step, path
Alike: TypeAlias = Callable[[Row], Difference | None]


class SamplePool:
    """Pools rows that stand at the same place of each sample."""

    def __init__(self, calls: Iterable[CallEntry]) -> None:
        """`calls` are the reference's: a place is told by the count of its call in a sample."""
        self._first: dict[tuple[str, int, int], int] = {}
        for call in calls:
            key = call.module, call.sample, call.step
            self._first[key] = min(call.index, self._first.get(key, call.index))

    def firsts(self, calls: Sequence[CallEntry]) -> list[CallEntry]:
        """The calls that pooled rows stand for: of each place those of the first sample."""
        found: dict[_Slot, CallEntry] = {}
        for call in calls:
            found.setdefault(self._slot(call.module, call.sample, call.step, call.index, ""), call)
        return list(found.values())

    def pool(
        self, rows: Sequence[Row], differences: Mapping[Place, Difference], alike: Alike
    ) -> tuple[list[Row], dict[Place, Difference]]:
        """One row a place, in the order of the first sample, and the differences that were pooled;
        weights stay as they are.

        `alike` measures a row of equal contents, of which no element was read.
        """
        members: dict[_Slot, list[Row]] = defaultdict(list)
        slots: dict[Place, _Slot] = {}
        for row in rows:
            slot = self._slot(row.module, row.sample or 0, row.step, row.call, row.path)
            members[slot].append(row)
            slots[row.place] = slot
        pooled: dict[_Slot, Row] = {}
        found: dict[Place, Difference] = {}
        for slot, of_slot in members.items():
            row, difference = of_slot[0], None
            if not is_weight(row):
                row, difference = _pooled(of_slot, differences, alike)
            pooled[slot] = row
            if difference is not None:
                found[row.place] = difference
        rows = [
            replace(row, same_as=self._same_as(members[slot], slots, pooled))
            for slot, row in pooled.items()
        ]
        return rows, found

    def _slot(self, module: str, sample: int, step: int, call: int, path: str) -> _Slot:
        return module, call - self._first.get((module, sample, step), 0), step, path

    def _same_as(
        self, members: Sequence[Row], slots: Mapping[Place, _Slot], pooled: Mapping[_Slot, Row]
    ) -> Place | None:
        """The earlier place that has the contents of this one in every sample."""
        others = {slots.get(row.same_as) if row.same_as else None for row in members}
        (other,) = others if len(others) == 1 else (None,)
        return None if other is None else pooled[other].place


def _pooled(
    rows: Sequence[Row], differences: Mapping[Place, Difference], alike: Alike
) -> tuple[Row, Difference | None]:
    """One row for those of all samples; the worst status of them is the row's."""
    first = rows[0]
    status = min((row.status for row in rows), key=_SEVERITY.index)
    deciding = [row for row in rows if row.status == status]
    samples = Samples(len(rows), dict(_figures(rows)))
    row = replace(
        deciding[0],
        call=first.call,
        order=first.order,
        sample=None,
        reason=_reason(deciding, len(rows)),
        padding_tokens=sum(row.padding_tokens for row in rows),
        samples=samples,
    )
    if status not in COMPARED or status == "identical":
        return row, None
    found = list(_measured(rows, differences, alike))
    if len(found) == len(rows):
        return _of_floats(row, rows, found)
    return replace(row, metrics=_of_values(rows), samples=replace(samples, peak=_worst(rows))), None


def _measured(
    rows: Sequence[Row], differences: Mapping[Place, Difference], alike: Alike
) -> Iterator[Difference]:
    """Of floats, what was found in each sample; of equal contents only now."""
    for row in rows:
        found = alike(row) if row.status == "identical" else differences.get(row.place)
        if found is not None and found.metrics.mismatches is None:
            yield found


def _of_floats(
    row: Row, rows: Sequence[Row], found: Sequence[Difference]
) -> tuple[Row, Difference]:
    pooled = pool_samples(found)
    difference = pooled.difference
    worst = rows[0 if pooled.peak is None else pooled.peak]
    token = None if pooled.token is None else rows[pooled.token]
    samples = row.samples and replace(
        row.samples,
        peak=None if pooled.peak is None else worst.sample,
        token=None if token is None else token.sample,
    )
    told = replace(
        row,
        shape=worst.shape,
        metrics=difference.metrics,
        undefined=difference.undefined,
        peak=None if pooled.peak is None else worst.peak,
        nonfinite=difference.nonfinite,
        worst_token=None if token is None else token.worst_token,
        zero_tokens=difference.zero_tokens,
        samples=samples,
        details=worst.details,
        **_explained(rows, worst),
    )
    return told, difference


def _explained(rows: Sequence[Row], worst: Row) -> dict[str, Any]:
    """A factor or a rotation only where every sample that differs has one; it is made up for only
    where it is in all of them."""
    differing = [row for row in rows if row.status != "identical"]
    names = ("scale_factor", "transform", "judgement", "residual")
    nothing = dict.fromkeys((*names, "residual_peir", "residual_sqnr"))
    if any(row.scale_factor is None and row.transform is None for row in differing):
        return nothing
    told = next((row for row in differing if not row.is_made_up_for), worst)
    told = told if told in differing else differing[0]
    residuals = [row.residual for row in differing if row.residual is not None]
    if len(residuals) < len(differing):
        return nothing
    residual = pool_samples(residuals).difference
    return {
        **{name: getattr(told, name) for name in names},
        "residual": residual,
        "residual_peir": residual.metrics.peir,
        "residual_sqnr": residual.metrics.sqnr,
    }


def _of_values(rows: Sequence[Row]) -> Metrics:
    """Of integers and plain values: how many differ in all, and the largest difference."""
    errors = [row.metrics.max_abs_error for row in rows if row.metrics.max_abs_error is not None]
    return Metrics(
        max_abs_error=max(errors, default=None),
        mismatches=sum(row.metrics.mismatches or 0 for row in rows),
    )


def _worst(rows: Sequence[Row]) -> int | None:
    return max(rows, key=lambda row: row.metrics.max_abs_error or 0).sample


def _reason(deciding: Sequence[Row], count: int) -> str | None:
    """What the samples that decide say, and how many they are where others say something else."""
    reasons = list(dict.fromkeys(row.reason for row in deciding if row.reason is not None))
    said = reasons[0] if reasons else None
    if len(deciding) == count or deciding[0].status in ("ok", "exact"):
        return said
    some = f"in {len(deciding)} of {count} samples, first in {deciding[0].sample}"
    return some if said is None else f"{some}: {said}"


def _figures(rows: Sequence[Row]) -> Iterator[tuple[str, SampleFigures]]:
    for metric in PAIR_METRICS:
        applicable = [row for row in rows if row.undefined.get(metric) not in _DOES_NOT_APPLY]
        values = [getattr(row.metrics, metric) for row in applicable]
        if not any(value is not None for value in values):
            continue
        ranked = sorted(applicable, key=lambda row: _badness(row, metric))
        median, p99 = (ranked[math.ceil(len(ranked) * p) - 1] for p in (0.5, 0.99))
        worst = ranked[-1]
        # Of equally bad samples the first.
        worst = next(row for row in ranked if _badness(row, metric) == _badness(worst, metric))
        value = getattr(worst.metrics, metric)
        yield (
            metric,
            SampleFigures(
                getattr(median.metrics, metric),
                getattr(p99.metrics, metric),
                value,
                worst.sample or 0,
                None if value is not None else worst.undefined.get(metric, worst.status),
            ),
        )


def _badness(row: Row, metric: str) -> tuple[int, float]:
    return badness(metric, getattr(row.metrics, metric), row.undefined.get(metric))
