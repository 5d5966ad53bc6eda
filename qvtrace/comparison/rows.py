"""A row of a comparison: one pair of leaves, and everything that is said of it."""

from dataclasses import dataclass, field
from typing import Literal

from qvtrace.archive.layout import DTYPES
from qvtrace.comparison.surroundings import Judgement
from qvtrace.manifest import CallEntry
from qvtrace.metrics.details import Details
from qvtrace.metrics.differences import Difference, Peak
from qvtrace.metrics.elements import format_of
from qvtrace.metrics.factors import ListedFactors, ScaleFactor
from qvtrace.metrics.names import Metrics
from qvtrace.metrics.nonfinite import Nonfinite

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
COMPARED: frozenset[Status] = frozenset({"ok", "identical", "nonfinite", "exact", "mismatch"})

PARTS = {
    "output": ("output",),
    "inputs": ("inputs",),
    "kwargs": ("kwargs",),
    "weights": (),  # of modules, not of calls
    "all": ("inputs", "kwargs", "output"),
}
# Why every metric of a row is undefined. The first two do not apply, the others are findings, or
# say that a side has no elements.
PLAIN_VALUE = "plain value"
NOT_STORED = "not stored"
STATISTICS_ONLY = "statistics only"
PRIVATE = "private"
TYPES_DIFFER = "types differ"
SHAPES_DIFFER = "shapes differ"
STRUCTURE_DIFFERS = "structure differs"
ROUTING_DIFFERS = "routing differs"

WEIGHTS = "weights"  # the part of a path
ON_BOTH_SIDES = " on both sides"
ROTATION = "rotation"  # what gives the candidate the vectors of the reference
INNER_ROTATION = "rotation within the layer"  # the same, which what takes the vectors undoes
PERMUTATION = "permutation within the layer"  # the same, of channels or whole heads


@dataclass(frozen=True)
class Place:
    """One place of one call: where a row stands, or what only one side has."""

    module: str
    call: int
    path: str

    @classmethod
    def of(cls, call: CallEntry, path: str) -> "Place":
        """A path of a recorded call."""
        return cls(call.module, call.index, path)


@dataclass(frozen=True)
class Groups:
    """The error of a weight in each group of its quantization, as SQNR in dB."""

    size: int  # elements
    sqnr_p50: float | None
    sqnr_p5: float | None
    sqnr_min: float | None
    worst: tuple[int, ...] | None  # channel and group of the smallest


@dataclass(frozen=True)
class FailedCall:
    """A call that both sides make and that has no output on one or both: what became of it there,
    None where it returned."""

    place: Place
    reference: str | None
    candidate: str | None


@dataclass(frozen=True)
class SampleFigures:
    """One metric over the samples; None where the sample in question has none."""

    median: float | int | None
    p99: float | int | None  # no worse than this are 99 of 100 samples, by nearest rank
    worst: float | int | None
    worst_sample: int
    undefined: str | None = None  # why the worst has no number


@dataclass(frozen=True)
class Samples:
    """How the samples that were pooled differ."""

    count: int
    figures: dict[str, SampleFigures] = field(default_factory=dict)  # by metric
    peak: int | None = None  # the sample that has the largest error
    token: int | None = None  # the sample that has the worst token


@dataclass(frozen=True)
class Row:
    """One pair of leaves, compared. Every metric is relative to the reference."""

    module: str
    call: int
    sample: int | None  # None: all samples, pooled
    step: int
    path: str  # `output`, `output.0`, `kwargs.attention_mask`
    order: int  # of the call, among all of the reference in order of execution
    type: tuple[str, str]  # module classes
    dtype: tuple[str | None, str | None]  # None where a side is no tensor
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    matched_by: str  # `exact`, or the rule
    status: Status
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    undefined: dict[str, str] = field(default_factory=dict)
    layout: str | None = None  # what gives the candidate the reference's, as methods of torch
    scale_factor: ScaleFactor | ListedFactors | None = (
        None  # the candidate is the reference times this,
    )
    transform: str | None = None  # one of the above, before any factor
    residual_peir: float | None = None  # what is left after the transform and the factor
    residual_sqnr: float | None = None
    worst_token: tuple[int, ...] | None = None
    zero_tokens: int = 0
    padding_tokens: int = 0  # left out of the figures of tokens
    peak: Peak | None = None
    nonfinite: Nonfinite | None = None
    groups: Groups | None = None  # of a weight that is quantized in groups
    same_as: Place | None = None  # the earlier row, by order, that has both digests of this one
    judgement: Judgement | None = None  # of the scale factor
    residual: Difference | None = field(default=None, repr=False)  # after all that explains it
    floor: Metrics | None = None  # of the same place in an archive that differs by noise alone
    sampled: tuple[int, int] | None = None  # vectors that were compared, and that there are
    samples: Samples | None = None  # what stands behind pooled figures
    details: Details | None = field(default=None, repr=False, compare=False)  # where asked for
    unseen: bool = False  # no more than a class, or a length, is known of what stood there

    @property
    def failed_alike(self) -> bool:
        """Whether it stands for a call that raised, or did not return, on both sides alike."""
        return self.status == "opaque" and (self.reason or "").endswith(ON_BOTH_SIDES)

    @property
    def has_no_elements(self) -> bool:
        """Whether two tensors differ of which a side stored no elements."""
        return self.undefined.get("max_abs_error") in (STATISTICS_ONLY, PRIVATE)

    @property
    def is_equal_where_sampled(self) -> bool:
        """Whether two tensors differ of which no difference is in what was sampled."""
        return self.status == "ok" and bool(self.sampled) and self.metrics.max_abs_error == 0

    @property
    def peaks_at_mask(self) -> bool:
        """Whether the largest error is a mask that only the candidate has: no size of an error."""
        dtype = DTYPES.get(self.dtype[1] or "")
        if dtype is None or self.peak is None or not self.nonfinite:
            return False
        if not self.nonfinite.sentinel_mismatches:
            return False
        return abs(self.peak.candidate) >= format_of(dtype.numpy).sentinel

    @property
    def place(self) -> Place:
        """Where the row stands."""
        return Place(self.module, self.call, self.path)

    @property
    def first_place(self) -> Place:
        """Where both sides had these contents first."""
        return self.same_as or self.place

    @property
    def is_made_up_for(self) -> bool:
        """Whether the row is equal up to a rotation, or to a factor that nothing around it shows:
        what is left is all of the error."""
        if self.judgement is not None:
            return self.judgement.agrees
        return self.transform is not None


def is_weight(row: Row) -> bool:
    """Whether a row is of a weight, not of a call."""
    return row.path.startswith(f"{WEIGHTS}.")
