"""Flags that several commands share, in groups: a command takes a group as one argument."""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from qvtrace.cli.group import SHOW_TRACEBACK
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.comparison.options import DiffOptions
    from qvtrace.judging.configuration import Configuration
    from qvtrace.judging.gates import Gate
    from qvtrace.models import ModelRequest
    from qvtrace.privacy import Privacy
    from qvtrace.recording.keeping import Share

MODEL = "Model"
SAMPLE = "Sample"
STORED = "What is stored"
MODULES = "Which modules"
ROWS = "Which rows"
ELEMENTS = "Elements"
WATCHED = "What is seen while it runs"
GATES = "Gates"
OUTPUT = "Output"

PATTERN = "PATTERN"  # on module names, as `--help` calls it


class Variant(StrEnum):
    """Which variant of a model runs."""

    FP = "fp"
    QUANT = "quant"


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


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option with its help, in a panel of `--help`; unless it has a callback of its own, it is
    refused with an empty value."""
    settings.setdefault("callback", _refuse_empty)
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def _refuse_empty(parameter: typer.CallbackParam, value: Any) -> Any:
    """What a shell makes of a variable that is not set is never taken for a value. The empty
    pattern is the name of the root."""
    empty = value == "" or (isinstance(value, list) and "" in value)
    if empty and parameter.metavar != PATTERN:
        raise UsageError(f"{parameter.opts[0]}: is empty; give a value, or leave the option out")
    return value


def flag(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """A switch, in a panel of `--help`."""
    return option(panel, text, *names, metavar="", **settings)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each group that it takes as an argument, but for those that
    it has itself under the same name."""
    asked = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, type] = {
        one.name: one.annotation
        for one in asked
        if isinstance(one.annotation, type) and is_dataclass(one.annotation)
    }
    own = {one.name for one in asked} - groups.keys()
    parameters: list[inspect.Parameter] = []
    for parameter in asked:
        if parameter.name in groups:
            grouped = _parameters(parameter.annotation)
            parameters.extend(one for one in grouped if one.name not in own)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            taken = [field.name for field in fields(group) if field.name not in own]
            values[name] = group(**{flag: values.pop(flag) for flag in taken})
        command(**values)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _remember_traceback(context: typer.Context, wanted: bool) -> bool:
    context.meta[SHOW_TRACEBACK] = wanted
    return wanted


Force = Annotated[bool, flag(OUTPUT, "Overwrite a file that is there.", "--force")]
Traceback = Annotated[
    bool,
    flag(
        OUTPUT,
        "Show where a model raised, not only what.",
        "--traceback",
        callback=_remember_traceback,
    ),
]


@dataclass(frozen=True)
class ModelFlags:
    """Which model runs on which sample."""

    model: Annotated[
        str | None,
        option(
            MODEL,
            "Embedded name, local directory, GGUF file, hub id, or file.py:function "
            "(package.module:function) "
            "that returns a model, or a model and its inputs. (default: qwen3-vl-tiny)",
            "--model",
            "-m",
            metavar="MODEL",
        ),
    ] = None
    quantizer: Annotated[
        str | None,
        option(
            MODEL,
            "For quant: NAME, NAME:SCHEME, or file.py:function taking and returning a model.  "
            "[default: torchao:int8-dynamic]",
            metavar="QUANTIZER",
        ),
    ] = None
    no_quantize: Annotated[
        bool,
        flag(
            MODEL,
            "For quant: the quantizer's wrappers in, quantization off (tico).",
            "--no-quantize",
        ),
    ] = False
    calibration: Annotated[
        str | None,
        option(
            MODEL,
            "For quant: calibration inputs, .safetensors or .json. (default: the sample)",
            metavar="FILE",
        ),
    ] = None
    keep_float: Annotated[
        list[str],
        option(
            MODEL,
            "For quant: leave modules float that are or fit this, and what is in them; repeatable.",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    keep_float_file: Annotated[
        str | None,
        option(
            MODEL,
            "File of such patterns, one a line, or what `suggest` wrote as JSON.",
            metavar="FILE",
        ),
    ] = None
    like: Annotated[
        str | None,
        option(
            MODEL,
            "Take model, inputs, seed, dtype, attention and filters from this archive.",
            metavar="ARCHIVE",
        ),
    ] = None
    from_config: Annotated[
        bool,
        flag(MODEL, "Random weights from the model's configuration.", "--from-config"),
    ] = False
    num_layers: Annotated[
        int | None,
        option(MODEL, "Only the first N layers (text and vision).", metavar="N", min=1),
    ] = None
    dtype: Annotated[
        str | None,
        option(MODEL, "Float dtype. (default: the checkpoint's)", metavar="DTYPE"),
    ] = None
    device: Annotated[
        str | None, option(MODEL, "Device to run on. (default: cpu)", metavar="DEVICE")
    ] = None
    device_map: Annotated[
        str | None,
        option(MODEL, "Spread the model as accelerate does: auto, or JSON.", metavar="MAP"),
    ] = None
    attn: Annotated[
        str | None,
        option(
            MODEL,
            "Attention implementation. (default: the checkpoint's; eager for the embedded model)",
            metavar="NAME",
        ),
    ] = None
    seed: Annotated[
        int | None, option(MODEL, "Seed of weights and samples. (default: 42)", metavar="N", min=0)
    ] = None
    revision: Annotated[
        str | None, option(MODEL, "Branch, tag or commit on the hub.", metavar="REVISION")
    ] = None
    cache_dir: Annotated[str | None, option(MODEL, "Where downloads are kept.", metavar="DIR")] = (
        None
    )
    hf_token: Annotated[
        str | None,
        option(
            MODEL,
            "Token for the hub; it never reaches a file or a message.",
            metavar="TOKEN",
            envvar="HF_TOKEN",
            show_default=False,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        flag(MODEL, "Run code that comes with the checkpoint.", "--trust-remote-code"),
    ] = False
    prompt: Annotated[str | None, option(SAMPLE, "The text.", metavar="TEXT")] = None
    image: Annotated[list[str], option(SAMPLE, "A picture file; repeatable.", metavar="FILE")] = (
        field(default_factory=list)
    )
    inputs: Annotated[
        str | None,
        option(
            SAMPLE,
            "Ready tensors: .safetensors or .json; several samples: .jsonl.",
            "--inputs",
            metavar="FILE",
        ),
    ] = None
    samples: Annotated[
        int | None,
        option(
            SAMPLE,
            "The first N samples of a file of several. (default: all)",
            metavar="N",
            min=1,
        ),
    ] = None
    generate: Annotated[
        int | None,
        option(
            SAMPLE,
            "Record a greedy generation of N tokens, every step; --like feeds its tokens.",
            metavar="N",
            min=1,
        ),
    ] = None
    use_cache: Annotated[
        bool, flag(SAMPLE, "Run the forward with use_cache=True.", "--use-cache")
    ] = False
    attention_maps: Annotated[
        bool,
        flag(
            STORED,
            "Also attention weights that the model returns only on request.",
            "--attention-maps",
        ),
    ] = False

    def request(self, variant: Variant) -> "ModelRequest":
        """What is asked of the models package."""
        from qvtrace.models import ModelRequest
        from qvtrace.models.keep_float import read_keep_float

        file = self.keep_float_file
        flags = {name: value for name, value in vars(self).items() if name not in _RENAMED}
        return ModelRequest(
            variant=variant.value,
            images=tuple(self.image),
            inputs_file=self.inputs,
            keep_float=(*(() if file is None else read_keep_float(file)), *self.keep_float),
            **flags,
        )

    def for_float(self) -> "ModelFlags":
        """The same for the float variant."""
        return replace(
            self,
            quantizer=None,
            no_quantize=False,
            calibration=None,
            keep_float=[],
            keep_float_file=None,
        )


_RENAMED = frozenset({"image", "inputs", "like", "keep_float", "keep_float_file"})


@dataclass(frozen=True)
class ModulePatterns:
    """Which modules, by their names."""

    include: Annotated[
        list[str],
        option(MODULES, "Only modules whose name is or fits this; repeatable.", metavar=PATTERN),
    ] = field(default_factory=list)
    exclude: Annotated[
        list[str],
        option(MODULES, "No modules that are or fit this; repeatable.", metavar=PATTERN),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class ShareFlags:
    """How much is stored of the tensors of a call."""

    sample_tokens: Annotated[
        int | None,
        option(
            STORED,
            "Of each tensor at most N vectors along its last dimension, at the same places in "
            "every archive; the first and the last always.",
            metavar="N",
            min=2,
        ),
    ] = None
    stats_only: Annotated[
        bool, flag(STORED, "Statistics and digests instead of elements.", "--stats-only")
    ] = False

    max_bytes: Annotated[
        str | None,
        option(
            STORED,
            "Budget for the archive, such as 200MB: a first forward counts, then tokens are "
            "sampled until every module fits.",
            metavar="SIZE",
        ),
    ] = None

    def budget(self) -> int | None:
        """Bytes; raises `UsageError` for what is no size."""
        from qvtrace.recording.budget import parse_size

        return None if self.max_bytes is None else parse_size(self.max_bytes)

    def share(self, like: "Share | None" = None) -> "Share":
        """What is asked for, else what the archive has that is followed."""
        from qvtrace.recording.keeping import Share

        asked = Share(self.sample_tokens, self.stats_only)
        return like if like is not None and asked.is_whole else asked


@dataclass(frozen=True)
class StorageFlags:
    """What of a call is stored."""

    no_inputs: Annotated[
        bool,
        flag(
            STORED,
            "Leave out positional inputs; the model's own stay, --like needs them.",
            "--no-inputs",
        ),
    ] = False
    no_kwargs: Annotated[
        bool,
        flag(
            STORED,
            "Leave out keyword inputs; the model's own stay, --like needs them.",
            "--no-kwargs",
        ),
    ] = False
    caches: Annotated[bool, flag(STORED, "Also the tensors of Cache objects.", "--caches")] = False
    weights: Annotated[
        bool, flag(STORED, "Also the dequantized weights, once each.", "--weights")
    ] = False
    private: Annotated[
        bool,
        flag(
            STORED,
            "Keep what the model is given, texts and absolute paths out of archive and reports: "
            "keyed digests stand for them.",
            "--private",
        ),
    ] = False
    private_key: Annotated[
        str | None,
        option(
            STORED,
            "File with the key of --private. (default: QVTRACE_PRIVATE_KEY, else the user's own)",
            metavar="FILE",
        ),
    ] = None

    def privacy(self, *, is_like_private: bool = False) -> "Privacy | None":
        """The key where something is to be kept private, as in an archive that is followed."""
        from qvtrace.privacy import load_privacy

        if self.private or is_like_private:
            return load_privacy(self.private_key)
        if self.private_key is not None:
            raise UsageError("--private-key: is the key of --private; add that, or leave it out")
        return None


@dataclass(frozen=True)
class ElementFlags:
    """Of which modules the elements are shown too, and how many of each tensor."""

    values: Annotated[
        list[str],
        option(
            ELEMENTS,
            "With elements of modules that are or fit this (diff: of the difference); repeatable.",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    all_values: Annotated[
        bool, flag(ELEMENTS, "All of them, however many a tensor has.", "--all-values")
    ] = False

    def limit(self, otherwise: int) -> int | None:
        """How many elements of one tensor are shown; None: all. Raises `UsageError` where no
        module is named of which any are."""
        if self.all_values and not self.values:
            raise UsageError("--all-values: shows all of what --values shows; add --values PATTERN")
        return None if self.all_values else otherwise


@dataclass(frozen=True)
class WatchFlags:
    """What is seen of a recording while it runs."""

    print_calls: Annotated[
        bool,
        flag(WATCHED, "Print each call as one JSON object on a line, as it happens.", "--print"),
    ] = False
    print_inputs: Annotated[
        bool, flag(WATCHED, "Print the model's inputs before it runs.", "--print-inputs")
    ] = False
    break_at: Annotated[
        list[str],
        option(
            WATCHED,
            "Stop in the debugger (PYTHONBREAKPOINT) after each call of these modules; repeatable.",
            "--break",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    break_before: Annotated[
        bool, flag(WATCHED, "Also stop before each such call.", "--break-before")
    ] = False


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
            "The rotation of the candidate's residual stream, an orthogonal matrix. "
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
        option(
            OUTPUT,
            "Write the report to a file; NAME.json has JSON where no format is given.",
            "--output",
            "-o",
            metavar="FILE",
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


def _read_maps(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--map-file {file}: cannot be read: {error}; give a text file") from error
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]
