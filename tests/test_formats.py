"""Comparisons as CSV, Markdown, JUnit and annotations, read by the parsers that others use."""

import csv
import html
import io
import json
import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from small_comparisons import compared, row

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.origins import Origin
from qvtrace.comparison.rows import Place
from qvtrace.comparison.verdict import Verdict
from qvtrace.judging.judge import judge
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.reports.csv import comparison_csv
from qvtrace.reports.gates import gate_lines
from qvtrace.reports.github import annotations
from qvtrace.reports.html import comparison_page
from qvtrace.reports.json import comparison_json
from qvtrace.reports.junit import comparison_junit
from qvtrace.reports.markdown import LARGEST, comparison_markdown

HOSTILE = "a|b`c``<img src=x>&*__d__[e](http://f)\\|@user#12\n\u202e</details>~~$x$!"
PRINTED = HOSTILE.replace("\n", "\\n").replace("\u202e", "\\u202e")


def of_peir(module, peir, order=0, **changes):
    return row(module, order, metrics=Metrics(max_abs_error=0.5, peir=peir), **changes)


def comparison(*rows, gates=(), **changes):
    made = compared(*rows, **{"coverage": Coverage.of(rows, (), ()), **changes})
    return judge(made, fail_on=gates)


def table_of(comparison):
    return list(csv.DictReader(io.StringIO(comparison_csv(comparison))))


def test_csv_has_a_line_for_each_pair_with_its_numbers():
    one = row(
        "fc",
        7,
        path="output.1",
        undefined={"mismatches": "floating point"},
        nonfinite=Nonfinite(new_nan=2),
    )
    line, other = table_of(comparison(one, of_peir("b", 0.25)))
    assert (line["module"], line["path"], line["order"]) == ("fc", "output.1", "7")
    assert float(line["peir"]) == one.metrics.peir
    assert json.loads(line["reference_shape"]) == [1, 84, 64]
    assert json.loads(line["peak_index"]) == [0, 17, 40]
    assert (float(line["peak_candidate"]), line["new_nan"]) == (1.25, "2")
    assert (line["mismatches"], line["layout"]) == ("", "")
    assert json.loads(line["undefined"]) == {"mismatches": "floating point"}
    assert other["peir"] == "0.25"


def test_csv_has_the_same_columns_whatever_the_rows():
    several = comparison(row("a"), row("b", status="shape", metrics=Metrics(), peak=None))
    headers = [comparison_csv(made).splitlines()[0] for made in (several, comparison(row("c")))]
    assert headers[0] == headers[1] == comparison_csv(comparison()).splitlines()[0]
    assert set(METRICS) < set(headers[0].split(","))


def test_csv_has_the_metrics_that_were_asked_for():
    asked = comparison(row("a"), options=DiffOptions(metrics="sqnr"))
    columns = set(table_of(replace(asked, options=DiffOptions(metrics="sqnr")))[0])
    assert columns.intersection(METRICS) == {"sqnr"}


def test_a_hostile_name_stays_in_its_cell():
    for line in table_of(comparison(row(HOSTILE), row("b"))):
        assert None not in line
    assert table_of(comparison(row(HOSTILE)))[0]["module"] == PRINTED


def junit(comparison):
    junitparser = pytest.importorskip("junitparser")
    return junitparser.JUnitXml.fromstring(comparison_junit(comparison).encode())


def cases(comparison):
    (suite,) = junit(comparison)
    return {case.name: case for case in suite}


def test_junit_has_a_case_for_each_gate_and_one_for_comparability():
    made = comparison(of_peir("a", 0.1), gates=["peir>0.05", "nonfinite", "structure"])
    parsed = junit(made)
    assert (parsed.tests, parsed.failures, parsed.errors) == (4, 1, 0)
    found = cases(made)
    assert set(found) == {"comparable", "peir>0.05", "nonfinite", "structure"}
    assert [name for name, case in found.items() if not case.is_passed] == ["peir>0.05"]


def test_a_failure_in_junit_lists_its_worst_rows_with_numbers():
    rows = [of_peir(f"layers.{index}", index / 100, index) for index in range(50)]
    (failure,) = cases(comparison(*rows, gates=["peir>0.1"]))["peir>0.1"].result
    assert failure.message == "39 of 50 rows are not within"
    lines = failure.text.splitlines()
    assert lines[0] == "layers.49: 0.49, 0.39 beyond the limit"
    assert lines[-1] == "and 19 more"
    assert len(lines) == 21


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"comparable": Comparable(False, ("inputs differ in call 0", "seed"))}, "inputs differ"),
        ({"coverage": Coverage.of((), (), ())}, "nothing was comparable"),
        ({"candidate": replace(compared().candidate, complete=False, error="x")}, "incomplete: x"),
    ],
)
def test_the_case_for_comparability_fails_where_numbers_mean_nothing(changes, wanted):
    case = cases(comparison(of_peir("a", 0.1), **changes))["comparable"]
    assert wanted in case.result[0].message


def test_a_gate_that_an_earlier_one_leaves_nothing_to_is_not_applied_in_any_format():
    made = comparison(of_peir("a", 0.1), gates=["peir>0.5", "peir>0.2 @ a"])
    (skipped,) = cases(made)["peir>0.2 @ a"].result
    assert type(skipped).__name__ == "Skipped"
    assert "an earlier gate decides" in skipped.message
    assert cases(made)["peir>0.5"].result == []
    (_, held, not_applied), *_ = Rendered(comparison_markdown(made)).tables
    assert (held[1], not_applied[1]) == ("held", "not applied")
    lines = "\n".join(line.plain for line in gate_lines(made, None, everything=False))
    assert "held peir>0.5: 1 row" in lines
    assert "not applied peir>0.2 @ a: an earlier gate decides" in lines
    gates = comparison_json(made, "1.2.3")["verdict"]["gates"]
    assert [gate["ok"] for gate in gates] == [True, None]
    assert made.verdict.exit_code == 0


def test_junit_tells_what_was_compared():
    (suite,) = junit(comparison(row("a")))
    told = {item.name: item.value for item in suite.properties()}
    assert told["reference"] == "fp.st"
    assert told["candidate.quantizer"] == "torchao:int8-dynamic"


def test_junit_and_the_page_go_on_with_what_the_verdict_begins():
    origin = Origin("fc", 0, "output", 0.0, 0.1, 0.1, "in-out", "it differs")
    lines = ("first seen at fc", "then at <b>", "usual noise -40 dB")
    verdict = Verdict("first seen at fc; worst: fc", 0, origins=(origin,), lines=lines)
    made = compared(row("fc"), verdict=verdict)

    said = ElementTree.fromstring(comparison_junit(made).encode()).findtext(".//system-out")
    assert said == "first seen at fc; worst: fc\nthen at <b>\nusual noise -40 dB"
    pytest.importorskip("bokeh")
    pytest.importorskip("itables")
    page = comparison_page(made, "1.2.3")
    assert '<p class="note">then at &lt;b&gt;</p>' in page
    assert '<p class="note">first seen at fc</p>' not in page


def test_no_name_breaks_junit():
    made = comparison(row(f"{HOSTILE}\x00\ud800\ufffe]]>"), gates=["peir>0.001"])
    (failure,) = cases(made)["peir>0.001"].result
    assert PRINTED in failure.text


class Rendered:
    """Markdown as GitHub would show it, but for its style sheet."""

    def __init__(self, markdown):
        self.html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)

    @property
    def tables(self):
        """Rows of cells, without markup, of each table."""
        return [
            [
                [
                    html.unescape(re.sub(r"<[^>]*>", "", cell))
                    for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)
                ]
                for line in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
            ]
            for table in re.findall(r"<table>(.*?)</table>", self.html, re.DOTALL)
        ]

    @property
    def text(self):
        return html.unescape(re.sub(r"<[^>]*>", "", self.html))


def test_markdown_has_verdict_gates_head_and_rows():
    verdict = Verdict("", 0, lines=("first seen at fc (inputs agree)",))
    rows = of_peir("fc", 0.1), of_peir("b", 0.01, 1)
    made = comparison(*rows, gates=["peir>0.05", "nonfinite"], verdict=verdict)
    rendered = Rendered(comparison_markdown(made))
    gates, rows = rendered.tables
    assert rendered.html.startswith("<h3>qvtrace: 1 of 2 gates failed</h3>")
    assert made.verdict.text in rendered.text
    assert "<li>first seen at fc (inputs agree)</li>" in rendered.html
    assert gates[1:] == [
        ["peir>0.05", "failed", "1 of 2", "fc: 0.1, 0.05 beyond the limit"],
        ["nonfinite", "held", "2", ""],
    ]
    assert rows[0] == ["module", "PEIR", "token SQNR p50 / p5", "max|d|", "worst at"]
    assert rows[1][:2] == ["fc", "0.100"]
    for wanted in ("reference fp.st", "torchao:int8-dynamic", "comparable yes", "2 pairs"):
        assert wanted in rendered.text


def test_the_ten_worst_rows_are_seen_and_the_rest_is_folded():
    rows = [of_peir(f"m{index}", index / 1000, index) for index in range(25)]
    markdown = comparison_markdown(comparison(*rows))
    worst, rest = Rendered(markdown).tables
    assert [line[0] for line in worst[1:]] == [f"m{index}" for index in range(24, 14, -1)]
    assert [line[0] for line in rest[1:]] == [f"m{index}" for index in range(15)]
    folded = markdown[markdown.index("<details>") : markdown.index("</details>")]
    assert "<summary>15 further rows</summary>" in folded
    assert "`m0`" in folded
    assert "`m24`" not in folded


def test_rows_that_are_not_listed_are_counted():
    twin = of_peir("block", 0.1, 1, same_as=Place("fc", 0, "output"))
    same = row("same", 2, status="identical", metrics=Metrics(peir=0.0))
    rendered = Rendered(comparison_markdown(comparison(of_peir("fc", 0.1), twin, same)))
    assert rendered.tables[0][1][0] == "fc= block"
    assert "not listed: 1 identical, 1 folded into the row above (=)" in rendered.text


def test_what_is_only_on_one_side_is_named():
    coverage = Coverage.of((row("a"),), (Place("gone", 0, "output"),), ())
    rendered = Rendered(comparison_markdown(comparison(row("a"), coverage=coverage)))
    assert "1 only in the reference: gone" in rendered.text


def test_a_hostile_name_is_shown_as_it_is():
    made = comparison(of_peir(HOSTILE, 0.1, reason=HOSTILE), gates=[f"peir>0.05 @ {HOSTILE}"])
    rendered = Rendered(comparison_markdown(made))
    gates, rows = rendered.tables
    assert gates[1][0] == f"peir>0.05 @ {PRINTED}"
    assert rows[1][0].startswith(PRINTED)
    assert made.verdict.text.replace("\n", "\\n").replace("\u202e", "\\u202e") in rendered.text
    for markup in ("<img", "<a ", "<em>", "<strong>__", "<del>"):
        assert markup not in rendered.html
    outside_of_code = re.sub(r"<code>.*?</code>", "", rendered.html)
    assert not re.search(r"@\w|://", outside_of_code)
    assert "</details>" not in rendered.html


@pytest.mark.parametrize("length", [10, 300, 5_000, 70_000])
def test_markdown_fits_into_a_comment_whatever_the_model(length):
    generator = random.Random(0)
    rows = [
        of_peir(
            "".join(generator.choices("`|_*<é\x1b", k=length)) + str(index),
            index / 1e4,
            index,
            reason="r" * length,
        )
        for index in range(2000 if length < 1000 else 10)
    ]
    places = [Place(row.module + "x", 0, "output") for row in rows]
    side = replace(compared().candidate, file="f" * length, warnings=("w" * length,))
    made = comparison(
        *rows,
        gates=["peir>0.001", *(f"sqnr<{index}" for index in range(400))],
        coverage=Coverage.of(rows, places, places),
        candidate=side,
        comparable=Comparable(False, ("d" * length,)),
    )
    markdown = comparison_markdown(made)
    assert len(markdown.encode()) <= LARGEST < 60_000
    rendered = Rendered(markdown)
    assert rendered.html.count("<details>") == rendered.html.count("</details>")
    assert "for which there is no room here" in rendered.text


def test_no_part_takes_the_room_of_all_others():
    mentions = "@a #1 <" * 20_000
    side = replace(compared().candidate, file=mentions, warnings=(mentions,) * 100)
    verdict = Verdict("", 0, lines=(mentions,) * 7, findings=(mentions,))
    rows = [of_peir("fc", 0.5), *(of_peir(mentions + str(index), 0.1) for index in range(20))]
    made = comparison(*rows, gates=["peir>0.4"], candidate=side, verdict=verdict)
    markdown = comparison_markdown(made)
    assert len(markdown.encode()) < 60_000
    gates, worst, _ = Rendered(markdown).tables
    assert (gates[1][:3], worst[1][0]) == (["peir>0.4", "failed", "1 of 21"], "fc")
    assert markdown.count("<!--") == markdown.count("-->")


def test_an_annotation_is_one_line_for_each_gate_that_failed():
    made = comparison(row("a,b:c\n::error::%"), gates=["peir>0.001", "sqnr<1", "nonfinite"])
    (line,) = annotations(made)
    title, _, text = line.removeprefix("::error title=").partition("::")
    assert title == "qvtrace%3A peir>0.001"
    assert text.startswith("gate peir>0.001 FAILED in 1 of 1 row, worst: a,b:c\\n::error::%25")


def test_an_annotation_says_that_nothing_was_comparable():
    (line,) = annotations(comparison(gates=["nonfinite"]))
    assert line.startswith("::error title=qvtrace%3A nothing was comparable::")
    assert not list(annotations(comparison(row("a"), gates=["nonfinite"])))
