"""A trace as people read it: what ran, the modules as a tree, a line a call."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qvtrace.manifest import CallEntry
from qvtrace.reports.branches import Branch, branches
from qvtrace.reports.formatting import number, printable
from qvtrace.reports.layout import words, wrapped
from qvtrace.reports.qparams import finding_lines, parameters_text
from qvtrace.reports.styled import Styled, styled
from qvtrace.reports.trace import PARTS, Trace
from qvtrace.reports.trace_head import head_lines
from qvtrace.reports.values import (
    ELEMENTS_SHOWN,
    call_text,
    elements_text,
    node_text,
    stored_text,
)
from qvtrace.trees import TensorLeaf, tensor_leaves

MAX_GUIDES = 64  # a tree that is deeper is drawn no further to the right


@dataclass(frozen=True)
class TreeOptions:
    """How a trace is shown."""

    width: int | None = None  # of the terminal; None: lines as long as they get
    statistics: bool = False
    elements: int | None = ELEMENTS_SHOWN  # of one tensor; None: all


def trace_lines(trace: Trace, options: TreeOptions) -> Iterator[Styled]:
    """The whole view."""
    yield from head_lines(trace.archive, options.width)
    yield from finding_lines([*map(str, trace.findings())], options.width, everything=False)
    yield Styled()
    calls = defaultdict(list)
    for call in trace.calls():
        calls[call.module].append(call)
    for branch in branches(trace.archive.manifest, trace.selection.modules):
        yield from _branch_lines(trace, branch, calls[branch.name], options)


def _branch_lines(
    trace: Trace, branch: Branch, calls: Sequence[CallEntry], options: TreeOptions
) -> Iterator[Styled]:
    guide = "│ " * min(branch.depth, MAX_GUIDES)
    title = _title(branch, guide)
    below = styled(f"{guide}│ ", "dim")
    if len(calls) == 1:
        (beside,) = wrapped(title + styled("  "), title, _call_words(trace, calls[0]), None)
        if options.width is None or beside.width <= options.width:
            yield beside
            yield from _module_lines(trace, branch, below, options)
            yield from _tensor_lines(trace, calls[0], below, options)
            return
    yield title
    yield from _module_lines(trace, branch, below, options)
    for call in calls:
        begin = below + styled(_ordinal(call) if len(calls) > 1 else "", "bold")
        further = below + styled("    ")
        yield from wrapped(begin, further, _call_words(trace, call), options.width)
        yield from _tensor_lines(trace, call, below, options)


def _ordinal(call: CallEntry) -> str:
    return f"#{call.index} step {call.step} " if call.step else f"#{call.index} "


def _module_lines(
    trace: Trace, branch: Branch, indent: Styled, options: TreeOptions
) -> Iterator[Styled]:
    """What is known of the module itself, if it is selected."""
    if branch.name in trace.selection.modules:
        yield from _parameter_lines(trace, branch, indent, options)
        yield from _weight_lines(trace, branch, indent, options)


def _weight_lines(
    trace: Trace, branch: Branch, indent: Styled, options: TreeOptions
) -> Iterator[Styled]:
    """The recorded weights, and what they were before they were dequantized."""
    for entry, node in trace.weights(branch.name):
        line = indent + styled("  weights ", "magenta")
        text = f"{printable(entry.name)} {node_text(node)} from {printable(entry.class_name)}"
        if entry.aliases:
            text += f", also {', '.join(map(printable, entry.aliases))}"
        yield from wrapped(line, indent + styled("    "), words(text), options.width)
        if isinstance(node, TensorLeaf):
            valued = branch.name in trace.selection.with_elements
            yield from _leaf_lines(trace, f"weights.{entry.name}", node, valued, indent, options)


def _parameter_lines(
    trace: Trace, branch: Branch, indent: Styled, options: TreeOptions
) -> Iterator[Styled]:
    """How the module is quantized; what a module below it says too is shown there."""
    for found in trace.parameters.about(branch.name, trace.selection.modules):
        begin = indent + styled("  quantized ", "magenta")
        yield from wrapped(
            begin, indent + styled("    "), words(parameters_text(found)), options.width
        )


def _title(branch: Branch, guide: str) -> Styled:
    title = styled(guide, "dim") + styled(printable(branch.label), "bold")
    title += styled(f" {printable(branch.class_name)}", "cyan")
    if branch.aliases:
        title += styled(f" also {', '.join(map(printable, branch.aliases))}", "dim")
    return title


def _call_words(trace: Trace, call: CallEntry) -> list[Styled]:
    parts = {part: trace.tree(call, part) for part in PARTS}
    text = words(call_text(parts["inputs"], parts["kwargs"], parts["output"]))
    if call.edited:
        text += words(f"edits {', '.join(map(printable, call.edited))} in place", "yellow")
    return text if call.error is None else [*text, *words(printable(call.error), "bold red")]


def _tensor_lines(
    trace: Trace, call: CallEntry, indent: Styled, options: TreeOptions
) -> Iterator[Styled]:
    """Statistics and elements of a call's tensors, where they were asked for."""
    valued = call.module in trace.selection.with_elements
    for path, leaf in _tensors(trace, call) if valued or options.statistics else ():
        yield from _leaf_lines(trace, path, leaf, valued, indent, options)


def _leaf_lines(
    trace: Trace,
    path: str,
    leaf: TensorLeaf,
    valued: bool,
    indent: Styled,
    options: TreeOptions,
) -> Iterator[Styled]:
    line = indent + styled(f"  {printable(path)}", "cyan")
    if leaf.added is not None:
        line += styled(f"  what the step added after the first {leaf.added.after}", "dim")
    stored = stored_text(trace.archive, leaf)
    if stored is not None:
        line += styled(f"  {stored}", "dim")
    if options.statistics:
        line += styled(f"  {_statistics_text(trace, leaf)}")
    if valued:
        elements = trace.elements(leaf, options.elements)
        line += styled(f"  {'no elements' if elements is None else elements_text(elements)}")
    if valued or options.statistics:
        yield line


def _tensors(trace: Trace, call: CallEntry) -> Iterator[tuple[str, TensorLeaf]]:
    for part in PARTS:
        node = trace.tree(call, part)
        if node is not None:
            yield from tensor_leaves(node, part)


def _statistics_text(trace: Trace, leaf: TensorLeaf) -> str:
    found = trace.statistics(leaf)
    names = ("mean", "min", "max", "stddev")
    values = {name: getattr(found, name) for name in names}
    parts = [f"{name} {'-' if v is None else number(v)}" for name, v in values.items()]
    counts = {"NaN": found.nan, "inf": found.positive_inf, "-inf": found.negative_inf}
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    return ", ".join(parts)
