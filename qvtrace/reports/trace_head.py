"""What ran and what was recorded of it, as lines of text."""

from collections.abc import Iterator
from dataclasses import asdict

from qvtrace.archive import Archive
from qvtrace.manifest import Manifest
from qvtrace.reports.formatting import byte_size, counted, printable
from qvtrace.reports.head import SEPARATOR, model_facts
from qvtrace.reports.layout import labelled, separated, words
from qvtrace.reports.recording import quantizer_lines, skipped_lines
from qvtrace.reports.styled import Styled
from qvtrace.trees import Json


def head_lines(archive: Archive, width: int | None) -> Iterator[Styled]:
    """Everything that an archive says of itself but for its calls."""
    manifest = archive.manifest
    about = [
        printable(archive.label),
        byte_size(archive.size),
        f"format {manifest.format}",
        f"qvtrace {printable(manifest.qvtrace)}",
        printable(manifest.created),
    ]
    yield from labelled("archive", separated(about, SEPARATOR), width)
    model, variant = asdict(manifest.model), asdict(manifest.variant)
    model["class"] = manifest.model.class_name
    facts = [printable(fact) for fact in model_facts(model, variant, manifest.environment).values()]
    yield from labelled("model", separated(facts, SEPARATOR), width)
    yield from labelled("inputs", separated(_source(manifest), SEPARATOR), width)
    yield from labelled("ran with", separated(_environment(manifest), SEPARATOR), width)
    contains = ", ".join(map(printable, manifest.contains)) or "nothing"
    yield from labelled("contains", words(contains), width)
    yield from _recorded_lines(manifest, width)


def _recorded_lines(manifest: Manifest, width: int | None) -> Iterator[Styled]:
    skipped = manifest.skipped
    text = (
        f"{skipped.registered} modules registered, {skipped.called} called, "
        f"{skipped.recorded} recorded; {counted(len(manifest.calls), 'call')}, "
        f"{counted(len(manifest.tensors), 'tensor')}"
    )
    if manifest.weights is not None:
        text += f", {counted(len(manifest.weights), 'weight')}"
    yield from labelled("recorded", words(text), width)
    yield from quantizer_lines(manifest.variant, width, limit=None)
    yield from skipped_lines(skipped.reasons, skipped.opaque, width, limit=None)
    if not manifest.complete:
        text = f"incomplete: {printable(manifest.error or 'the recording did not end')}"
        yield from labelled("warning", words(text, "bold red"), width)
    for warning in skipped.warnings:
        yield from labelled("warning", words(printable(warning), "yellow"), width)


def _source(manifest: Manifest) -> list[str]:
    facts = _facts(manifest.inputs.source)
    first = manifest.inputs.given or next(iter(manifest.inputs.root_calls), None)
    digests = [] if first is None else [printable(f"digest {first.digest}")]
    steps = [counted(len(manifest.steps), "step")] if manifest.steps else []
    return [*facts, counted(len(manifest.inputs.root_calls), "root call"), *steps, *digests]


def _environment(manifest: Manifest) -> list[str]:
    return _facts(manifest.environment) or ["unknown"]


def _facts(json: Json) -> list[str]:
    """What a JSON object says, in words."""
    return [
        printable(_words(value) if name == "kind" else f"{name} {_words(value)}")
        for name, value in json.items()
        if value not in (None, [], {}, "")
    ]


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
