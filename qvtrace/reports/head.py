"""What is being compared, as lines of text: both sides, whether they are comparable, coverage."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from qvtrace.comparison.comparison import Comparison, Side
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.rows import Place
from qvtrace.judging.noise_floor import times_floor
from qvtrace.patterns import shown
from qvtrace.reports.formatting import counted, listed, printable
from qvtrace.reports.layout import labelled, separated, words
from qvtrace.reports.qparams import finding_lines
from qvtrace.reports.quantization import calibration_text, is_switched_off, kept_text, types_text
from qvtrace.reports.styled import Styled, styled
from qvtrace.trees import Json

_MODULES_LISTED = 8  # unmatched modules that are named without being asked for
_VERSIONS = (
    "torch",
    "transformers",
    "torchao",
    "bitsandbytes",
    "compressed-tensors",
    "optimum-quanto",
    "tico",
    "gguf",
)
SEPARATOR = " ·"


def head_lines(comparison: Comparison, width: int | None, *, everything: bool) -> Iterator[Styled]:
    """The head of a comparison; `everything` names each unmatched module."""
    reference, candidate = comparison.reference, comparison.candidate
    files = [printable(side.file) for side in (reference, candidate)]
    longest = max(map(len, files))
    for label, file, telling in zip(
        ("reference", "candidate"), files, sides_told(comparison), strict=True
    ):
        pieces = separated([printable(piece) for piece in telling], SEPARATOR)
        yield from labelled(label, [styled(file.ljust(longest) + " "), *pieces], width)
    yield from _comparable_lines(comparison, width)
    yield from labelled("coverage", words(coverage_text(comparison.coverage)), width)
    for text in comparison.portions:
        yield from labelled("stored", words(printable(text)), width)
    yield from _floor_lines(comparison, width)
    yield from _matched_lines(comparison, width)
    limit = None if everything else _MODULES_LISTED
    yield from _unmatched_lines(comparison.coverage, limit, width)
    yield from _wrapper_lines(comparison.coverage, everything, width)
    if comparison.local is not None:
        replayed = f"{printable(comparison.local.file)}, each module on the reference's inputs"
        yield from labelled("local", words(replayed), width)
    for side in filter(None, (reference, candidate, comparison.local)):
        for warning in side.warnings:
            text = f"{printable(side.file)}: {printable(warning)}"
            yield from labelled("warning", words(text, "yellow"), width)
        findings = [f"{side.file}: {finding}" for finding in side.findings]
        yield from finding_lines(findings, width, everything=everything)


def sides_told(comparison: Comparison) -> tuple[list[str], list[str]]:
    """The facts of the reference, and those of the candidate that are not the same."""
    facts = side_facts(comparison.reference)
    others = _different_facts(facts, side_facts(comparison.candidate))
    return list(facts.values()), [*_sameness(comparison), *others]


def side_facts(side: Side) -> dict[str, str]:
    """What a side is, each fact by its name."""
    return model_facts(side.model, side.variant, side.environment)


def model_facts(model: Json, variant: Json, environment: Json) -> dict[str, str]:
    """What ran: model, variant, quantizer, dtype, device, versions, as far as they are known."""
    facts = {
        "class": model.get("class"),
        "model": model.get("name"),
        "variant": variant.get("name"),
        "quantizer": variant.get("quantizer"),
        "quantization": "quantization off, wrappers only" if is_switched_off(variant) else None,
        "types": types_text(variant),
        "kept float": kept_text(variant),
        "calibration": calibration_text(variant),
        "dtype": model.get("dtype"),
        "device": environment.get("device"),
        **{name: _version(environment, name) for name in _VERSIONS},
    }
    return {name: str(fact) for name, fact in facts.items() if fact is not None}


def _version(environment: Json, name: str) -> str | None:
    version = environment.get(name)
    return None if version is None else f"{name} {version}"


def _different_facts(reference: dict[str, str], candidate: dict[str, str]) -> list[str]:
    """The candidate's facts but for those that the reference's line has told."""
    return [
        fact for name, fact in candidate.items() if name == "variant" or reference.get(name) != fact
    ]


def _sameness(comparison: Comparison) -> list[str]:
    """`the same model` where the digests of weights say so, else what is known to be equal."""
    models = comparison.reference.model, comparison.candidate.model
    digests = [model.get("weights_digest") for model in models]
    if digests[0] is not None and digests[0] == digests[1]:
        return ["the same model"]
    return ["the same class"] if models[0].get("class") == models[1].get("class") else []


def _comparable_lines(comparison: Comparison, width: int | None) -> Iterator[Styled]:
    answer, reasons = comparable_text(comparison)
    style = "green" if comparison.comparable.ok else "bold red"
    yield from labelled("comparable", [styled(answer + ":", style), *words(reasons)], width)


def comparable_text(comparison: Comparison) -> tuple[str, str]:
    """`yes` or `no`, and the differences, or what is the same."""
    differences = "; ".join(map(printable, comparison.comparable.differences))
    answer = "yes" if comparison.comparable.ok else "no"
    return answer, differences or _what_is_the_same(comparison)


def _what_is_the_same(comparison: Comparison) -> str:
    model, environment = comparison.reference.model, comparison.reference.environment
    are_private = comparison.reference.private and comparison.candidate.private
    same = ["same inputs by keyed digest" if are_private else "same inputs"]
    if model.get("seed") is not None:
        same.append(f"seed {model['seed']}")
    if environment.get("attention") is not None:
        same.append(f"{printable(str(environment['attention']))} attention")
    return ", ".join(same)


def coverage_text(coverage: Coverage) -> str:
    """`77 of 77 modules, 97 pairs: 3 identical, 0 not comparable`."""
    return (
        f"{coverage.modules_compared} of {counted(coverage.modules_reference, 'module')}, "
        f"{counted(coverage.pairs, 'pair')}: {coverage.identical} identical, "
        f"{coverage.not_comparable} not comparable"
    )


def _floor_lines(comparison: Comparison, width: int | None) -> Iterator[Styled]:
    text = floor_text(comparison)
    if text is not None:
        yield from labelled("floor", words(text), width)


def floor_text(comparison: Comparison) -> str | None:
    """What the noise was measured by, where it was, and how many rows are no more than that."""
    if comparison.floor is None:
        return None
    rows = [*comparison.rows, *comparison.cut]
    found = [times for row in rows if (times := times_floor(row)) is not None]
    modules = {row.module for row in rows}
    measured = {row.module for row in rows if row.floor is not None}
    few = f", which has ONLY {len(measured)} of {counted(len(modules), 'module')}"
    within = sum(times <= 1 for times in found)
    facts = side_facts(comparison.floor)
    told = " ".join(filter(None, (facts.get("variant"), facts.get("dtype"))))
    return (
        f"{printable(comparison.floor.file)} ({printable(told)})"
        f"{few if 2 * len(measured) < len(modules) else ''}: {within} of "
        f"{counted(len(found), 'row')} with a PEIR not above the noise"
    )


def _matched_lines(comparison: Comparison, width: int | None) -> Iterator[Styled]:
    """By which rules rows were matched, unless names were simply equal."""
    rules = Counter(row.matched_by for row in chain(comparison.rows, comparison.cut))
    if set(rules) - {"exact"}:
        pieces = [f"{count} by {printable(rule)}" for rule, count in rules.most_common()]
        yield from labelled("matched", separated(pieces, ","), width)


def _unmatched_lines(coverage: Coverage, limit: int | None, width: int | None) -> Iterator[Styled]:
    for text, modules in unmatched(coverage):
        told = f"{text}: {listed(modules, limit)}"
        yield from labelled("unmatched", words(told, "yellow"), width)


def unmatched(coverage: Coverage) -> Iterator[tuple[str, list[str]]]:
    """`3 only in the reference`, and which modules those are, apart from those that nobody would
    look for on the other side; the same for the candidate."""
    wrappers = set(coverage.wrappers)
    for side, places in _by_side(coverage):
        modules = _unmatched_modules(place for place in places if place.module not in wrappers)
        if modules:
            yield f"{len(modules)} only in the {side}", modules


def _wrapper_lines(coverage: Coverage, everything: bool, width: int | None) -> Iterator[Styled]:
    """How many modules a quantizer put around compared ones, or added."""
    wrappers = set(coverage.wrappers)
    for side, places in _by_side(coverage):
        found = dict.fromkeys(place.module for place in places if place.module in wrappers)
        if found:
            what = counted(len(found), "wrapper or added module", "wrappers and added modules")
            named = f": {listed([*map(shown, found)], None)}" if everything else ""
            yield from labelled("wrappers", words(f"{what} in the {side}{named}", "dim"), width)


def _by_side(coverage: Coverage) -> tuple[tuple[str, tuple[Place, ...]], ...]:
    return (
        ("reference", coverage.only_in_reference),
        ("candidate", coverage.only_in_candidate),
    )


def _unmatched_modules(places: Iterable[Place]) -> list[str]:
    """Modules, from which call on when it is not the first, and how many places each has."""
    of_module: dict[str, list[Place]] = {}
    for place in places:
        of_module.setdefault(place.module, []).append(place)
    modules = []
    for name, missing in of_module.items():
        first = min(place.call for place in missing)
        label = f"{shown(name)}#{first}" if first else shown(name)
        modules.append(f"{label} ({len(missing)} places)" if len(missing) > 1 else label)
    return modules
