"""Where in the tensors of a module its error is, in words and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.explanations import Explanation
from qvtrace.comparison.noise import decibels
from qvtrace.comparison.row_names import RowNames
from qvtrace.metrics.spreads import MOST, Along, Outlier, Part, Spread
from qvtrace.patterns import shown
from qvtrace.reports.formatting import counted, number, printable
from qvtrace.reports.layout import words, wrapped
from qvtrace.reports.styled import Styled, styled
from qvtrace.trees import Json

_NAMED = 4  # tokens, channels, heads and outliers in a line of text
_INDENT = 4


def explanation_lines(comparison: Comparison, width: int | None) -> Iterator[Styled]:
    """Each explained tensor: its name, then a line for each axis."""
    for name, texts in explained(comparison):
        yield styled(name, "bold")
        for text in texts:
            indent = styled(" " * _INDENT)
            yield from wrapped(indent, indent, words(text), width)
        yield Styled()


def explained(comparison: Comparison) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each explained tensor: its name, and a text for each axis."""
    names = RowNames(comparison.rows)
    are_pooled = any(row.samples for row in comparison.rows)
    for explanation in comparison.explanations:
        place = explanation.place
        name = f"{printable(shown(place.module))}{names.call(place)} {printable(place.path)}"
        name += f" in sample {explanation.sample}" if are_pooled else ""
        yield name, tuple(explanation_texts(explanation))


def explanation_texts(explanation: Explanation) -> Iterator[str]:
    """What is said of one tensor, a text for each axis."""
    if explanation.spread is None:
        yield f"not to be had: {explanation.reason}"
        return
    module = printable(shown(explanation.place.module))
    whose = f" of {module}'s {'input' if explanation.is_input else 'output'}"
    yield from spread_texts(explanation.spread, whose)


def spread_texts(spread: Spread, whose: str = "") -> Iterator[str]:
    """The same of any tensor; `whose` its channels are is said of outliers."""
    if spread.is_exact:
        yield "no error"
    else:
        yield from _axis_texts(spread)
    if spread.outliers:
        yield _outlier_text(spread, whose)
    if spread.sampled is not None:
        stored, tokens = spread.sampled
        yield f"of the {stored} of its {tokens} tokens that are stored"
    if spread.padding:
        yield f"{counted(spread.padding, 'token')} of padding left out"
    if spread.left_out:
        yield f"{counted(spread.left_out, 'position')} left out, masked or not finite"


def _axis_texts(spread: Spread) -> Iterator[str]:
    axes = ("token", spread.tokens), ("head", spread.heads), ("channel", spread.channels)
    for name, along in axes:
        if along is not None and along.count > 1:
            yield _along_text(name, along)


def _along_text(name: str, along: Along) -> str:
    worst = ", ".join(_part_text(part) for part in along.worst[:_NAMED])
    few = f"{along.carrying} of {counted(along.count, name)}"
    verb = "carries" if along.carrying == 1 else "carry"
    told = f"{few} {verb} {100 * MOST:.0f} % of the error" if along.carrying else "no finite error"
    return f"by {name}: {'few: ' if along.is_concentrated else ''}{told}; worst {name} {worst}"


def _part_text(part: Part) -> str:
    if part.nonfinite:
        return f"{_index(part)} ({part.nonfinite} not finite on one side)"
    noise = "zero reference" if part.nsr is None else f"{decibels(part.nsr)}"
    return f"{_index(part)} ({100 * (part.share or 0.0):.3g} %, {noise})"


def _index(part: Part) -> str:
    *leading, last = part.index or (0,)
    telling = (*leading, last) if any(leading) else (last,)
    return str(telling[0]) if len(telling) == 1 else f"({', '.join(map(str, telling))})"


def _outlier_text(spread: Spread, whose: str) -> str:
    """`channel 1741 of model.layers.2.mlp.down_proj's input: 43 times the median channel`."""
    first, *others = spread.outliers[:_NAMED]
    text = f"channel {first.channel}{whose}: {_times(first)} the median channel"
    if others:
        text += f"; {', '.join(f'{other.channel}: {_times(other)}' for other in others)}"
    more = spread.outlying - 1 - len(others)
    return f"{text}; and {more} more" if more > 0 else text


def _times(outlier: Outlier) -> str:
    return f"{number(float(outlier.times))} times"


def explanation_json(explanation: Explanation) -> Json:
    """The place, and of each axis `count`, `carrying` (how many hold 90 % of the error), the
    `worst` with index, share, NSR and what is not finite, and a `profile` of at most 64 runs."""
    place, spread = explanation.place, explanation.spread
    report: Json = {
        "module": place.module,
        "call": place.call,
        "path": place.path,
        "sample": explanation.sample,
        "reason": explanation.reason,
    }
    if spread is None:
        return report
    return {**report, "channel_axis": explanation.channel_axis, **asdict(spread)}
