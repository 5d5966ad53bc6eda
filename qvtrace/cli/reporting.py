"""Writes a comparison in the format and to the place that were asked for."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qvtrace.cli.flags import Format, ReportFlags
from qvtrace.cli.terminal import output_width, print_lines, shows_blocks
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.comparison import Comparison
    from qvtrace.reports.styled import Styled

_ARCHIVE_SUFFIXES = (".st", ".safetensors", ".partial")


def write_comparison(comparison: "Comparison", report: ReportFlags) -> None:
    """Write a report to its file, or to standard output."""
    if report.output is not None:
        _write_file(_text(comparison, report), report.output)
        print(f"qvtrace: wrote {report.output}", file=sys.stderr)
    elif report.format is Format.JSON:
        sys.stdout.write(_text(comparison, report))
    else:
        print_lines(_lines(comparison, report, terminal=True))


def refuse_archive_name(report: ReportFlags, *archives: str) -> None:
    """Raise `UsageError` where a report would be written over one of these or another archive."""
    if report.output is not None and report.output.exists():
        for archive in map(Path, archives):
            if archive.exists() and report.output.samefile(archive):
                raise UsageError(
                    f"--output {report.output}: is {archive}, which is compared; "
                    "choose another name"
                )
    if report.output is not None and report.output.suffix in _ARCHIVE_SUFFIXES:
        raise UsageError(
            f"--output {report.output}: is the name of an archive, and this writes a report; "
            "choose another name"
        )


def _text(comparison: "Comparison", report: ReportFlags) -> str:
    if report.format is Format.JSON:
        from importlib.metadata import version

        from qvtrace.reports.json import comparison_text

        return comparison_text(comparison, version("qvtrace")) + "\n"
    lines = _lines(comparison, report, terminal=False)
    return "".join(f"{line.plain}\n" for line in lines)


def _lines(comparison: "Comparison", report: ReportFlags, *, terminal: bool) -> Iterator["Styled"]:
    from qvtrace.reports.table import TableOptions, comparison_lines

    options = TableOptions(
        width=output_width() if terminal else None,
        blocks=terminal and shows_blocks(),
        everything=report.everything,
    )
    return comparison_lines(comparison, options)


def _write_file(text: str, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
