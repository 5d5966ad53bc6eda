"""Two archives -> a comparison: rows, coverage, whether they are comparable, a verdict."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeAlias, Unpack

from qvtrace.archive import Archive
from qvtrace.collector import without_collector
from qvtrace.comparison.additions import find_additions
from qvtrace.comparison.alignment import Alignment, align
from qvtrace.comparison.comparability import comparable, inputs_told
from qvtrace.comparison.comparison import Comparison, Side
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.coverage import cover
from qvtrace.comparison.edits import Edits, find_edits
from qvtrace.comparison.explanations import Explainer, Explanation
from qvtrace.comparison.final_shares import find_ways
from qvtrace.comparison.floor_measurement import Measured, measure_floor
from qvtrace.comparison.fusion import fused
from qvtrace.comparison.grouping import roll_up
from qvtrace.comparison.kindred_factors import kindred_factors
from qvtrace.comparison.logits import logits_of
from qvtrace.comparison.noise import call_noises, rounding_noise, with_local, with_noise
from qvtrace.comparison.options import DiffKeywords, DiffOptions
from qvtrace.comparison.ordering import in_order, top
from qvtrace.comparison.origin_search import find_origins
from qvtrace.comparison.origins import Origins
from qvtrace.comparison.portions import portion_texts, told_of_samples
from qvtrace.comparison.replayed_rows import judged_alike, telling
from qvtrace.comparison.replayed_sizes import find_sizes
from qvtrace.comparison.rotating import Declared
from qvtrace.comparison.rotation_files import load_rotations, require_modules
from qvtrace.comparison.row_building import RowBuilder
from qvtrace.comparison.rows import WEIGHTS, Row
from qvtrace.comparison.tokens import compare_tokens
from qvtrace.comparison.verdict import Evidence, judge
from qvtrace.comparison.weight_pairs import WeightPairs, pair_weights
from qvtrace.comparison.weight_rows import WeightRows, require_weights
from qvtrace.errors import UsageError
from qvtrace.failures import failure_warnings
from qvtrace.manifest import CallEntry
from qvtrace.manifest_json import head_to_json
from qvtrace.metrics.names import LOCAL_METRICS
from qvtrace.patterns import require_matches, select
from qvtrace.qparams.findings import Finding, parameters_of, suspect
from qvtrace.qparams.parameters import ModuleParameters, Parameters
from qvtrace.qparams.saturation import saturated_pairs

Source: TypeAlias = str | os.PathLike[str] | Archive


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
    each row has its difference there as `floor`, and the verdict names what is above it. `local` is
    a replay of the candidate's model on the reference's inputs: what its modules give tells their
    own error from what they inherited. `keywords` are fields of `DiffOptions` and win over
    `options`. Where digests tell tensors equal, none is read. Raises `UsageError` for unusable
    options, and children of `ArchiveError` for files that cannot.
    """
    options = replace(options or DiffOptions(), **keywords)  # type: ignore[arg-type]
    with without_collector(), ExitStack() as opened:
        archives = open_source(reference, opened), open_source(candidate, opened)
        noise, replayed = (
            None if source is None else open_source(source, opened) for source in (floor, local)
        )
        return compare_archives(*archives, noise, replayed, options)


def compare_archives(
    reference: Archive,
    candidate: Archive,
    floor: Archive | None,
    local: Archive | None,
    options: DiffOptions,
    contents: ContentPairs | None = None,
) -> Comparison:
    """The same for archives that are open; `contents` may have been looked at before."""
    if local is not None and options.sort_by is None:
        options = replace(options, sort_by="local_noise")
    _hide_folders([reference, candidate, *filter(None, (floor, local))])
    replayed = _replayed(reference, local, options)
    rotations = _declared(options, reference)
    chosen = _choose(reference, candidate, options)
    built = RowBuilder(
        reference,
        candidate,
        options.path,
        chosen.everything.pairs,
        details=options.details,
        contents=contents,
        rotations=rotations,
        per_sample=options.per_sample,
    )
    if options.path != WEIGHTS:
        _add_calls(built, chosen.alignment)
    weight_rows = WeightRows(built, reference, candidate, chosen.everything)
    weight_rows.add(chosen.weights)
    built.compare()
    coverage = cover(built, chosen.alignment)
    comparability = comparable(reference, candidate)
    manifests = reference.manifest, candidate.manifest
    tokens = compare_tokens(*manifests)
    logits = logits_of(built.contents, chosen.everything.pairs)
    parameters = parameters_of(reference), parameters_of(candidate)
    findings = _findings(built.contents, chosen.alignment, parameters)
    modules = {row.module for row in built.of_calls()}
    measured = measure_floor(modules, reference, floor, options, rotations)
    quantized = _quantized(candidate, parameters[1], chosen.everything)
    is_replay = candidate.manifest.recorded_by == "replay"
    edits = find_edits(reference, candidate, chosen.everything.pairs)
    rows, origins = _with_noise(
        built, replayed, measured, options, quantized, edits, is_replay=is_replay
    )
    executed = told_of_samples(weight_rows.finish(rows))
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
        logits,
        built.contents.rotations,
    )
    ordered = in_order(executed, options.order)
    is_cut = options.top is not None and not options.group_by
    shown, cut = top(ordered, options, chosen.valued) if is_cut else (ordered, [])
    groups = roll_up(executed, built.sums(), options) if options.group_by else []
    return Comparison(
        _side(reference, findings[0]),
        _side(candidate, findings[1], chosen.alignment.warnings),
        comparability,
        coverage,
        tuple(shown),
        judge(evidence),
        complete=not cut and not options.metrics,
        options=options,
        tokens=tokens,
        floor=None if floor is None else _side(floor, ()),
        portions=portion_texts(executed),
        quantization=_quantization(
            parameters, chosen.everything, None if options.details else chosen.valued
        ),
        elements=dict(built.elements(chosen.valued, options.values_limit)),
        local=None if local is None else _side(local, (), _doubts(reference, candidate, local)),
        logits=logits,
        inputs=inputs_told(reference, candidate),
        groups=tuple(groups),
        explanations=_explanations(built, reference, chosen.explained, options),
        cut=tuple(cut),
    )


def _with_noise(
    built: RowBuilder,
    replayed: Sequence[Row],
    floor: Measured | None,
    options: DiffOptions,
    quantized: set[str],
    edits: Edits,
    *,
    is_replay: bool,
) -> tuple[list[Row], Origins]:
    """The rows with the noise of their calls, and where that comes in. `is_replay`: that of a call
    of the candidate is its own."""
    of_calls = built.of_calls()
    alike = judged_alike(of_calls, replayed)
    local = of_calls if is_replay and not replayed else telling(of_calls, alike)
    noises = call_noises(of_calls, built.calls, local, built.without_inputs)
    again = partial(_with_noise, built, replayed, floor, options, quantized, edits)
    if built.rejudge(kindred_factors(noises)):
        return again(is_replay=is_replay)
    # Only of a replay or beside one: elements are read again for it.
    tensors = built.tensors() if local else {}
    additions = find_additions(noises, tensors, built.contents) if replayed else {}
    origins = find_origins(
        noises,
        rounding_noise(of_calls),
        unsure=built.contents.rotations.noise,
        narrowed=bool(options.include or options.exclude),
        floor=None if floor is None else floor.levels,
        quantized=quantized,
        additions=additions,
        edits=edits,
        sizes=find_sizes(noises, tensors, built.contents),
        ways=find_ways(noises, additions, tensors, built.contents) if replayed else {},
    )
    if built.rejudge(origins.refuted):
        return again(is_replay=is_replay)
    rows = with_local(with_noise(built.rows, noises), alike)
    return rows if floor is None else floor.on(rows), origins


@dataclass(frozen=True)
class _Chosen:
    """What of two archives is compared, and of which modules more is wanted."""

    everything: Alignment
    alignment: Alignment  # of the modules that patterns leave
    weights: WeightPairs
    valued: set[str]
    explained: set[str]


def _choose(reference: Archive, candidate: Archive, options: DiffOptions) -> _Chosen:
    manifests = reference.manifest, candidate.manifest
    everything = fused(align(*manifests, options.maps), *manifests)
    weights = _weights(reference, candidate, everything, options)
    valued = _modules(everything, weights, options.values, "--values")
    explained = _modules(everything, weights, options.explain, "--explain")
    return _Chosen(everything, *_filtered(everything, weights, options), valued, explained)


def _quantization(
    parameters: tuple[ModuleParameters, ModuleParameters],
    alignment: Alignment,
    modules: set[str] | None,
) -> dict[str, tuple[tuple[Parameters, ...], tuple[Parameters, ...]]]:
    """How both sides of these modules are quantized; None: of all that are paired."""
    return {
        pair.reference.module: (
            tuple(parameters[0].of(pair.reference.module)),
            tuple(parameters[1].of(pair.candidate.module)),
        )
        for pair in alignment.pairs
        if modules is None or pair.reference.module in modules
    }


def _quantized(candidate: Archive, parameters: ModuleParameters, alignment: Alignment) -> set[str]:
    """The reference's names of modules that are known to be quantized in the candidate."""
    known = set(candidate.manifest.variant.quantized)
    names = {pair.candidate.module: pair.reference.module for pair in alignment.pairs}
    return {own for name, own in names.items() if name in known or parameters.of(name)}


def _explanations(
    built: RowBuilder, reference: Archive, modules: set[str], options: DiffOptions
) -> tuple[Explanation, ...]:
    if not modules:
        return ()
    places = built.places(modules, with_inputs=options.path == "output")
    return Explainer(built.contents, reference.manifest).explain(places)


def _hide_folders(archives: Sequence[Archive]) -> None:
    """Beside one archive that is private, none is called by its folder."""
    if any(archive.is_private for archive in archives):
        for archive in archives:
            archive.label = archive.file.name


def _replayed(reference: Archive, local: Archive | None, options: DiffOptions) -> Sequence[Row]:
    """What a replay gives, compared with what the reference gave."""
    check_local(reference, local, options)
    if local is None:
        return ()
    manifests = reference.manifest, local.manifest
    pairs = fused(align(*manifests), *manifests).pairs
    built = RowBuilder(reference, local, "output", pairs, per_sample=options.per_sample)
    for pair in pairs:
        built.add(pair)
    built.compare()
    return built.rows


def _declared(options: DiffOptions, reference: Archive) -> Declared | None:
    """The rotations that the candidate is said to have."""
    if options.transform is None:
        return None
    declared = load_rotations(options.transform)
    modules = reference.manifest.modules
    names = {name for module in modules for name in (module.name, *module.aliases)}
    require_modules(declared, options.transform, names)
    return declared


def check_local(reference: Archive, local: Archive | None, options: DiffOptions) -> None:
    """Raise `UsageError` for an archive that is no replay, or for metrics that need one."""
    if local is None:
        named = [("--sort-by", options.order), *(("--metrics", name) for name in options.metrics)]
        for option, metric in named:
            if metric in LOCAL_METRICS:
                raise UsageError(
                    f"{option} {metric}: is of a replay; give one with --local ARCHIVE"
                )
    elif local.manifest.recorded_by != "replay":
        raise UsageError(
            f"--local {local.file}: is no replay; make one with `qvtrace replay {reference.file}`"
        )


def _doubts(reference: Archive, candidate: Archive, local: Archive) -> list[str]:
    """Why a replay may not be of these two."""
    replayed = local.manifest.settings.get("replayed")
    of = replayed.get("created") if isinstance(replayed, dict) else None
    doubts = []
    if of != reference.manifest.created:
        doubts.append(f"is not a replay of {reference.label}, but of another recording")
    quantizers = [side.manifest.variant.quantizer for side in (candidate, local)]
    if quantizers[0] != quantizers[1]:
        doubts.append(f"quantized by {quantizers[1]}, the candidate by {quantizers[0]}")
    return doubts


def open_source(source: Source, opened: ExitStack) -> Archive:
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


def _modules(
    alignment: Alignment, weights: WeightPairs, patterns: Sequence[str], option: str
) -> set[str]:
    """The modules of which more is wanted than of others; none without patterns."""
    if not patterns:
        return set()
    names = _names(alignment, weights)
    require_matches(names, patterns, option)
    return select(names, include=patterns)


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


def _findings(
    contents: ContentPairs,
    alignment: Alignment,
    parameters: tuple[ModuleParameters, ModuleParameters],
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """What is suspect about the quantization of each side; the candidate's ranges are also held
    against values."""
    ours, theirs = parameters
    clipped = saturated_pairs(contents, alignment.pairs, theirs)
    return tuple(suspect(ours)), (*suspect(theirs), *clipped)


def _side(archive: Archive, findings: tuple[Finding, ...], warnings: Sequence[str] = ()) -> Side:
    manifest = archive.manifest
    head = head_to_json(manifest)
    incomplete = [] if manifest.complete else [f"incomplete: {manifest.error or 'killed'}"]
    return Side(
        archive.label,
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
        archive.is_private,
    )
