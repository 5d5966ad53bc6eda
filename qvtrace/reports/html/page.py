"""The page: a template filled with the head, the rows as data, and the scripts that draw them."""

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files

from qvtrace.collector import without_collector
from qvtrace.comparison.comparison import Comparison
from qvtrace.reports.explanations import explained
from qvtrace.reports.formatting import counted, printable
from qvtrace.reports.gates import gate_lines
from qvtrace.reports.groups import group_table
from qvtrace.reports.head import head_lines
from qvtrace.reports.html.data import json_in_html, page_data
from qvtrace.reports.html.libraries import (
    plot_scripts,
    require_libraries,
    table_module,
    table_styles,
)
from qvtrace.reports.layout import LABEL_WIDTH
from qvtrace.reports.styled import Styled

_OWN_SCRIPTS = ("rows.js", "charts.js", "details.js", "table.js")
_TONES = (("red", "bad"), ("yellow", "warning"), ("green", "good"))


@dataclass(frozen=True)
class Fact:
    """One line of the head."""

    label: str
    text: str
    tone: str = ""  # a class of the style sheet


def comparison_page(comparison: Comparison, version: str, *, everything: bool = False) -> str:
    """The page as text, written by qvtrace `version`; `everything` lists folded rows, too.

    Rows have their statistics and histograms where the comparison was made with `details`. Raises
    `UsageError` where the libraries that draw it are not installed.
    """
    require_libraries()
    with without_collector():
        return _page(comparison, version, everything=everything)


def _page(comparison: Comparison, version: str, *, everything: bool) -> str:
    from jinja2 import Environment, StrictUndefined

    scripts = [*plot_scripts(), table_module(), "".join(map(_own, _OWN_SCRIPTS))]
    scripts = [_in_script(script) for script in scripts]
    # The line ends that a template would eat are part of what is hashed.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(_own("page.html")).render(
        title=_title(comparison),
        version=version,
        policy=_policy(scripts),
        facts=_facts(_head(comparison)),
        verdict=printable(comparison.verdict.text),
        further=list(map(printable, comparison.verdict.further)),
        verdict_tone="good" if comparison.verdict.exit_code == 0 else "bad",
        cut=_cut(comparison),
        groups=group_table(comparison) if comparison.groups else None,
        explanations=list(explained(comparison)),
        styles=[table_styles(), _own("page.css")],
        data=json_in_html(page_data(comparison, everything=everything)),
        plot_scripts=scripts[:2],
        modules=scripts[2:],
    )


def _own(name: str) -> str:
    return (files("qvtrace.reports.html") / name).read_text(encoding="utf-8")


def _title(comparison: Comparison) -> str:
    sides = comparison.reference, comparison.candidate
    return " against ".join(printable(side.file) for side in sides)


def _head(comparison: Comparison) -> Iterator[Styled]:
    yield from head_lines(comparison, None, everything=True)
    yield from gate_lines(comparison, None, everything=False)


def _facts(lines: Iterable[Styled]) -> list[Fact]:
    """Lines of a head that has no width, each a label and what it says; one without a label goes on
    with what the last one said."""
    told: list[Fact] = []
    for line in lines:
        text = line.plain
        label, text = text[:LABEL_WIDTH].strip(), text[LABEL_WIDTH:].strip()
        if not label and told:
            told[-1] = replace(told[-1], text=f"{told[-1].text}\n{text}")
            continue
        styles = " ".join(style for _, style in line.pieces)
        tones = (tone for style, tone in _TONES if style in styles)
        told.append(Fact(label, text, next(tones, "")))
    return told


def _cut(comparison: Comparison) -> str:
    count = comparison.coverage.pairs - len(comparison.rows)
    return f"{counted(count, 'row')} beyond --top" if count else ""


def _in_script(text: str) -> str:
    """A script as it may stand in a page: nothing in it ends it, or begins a comment of HTML."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Iterable[str]) -> str:
    """What the page may do: run these scripts and no others, and ask nothing of any network."""
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(script: str) -> str:
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()
