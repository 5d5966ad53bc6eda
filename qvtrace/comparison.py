"""Two archives -> a comparison: rows, coverage, whether they are comparable, a verdict."""

from dataclasses import dataclass, field
from typing import Literal

from qvtrace.metrics import Metrics, Nonfinite, Peak
from qvtrace.trees import Json

Status = Literal[
    "ok",
    "identical",
    "nonfinite",
    "shape",
    "structure",
    "opaque",
    "routing",
    "exact",
    "mismatch",
]
COMPARED = frozenset({"ok", "identical", "nonfinite", "exact", "mismatch"})


@dataclass(frozen=True)
class Place:
    """One place of one call: where a row stands, or an unmatched output."""

    module: str
    call: int
    path: str


@dataclass(frozen=True)
class Row:
    """One pair of leaves, compared. Every metric is relative to the reference."""

    module: str
    call: int
    sample: int
    step: int
    path: str  # `output`, `output.0`, `kwargs.attention_mask`
    order: int  # position in the reference's order of execution
    type: tuple[str, str]  # module classes
    dtype: tuple[str | None, str | None]  # None where a side is no tensor
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    matched_by: str  # `exact`, or the rule
    status: Status
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    layout: str | None = None
    scale_factor: float | None = None
    residual_peir: float | None = None
    residual_sqnr: float | None = None
    worst_token: tuple[int, ...] | None = None
    zero_tokens: int = 0
    peak: Peak | None = None
    nonfinite: Nonfinite | None = None
    same_as: Place | None = None  # the earlier row that has both digests of this one


@dataclass(frozen=True)
class Side:
    """What one archive is."""

    file: str
    model: Json  # name, class, revision, dtype, seed, digests
    variant: Json  # name, quantizer, settings, quantized and left float
    environment: Json
    complete: bool = True
    error: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparable:
    """Whether the difference of the two archives means what it seems to mean."""

    ok: bool
    differences: tuple[str, ...] = ()  # each in words; those that do not decide `ok` included


@dataclass(frozen=True)
class Coverage:
    """What was compared and what was not."""

    modules_reference: int
    modules_candidate: int
    modules_compared: int
    pairs: int
    compared: int
    identical: int
    not_comparable: int
    only_in_reference: tuple[Place, ...] = ()
    only_in_candidate: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answer in one line."""

    text: str
    exit_code: int
    gates: tuple[Json, ...] = ()
    origins: tuple[Json, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The difference of two archives."""

    reference: Side
    candidate: Side
    comparable: Comparable
    coverage: Coverage
    rows: tuple[Row, ...]  # in the order that was asked for
    verdict: Verdict
    complete: bool = True  # False when rows or metrics were cut
