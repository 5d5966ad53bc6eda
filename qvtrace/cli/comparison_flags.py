"""What a comparison has, what it is judged by and how it is written."""

import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qvtrace.cli.flags import ElementFlags, ModulePatterns
from qvtrace.cli.options import ELEMENTS, GATES, OUTPUT, PATTERN, ROWS, file_option, flag, option
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.comparison.options import DiffOptions
    from qvtrace.judging.configuration import Configuration
    from qvtrace.judging.gates import Gate


class Format(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"
    JUNIT = "junit"
    HTML = "html"


class Grouping(StrEnum):
    """What rows are rolled up by."""

    BLOCK = "block"
    KIND = "kind"


class Paths(StrEnum):
    """Which places of a call are compared."""

    OUTPUT = "output"
    INPUTS = "inputs"
    KWARGS = "kwargs"
    WEIGHTS = "weights"
    ALL = "all"


@dataclass(frozen=True)
class RowFlags:
    """Which rows a comparison has, in which order."""

    sort_by: Annotated[
        str | None,
        option(
            ROWS,
            "order (of execution), name, or a metric: worst first. "
            "(default: order; with --local, local_noise)",
            metavar="KEY",
        ),
    ] = None
    top: Annotated[
        int | None,
        option(
            ROWS,
            "Only the N worst rows: by PEIR, or by the metric of --sort-by.",
            metavar="N",
            min=1,
        ),
    ] = None
    group_by: Annotated[
        Grouping | None,
        option(
            ROWS,
            "Rows rolled up by block (model.layers.7) or by kind of module "
            "(model.layers.(0-27).mlp).",
            "--group-by",
        ),
    ] = None
    path: Annotated[Paths, option(ROWS, "Which places of a call; or the weights.", "--path")] = (
        Paths.OUTPUT
    )
    maps: Annotated[
        list[str],
        option(
            ROWS,
            "Regular expression on candidate names; repeatable.",
            "--map",
            metavar="PATTERN=REPLACEMENT",
        ),
    ] = field(default_factory=list)
    map_file: Annotated[
        str | None,
        option(ROWS, "File of such lines, applied before --map.", metavar="FILE"),
    ] = None
    floor: Annotated[
        str | None,
        option(
            ROWS,
            "Archive that differs from the reference by noise alone (a second run, bfloat16): "
            "rows as multiples of that, and places with more named.",
            metavar="ARCHIVE",
        ),
    ] = None
    transform: Annotated[
        str | None,
        option(
            ROWS,
            "The rotation of the candidate's residual stream, an orthogonal matrix, and those of "
            "heads (MODULE.R2). "
            "(default: found)",
            metavar="SAFETENSORS",
        ),
    ] = None
    per_sample: Annotated[
        bool,
        flag(ROWS, "A row for each sample, where a recording has several.", "--per-sample"),
    ] = False
    metrics: Annotated[
        list[str],
        option(
            ROWS, "Columns, separated by commas or repeated.", "--metrics", metavar="METRIC,..."
        ),
    ] = field(default_factory=list)

    def metric_names(self) -> tuple[str, ...]:
        """The metrics that were asked for."""
        names = (name.strip() for names in self.metrics for name in names.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def options(
        self,
        patterns: ModulePatterns,
        gates: "GateFlags",
        elements: ElementFlags,
        limit: int | None,
    ) -> "DiffOptions":
        """What is asked of the comparison."""
        from qvtrace.comparison.options import DiffOptions

        return DiffOptions(
            sort_by=self.sort_by,
            top=self.top,
            include=tuple(patterns.include),
            exclude=tuple(patterns.exclude),
            path=self.path.value,
            group_by=self.group_by and self.group_by.value,
            maps=(*_read_maps(self.map_file), *self.maps),
            metrics=self.metric_names(),
            per_sample=self.per_sample,
            fail_on=gates.of_rows(),
            values=tuple(elements.values),
            values_limit=limit,
            transform=self.transform,
        )


def _read_maps(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--map-file {file}: cannot be read: {error}; give a text file") from error
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


@dataclass(frozen=True)
class GateFlags:
    """What makes a comparison fail."""

    fail_on: Annotated[
        list[str],
        option(
            GATES,
            "What must not be: 'peir>0.05', 'sqnr<20 @ *.mlp.*', 'kl>0.05', 'top1<0.98', "
            "nonfinite, structure, unmatched; repeatable. (default: fail-on of the configuration)",
            metavar="GATE",
        ),
    ] = field(default_factory=list)
    config: Annotated[
        Path | None,
        option(
            GATES,
            "TOML file to take the place of tool.qvtrace in pyproject.toml.",
            metavar="FILE",
        ),
    ] = None

    def gates(self) -> "tuple[Gate, ...]":
        """Those of the command line; where it has none, those of the configuration."""
        from qvtrace.judging.gates import parse_gates

        configured = self.configuration().fail_on
        return parse_gates(self.fail_on) or configured

    def of_rows(self) -> "tuple[Gate, ...]":
        """The same, where there is nothing else to judge by: a project that sets none is named."""
        found, file = self.gates(), self.configuration().file
        if not found and file is not None:
            print(f"qvtrace: {file}: sets no gate, nothing is judged", file=sys.stderr)
        return found

    def configuration(self) -> "Configuration":
        """What the project asks, or the file that was named."""
        from qvtrace.judging.configuration import load_configuration

        return load_configuration(self.config)


@dataclass(frozen=True)
class ExplainFlags:
    """Of which modules it is told where in their tensors the error is."""

    explain: Annotated[
        list[str],
        option(
            ELEMENTS,
            "Error by token, channel and head of modules that are or fit this, and of their "
            "inputs with outlier channels; repeatable.",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)


_JSON = ".json"


@dataclass(frozen=True)
class ReportFlags:
    """How a comparison is written, and where to."""

    format: Annotated[Format, option(OUTPUT, "How the report is written.", "--format")] = (
        Format.TABLE
    )
    everything: Annotated[
        bool, flag(OUTPUT, "Also list rows that are folded into another, or equal.", "--all")
    ] = False
    output: Annotated[
        Path | None,
        file_option(
            OUTPUT,
            "Write the report to a file; NAME.json has JSON where no format is given.",
            "--output",
            "-o",
        ),
    ] = None
    github: Annotated[
        bool,
        flag(
            OUTPUT,
            "In GitHub Actions: markdown for the step's summary, annotations for what failed.",
            "--github",
        ),
    ] = False

    def __post_init__(self) -> None:
        """Raise `UsageError` for a page that cannot be written, before anything is compared."""
        if self.format is Format.TABLE and self.output is not None and self.output.suffix == _JSON:
            object.__setattr__(self, "format", Format.JSON)  # a name that says what it is
        if self.format is Format.HTML:
            from qvtrace.reports.html.libraries import require_libraries

            require_libraries()
            if self.output is None and sys.stdout.isatty():
                raise UsageError("--format html: is no text for a terminal; name a file with -o")

    @property
    def details(self) -> bool:
        """Whether the report shows the details of each row."""
        return self.format is Format.HTML

    def limit(self, elements: ElementFlags) -> int | None:
        """How many elements of one tensor the report has; None: all."""
        from qvtrace.metrics.elements import ELEMENTS_LIMIT
        from qvtrace.reports.values import ELEMENTS_SHOWN

        return elements.limit(ELEMENTS_SHOWN if self.format is Format.TABLE else ELEMENTS_LIMIT)
