"""What became of a recording, as lines of text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvtrace.manifest import StepEntry, VariantInfo
from qvtrace.patterns import folded
from qvtrace.reports.formatting import byte_size, counted, duration, listed, printable
from qvtrace.reports.layout import labelled, words
from qvtrace.reports.quantization import is_switched_off, otherwise_texts, types_text
from qvtrace.reports.styled import Styled

if TYPE_CHECKING:
    from qvtrace.models.generation import Generation
    from qvtrace.recording.options import RecordingReport
    from qvtrace.replayer import ReplayReport

MODULES_LISTED = 4  # kinds of names, at the end of a recording


@dataclass(frozen=True)
class Outcome:
    """What came of a recording, and what is to be said of the model."""

    report: "RecordingReport"
    variant: VariantInfo
    warnings: tuple[str, ...] = ()
    generation: "Generation | None" = None


def recording_lines(outcome: Outcome, width: int | None) -> Iterator[Styled]:
    """Where the archive is and how large, what was recorded, what was skipped and why."""
    report = outcome.report
    archive = (
        f"{printable(str(report.file))} {byte_size(report.size)}, {counted(report.calls, 'call')} "
        f"in {duration(report.seconds)}"
    )
    yield from labelled("archive", words(archive), width)
    yield from _module_lines(outcome, width)


def in_flight_lines(outcome: Outcome, width: int | None) -> Iterator[Styled]:
    """What was compared as it happened, what was skipped and why."""
    report = outcome.report
    compared = (
        f"{counted(report.calls, 'call')} in {duration(report.seconds)}, as they happened; "
        f"{byte_size(report.distinct_bytes)} not stored"
    )
    yield from labelled("compared", words(compared), width)
    yield from _module_lines(outcome, width)


def dry_run_lines(outcome: Outcome, width: int | None) -> Iterator[Styled]:
    """What a recording would store, last the size of the file that it would write."""
    report = outcome.report
    yield from _module_lines(outcome, width)
    for kind, count in report.bytes_by_kind.items():
        yield from labelled(kind, words(byte_size(count)), width)
    places = (
        f"{counted(report.places, 'tensor')} at {counted(report.calls, 'call')}, "
        f"{byte_size(report.place_bytes)}"
    )
    yield from labelled("places", words(places), width)
    distinct = f"{byte_size(report.distinct_bytes)}, equal contents counted once"
    yield from labelled("distinct", words(distinct), width)
    yield from labelled("time", words(duration(report.seconds)), width)
    yield from labelled("file", words(f"{byte_size(report.size)}, not written"), width)


def replay_lines(report: "ReplayReport", width: int | None) -> Iterator[Styled]:
    """Where the archive of a replay is and how large, what was replayed, what was not and why."""
    archive = (
        f"{printable(str(report.file))} {byte_size(report.size)}, {counted(report.calls, 'call')} "
        f"in {duration(report.seconds)}"
    )
    yield from labelled("archive", words(archive), width)
    modules = f"{report.modules} of {counted(report.chosen, 'module')} replayed"
    yield from labelled("modules", words(modules), width)
    yield from skipped_lines(report.skipped, {}, width)


def skipped_lines(
    reasons: Mapping[str, Sequence[str]],
    opaque: Mapping[str, int],
    width: int | None,
    *,
    limit: int | None = MODULES_LISTED,
) -> Iterator[Styled]:
    """Which modules and which values were not stored, and why; at most `limit` names of a kind,
    those that differ in numbers only counted as one."""
    for reason, modules in reasons.items():
        text = (
            f"{counted(len(modules), 'module')}, {printable(reason)}: "
            f"{listed(folded(modules), limit)}"
        )
        yield from labelled("skipped", words(text), width)
    for reason, count in opaque.items():
        text = f"{counted(count, 'value')} by type only: {printable(reason)}"
        yield from labelled("skipped", words(text), width)


def quantizer_lines(
    variant: VariantInfo, width: int | None, *, limit: int | None = MODULES_LISTED
) -> Iterator[Styled]:
    """What was quantized, and what of its kind was left float."""
    if variant.quantizer is None:
        return
    text = f"{printable(variant.quantizer)}: {counted(len(variant.quantized), 'module')}"
    types = types_text({"settings": variant.settings})
    if types is not None:
        text += f"; tensors of the file: {printable(types)}"
    if is_switched_off({"settings": variant.settings}):
        text += ", wrappers only: quantization is off"
    if variant.left_float:
        left = listed(folded(variant.left_float), limit)
        text += f"; {len(variant.left_float)} left float: {left}"
    text += "".join(f"; {printable(each)}" for each in otherwise_texts(variant.settings))
    yield from labelled("quantized", words(text), width)


def _about_tokens(steps: Sequence[StepEntry], generation: "Generation") -> Iterator[str]:
    """How many tokens there are, whose they are, and where the model ends or differs."""
    fed = generation.fed_from
    yield counted(len(steps), "token") + ("" if fed is None else f", fed from {printable(fed)}")
    different = next((step for step in steps if step.chosen != step.taken), None)
    if different is not None:
        yield _about_difference(
            different, sum(step.chosen == step.taken for step in steps), len(steps)
        )
    elif fed is not None:
        yield "the model would have gone on with the same tokens"
    end = next((step for step in steps if generation.ends.intersection(step.chosen)), None)
    if end is not None:
        yield f"the model ends the text at step {end.step}; the recording goes on"


def _about_difference(step: StepEntry, same: int, steps: int) -> str:
    pairs = zip(step.chosen, step.taken, strict=True)
    sequence, (chosen, taken) = next(
        (number, pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]
    )
    of_batch = f" of sequence {sequence}" if sequence else ""
    return (
        f"first token that differs: step {step.step}{of_batch}, the model would have gone on with "
        f"{chosen} in place of {taken}; {same} of {counted(steps, 'step')} the same"
    )


def _module_lines(outcome: Outcome, width: int | None) -> Iterator[Styled]:
    report = outcome.report
    modules = f"{report.registered} registered, {report.called} called, {report.recorded} recorded"
    yield from labelled("modules", words(modules), width)
    yield from skipped_lines(report.reasons, report.opaque, width)
    yield from quantizer_lines(outcome.variant, width)
    if outcome.generation is not None and report.steps:
        for line in _about_tokens(report.steps, outcome.generation):
            yield from labelled("generated", words(line), width)
    for warning in (*outcome.warnings, *report.warnings):
        yield from labelled("warning", words(printable(warning), "yellow"), width)
