"""What may be asked of a comparison."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import NameMap
from qvtrace.comparison.rows import PARTS
from qvtrace.errors import UsageError
from qvtrace.judging.gates import Gate, check_patterns, parse_gates
from qvtrace.metrics.elements import ELEMENTS_LIMIT
from qvtrace.metrics.names import METRICS

ORDERS = ("order", "name")
GROUPINGS = ("block", "kind")


class DiffKeywords(TypedDict, total=False):
    """`DiffOptions` as keywords of `diff`."""

    sort_by: str | None
    top: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    path: str
    maps: Sequence[str]
    metrics: Sequence[str]
    fail_on: Sequence[str | Gate]
    values: Sequence[str]
    values_limit: int | None
    per_sample: bool
    details: bool
    group_by: str | None
    transform: str | os.PathLike[str] | None
    explain: Sequence[str]


@dataclass(frozen=True)
class DiffOptions:
    """Which rows, and in which order; raises `UsageError` for what cannot be asked for."""

    sort_by: str | None = None  # `order`, `name`, or a metric: worst first
    top: int | None = None  # the worst of them, by PEIR where they are not sorted by a metric
    include: tuple[str, ...] = ()  # patterns on module names
    exclude: tuple[str, ...] = ()
    path: str = "output"  # or `inputs`, `kwargs`, `weights`, `all`
    maps: tuple[str, ...] = ()  # `PATTERN=REPLACEMENT` on candidate names
    metrics: tuple[str, ...] = ()  # columns; all when empty
    fail_on: tuple[str | Gate, ...] = ()  # parsed once given
    values: tuple[str, ...] = ()  # patterns on modules of which elements are wanted
    values_limit: int | None = ELEMENTS_LIMIT  # of one tensor; None: all
    per_sample: bool = False  # a row for each of several samples, not one for all
    details: bool = False  # each row's statistics and histograms
    group_by: str | None = None  # or `block`, `kind`: rows rolled up, of which `top` then is
    transform: str | os.PathLike[str] | None = None  # file of the rotation that the candidate has
    explain: tuple[str, ...] = ()  # patterns on modules of which error by token and channel is

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "maps", "metrics", "fail_on", "values", "explain"):
            given = getattr(self, name)
            single = isinstance(given, str | Gate)
            object.__setattr__(self, name, (given,) if single else tuple(given))
        object.__setattr__(self, "fail_on", parse_gates(self.fail_on))
        require_known("--sort-by", self.order, (*ORDERS, *METRICS))
        require_known("--path", self.path, tuple(PARTS))
        if self.group_by is not None:
            require_known("--group-by", self.group_by, GROUPINGS)
        for text in self.maps:
            NameMap.parse(text)
        for metric in self.metrics:
            require_known("--metrics", metric, METRICS)
        if self.top is not None and self.top < 1:
            raise UsageError(f"--top {self.top}: shows nothing; give a number from 1 on")

    @property
    def order(self) -> str:
        """What sorts the rows; without any other wish, they stand as they were executed."""
        return "order" if self.sort_by is None else self.sort_by

    @property
    def gates(self) -> tuple[Gate, ...]:
        """What must not be, each parsed."""
        return parse_gates(self.fail_on)

    @property
    def rows_asked(self) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        """What decides which rows there are."""
        return self.include, self.exclude, self.path

    @property
    def filters(self) -> str:
        """What narrows the rows, as it would be typed."""
        given = [("--include", pattern) for pattern in self.include]
        given += [("--exclude", pattern) for pattern in self.exclude]
        given += [("--path", self.path)] if self.path not in ("output", "all") else []
        return " ".join(f"{option} {value}" for option, value in given)


def check_gates(options: DiffOptions, reference: Archive) -> None:
    """Raise `UsageError` for a gate that can match nothing, before there is a candidate."""
    called = (call.module for call in reference.manifest.calls)
    weighted = (weight.module for weight in reference.manifest.weights or ())
    check_patterns(options.gates, chain(called, weighted))


def require_known(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value!r}: is not known; choose one of {', '.join(known)}")
