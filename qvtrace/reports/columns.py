"""What a table says of one pair: the cells of a row, and the lines under it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.noise import decibels
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import Row, is_weight
from qvtrace.judging.noise_floor import times_floor
from qvtrace.metrics.factors import ListedFactors, ScaleFactor, factor_text
from qvtrace.metrics.names import DECIBELS, METRICS, Metrics, Undefined
from qvtrace.metrics.nonfinite import NOTHING_FOUND
from qvtrace.patterns import shown
from qvtrace.reports.formatting import counted, number, printable
from qvtrace.reports.samples import SAMPLE_TITLE, by_sample
from qvtrace.reports.styled import Styled, styled

BAR_WIDTH = 6
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Ratios of powers, shown in dB.
NOISES = frozenset({"noise_in", "noise_out", "added", "local_noise"})
_IN_DEFAULT_COLUMNS = frozenset(
    {"order", "name", "peir", "token_sqnr_p50", "token_sqnr_p5", "max_abs_error", "mean_abs_error"}
)
TITLES = {
    "max_abs_error": "max|d|",
    "mean_abs_error": "mean|d|",
    "min_abs_error": "min|d|",
    "stddev_abs_error": "stddev|d|",
    "mean_error": "mean d",
    "peir": "PEIR",
    "sqnr": "SQNR",
    "relative_l2": "rel. L2",
    "token_sqnr_p50": "token p50",
    "token_sqnr_p5": "token p5",
    "token_sqnr_min": "token min",
    "noise_in": "noise in",
    "noise_out": "noise out",
    "local_noise": "local noise",
    "local_peir": "local PEIR",
}
_SHARE_OF_WORST = ((0.8, "bold red"), (0.4, "yellow"))  # of the largest PEIR in the table


@dataclass(frozen=True)
class Column:
    """One column: its title and how a row fills it."""

    title: str
    cell: Callable[[Row], Styled]
    optional: bool = False  # left out where the line would be too long


@dataclass(frozen=True)
class Bar:
    """A bar as long as a PEIR is large beside the largest one in the table."""

    longest: float
    blocks: bool  # characters in eighths; else `#`, which any file and terminal shows

    def of(self, value: float) -> str:
        """The bar; something is seen of everything that is above zero."""
        eighths = max(1, round(BAR_WIDTH * 8 * value / self.longest)) if value > 0 else 0
        whole, rest = divmod(min(eighths, BAR_WIDTH * 8), 8)
        if self.blocks:
            return "█" * whole + _EIGHTHS[rest].strip()
        return "#" * (whole + (rest > 0))

    def style(self, value: float) -> str:
        """How a PEIR of this size stands out."""
        shares = (style for share, style in _SHARE_OF_WORST if value >= share * self.longest)
        return next(shares, "") if value > 0 else ""


def peir_bar(rows: Iterable[Row], *, blocks: bool) -> Bar:
    """The bar for the PEIR column of these rows."""
    telling = (row for row in rows if not (row.is_made_up_for or row.peaks_at_mask))
    lengths = (row.metrics.peir or 0.0 for row in telling)
    return Bar(max(lengths, default=0.0), blocks)


def asked_columns(bar: Bar | None, comparison: Comparison) -> list[Column]:
    """The columns that were asked for, or those that every table has; what sorts is among them."""
    options = comparison.options
    if options.metrics:
        columns = [metric_column(name, bar) for name in options.metrics]
    else:
        columns = _default_columns(bar, comparison.rows)
        if comparison.local is not None:  # accumulated and local error side by side
            names = [name for name in ("noise_out", "local_noise") if name != options.order]
            columns[:0] = [metric_column(name, bar) for name in names]
    if options.order not in _IN_DEFAULT_COLUMNS and not options.metrics:
        columns.insert(0, metric_column(options.order, bar))
    if any(row.samples for row in comparison.rows):
        by = options.order if options.order in METRICS else "peir"
        title = f"{TITLES.get(by, by)} {SAMPLE_TITLE}"
        columns.append(Column(title, lambda row: by_sample(row, by)))
    if comparison.floor is not None:
        metric = options.order if options.order in METRICS else "peir"
        columns.insert(1, Column("x floor", lambda row: _times_floor(row, metric)))
    return columns


def _times_floor(row: Row, metric: str) -> Styled:
    if row.floor is None:
        return styled("- not measured", "dim")
    times = times_floor(row, metric)
    if times is None:
        return styled("- no noise", "dim")
    return styled(number(times), "dim" if times <= 1 else "")


def _default_columns(bar: Bar | None, rows: Sequence[Row]) -> list[Column]:
    groups = [Column("group SQNR p50 / p5", _group_sqnr)] if any(r.groups for r in rows) else []
    return [
        _peir_column(bar),
        Column(f"{_vectors(rows)} SQNR p50 / p5", _token_sqnr),
        *groups,
        metric_column("max_abs_error", bar),
        replace(metric_column("mean_abs_error", bar), optional=True),
        Column("worst at", worst_at),
    ]


def _vectors(rows: Sequence[Row]) -> str:
    """What a vector along the last dimension is: of a weight, an output channel."""
    kinds = {"channel" if is_weight(row) else "token" for row in rows}
    return " / ".join(sorted(kinds, reverse=True)) or "token"


def further_columns(bar: Bar) -> list[Column]:
    """What is shown besides where there is room, the most useful first."""
    return [
        metric_column("sqnr", bar),
        metric_column("cosine", bar),
        Column("class", _class_names),
    ]


def metric_column(name: str, bar: Bar | None) -> Column:
    """The column of one metric."""
    if name == "peir":
        return _peir_column(bar)
    if name == "token_sqnr_min":
        return Column(TITLES[name], _token_sqnr_min)
    return Column(TITLES.get(name, name), lambda row: metric_cell(row, name))


def row_name(row: Row, names: RowNames) -> Styled:
    """Module, call and step where there are several, and path where it is not the output."""
    name = styled(printable(shown(row.module)) + names.call(row))
    if row.path != "output":
        name += styled(f" {printable(row.path)}", "cyan")
    return name


def message(row: Row) -> Styled | None:
    """What is said in place of numbers; None where there are numbers."""
    match row.status:
        case "ok" | "nonfinite":
            return _all_undefined(row)
        case "identical":
            return styled("identical", "green")
        case "exact":
            return styled("equal", "green")
        case "mismatch":
            return styled(_mismatch(row), "bold red")
        case "opaque":
            said = "" if row.failed_alike or row.has_no_elements else "not stored: "
            return styled(f"{said}{_reason(row, row.type)}", "yellow")
        case "shape":
            return styled(f"shapes differ: {_reason(row, row.shape)}", "yellow")
    return styled(f"{row.status}: {_reason(row, row.type)}", "yellow")


def notes(row: Row, dtypes: tuple[str | None, str | None]) -> list[Styled]:
    """The lines under a row; `dtypes` are those that the head of the table has told already."""
    lines = []
    if row.nonfinite is not None and row.nonfinite != NOTHING_FOUND:
        style = "bold red" if row.status == "nonfinite" else "dim"
        lines.append(styled(row.nonfinite.described, style))
    if row.peaks_at_mask:
        lines.append(styled("the largest error is a mask that only the candidate has", "bold red"))
    if row.dtype[0] != row.dtype[1] and row.dtype != dtypes and None not in row.dtype:
        lines.append(styled(f"dtypes {_against(row.dtype)}", "dim"))
    if row.layout is not None:
        lines.append(styled(printable(f"compared with candidate.{row.layout}"), "dim"))
    if row.transform is not None:
        lines.append(styled(_after_transform(row, row.transform), "dim"))
    if row.scale_factor is not None:
        style = "dim" if row.is_made_up_for else "bold red"
        lines += [styled(text, style) for text in _factor(row, row.scale_factor)]
    if row.padding_tokens:
        left_out = counted(row.padding_tokens, "token")
        lines.append(styled(f"{left_out} of padding left out of the token figures", "dim"))
    if row.reason is not None and message(row) is None:
        lines.append(styled(printable(row.reason), "dim"))
    return lines


def _peir_column(bar: Bar | None) -> Column:
    def cell(row: Row) -> Styled:
        value = row.metrics.peir
        if value is None:
            return _undefined(row, "peir")
        if row.nonfinite is not None and row.nonfinite.introduced:
            what = "NaN" if row.nonfinite.new_nan else "inf"
            return styled(f"{number(value)} + {what}", "bold red")
        if row.is_made_up_for or bar is None:
            return styled(number(value), "dim")
        return styled(f"{number(value):<8} {bar.of(value)}".rstrip(), bar.style(value))

    return Column("PEIR", cell)


class Measured(Protocol):
    """What has metrics: a row, or a group of rows."""

    @property
    def metrics(self) -> Metrics:
        """The numbers."""

    @property
    def undefined(self) -> dict[str, str]:
        """Why a number is missing, by the name of the metric."""


def metric_cell(row: Measured, name: str) -> Styled:
    """One metric with its unit, or why there is none."""
    value = getattr(row.metrics, name)
    if value is None:
        return _undefined(row, name)
    if name in NOISES:
        return styled(decibels(value))
    if name == "cosine":  # close to 1, where three digits would say nothing
        return styled(f"{value:.6f}")
    return styled(f"{number(value)} dB" if name in DECIBELS else number(value))


def _undefined(row: Measured, name: str) -> Styled:
    reason = row.undefined.get(name, "")
    if reason == Undefined.IDENTICAL and isinstance(row, Row) and row.status == "nonfinite":
        reason = "the rest identical"
    return styled(f"- {printable(reason)}".rstrip(), "dim")


def _token_sqnr(row: Row) -> Styled:
    names = ("token_sqnr_p50", "token_sqnr_p5")
    if all(getattr(row.metrics, name) is None for name in names):
        return _undefined(row, names[0])
    texts = [metric_cell(row, name).plain.removesuffix(" dB") for name in names]
    return styled(" / ".join(texts) + " dB")


def _group_sqnr(row: Row) -> Styled:
    if row.groups is None:
        return styled("-", "dim")
    texts = ["-" if v is None else number(v) for v in (row.groups.sqnr_p50, row.groups.sqnr_p5)]
    return styled(f"{' / '.join(texts)} dB of {row.groups.size}")


def _token_sqnr_min(row: Row) -> Styled:
    cell = metric_cell(row, "token_sqnr_min")
    if row.worst_token is not None:
        name = "channel" if is_weight(row) else "token"
        of = row.samples.token if row.samples else None
        where = "" if of is None else f"sample {of}, "
        cell += styled(f" at {where}{name} {_indices(row.worst_token, _sizes(row))}", "dim")
    return cell


def worst_at(row: Row) -> Styled:
    """Where the largest error is: leading indices are those of a token, the last is a channel."""
    if row.peak is None:
        return styled("-", "dim")
    *leading, last = row.peak.index or (0,)
    of = "" if row.samples is None or row.samples.peak is None else f"sample {row.samples.peak}, "
    if len(row.peak.index) < 2:
        return styled(of + (f"index {last}" if row.peak.index else "the only element"))
    names = ("channel", "input") if is_weight(row) else ("token", "channel")
    return styled(f"{of}{names[0]} {_indices(leading, _sizes(row))}, {names[1]} {last}")


def _indices(indices: Sequence[int], sizes: Sequence[int]) -> str:
    """Leading indices; those of axes of size 1 say nothing."""
    telling = [index for index, size in zip(indices, sizes, strict=False) if size != 1]
    telling = telling or list(indices[-1:])
    return str(telling[0]) if len(telling) == 1 else f"({', '.join(map(str, telling))})"


def _sizes(row: Row) -> tuple[int, ...]:
    return row.shape[0] or ()


def _class_names(row: Row) -> Styled:
    return styled(_against(row.type) if row.type[0] != row.type[1] else printable(row.type[0]))


def _all_undefined(row: Row) -> Styled | None:
    if row.metrics.max_abs_error is not None:
        return None
    return styled(f"- {printable(row.undefined.get('max_abs_error', 'undefined'))}", "dim")


def _after_transform(row: Row, transform: str) -> str:
    name = printable(transform)
    return f"after a {name}: {_left(row)}" if row.scale_factor is None else f"a {name}, and then"


def _left(row: Row) -> str:
    rest = [
        f"PEIR {number(row.residual_peir)}" if row.residual_peir is not None else "",
        f"SQNR {number(row.residual_sqnr)} dB" if row.residual_sqnr is not None else "exact",
    ]
    return ", ".join(filter(None, rest))


def _factor(row: Row, factor: ScaleFactor | ListedFactors) -> tuple[str, str]:
    return f"the reference times {factor_text(factor)}", f"without the factor: {_left(row)}"


def _mismatch(row: Row) -> str:
    parts = []
    if row.shape[0] is not None and row.metrics.mismatches is not None:
        parts.append(counted(row.metrics.mismatches, "element differs", "elements differ"))
        if row.metrics.max_abs_error is not None:
            parts.append(f"by at most {number(row.metrics.max_abs_error)}")
    if row.reason is not None:
        parts.append(printable(row.reason))
    return ", ".join(parts) or "differs"


def _reason(row: Row, sides: tuple[object, object]) -> str:
    return printable(row.reason) if row.reason is not None else _against(sides)


def _against(sides: tuple[object, object]) -> str:
    reference, candidate = map(_side, sides)
    return printable(f"{reference} against {candidate}")


def _side(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
