"""Writes a comparison in the format and to the place that were asked for."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvtrace.cli.comparison_flags import Format, ReportFlags, RowFlags
from qvtrace.cli.terminal import output_width, print_lines, shows_blocks
from qvtrace.errors import UsageError

if TYPE_CHECKING:
    from qvtrace.archive.overwriting import InputFile
    from qvtrace.comparison.comparison import Comparison
    from qvtrace.reports.styled import Styled

_ARCHIVE_SUFFIXES = (".st", ".safetensors", ".partial", ".manifest.json", ".journal")


def write_comparison(comparison: "Comparison", report: ReportFlags, *, rows: bool = True) -> None:
    """Write a report to its file, or to standard output; without rows, what came of the gates."""
    if report.output is not None:
        write_file(_text(comparison, report, rows=rows), report.output)
        print(f"qvtrace: wrote {report.output}", file=sys.stderr)
    elif report.format is Format.TABLE:
        print_lines(_lines(comparison, report, rows=rows, terminal=True))
    else:
        sys.stdout.write(_text(comparison, report, rows=rows))
    if report.github:
        _tell_github(comparison, report)


def _tell_github(comparison: "Comparison", report: ReportFlags) -> None:
    """Append to the summary of the step, and annotate: where standard output is a report for
    programs, on standard error, which GitHub reads as well."""
    from qvtrace.reports.github import annotations
    from qvtrace.reports.markdown import comparison_markdown

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(f"{comparison_markdown(comparison)}\n")
    else:
        print("qvtrace: --github: GITHUB_STEP_SUMMARY is not set, no summary", file=sys.stderr)
    is_free = report.output is not None or report.format is Format.TABLE
    for line in annotations(comparison):
        print(line, file=sys.stdout if is_free else sys.stderr)


def check_output(output: Path | None, inputs: Iterable["InputFile"]) -> None:
    """Raise `UsageError` where a report would be written over one of the inputs, or be named as an
    archive or what is beside one."""
    from qvtrace.archive.overwriting import refuse_overwriting

    if output is None:
        return
    refuse_overwriting(output, inputs)
    if output.name.endswith(_ARCHIVE_SUFFIXES):
        raise UsageError(
            f"--output {output}: is the name of an archive, and this writes a report; "
            "choose another name"
        )


def check_places(
    report: ReportFlags, rows: RowFlags, values: Sequence[str], explain: Sequence[str] = ()
) -> None:
    """Raise `UsageError` for what is asked of modules and has no place in the report."""
    told = report.format
    if explain and told in (Format.CSV, Format.JUNIT):
        raise UsageError(
            f"--explain: --format {told} has no place for it; take table, json, markdown or html, "
            "or leave it out"
        )
    if values and told not in (Format.TABLE, Format.JSON):
        raise UsageError(
            f"--values: --format {told} has no place for elements; take table or json, "
            "or leave it out"
        )
    if values and rows.group_by is not None and told is Format.TABLE:
        raise UsageError(
            "--values: with --group-by, the table has groups in place of rows with elements; "
            "leave one of the two out, or take --format json"
        )


def _text(comparison: "Comparison", report: ReportFlags, *, rows: bool) -> str:
    if report.format is Format.TABLE:
        lines = _lines(comparison, report, rows=rows, terminal=False)
        return "".join(f"{line.plain}\n" for line in lines)
    if report.format is Format.HTML:
        return _html(comparison, everything=report.everything)
    return _DOCUMENTS[report.format](comparison)


def _json(comparison: "Comparison") -> str:
    from importlib.metadata import version

    from qvtrace.reports.json import comparison_text

    return comparison_text(comparison, version("qvtrace")) + "\n"


def _html(comparison: "Comparison", *, everything: bool) -> str:
    from importlib.metadata import version

    from qvtrace.reports.html import comparison_page

    return comparison_page(comparison, version("qvtrace"), everything=everything)


def _csv(comparison: "Comparison") -> str:
    from qvtrace.reports.csv import comparison_csv

    return comparison_csv(comparison)


def _markdown(comparison: "Comparison") -> str:
    from qvtrace.reports.markdown import comparison_markdown

    return comparison_markdown(comparison)


def _junit(comparison: "Comparison") -> str:
    from qvtrace.reports.junit import comparison_junit

    return comparison_junit(comparison) + "\n"


_DOCUMENTS = {
    Format.JSON: _json,
    Format.CSV: _csv,
    Format.MARKDOWN: _markdown,
    Format.JUNIT: _junit,
}


def _lines(
    comparison: "Comparison", report: ReportFlags, *, rows: bool, terminal: bool
) -> Iterator["Styled"]:
    from qvtrace.reports.table import TableOptions, comparison_lines

    options = TableOptions(
        width=output_width() if terminal else None,
        blocks=terminal and shows_blocks(),
        everything=report.everything,
        rows=rows,
    )
    return comparison_lines(comparison, options)


def write_file(text: str, output: Path, option: str = "--output") -> None:
    """Write text, and make the folder where there is none.

    A regular file that is there is replaced by the whole text or kept, where its folder allows it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = Path(os.path.realpath(output))
        if output.exists() and not (output.is_file() and os.access(file.parent, os.W_OK)):
            output.write_text(text, encoding="utf-8")
        else:
            _replace(file, text)
    except OSError as error:
        raise UsageError(
            f"{option} {output}: cannot be written: {error.strerror or error}; "
            "check path and space, or choose another"
        ) from error


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with unfinished.open("x", encoding="utf-8") as output:
        try:
            if file.exists():
                shutil.copymode(file, unfinished)
            output.write(text)
            output.flush()
            unfinished.replace(file)
        except BaseException:  # also Ctrl-C
            unfinished.unlink(missing_ok=True)
            raise
