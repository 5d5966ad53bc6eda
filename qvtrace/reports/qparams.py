"""Quantization parameters in words."""

from collections.abc import Iterator, Sequence

from qvtrace.qparams.findings import summary_text
from qvtrace.qparams.parameters import Parameters
from qvtrace.reports.formatting import number, printable
from qvtrace.reports.layout import labelled, words
from qvtrace.reports.styled import Styled

_FINDINGS_LISTED = 8


def parameters_text(found: Parameters) -> str:
    """`weight Int8Tensor int8 symmetric per channel, scale 0.00028 to 0.00068, ...`."""
    parts = [f"{found.of} {found.class_name} {found.described}".rstrip()]
    summaries = {
        "scale": found.scale,
        "zero point": found.zero_point,
        "min": found.minimum,
        "max": found.maximum,
    }
    for name, summary in summaries.items():
        if summary is not None:
            parts.append(f"{name} {summary_text(summary)}")
    if found.range is not None:
        parts.append(f"range [{number(found.range.minimum)}, {number(found.range.maximum)}]")
    return printable(", ".join(parts))


def finding_lines(
    findings: Sequence[str], width: int | None, *, everything: bool
) -> Iterator[Styled]:
    """Each finding on a line of its own, the first of them where there are many."""
    listed = findings if everything else findings[:_FINDINGS_LISTED]
    for finding in listed:
        yield from labelled("finding", words(printable(finding), "yellow"), width)
    if findings[len(listed) :]:
        more = f"and {len(findings) - len(listed)} more suspect ranges"
        yield from labelled("finding", words(more, "yellow"), width)
