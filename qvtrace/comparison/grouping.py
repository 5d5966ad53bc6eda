"""Rows rolled up: by block of the network, or by kind of module with its layers collapsed."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import Any

from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.ordering import most_telling, row_badness
from qvtrace.comparison.rows import COMPARED, Place, Row
from qvtrace.metrics.differences import Difference, Sums
from qvtrace.metrics.names import METRICS, Metrics, badness
from qvtrace.metrics.pooling import pool
from qvtrace.patterns import shown

_LARGEST = ("noise_in", "noise_out", "gain", "local_peir")  # of a group
_SUMMED = ("added", "local_noise")
_MADE_UP_FOR = "equal up to a factor"
_NOT_POOLED = "percentiles cannot be pooled"


@dataclass(frozen=True)
class Group:
    """Rows of one block or one kind, as one.

    `max_abs_error` and `peir` are the largest, as are noise in and out and `gain`; `sqnr`,
    `cosine`, `relative_l2` and the means are pooled from sums; `added` and `local_noise` are sums
    over the calls of the innermost modules. Percentiles cannot be pooled. Rows that are equal up to
    a factor are in none of these, and identical ones not in `sqnr`, `cosine` and `relative_l2`.
    """

    name: str  # `model.layers.7`, `model.layers.(0-27).mlp`
    modules: int
    rows: int
    compared: int
    nonfinite: int  # rows with that status
    made_up_for: int  # rows that are equal up to a factor
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    worst: Place | None = None  # the row with the largest PEIR, or the worst by what sorts them

    def badness(self, metric: str) -> tuple[bool, tuple[int, float]]:
        """A key that sorts the worst last; with nothing beyond factors, a group comes first."""
        reason = self.undefined.get(metric)
        key = badness(metric, getattr(self.metrics, metric), reason)
        return self.made_up_for < self.rows, key


def roll_up(rows: Sequence[Row], sums: Mapping[Place, Sums], options: DiffOptions) -> list[Group]:
    """The groups that are asked for, of rows in order of execution; `sums` are of those that were
    read.

    In the order of their first rows, by name, or the worst by a metric first; `top` keeps the worst
    by that metric, else by PEIR.
    """
    modules = {row.module for row in rows}
    names = _blocks(modules) if options.group_by == "block" else _kinds(modules)
    sort_by = options.order
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        members[names[row.module]].append(row)
    metric = sort_by if sort_by in METRICS else "peir"
    groups = {name: _group(name, of_group, sums, metric) for name, of_group in members.items()}
    worst = sorted(groups.values(), key=lambda group: group.badness(metric), reverse=True)
    worst = worst[: options.top]
    if sort_by == metric:
        return worst
    kept = {group.name for group in worst}
    ordered = sorted(groups) if sort_by == "name" else list(groups)
    return [groups[name] for name in ordered if name in kept]


def _blocks(modules: Collection[str]) -> dict[str, str]:
    """Of each module the layer that it is in, by the first number in its name; else itself."""
    blocks = {}
    for module in modules:
        components = module.split(".")
        numbers = (place for place, part in enumerate(components) if _is_number(part))
        end = next(numbers, len(components)) + 1
        blocks[module] = shown(".".join(components[:end]))
    return blocks


def _kinds(modules: Collection[str]) -> dict[str, str]:
    """Of each module its name with all numbers that stand there in modules alike."""
    numbers: dict[str, list[set[int]]] = {}
    for module in modules:
        components = module.split(".")
        found = [int(part) for part in components if _is_number(part)]
        sets = numbers.setdefault(_pattern(components), [set() for _ in found])
        for known, number in zip(sets, found, strict=True):
            known.add(number)
    return {module: _collapsed(module, numbers[_pattern(module.split("."))]) for module in modules}


def _collapsed(module: str, numbers: Sequence[set[int]]) -> str:
    texts = iter(map(_ranges, numbers))
    parts = [next(texts) if _is_number(part) else part for part in module.split(".")]
    return shown(".".join(parts))


def _pattern(components: Sequence[str]) -> str:
    return ".".join("*" if _is_number(part) else part for part in components)


def _is_number(component: str) -> bool:
    return component.isdecimal() and component.isascii() and len(component) < 10


def _ranges(numbers: Collection[int]) -> str:
    """`7`, `(0-27)`, `(0,2-5)`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return texts[0] if len(numbers) == 1 else f"({','.join(texts)})"


def _group(name: str, rows: Sequence[Row], sums: Mapping[Place, Sums], metric: str) -> Group:
    telling = [row for row in rows if not row.is_made_up_for]
    noises: dict[str, Any] = dict(_noises(telling))
    pooled = pool(_difference(row, sums.get(row.place)) for row in telling)
    metrics = replace(pooled, **noises)
    worst = next(iter(most_telling(telling, metric)), None)
    return Group(
        name,
        len({row.module for row in rows}),
        len(rows),
        sum(row.status in COMPARED for row in rows),
        sum(row.status == "nonfinite" for row in rows),
        len(rows) - len(telling),
        metrics,
        dict(_reasons(metrics, telling)),
        None if worst is None or worst.status in ("identical", "exact") else worst.place,
    )


def _difference(row: Row, sums: Sums | None) -> Difference:
    if row.status == "identical" and row.metrics.mean_abs_error is not None:
        sums = Sums(prod(row.shape[0] or ()), 0.0, None, None)
    return Difference("ok", row.metrics, row.undefined, sums=sums)


def _noises(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for name in _LARGEST:
        found = [value for row in rows if (value := getattr(row.metrics, name)) is not None]
        if found:
            yield name, max(found)
    innermost = _innermost({row.module for row in rows})
    for name in _SUMMED:
        calls: dict[tuple[str, int], float] = {}
        for row in rows:
            value = getattr(row.metrics, name)
            if value is not None and row.module in innermost:
                key = row.module, row.call
                calls[key] = max(value, calls.get(key, 0.0))
        if calls:
            yield name, sum(calls.values())


def _innermost(modules: Collection[str]) -> set[str]:
    """Those that have no other of them in them: what these add shows in the others again."""
    around = {""} if len(modules) > 1 else set()
    for module in modules:
        while "." in module:
            module = module.rpartition(".")[0]
            around.add(module)
    return set(modules) - around


def _reasons(metrics: Metrics, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """Why each metric without a number has none: the worst that any row says."""
    if not rows:
        yield from dict.fromkeys(METRICS, _MADE_UP_FOR).items()
        return
    for name in METRICS:
        if getattr(metrics, name) is not None:
            continue
        without = [row for row in rows if getattr(row.metrics, name) is None]
        if name in ("token_sqnr_p50", "token_sqnr_p5") and len(without) < len(rows):
            yield name, _NOT_POOLED
        elif without:
            worst = max(without, key=lambda row: row_badness(row, name))
            yield name, worst.undefined.get(name, _NOT_POOLED)
