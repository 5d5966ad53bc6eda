"""The answer in one line: what failed, where error comes in, what is worst, what is new that is not
finite, and how much was compared."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from qvtrace.comparison.answer import answer
from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.factor_faults import factor_faults, scaled_text, with_factors
from qvtrace.comparison.logits import Logits, logits_text
from qvtrace.comparison.noise import is_output
from qvtrace.comparison.origins import Origin, Origins
from qvtrace.comparison.rotating import Rotations
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import COMPARED, FailedCall, Row
from qvtrace.comparison.tokens import Tokens
from qvtrace.comparison.transforms import are_equal_after_transform, transforms_text
from qvtrace.judging.decision import Case, decide
from qvtrace.judging.gates import Gate, GateResult, Scope
from qvtrace.manifest import Manifest
from qvtrace.qparams.findings import Finding

_SAME = frozenset({"identical", "exact", "opaque"})


@dataclass(frozen=True)
class Verdict:
    """The answer in one line, and where the error comes in."""

    text: str
    exit_code: int  # 0: every gate held, 1: one failed, 3: nothing was comparable
    gates: tuple[GateResult, ...] = ()
    origins: tuple[Origin, ...] = ()  # the most important first
    lines: tuple[str, ...] = ()  # of the origins, in words: the answer
    findings: tuple[str, ...] = ()  # what the text says but for the gates

    @property
    def around(self) -> tuple[str, str]:
        """What the text says before and after its origins."""
        before, _, after = self.text.partition(self.lines[0])
        return before.removesuffix("; "), after.removeprefix("; ")

    @property
    def further(self) -> tuple[str, ...]:
        """The lines that the text does not begin with."""
        return self.lines[1:] if self.origins else self.lines


@dataclass(frozen=True)
class Evidence:
    """What a verdict is made from: everything that was compared, in order of execution."""

    rows: Sequence[Row]
    coverage: Coverage
    comparable: Comparable
    origins: Origins
    reference: Manifest
    candidate: Manifest
    filters: str = ""  # what narrowed the rows, as it was asked for
    tokens: Tokens | None = None  # of two generations
    gates: Sequence[Gate] = ()
    findings: Sequence[Finding] = ()  # of the candidate's quantization parameters
    logits: Logits | None = None  # of a language model
    rotations: Rotations = field(default_factory=Rotations)  # of the candidate's vectors


def judge(evidence: Evidence) -> Verdict:
    """What is to be said, the loudest first.

    Raises `UsageError` for a gate whose pattern matches nothing.
    """
    origins, is_equal = _origins(evidence)
    faults = factor_faults(evidence.rows)
    origins = with_factors(origins, faults)
    has_fault = bool(faults) and not origins.found
    lines = answer(
        origins,
        RowNames(evidence.rows),
        _final(evidence),
        is_clear=not (is_equal or has_fault),
        hint=_hint(evidence),
    )
    first = lines[:1] if origins.found else ()
    findings = tuple(_findings(evidence, first, is_equal=is_equal, has_fault=has_fault))
    case = Case(
        Scope.of(evidence.rows, evidence.coverage, evidence.logits),
        findings,
        evidence.coverage.compared,
        is_trusted=evidence.comparable.same_inputs
        and not evidence.comparable.swapped
        and evidence.reference.complete
        and evidence.candidate.complete,
    )
    decision = decide(case, evidence.gates)
    return Verdict(
        decision.text,
        decision.exit_code,
        decision.gates,
        origins.found,
        lines,
        findings,
    )


def _origins(evidence: Evidence) -> tuple[Origins, bool]:
    """One answer: where transforms leave nothing but rounding, nothing is blamed; a floor's noise
    may hide a place that its own noise tells."""
    origins, rows = evidence.origins, evidence.rows
    if not are_equal_after_transform(rows, evidence.rotations):
        return origins, False
    has_floor = any(row.floor is not None for row in rows)
    if origins.found and has_floor:
        return origins, False
    return replace(origins, found=(), noises=(), alone=(), before=None), True


def _hint(evidence: Evidence) -> str:
    """What it does not mean that no place of a quantized model is unusual."""
    has_floor = any(row.floor is not None for row in evidence.rows)
    is_quantized = evidence.origins.quantized or evidence.candidate.variant.quantizer is not None
    if not is_quantized or has_floor or evidence.origins.local is not None:
        return ""
    return "a fault below quantization's own noise shows only with --floor or --local"


def _findings(
    evidence: Evidence, first: Sequence[str], *, is_equal: bool, has_fault: bool
) -> list[str]:
    """The loudest first: what takes all else away from under the numbers, then the answer."""
    name = RowNames(evidence.rows)
    return [
        *_doubts(evidence),
        *_nonfinite(evidence.rows, name),
        *first,
        *transforms_text(evidence.rows, evidence.rotations, equal=is_equal),
        *(_factor_fault(evidence.rows, name) if has_fault else ()),
        *_worst(evidence.rows, name),
        *([logits_text(evidence.logits)] if evidence.logits else []),
        *_first(evidence.rows, name),
        *_tokens(evidence.tokens),
        *_ranges(evidence.findings),
        *_mismatches(evidence.rows, name),
        *_routing(evidence.rows, name),
        *_not_comparable(evidence.rows, name),
        *_without_elements(evidence.rows, name),
        *_failed(evidence.coverage.failed, name),
        _modules(evidence),
    ]


def _final(evidence: Evidence) -> float | None:
    """The noise of what the model gives, in its last call; None where that is not known."""
    roots = {(call.module, call.index) for call in evidence.reference.calls if call.parent is None}
    outputs = [row for row in evidence.rows if is_output(row) and (row.module, row.call) in roots]
    last = max(((row.sample, row.step, row.call) for row in outputs), default=None)
    noises = [
        row.metrics.noise_out
        for row in outputs
        if (row.sample, row.step, row.call) == last and row.metrics.noise_out is not None
    ]
    return max(noises, default=None)


def _doubts(evidence: Evidence) -> Iterator[str]:
    """Why the numbers may not mean what they seem to mean."""
    coverage = evidence.coverage
    if not coverage.compared:
        yield f"nothing was comparable: {_why_nothing(evidence)}"
    elif 2 * coverage.modules_compared < coverage.modules_reference:
        yield (
            f"ONLY {coverage.modules_compared} of {coverage.modules_reference} modules compared: "
            f"{_why_few(evidence)}"
        )
    if not evidence.comparable.ok:
        yield f"not comparable: {evidence.comparable.differences[0]}"
    if evidence.comparable.swapped:
        yield (
            "the archives look SWAPPED: the reference is quantized, the candidate is not; "
            "give the float one first"
        )
    for side, manifest in (("reference", evidence.reference), ("candidate", evidence.candidate)):
        if not manifest.complete:
            yield f"the {side} is incomplete ({manifest.error or 'its recording was killed'})"
    variant = evidence.candidate.variant
    if variant.quantizer is not None and variant.settings.get("no_quantize") is True:
        yield f"{variant.quantizer} with quantization off: what differs comes from its wrappers"
    elif variant.quantizer is not None and not variant.quantized:
        yield f"the quantizer {variant.quantizer} {_what_it_did(evidence)}"
    experts = variant.settings.get("float_experts")
    if isinstance(experts, dict) and isinstance(share := experts.get("share"), int | float):
        yield f"fused experts stayed float, {share:.0%} of the weights"


def _what_it_did(evidence: Evidence) -> str:
    """Of a quantizer of which no module is known that it changed: that it changed none is only said
    where nothing differs either."""
    otherwise = evidence.candidate.variant.settings.get("otherwise")
    if isinstance(otherwise, list) and otherwise:
        return f"quantized NO module that is known ({'; '.join(map(str, otherwise))})"
    different = sum(row.status not in _SAME for row in evidence.rows)
    if different:
        return f"names NO module that it changed, yet {_counted(different, 'row')} differ"
    return "changed NO module"


def _why_few(evidence: Evidence) -> str:
    candidate = evidence.candidate
    if any(_is_unknown(row) for row in evidence.rows):
        return "of the others no elements were stored"
    if not candidate.complete:
        return "the candidate's recording ended early"
    if candidate.settings.get("include") or candidate.settings.get("exclude"):
        return "the candidate was recorded with --include or --exclude"
    return "if the candidate names its modules otherwise, map them with --map"


def _why_nothing(evidence: Evidence) -> str:
    coverage = evidence.coverage
    if not evidence.reference.calls or not evidence.candidate.calls:
        side = "candidate" if evidence.reference.calls else "reference"
        return f"the {side} holds no call"
    if coverage.pairs:
        why = ", no elements were stored" if any(map(_is_unknown, evidence.rows)) else ""
        return f"{coverage.pairs} pairs, none of which can be compared{why}"
    if coverage.only_in_reference and coverage.only_in_candidate:
        return "no module of one side is on the other, map names with --map"
    if coverage.only_in_reference or coverage.only_in_candidate:
        side = "reference" if coverage.only_in_reference else "candidate"
        return f"only the {side} holds what was asked for"
    return "neither side holds what was asked for"


def _nonfinite(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    found = [row for row in rows if row.status == "nonfinite"]
    new = {
        "NaN": [(row, count) for row in found if (count := _new_nan(row))],
        "infinities": [(row, count) for row in found if (count := _new_inf(row))],
    }
    for what, introduced in sorted(new.items(), key=lambda item: _first_order(item[1])):
        if introduced:
            first, count = introduced[0]
            yield (
                f"{what} introduced, first in {name(first)} ({_counted(count, 'element')}), "
                f"in {_counted(len(introduced), 'row')}"
            )
    if found and not any(new.values()):
        rows_found = _counted(len(found), "row")
        yield f"NaN, infinities or masks differ, first in {name(found[0])}, in {rows_found}"


def _new_nan(row: Row) -> int:
    return 0 if row.nonfinite is None else row.nonfinite.new_nan


def _new_inf(row: Row) -> int:
    return 0 if row.nonfinite is None else row.nonfinite.new_inf


def _first_order(introduced: Sequence[tuple[Row, int]]) -> float:
    return introduced[0][0].order if introduced else math.inf


def _first(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    """Where the two begin to differ; the worst place is told anyway."""
    floats = [row for row in rows if row.status in ("ok", "nonfinite")]
    different = [row for row in floats if not _is_exact(row) and not row.is_made_up_for]
    if len(different) > 1:
        yield f"first difference: {name(different[0])}"


def _ranges(findings: Sequence[Finding]) -> Iterator[str]:
    if findings:
        yield f"{_counted(len(findings), 'suspect quantization range')}, first {findings[0]}"


def _is_exact(row: Row) -> bool:
    """A sample is of two tensors that differ, wherever they do."""
    return row.status == "ok" and row.metrics.max_abs_error == 0 and row.sampled is None


def _is_unknown(row: Row) -> bool:
    """Whether two tensors differ, and nobody knows by how much."""
    return row.status == "opaque" and row.has_no_elements


def _worst(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    telling = [row for row in rows if not row.is_made_up_for]
    has_factors = len(telling) < len(rows)
    sized = [row for row in telling if not row.peaks_at_mask]
    measured = [(row, peir) for row in sized if (peir := row.metrics.peir) is not None]
    undefined = [
        row for row in telling if row.status in ("ok", "nonfinite") and row.metrics.peir is None
    ]
    worst, peir = max(measured, key=lambda pair: pair[1], default=(None, 0.0))
    if worst is not None and peir > 0:
        yield f"worst: {name(worst)}, PEIR {peir:.3g}"
    elif rows and all(row.status in ("identical", "exact") for row in rows):
        yield "no difference in any pair"
    elif any(map(_is_unknown, rows)):
        pass  # which is told by itself
    elif (measured or has_factors) and len(sized) == len(telling):
        beyond = " beyond factors" if has_factors else ""
        where = " in what was sampled" if any(row.sampled for row in rows) else ""
        other = "no other" if any(row.status == "nonfinite" for row in rows) else "no"
        yield f"{other} difference between floating-point values{where}{beyond}"
    if undefined:
        yield f"PEIR undefined in {_counted(len(undefined), 'row')}, first in {name(undefined[0])}"
    may_have_nan = any(_is_unknown(row) and row.nonfinite is None for row in rows)
    has_new = any(row.nonfinite is not None and row.nonfinite.introduced for row in rows)
    if (measured or undefined or has_factors) and not has_new | may_have_nan:
        yield "no NaN introduced"


def _tokens(tokens: Tokens | None) -> Iterator[str]:
    """What the candidate would have gone on with."""
    if tokens is None:
        return
    if tokens.first is None:
        yield f"the same token in every step, {tokens.compared} of {tokens.compared}"
        return
    first = tokens.first
    sequence = f" of sequence {first.sequence}" if first.sequence else ""
    yield (
        f"first token that differs: step {first.step}{sequence}, {first.candidate} in place of "
        f"{first.reference}, {tokens.agreed} of {tokens.compared} the same"
    )


def _mismatches(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    found = [row for row in rows if row.status == "mismatch"]
    if found:
        what = "integers or plain values differ"
        yield f"{what} in {_counted(len(found), 'row')}, first in {name(found[0])}"


def _routing(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    found = [row for row in rows if row.status == "routing"]
    if found:
        how_many = _counted(len(found), "pair")
        yield f"experts saw other tokens in {how_many}, first {name(found[0])}: {found[0].reason}"


def _not_comparable(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    """Opaque objects of one type are no finding: nobody could compare them."""
    told = (*COMPARED, "opaque", "routing")
    found = [row for row in rows if row.status not in told]
    if found:
        pairs = _counted(len(found), "pair")
        yield f"{pairs} not comparable, first {name(found[0])} ({found[0].reason})"


def _without_elements(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    """Differences of which nobody knows how large they are."""
    found = [row for row in rows if _is_unknown(row)]
    if found:
        differ = f"{_counted(len(found), 'pair')} without elements, how far apart is not known"
        yield f"{differ}, first {name(found[0])} ({found[0].undefined['max_abs_error']})"


def _failed(calls: Sequence[FailedCall], name: RowNames) -> Iterator[str]:
    """Calls that raised or did not return: their modules were compared less than it seems."""
    kinds = {
        "on both sides": [call for call in calls if call.reference and call.candidate],
        "in the reference only": [call for call in calls if not call.candidate],
        "in the candidate only": [call for call in calls if not call.reference],
    }
    for where, found in kinds.items():
        if found:
            first = found[0]
            fate = first.reference or first.candidate
            number = _counted(len(found), "call")
            yield f"{number} without an output {where}, first {name(first.place)} ({fate})"


def _factor_fault(rows: Sequence[Row], name: RowNames) -> Iterator[str]:
    """Where a factor comes in that nothing takes out again, and in how many rows it shows."""
    first, *others = factor_faults(rows)
    more = f", {_counted(1 + len(others), 'row')} scaled so" if others else ""
    yield f"a factor is the fault: {name(first)} is {scaled_text(first)}{more}"


def _modules(evidence: Evidence) -> str:
    coverage = evidence.coverage
    modules = _counted(coverage.modules_reference, "module")
    filters = f" ({evidence.filters})" if evidence.filters else ""
    return f"{coverage.modules_compared} of {modules} compared{filters}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
