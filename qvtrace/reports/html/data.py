"""The rows of a comparison as columns, in as little JSON as they need.

A text that many rows share stands once in the list of its column, and rows have its position
there; details that rows share stand once too. Numbers have six significant digits.
"""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.ordering import row_badness
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import Place, Row
from qvtrace.judging.noise_floor import times_floor
from qvtrace.metrics.details import Details
from qvtrace.metrics.factors import factor_text
from qvtrace.metrics.histograms import Histogram, Histograms
from qvtrace.metrics.names import DECIBELS, HIGHER_IS_BETTER, METRICS
from qvtrace.metrics.spreads import Spread
from qvtrace.metrics.statistics import Statistics
from qvtrace.reports.columns import NOISES, TITLES, message, notes, row_name, worst_at
from qvtrace.reports.explanations import spread_texts
from qvtrace.reports.formatting import number, printable
from qvtrace.reports.html.layers import layer_places
from qvtrace.reports.qparams import parameters_text
from qvtrace.reports.samples import SAMPLE_TITLE, by_sample
from qvtrace.trees import Json

_DEFAULT_METRICS = ("peir", "token_sqnr_p50", "token_sqnr_p5", "max_abs_error", "mean_abs_error")
_STATISTICS = ("min", "max", "mean", "stddev", "zeros", "nan", "positive_inf", "negative_inf")


def page_data(comparison: Comparison, *, everything: bool) -> Json:
    """What the page's script draws; `everything` lists folded rows from the beginning."""
    return {
        "metrics": _metrics(comparison),
        "sort": comparison.options.order,
        "fold": not everything,
        "gates": _gates(comparison),
        **_columns(comparison),
    }


def json_in_html(data: Json) -> str:
    """Strict JSON that no HTML parser takes for anything else."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _metrics(comparison: Comparison) -> list[Json]:
    wanted = comparison.options.metrics
    default = {*_DEFAULT_METRICS, comparison.options.order}
    names = wanted or dict.fromkeys((*_DEFAULT_METRICS, *METRICS))
    return [
        {
            "name": name,
            "title": TITLES.get(name, name),
            "unit": " dB" if name in DECIBELS else "",
            "is_power": name in NOISES,
            "higher_is_better": name in HIGHER_IS_BETTER,
            "shown": name in (wanted or default),
        }
        for name in names
    ]


def _gates(comparison: Comparison) -> list[Json]:
    """Gates that have a limit, for the lines that show it."""
    return [
        {"metric": gate.subject, "limit": gate.limit, "everywhere": gate.pattern is None}
        for gate in comparison.options.gates
        if gate.subject in METRICS
    ]


def _columns(comparison: Comparison) -> Json:
    rows = comparison.rows
    places = layer_places({row.module for row in rows})
    names = RowNames(rows)
    dtypes = (comparison.reference.model.get("dtype"), comparison.candidate.model.get("dtype"))
    details = _Shared[Details]()
    columns: dict[str, Any] = {
        "order": [row.order for row in rows],
        "name": [row_name(row, names).plain for row in rows],
        "layer": [places[row.module].layer for row in rows],
        "kind": _coded(places[row.module].kind for row in rows),
        "class": _coded(_against(row.type) for row in rows),
        "dtype": _coded(_against(row.dtype) for row in rows),
        "shape": _coded(_against(tuple(map(_shape, row.shape))) for row in rows),
        "status": _coded(row.status for row in rows),
        "matched_by": _coded(row.matched_by for row in rows),
        "message": _coded(_message(row) for row in rows),
        "notes": _coded("\n".join(note.plain for note in notes(row, dtypes)) for row in rows),
        "worst_at": [worst_at(row).plain if row.peak else "" for row in rows],
        "peak": [_peak(row) for row in rows],
        "worst_token": [row.worst_token for row in rows],
        "zero_tokens": [row.zero_tokens for row in rows],
        "same_as": _positions_of_same(rows),
        "undefined": _coded(_undefined(row) for row in rows),
        "made_up_for": _coded(row.is_made_up_for for row in rows),
        "quantization": _coded(_quantization(comparison, row.module) for row in rows),
        "further": [_further(row) for row in rows],
        "details": [details.position(row.details) for row in rows],
    }
    for name in comparison.options.metrics or METRICS:
        columns[name] = [_rounded(getattr(row.metrics, name)) for row in rows]
    return {"rows": columns, "details": [_details(found) for found in details.values]}


Value = TypeVar("Value")


class _Shared(Generic[Value]):
    """Distinct objects, and where each stands among them."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self._position_of: dict[int, int] = {}

    def position(self, value: Value | None) -> int | None:
        """Of one object; None has none."""
        if value is None:
            return None
        position = self._position_of.setdefault(id(value), len(self.values))
        if position == len(self.values):
            self.values.append(value)
        return position


def _coded(values: Iterable[Hashable]) -> Json:
    positions: dict[Hashable, int] = {}
    at = [positions.setdefault(value, len(positions)) for value in values]
    return {"of": list(positions), "at": at}


def _against(sides: Sequence[object]) -> str:
    reference, candidate = (printable(str(side)) for side in sides)
    return reference if reference == candidate else f"{reference} against {candidate}"


def _shape(shape: tuple[int, ...] | None) -> list[int] | None:
    return None if shape is None else list(shape)


def _message(row: Row) -> str:
    text = message(row)
    return "" if text is None else text.plain


def _undefined(row: Row) -> tuple[tuple[str, str, int], ...]:
    """Each metric that is undefined, why, and how that ranks: 1 is worse than any number."""
    return tuple(
        (name, printable(reason), row_badness(row, name)[0])
        for name, reason in row.undefined.items()
    )


def _quantization(comparison: Comparison, module: str) -> str:
    """How each side of a module is quantized, a line for each tensor of it."""
    sides = zip(("reference", "candidate"), comparison.quantization.get(module, ()), strict=False)
    return "\n".join(
        f"{side}: {parameters_text(found)}" for side, parameters in sides for found in parameters
    )


def _peak(row: Row) -> list[Any] | None:
    if row.peak is None:
        return None
    return [list(row.peak.index), _rounded(row.peak.reference), _rounded(row.peak.candidate)]


def _further(row: Row) -> dict[str, str] | None:
    """What only few rows have."""
    factor, peir, sqnr = row.scale_factor, row.residual_peir, row.residual_sqnr
    noise = times_floor(row, "peir")
    texts = {
        "layout": row.layout and printable(row.layout),
        "transform": row.transform and printable(row.transform),
        "scale factor": None if factor is None else factor_text(factor),
        "residual PEIR": None if peir is None else number(peir),
        "residual SQNR": None if sqnr is None else f"{number(sqnr)} dB",
        **_by_sample(row),
        "times the noise": None if noise is None else f"PEIR {number(noise)}",
    }
    return {name: text for name, text in texts.items() if text} or None


def _by_sample(row: Row) -> dict[str, str]:
    if row.samples is None:
        return {}
    shown = (*_DEFAULT_METRICS, "sqnr")
    return {
        f"{TITLES.get(name, name)} {SAMPLE_TITLE}": by_sample(row, name).plain
        for name in dict.fromkeys(shown)
        if name in row.samples.figures
    }


def _positions_of_same(rows: Sequence[Row]) -> list[int | None]:
    position_of: dict[Place, int] = {row.place: index for index, row in enumerate(rows)}
    return [None if row.same_as is None else position_of.get(row.same_as) for row in rows]


def _details(details: Details) -> list[Any]:
    statistics = [_statistics(details.reference), _statistics(details.candidate)]
    drawn = None if details.histograms is None else _histograms(details.histograms)
    return [*statistics, drawn, None if details.spread is None else _spread(details.spread)]


def _spread(found: Spread) -> Json:
    """What is said in words, and the profiles that are drawn, in thousandths of the error."""
    profiles = [("token", found.tokens), ("head", found.heads), ("channel", found.channels)]
    return {
        "texts": list(spread_texts(found)),
        "profiles": [
            [name, along.count, [round(1000 * share) for share in along.profile]]
            for name, along in profiles
            if along is not None and along.count > 1 and along.profile
        ],
    }


def _statistics(statistics: Statistics) -> list[Any]:
    return [statistics.count, *(_rounded(getattr(statistics, name)) for name in _STATISTICS)]


def _histograms(found: Histograms) -> list[Any]:
    three = (found.reference, found.candidate, found.error)
    return [found.counted, found.left_out, found.step, *map(_histogram, three)]


def _histogram(histogram: Histogram | None) -> list[Any] | None:
    if histogram is None:
        return None
    return [_rounded(histogram.low), _rounded(histogram.high), histogram.counts]


def _rounded(value: float | int | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}")
