"""A comparison that was written as JSON, read again: nothing in the file is trusted."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.comparison import RESULT_FORMAT, Comparison, Side
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.logits import Agreement, Divergence, Logits, Perplexity
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.origins import Origin
from qvtrace.comparison.portions import portion_texts
from qvtrace.comparison.rows import PARTS, Place, Row, SampleFigures, Samples, Status
from qvtrace.comparison.scored_tokens import TokenPlace
from qvtrace.comparison.swapping import variants_look_swapped
from qvtrace.comparison.verdict import Verdict
from qvtrace.errors import ResultError
from qvtrace.json_fields import Fields
from qvtrace.judging.decision import DONE, NOTHING_COMPARABLE
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.factors import ListedFactors
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite

_LARGEST = 512 * 2**20  # bytes
_LONGEST_INTEGER = 300  # digits: no float is longer
_COUNTS = tuple(Nonfinite.__dataclass_fields__)
_FIRST = _COUNTS[:6]  # which results of every version have


def load_result(file: str | os.PathLike[str]) -> Comparison:
    """The comparison that `diff --format json` wrote, without any gate.

    Raises `ResultError`, which names the file, for one that cannot be read, that is something else,
    that a newer qvtrace wrote, that contradicts itself, or that was cut by `--top` or `--metrics`.
    """
    path = Path(file)
    try:
        return replace(_comparison(_object(_text(path))), file=str(path))
    except OSError as error:
        fault = error.strerror or str(error)
        raise ResultError(f"{path}: cannot be read: {fault}; check the path") from error
    except RecursionError as error:
        raise ResultError(f"{path}: is nested too deeply; {_REMEDY}") from error
    except (ValueError, OverflowError) as error:
        raise ResultError(f"{path}: is no result of a comparison: {error}; {_REMEDY}") from error
    except _UnusableError as error:
        raise ResultError(f"{path}: {error}") from error


_REMEDY = "write it with `qvtrace diff --format json -o FILE`"


class _UnusableError(Exception):
    """A result that cannot be judged."""


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
    return content.decode("utf-8")


def _object(text: str) -> Fields:
    json_object = json.loads(
        text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer
    )
    return Fields(json_object, "result")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond every float")
    return number


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER:
        raise ValueError(f"{text[:20]}... is beyond every float")
    return int(text)


def _comparison(fields: Fields) -> Comparison:
    version = fields.count("format")
    if version > RESULT_FORMAT:
        raise _UnusableError(
            f"has format {version} (written by qvtrace {fields.json.get('qvtrace')}); this qvtrace "
            f"reads up to {RESULT_FORMAT}; upgrade with: pip install -U qvtrace"
        )
    if not fields.flag("complete"):
        raise _UnusableError(
            "was cut by --top or --metrics, so that nothing can be judged by it; "
            "write it again without them"
        )
    rows = _rows(fields.list("rows"))
    coverage = _coverage(fields.section("coverage"), rows)
    sides = _side(fields.section("reference")), _side(fields.section("candidate"))
    comparability = _comparable(fields.section("comparable"), *sides)
    verdict = fields.section("verdict")
    findings = verdict.texts("findings")
    origins = tuple(_origin(Fields(origin, "origin")) for origin in verdict.list("origins"))
    code = DONE if coverage.compared else NOTHING_COMPARABLE
    return Comparison(
        *sides,
        comparability,
        coverage,
        rows,
        Verdict("; ".join(findings), code, (), origins, verdict.texts("lines"), findings),
        options=_options(fields),
        floor=_side(fields.section("floor")) if "floor" in fields.json else None,
        local=_side(fields.section("local")) if "local" in fields.json else None,
        logits=_logits(fields.optional_section("logits")),
        inputs=fields.free_object("inputs") if "inputs" in fields.json else None,
        portions=portion_texts(rows),
    )


def _side(fields: Fields) -> Side:
    error = fields.optional_text("incomplete")
    warnings = fields.texts("warnings") if "warnings" in fields.json else ()
    return Side(
        fields.text("file"),
        fields.free_object("model"),
        fields.free_object("variant"),
        fields.free_object("environment"),
        complete=error is None,
        error=error,
        warnings=warnings,
    )


def _comparable(fields: Fields, reference: Side, candidate: Side) -> Comparable:
    """Sides that are swapped are known by their variants where the file does not say it."""
    ok, differences = fields.flag("ok"), fields.texts("differences")
    if not ok and not differences:
        raise ValueError("the two are not comparable, and no difference says why")
    said = "swapped" in fields.json and fields.flag("swapped")
    swapped = said or variants_look_swapped(reference.variant, candidate.variant)
    return Comparable(ok, differences, swapped)


def _coverage(fields: Fields, rows: Sequence[Row]) -> Coverage:
    """Counted anew: only what no row says is taken from the file."""
    only_in_reference, only_in_candidate = (
        tuple(_place(Fields(place, "place")) for place in fields.list(name))
        for name in ("only_in_reference", "only_in_candidate")
    )
    wrappers = fields.texts("wrappers") if "wrappers" in fields.json else ()
    return Coverage.of(rows, only_in_reference, only_in_candidate, wrappers=wrappers)


def _origin(fields: Fields) -> Origin:
    evidence = fields.text("evidence")
    if evidence not in ("local", "in-out"):
        raise ValueError(f"the evidence {evidence!r} of an origin is not known")
    return Origin(
        fields.text("module"),
        fields.count("call"),
        fields.text("path"),
        fields.optional_number("noise_in"),
        fields.optional_number("noise_out"),
        fields.optional_number("added"),
        cast(Literal["local", "in-out"], evidence),
        fields.text("reason"),
    )


def _logits(fields: Fields | None) -> Logits | None:
    if fields is None:
        return None
    kl, top1, perplexity = map(fields.optional_section, ("kl", "top1", "perplexity"))
    not_scored = fields.section("not_scored")
    return Logits(
        fields.count("tokens"),
        None if kl is None else _divergence(kl),
        None if top1 is None else Agreement(*_mean(top1, "share"), top1.count("tokens")),
        None if perplexity is None else _perplexity(perplexity),
        fields.count("nonfinite"),
        {reason: not_scored.count(reason) for reason in not_scored.json},
    )


def _divergence(fields: Fields) -> Divergence:
    worst = fields.section("worst")
    return Divergence(
        *_mean(fields, "mean"),
        fields.number("p99"),
        fields.number("max"),
        TokenPlace(*map(worst.count, TokenPlace.__dataclass_fields__)),
        fields.count("tokens"),
    )


def _perplexity(fields: Fields) -> Perplexity:
    return Perplexity(
        fields.optional_number("reference"),
        fields.optional_number("candidate"),
        *_mean(fields, "ratio"),
        fields.count("tokens"),
    )


def _mean(fields: Fields, name: str) -> tuple[float, float | None]:
    return fields.number(name), fields.optional_number("error")


def _options(fields: Fields) -> DiffOptions:
    if "filters" not in fields.json:
        return DiffOptions()
    filters = fields.section("filters")
    path = filters.text("path")
    if path not in PARTS:
        raise ValueError(f"'path' of the filters is {path!r}")
    return DiffOptions(
        include=filters.texts("include"), exclude=filters.texts("exclude"), path=path
    )


def _place(fields: Fields) -> Place:
    return Place(fields.text("module"), fields.count("call"), fields.text("path"))


def _rows(values: list[Any]) -> tuple[Row, ...]:
    rows = []
    places = set()
    for position, value in enumerate(values):
        try:
            row = _row(Fields(value, "row"))
        except ValueError as error:
            raise ValueError(f"row {position}: {error}") from error
        if row.place in places:
            raise ValueError(f"row {position}: stands at the place of an earlier one")
        places.add(row.place)
        rows.append(row)
    return tuple(rows)


def _row(fields: Fields) -> Row:
    place = _place(fields)
    return Row(
        place.module,
        place.call,
        None if fields.json.get("sample") is None else fields.count("sample"),
        fields.count("step"),
        place.path,
        fields.count("order"),
        type=cast(tuple[str, str], _pair(fields, "type", str)),
        dtype=cast(tuple[str | None, str | None], _pair(fields, "dtype", (str, type(None)))),
        shape=_shapes(fields),
        matched_by=fields.text("matched_by"),
        status=_status(fields.text("status")),
        reason=fields.optional_text("reason"),
        metrics=_metrics(fields.section("metrics")),
        undefined=_reasons(fields.section("undefined")),
        layout=fields.optional_text("layout"),
        scale_factor=_scale_factor(fields),
        transform=fields.optional_text("transform") if "transform" in fields.json else None,
        residual_peir=fields.optional_number("residual_peir"),
        residual_sqnr=fields.optional_number("residual_sqnr"),
        worst_token=_optional_index(fields, "worst_token"),
        zero_tokens=fields.count("zero_tokens"),
        padding_tokens=fields.count("padding_tokens") if "padding_tokens" in fields.json else 0,
        samples=_samples(fields.optional_section("samples")),
        peak=_peak(fields),
        nonfinite=_nonfinite(fields),
        sampled=_sampled(fields),
        floor=_metrics(fields.section("floor")) if fields.json.get("floor") is not None else None,
    )


def _samples(fields: Fields | None) -> Samples | None:
    if fields is None:
        return None
    figures = fields.section("figures")
    return Samples(
        fields.count("count"),
        {metric: _sample_figures(figures.section(metric)) for metric in figures.json},
        *(
            None if fields.json.get(name) is None else fields.count(name)
            for name in ("peak", "token")
        ),
    )


def _sample_figures(fields: Fields) -> SampleFigures:
    return SampleFigures(
        fields.optional_number("median"),
        fields.optional_number("p99"),
        fields.optional_number("worst"),
        fields.count("worst_sample"),
        fields.optional_text("undefined"),
    )


def _pair(fields: Fields, name: str, kind: type | tuple[type, ...]) -> tuple[Any, Any]:
    values = fields.list(name)
    if len(values) != 2 or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name!r} of the {fields.what} is not one of each side")
    return values[0], values[1]


def _shapes(fields: Fields) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    sides = _pair(fields, "shape", (list, type(None)))
    reference, candidate = (None if side is None else _index(side, "shape") for side in sides)
    return reference, candidate


def _index(values: object, name: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(item) is int and item >= 0 for item in values):
        raise ValueError(f"{name!r} is not a list of counts")
    return tuple(values)


def _scale_factor(fields: Fields) -> float | ListedFactors | None:
    if not isinstance(fields.json.get("scale_factor"), dict):
        number = fields.optional_number("scale_factor")
        return None if number is None else float(number)
    factor = fields.section("scale_factor")
    ends = [_index(channels, "channels") for channels in factor.list("channels")]
    values = factor.list("factors")
    if len(ends) != len(values) or any(len(pair) != 2 for pair in ends):
        raise ValueError("the channels and factors of the scale_factor are not pairs")
    if not all(type(value) in (int, float) for value in values):
        raise ValueError("a factor of the scale_factor is no number")
    listed = tuple((*pair, float(value)) for pair, value in zip(ends, values, strict=True))
    return ListedFactors(
        cast(tuple[tuple[int, int, float], ...], listed),
        factor.count("not_listed") if "not_listed" in factor.json else 0,
        factor.optional_number("smallest"),
        factor.optional_number("largest"),
    )


def _optional_index(fields: Fields, name: str) -> tuple[int, ...] | None:
    value = fields.json.get(name)
    return None if value is None else _index(value, name)


def _status(text: str) -> Status:
    if text not in get_args(Status):
        raise ValueError(f"the status {text!r} is not known")
    return cast(Status, text)


def _metrics(fields: Fields) -> Metrics:
    return Metrics(**{name: cast(Any, fields.optional_number(name)) for name in METRICS})


def _reasons(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.json}


def _peak(fields: Fields) -> Peak | None:
    if fields.json.get("peak") is None:
        return None
    peak = fields.section("peak")
    return Peak(
        _index(peak.json.get("index"), "index"),
        _element(peak, "reference"),
        _element(peak, "candidate"),
    )


def _sampled(fields: Fields) -> tuple[int, int] | None:
    if fields.json.get("sampled") is None:
        return None
    counts = fields.counts("sampled")
    if len(counts) != 2:
        raise ValueError("'sampled' is not a count of how many")
    return counts[0], counts[1]


def _element(peak: Fields, side: str) -> float | int | bool:
    value = peak.json.get(side)
    if not isinstance(value, int | float):
        raise ValueError(f"the {side} of the peak is {type(value).__name__}")
    return value


def _nonfinite(fields: Fields) -> Nonfinite | None:
    if fields.json.get("nonfinite") is None:
        return None
    counts = fields.section("nonfinite")
    return Nonfinite(
        **{name: counts.count(name) for name in _COUNTS if name in counts.json or name in _FIRST}
    )
