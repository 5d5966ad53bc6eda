"""The quantizers that there are, as lines of text and as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from qvtrace.reports.formatting import printable
from qvtrace.reports.layout import Entry, Table
from qvtrace.reports.styled import Styled, styled
from qvtrace.trees import Json

if TYPE_CHECKING:
    from qvtrace.models.quantizers.listing import ListedQuantizer

_FURTHER = (
    "A file.py:function or package.module:function that takes a model and returns it quantized "
    "is one too.",
    "A checkpoint that is already quantized, or a GGUF file, needs none: --variant quant.",
)


def quantizer_lines(listed: Iterable["ListedQuantizer"], width: int | None) -> Iterator[Styled]:
    """A table of name, whether it is there, which schemes need calibration, and the schemes."""
    entries = tuple(map(_entry, listed))
    table = Table("", "quantizer, and its schemes", ("installed", "calibration"), entries)
    yield from table.lines(width)
    yield styled("")
    yield from map(styled, _FURTHER)


def quantizers_json(listed: Iterable["ListedQuantizer"]) -> list[Json]:
    """The same as plain data."""
    return [asdict(quantizer) for quantizer in listed]


def _entry(quantizer: "ListedQuantizer") -> Entry:
    installed = styled(printable(_installed(quantizer)), "" if quantizer.installed else "yellow")
    calibration = styled(printable(_calibration(quantizer)))
    schemes = ", ".join(quantizer.schemes).replace(",", " (default),", 1)
    further = [schemes] if schemes else []
    if not quantizer.installed and quantizer.origin != "qvtrace" and quantizer.remedy:
        further.append(quantizer.remedy)
    notes = tuple(styled(f"  {printable(text)}") for text in further)
    name = styled(printable(quantizer.name), "bold")
    return Entry("", name, (installed, calibration), notes=notes)


def _calibration(quantizer: "ListedQuantizer") -> str:
    if quantizer.calibrated is None:
        return "-" if not quantizer.installed else "as it asks"
    if not quantizer.calibrated:
        return "no"
    every = set(quantizer.calibrated) == set(quantizer.schemes)
    return "yes" if every else f"for {', '.join(quantizer.calibrated)}"


def _installed(quantizer: "ListedQuantizer") -> str:
    if quantizer.origin == "qvtrace":
        return quantizer.version or "yes" if quantizer.installed else f"no: {quantizer.remedy}"
    version = quantizer.version or "yes"
    usable = version if quantizer.installed else f"{version}, CANNOT BE USED"
    return f"{usable}, from {quantizer.origin}"
