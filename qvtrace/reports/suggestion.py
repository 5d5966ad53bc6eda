"""A suggestion as lines of text and as JSON: every run, what is to be kept float, and how."""

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qvtrace.reports.formatting import byte_size, counted, duration, number, printable
from qvtrace.reports.json import strict
from qvtrace.reports.layout import Entry, Table, labelled, words
from qvtrace.reports.styled import Styled, styled
from qvtrace.suggesting.outcome import figure_text
from qvtrace.suggesting.skip_lists import skip_list_code, skip_lists
from qvtrace.trees import Json

if TYPE_CHECKING:
    from qvtrace.suggesting.suggestion import Candidate, Step, Suggestion
    from qvtrace.suggesting.targets import Target

FORMAT_VERSION = 1


def suggestion_lines(suggestion: "Suggestion", width: int | None) -> Iterator[Styled]:
    """The whole report."""
    target, found = suggestion.target, suggestion
    limit = "" if found.budget is None else f", within {byte_size(found.budget)}"
    yield from labelled("reference", words(printable(found.reference)), width)
    yield from labelled("quantizer", words(printable(found.quantizer)), width)
    yield from labelled("target", words(printable(target.described + limit)), width)
    for warning in found.warnings:
        yield from labelled("warning", words(printable(warning), "yellow"), width)
    yield Styled()
    yield from _runs(found).lines(width)
    yield Styled()
    if found.keep_float:
        yield from _kept(found).lines(width)
        yield Styled()
    verdict = f"{found.reason} ({_spent(found)})"
    style = "bold" if found.reached else "bold red"
    yield from labelled("verdict", words(printable(verdict), style), width)
    if found.figure.value is not None and found.figure.reason is not None:
        yield from labelled("doubt", words(printable(found.figure.reason), "yellow"), width)
    code = skip_list_code(found.quantizer, found.left_float) if found.keep_float else None
    if code is not None:
        yield Styled()
        yield from (styled(printable(line)) for line in code.rstrip().split("\n"))


def step_text(step: "Step", target: "Target", max_runs: int) -> str:
    """One run in a line, as it is told while the search goes on."""
    reached = "reached" if step.figure.ok else "missed"
    return printable(
        f"run {step.run} of at most {max_runs}: {step.why} ({step.modules} float): "
        f"{figure_text(step.figure, target)}, {reached}, +{byte_size(step.extra_bytes)}, "
        f"{duration(step.seconds)}"
    )


def _runs(suggestion: "Suggestion") -> Table:
    entries = tuple(
        Entry(
            str(step.run),
            styled(printable(step.why)),
            (
                styled(str(step.modules)),
                _figure(step, suggestion),
                styled(f"+{byte_size(step.extra_bytes)}"),
                styled("reached" if step.figure.ok else "missed", _style(step)),
            ),
        )
        for step in suggestion.steps
    )
    titles = ("kept", suggestion.target.metric, "bytes", "target")
    return Table("run", "modules kept float", titles, entries)


def _figure(step: "Step", suggestion: "Suggestion") -> Styled:
    value = step.figure.value
    text = number(value) if value is not None else figure_text(step.figure, suggestion.target)
    return styled(printable(text), _style(step))


def _style(step: "Step") -> str:
    return "green" if step.figure.ok else ""


def _kept(suggestion: "Suggestion") -> Table:
    known = {candidate.name: candidate for candidate in suggestion.candidates}
    entries = tuple(
        Entry(str(position), styled(printable(name)), (styled(_local(known[name])),))
        for position, name in enumerate(suggestion.keep_float, start=1)
    )
    title = "to keep float" if suggestion.reached else "kept in the best run"
    return Table("#", title, ("local error",), entries)


def _local(candidate: "Candidate") -> str:
    if candidate.noise is None or not math.isfinite(candidate.noise):
        return printable(candidate.reason or "not known")
    if not candidate.noise:
        return "none"
    return f"{10 * math.log10(candidate.noise):.0f} dB"


def _spent(suggestion: "Suggestion") -> str:
    runs = f"{counted(len(suggestion.steps), 'run')} of at most {suggestion.max_runs}"
    more = f"+{byte_size(suggestion.extra_bytes)}, " if suggestion.keep_float else ""
    return f"{more}{runs}, {duration(suggestion.seconds)}"


def suggestion_json(suggestion: "Suggestion", version: str, command: str | None) -> Json:
    """The object that other tools read.

    `keep_float` are the modules of the smallest set that reached the target, or of the best one
    where none did. A figure is null where it is undefined, or as good as can be.
    """
    target = suggestion.target
    return {
        "format": FORMAT_VERSION,
        "qvtrace": version,
        "reference": suggestion.reference,
        "quantizer": suggestion.quantizer,
        "target": {
            "text": target.text,
            "metric": target.metric,
            "number": target.number,
            "better": "higher" if target.higher_is_better else "lower",
            "pattern": target.pattern,
            "modules": list(suggestion.modules),
        },
        "budget": suggestion.budget,
        "reached": suggestion.reached,
        "reason": suggestion.reason,
        "keep_float": list(suggestion.keep_float),
        "minimal": suggestion.minimal,
        "figure": suggestion.figure.value,
        "extra_bytes": suggestion.extra_bytes,
        "runs": len(suggestion.steps),
        "max_runs": suggestion.max_runs,
        "seconds": round(suggestion.seconds, 3),
        "steps": [_step(step) for step in suggestion.steps],
        "candidates": [_candidate(candidate) for candidate in suggestion.candidates],
        "skip_lists": skip_lists(suggestion.left_float),
        "warnings": list(suggestion.warnings),
        "command": command,
    }


def suggestion_text(suggestion: "Suggestion", version: str, command: str | None) -> str:
    """The object as text."""
    report = strict(suggestion_json(suggestion, version, command))
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def _step(step: "Step") -> Json:
    return {
        "run": step.run,
        "why": step.why,
        "keep_float": list(step.kept),
        "modules": step.modules,
        "figure": step.figure.value,
        "reached": step.figure.ok,
        "module": step.figure.module,
        "reason": step.figure.reason,
        "extra_bytes": step.extra_bytes,
        "seconds": round(step.seconds, 3),
    }


def _candidate(candidate: "Candidate") -> Json:
    return {
        "module": candidate.name,
        "local_noise": candidate.noise,
        "local_peir": candidate.peir,
        "reason": candidate.reason,
        "extra_bytes": candidate.extra_bytes,
    }
