"""Two archives -> a comparison: rows, coverage, whether they are comparable, a verdict."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeAlias, TypedDict, Unpack

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Alignment, align
from qvtrace.comparison.comparability import Comparable, comparable
from qvtrace.comparison.coverage import Coverage, cover
from qvtrace.comparison.floor_measurement import with_floor
from qvtrace.comparison.noise import call_noises, rounding_noise, with_local, with_noise
from qvtrace.comparison.origins import find_origins
from qvtrace.comparison.rows import (
    COMPARED,
    NOT_STORED,
    PARTS,
    PLAIN_VALUE,
    Place,
    Row,
    RowBuilder,
    Status,
)
from qvtrace.comparison.tokens import Tokens, compare_tokens
from qvtrace.comparison.verdict import Evidence, Verdict, judge
from qvtrace.comparison.weight_pairs import WeightPairs, pair_weights
from qvtrace.comparison.weight_rows import WEIGHTS, WeightRows, is_weight, require_weights
from qvtrace.errors import UsageError
from qvtrace.failures import failure_warnings
from qvtrace.judging.gates import Gate, GateResult, parse_gates
from qvtrace.judging.regression import Changes
from qvtrace.manifest import CallEntry, head_to_json
from qvtrace.metrics.differences import LOCAL_METRICS, METRICS, Undefined, badness
from qvtrace.metrics.elements import ELEMENTS_LIMIT, ElementsJson
from qvtrace.patterns import require_matches, select
from qvtrace.qparams.findings import Finding, parameters_of, suspect
from qvtrace.qparams.parameters import ModuleParameters, Parameters
from qvtrace.qparams.saturation import saturated_pairs
from qvtrace.trees import Json

__all__ = [
    "COMPARED",
    "Comparable",
    "Comparison",
    "Coverage",
    "DiffOptions",
    "Gate",
    "GateResult",
    "Place",
    "Row",
    "Side",
    "Status",
    "Verdict",
    "diff",
]

Source: TypeAlias = str | os.PathLike[str] | Archive

_ORDERS = ("order", "name")


class DiffKeywords(TypedDict, total=False):
    """`DiffOptions` as keywords of `diff`."""

    sort_by: str
    top: int | None
    include: Sequence[str]
    exclude: Sequence[str]
    path: str
    maps: Sequence[str]
    metrics: Sequence[str]
    fail_on: Sequence[str | Gate]
    values: Sequence[str]
    values_limit: int | None
    details: bool


@dataclass(frozen=True)
class DiffOptions:
    """Which rows, and in which order; raises `UsageError` for what cannot be asked for."""

    sort_by: str = "order"  # or `name`, or a metric: worst first
    top: int | None = None  # the worst of them, by PEIR where they are not sorted by a metric
    include: tuple[str, ...] = ()  # patterns on module names
    exclude: tuple[str, ...] = ()
    path: str = "output"  # or `inputs`, `kwargs`, `weights`, `all`
    maps: tuple[str, ...] = ()  # `PATTERN=REPLACEMENT` on candidate names
    metrics: tuple[str, ...] = ()  # columns; all when empty
    fail_on: tuple[str | Gate, ...] = ()  # parsed once given
    values: tuple[str, ...] = ()  # patterns on modules of which elements are wanted
    values_limit: int | None = ELEMENTS_LIMIT  # of one tensor; None: all
    details: bool = False  # each row's statistics and histograms

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "maps", "metrics", "fail_on", "values"):
            given = getattr(self, name)
            single = isinstance(given, str | Gate)
            object.__setattr__(self, name, (given,) if single else tuple(given))
        object.__setattr__(self, "fail_on", parse_gates(self.fail_on))
        _require_known("--sort-by", self.sort_by, (*_ORDERS, *METRICS))
        _require_known("--path", self.path, tuple(PARTS))
        for metric in self.metrics:
            _require_known("--metrics", metric, METRICS)
        if self.top is not None and self.top < 1:
            raise UsageError(f"--top {self.top}: shows nothing; give a number from 1 on")

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

    def worst(self, metric: str, n: int) -> list[Row]:
        """The `n` rows that are worst by a metric, worst first.

        A row whose metric is undefined comes before any number, an identical one after; rows that
        the metric does not apply to (integers have no PEIR) come last, and after them those that
        are equal up to a factor. Raises `UsageError` for an
        unknown metric.
        """
        _require_known("worst", metric, METRICS)
        return _most_telling(self.rows, metric)[: max(n, 0)]


def diff(
    reference: Source,
    candidate: Source,
    *,
    floor: Source | None = None,
    local: Source | None = None,
    options: DiffOptions | None = None,
    **keywords: Unpack[DiffKeywords],
) -> Comparison:
    """Compare two archives, or files of them; every error is relative to the reference.

    `floor` is an archive that differs from the reference by noise alone (another run, or bfloat16):
    each row has its difference there as `floor`. `local` is a replay of the candidate's model on
    the reference's inputs: what its modules give tells their own error from what they inherited.
    `keywords` are fields of `DiffOptions` and win
    over `options`. Where digests tell tensors equal, none is read. Raises `UsageError` for unusable
    options, and children of `ArchiveError` for files that cannot.
    """
    options = replace(options or DiffOptions(), **keywords)  # type: ignore[arg-type]
    with ExitStack() as opened:
        archives = _open(reference, opened), _open(candidate, opened)
        noise, replayed = (
            None if source is None else _open(source, opened) for source in (floor, local)
        )
        return _compare(*archives, noise, replayed, options)


def _compare(
    reference: Archive,
    candidate: Archive,
    floor: Archive | None,
    local: Archive | None,
    options: DiffOptions,
) -> Comparison:
    replayed = _replayed(reference, local, options)
    everything = align(reference.manifest, candidate.manifest, options.maps)
    weights = _weights(reference, candidate, everything, options)
    valued = _valued(everything, weights, options)
    alignment, weights = _filtered(everything, weights, options)
    built = RowBuilder(
        reference, candidate, options.path, everything.pairs, details=options.details
    )
    if options.path != WEIGHTS:
        _add_calls(built, alignment)
    weight_rows = WeightRows(built, reference, candidate, everything)
    weight_rows.add(weights)
    built.compare()
    coverage = cover(built, alignment)
    comparability = comparable(reference, candidate)
    manifests = reference.manifest, candidate.manifest
    tokens = compare_tokens(*manifests)
    parameters = parameters_of(reference), parameters_of(candidate)
    findings = _findings(reference, candidate, alignment, parameters)
    of_calls = [row for row in (*built.rows, *built.aside) if not is_weight(row)]
    noises = call_noises(of_calls, reference.manifest.calls, replayed)
    executed = weight_rows.finish(with_local(with_noise(built.rows, noises), replayed))
    narrowed = bool(options.include or options.exclude)
    origins = find_origins(noises, rounding_noise(of_calls), narrowed=narrowed)
    evidence = Evidence(
        executed,
        coverage,
        comparability,
        origins,
        *manifests,
        options.filters,
        tokens,
        options.gates,
        findings[1],
    )
    if floor is not None:
        executed = with_floor(executed, reference, floor, options.path)
    ordered = _sorted(executed, options.sort_by)
    rows = ordered if options.top is None else _top(ordered, options)
    return Comparison(
        _side(reference, findings[0]),
        _side(candidate, findings[1], alignment.warnings),
        comparability,
        coverage,
        tuple(rows),
        judge(evidence),
        complete=len(rows) == len(executed) and not options.metrics,
        options=options,
        tokens=tokens,
        floor=None if floor is None else _side(floor, ()),
        quantization={
            pair.reference.module: (
                tuple(parameters[0].of(pair.reference.module)),
                tuple(parameters[1].of(pair.candidate.module)),
            )
            for pair in everything.pairs
            if pair.reference.module in valued or options.details
        },
        elements=dict(built.elements(valued, options.values_limit)),
        local=None if local is None else _side(local, (), _doubts(reference, candidate, local)),
    )


def _replayed(reference: Archive, local: Archive | None, options: DiffOptions) -> Sequence[Row]:
    """What a replay gives, compared with what the reference gave."""
    if local is None:
        named = [("--sort-by", options.sort_by), *(("--metrics", name) for name in options.metrics)]
        for option, metric in named:
            if metric in LOCAL_METRICS:
                raise UsageError(
                    f"{option} {metric}: is of a replay; give one with --local ARCHIVE"
                )
        return ()
    if local.manifest.recorded_by != "replay":
        raise UsageError(
            f"--local {local.file}: is no replay; make one with `qvtrace replay {reference.file}`"
        )
    pairs = align(reference.manifest, local.manifest).pairs
    built = RowBuilder(reference, local, "output", pairs)
    for pair in pairs:
        built.add(pair)
    built.compare()
    return built.rows


def _doubts(reference: Archive, candidate: Archive, local: Archive) -> list[str]:
    """Why a replay may not be of these two."""
    replayed = local.manifest.settings.get("replayed")
    of = replayed.get("created") if isinstance(replayed, dict) else None
    doubts = []
    if of != reference.manifest.created:
        doubts.append(f"is not a replay of {reference.file}, but of another recording")
    quantizers = [side.manifest.variant.quantizer for side in (candidate, local)]
    if quantizers[0] != quantizers[1]:
        doubts.append(f"quantized by {quantizers[1]}, the candidate by {quantizers[0]}")
    return doubts


def _open(source: Source, opened: ExitStack) -> Archive:
    """The archive; one that is opened here is closed with `opened`."""
    return source if isinstance(source, Archive) else opened.enter_context(Archive.open(source))


def _weights(
    reference: Archive, candidate: Archive, alignment: Alignment, options: DiffOptions
) -> WeightPairs:
    """None unless they are asked for: with everything else where both sides have them."""
    if options.path == WEIGHTS:
        require_weights(reference, candidate)
    manifests = reference.manifest, candidate.manifest
    if options.path not in (WEIGHTS, "all") or any(m.weights is None for m in manifests):
        return WeightPairs()
    return pair_weights(*manifests, alignment, options.maps)


def _filtered(
    alignment: Alignment, weights: WeightPairs, options: DiffOptions
) -> tuple[Alignment, WeightPairs]:
    """Patterns are on the reference's names, and on the candidate's for what only that has."""
    if not options.include and not options.exclude:
        return alignment, weights
    names = _names(alignment, weights)
    require_matches(names, options.include, "--include")
    require_matches(names, options.exclude, "--exclude")
    chosen = select(names, include=options.include, exclude=options.exclude)
    calls_chosen = replace(
        alignment,
        pairs=tuple(pair for pair in alignment.pairs if pair.reference.module in chosen),
        only_in_reference=_called(alignment.only_in_reference, chosen),
        only_in_candidate=_called(alignment.only_in_candidate, chosen),
    )
    return calls_chosen, weights.of(chosen)


def _valued(alignment: Alignment, weights: WeightPairs, options: DiffOptions) -> set[str]:
    """The modules of which the elements of the difference are wanted."""
    names = _names(alignment, weights)
    require_matches(names, options.values, "--values")
    return select(names, include=options.values) if options.values else set()


def _names(alignment: Alignment, weights: WeightPairs) -> set[str]:
    calls = chain(
        (pair.reference for pair in alignment.pairs),
        alignment.only_in_reference,
        alignment.only_in_candidate,
    )
    return {call.module for call in calls} | weights.modules


def _called(calls: Iterable[CallEntry], modules: set[str]) -> tuple[CallEntry, ...]:
    return tuple(call for call in calls if call.module in modules)


def _add_calls(built: RowBuilder, alignment: Alignment) -> None:
    for pair in alignment.pairs:
        built.add(pair)
    for call in alignment.only_in_reference:
        built.add_only_in_reference(call)
    for call in alignment.only_in_candidate:
        built.add_only_in_candidate(call)


def _sorted(rows: Sequence[Row], sort_by: str) -> list[Row]:
    """`rows`, which are in order of execution, in the order that is asked for."""
    if sort_by == "order":
        return list(rows)
    if sort_by == "name":
        return sorted(rows, key=lambda row: (row.module, row.call))
    return _worst_first(rows, sort_by)


def _worst_first(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows that are equally bad stay in their order."""
    return sorted(rows, key=lambda row: row_badness(row, metric), reverse=True)


def _most_telling(rows: Sequence[Row], metric: str) -> list[Row]:
    """As `_worst_first`, where a factor that is made up for is no reason to look at a row."""
    return sorted(_worst_first(rows, metric), key=lambda row: row.is_made_up_for)


def row_badness(row: Row, metric: str) -> tuple[int, float]:
    """`metrics.badness` of a row: a key that sorts the worst last."""
    reason = row.undefined.get(metric)
    if reason in (PLAIN_VALUE, NOT_STORED):
        reason = Undefined.INTEGER  # no more part of the ranking than an integer is
    return badness(metric, getattr(row.metrics, metric), reason)


def _top(rows: list[Row], options: DiffOptions) -> list[Row]:
    """The worst of the rows, in the order that they are in."""
    metric = "peir" if options.sort_by in _ORDERS else options.sort_by
    worst = {row.place for row in _most_telling(rows, metric)[: options.top]}
    return [row for row in rows if row.place in worst]


def _findings(
    reference: Archive,
    candidate: Archive,
    alignment: Alignment,
    parameters: tuple[ModuleParameters, ModuleParameters],
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is suspect about the quantization of each side; the candidate's ranges are also held
    against values."""
    ours, theirs = parameters
    clipped = saturated_pairs(reference, candidate, alignment.pairs, theirs)
    return tuple(suspect(ours)), (*suspect(theirs), *clipped)


def _side(archive: Archive, findings: tuple[Finding, ...], warnings: Sequence[str] = ()) -> Side:
    manifest = archive.manifest
    head = head_to_json(manifest)
    incomplete = [] if manifest.complete else [f"incomplete: {manifest.error or 'killed'}"]
    return Side(
        str(archive.file),
        head["model"],
        head["variant"],
        head["environment"],
        manifest.complete,
        manifest.error,
        (
            *incomplete,
            *failure_warnings(manifest.calls),
            *manifest.skipped.warnings,
            *warnings,
        ),
        findings,
    )


def _require_known(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value!r}: is not known; choose one of {', '.join(known)}")
