"""The difference of two archives: rows, and all that is said of them together."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.explanations import Explanation
from qvtrace.comparison.grouping import Group
from qvtrace.comparison.logits import Logits
from qvtrace.comparison.options import DiffOptions, require_known
from qvtrace.comparison.ordering import is_ranked, most_telling
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.tokens import Tokens
from qvtrace.comparison.verdict import Verdict
from qvtrace.judging.regression import Changes
from qvtrace.metrics.elements import ElementsJson
from qvtrace.metrics.names import METRICS
from qvtrace.qparams.findings import Finding
from qvtrace.qparams.parameters import Parameters
from qvtrace.trees import Json

RESULT_FORMAT = 1  # of a comparison that is written as JSON


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
    findings: tuple[Finding, ...] = ()  # quantization parameters that are suspect
    private: bool = False  # its inputs are known by keyed digests alone


@dataclass(frozen=True)
class Comparison:
    """The difference of two archives."""

    reference: Side
    candidate: Side
    comparable: Comparable
    coverage: Coverage
    rows: tuple[Row, ...] = field(repr=False)  # in the order that was asked for
    verdict: Verdict
    complete: bool = True  # False when rows or metrics were cut
    options: DiffOptions = field(default_factory=DiffOptions)
    tokens: Tokens | None = None  # where both sides are generations
    floor: Side | None = None  # what the noise was measured by
    file: str | None = None  # that it was read from
    changes: Changes | None = None  # of modules, since the baseline that it was judged by
    # Of both sides, by the reference's name; for the modules of `options.values`, or with details.
    quantization: Mapping[str, tuple[tuple[Parameters, ...], tuple[Parameters, ...]]] = field(
        default_factory=dict, repr=False
    )
    # Of candidate minus reference, by the place of the row; for the modules of `options.values`.
    elements: Mapping[Place, ElementsJson] = field(default_factory=dict, repr=False)
    local: Side | None = None  # the replay that was given
    portions: tuple[str, ...] = ()  # what was compared by a sample, or not at all, in words
    logits: Logits | None = None  # of a language model, from end to end
    inputs: Json | None = None  # what tells those of the reference from others
    groups: tuple[Group, ...] = ()  # of all rows, where they are rolled up
    # Of the modules of `options.explain`, in order of execution: their rows and their inputs.
    explanations: tuple[Explanation, ...] = field(default=(), repr=False)
    cut: tuple[Row, ...] = field(default=(), repr=False)  # beyond `options.top`

    @property
    def has_pooled_rows(self) -> bool:
        """Whether rows stand for several samples."""
        return any(row.samples is not None for row in self.rows)

    @property
    def has_row_per_sample(self) -> bool:
        """Whether there are several samples, each with rows of its own."""
        return len({row.sample for row in self.rows if row.sample is not None}) > 1

    def worst(self, metric: str, n: int) -> list[Row]:
        """The `n` rows that are worst by a metric, worst first.

        A row with NaN or infinities that only the candidate has comes first, then one whose metric
        is undefined, then numbers, after them what no number can be
        told of (a place that one side lacks), then an identical one, at last those that are equal
        up to a factor; rows that the metric does not apply to (integers have no PEIR) are not
        there. Raises `UsageError` for an unknown metric.
        """
        require_known("worst", metric, METRICS)
        ranked = [row for row in self.rows if is_ranked(row, metric)]
        return most_telling(ranked, metric)[: max(n, 0)]
