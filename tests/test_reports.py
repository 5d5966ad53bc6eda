"""What people and other tools are told of a comparison."""

import json
from dataclasses import fields, replace

import pytest
from small_archives import manifest
from small_comparisons import ENVIRONMENT, LONG, MODEL, compared, row

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.comparison import Side
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.rows import Place, Row
from qvtrace.manifest import ModuleEntry
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.names import LOCAL_METRICS, METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.reports.branches import branches
from qvtrace.reports.formatting import byte_size, number, printable
from qvtrace.reports.json import comparison_json, comparison_text
from qvtrace.reports.layout import words
from qvtrace.reports.table import TableOptions, comparison_lines


def table(comparison, **options):
    lines = comparison_lines(comparison, TableOptions(**options))
    return "\n".join(line.plain.rstrip() for line in lines)


def line_with(text, wanted):
    return next(line for line in text.splitlines() if wanted in line)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04123, "0.0412"),
        (28.14, "28.1"),
        (999.6, "1000"),
        (0.000012345, "1.23e-5"),
        (-0.5, "-0.500"),
        (0.0, "0"),
        (3, "3"),
        (1e300, "1.00e300"),
        (float("nan"), "NaN"),
    ],
)
def test_a_number_has_three_significant_digits(value, text):
    assert number(value) == text


def test_sizes_are_in_powers_of_a_thousand():
    sizes = [byte_size(count) for count in (0, 999, 999_499, 999_500, 3_416_000)]
    assert sizes == ["0 bytes", "999 bytes", "999 KB", "1.00 MB", "3.42 MB"]


def test_what_a_terminal_would_obey_is_shown_escaped():
    hostile = "a\x1b[31m\nb\u202ec\ud800"
    assert printable(hostile) == r"a\x1b[31m\nb\u202ec\ud800"


def test_the_head_says_what_is_common_once():
    text = table(compared(row()))
    assert line_with(text, "reference").endswith("Net · net · fp · float32 · cpu · torch 2.13.0")
    assert line_with(text, "candidate").endswith("the same model · quant · torchao:int8-dynamic")


def test_models_are_the_same_only_where_the_digests_of_their_weights_say_so():
    unknown = Side("quant.st", {**MODEL, "weights_digest": None}, {"name": "quant"}, ENVIRONMENT)
    text = table(compared(row(), candidate=unknown))

    assert "the same class" in line_with(text, "candidate")
    assert "the same model" not in text


def test_every_difference_that_makes_runs_incomparable_is_named():
    differences = ("inputs differ", "seed 1 in the reference, 2 in the candidate")
    text = table(compared(row(), comparable=Comparable(False, differences)))
    assert line_with(text, "comparable").endswith(f"no: {'; '.join(differences)}")


def test_without_a_terminal_every_row_is_one_line_however_long():
    text = table(compared(row(LONG), row("fc", 1)))
    cells = ["0.0300", "28.1 / 21.8 dB", "0.250", "0.125", "token 17, channel 40"]
    line = line_with(text, LONG)
    assert all(cell in line for cell in cells)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_names_are_whole_and_lines_fit_in_a_terminal(width):
    rows = [row(LONG[: width - 8], 3), row("model.layers.0", 12)]
    text = table(compared(*rows), width=width)
    assert LONG[: width - 8] in text
    assert max(map(len, text.splitlines())) <= width


def test_a_name_that_is_wider_than_the_terminal_is_not_cut():
    assert LONG in table(compared(row(LONG)), width=60).splitlines()[-5]


def test_numbers_stand_under_a_name_that_leaves_them_no_room():
    lines = table(compared(row(LONG)), width=90).splitlines()
    position = next(index for index, line in enumerate(lines) if LONG in line)
    assert "28.1 / 21.8 dB" in lines[position + 1]


def test_a_wide_terminal_shows_more_columns():
    assert "cosine" not in table(compared(row()), width=80)
    assert "cosine" in table(compared(row()), width=200)


def test_the_bar_is_as_long_as_the_peir_is_large():
    text = table(compared(row("worst", peir=0.06), row("half", peir=0.03), row("none", peir=0.0)))
    assert line_with(text, "half").count("#") == 3
    assert line_with(text, "none").count("#") == 0
    assert line_with(text, "worst  ").count("#") == 6


def test_a_row_equal_to_an_earlier_one_is_folded_into_it():
    block = row("block", 1, same_as=Place("block.down", 0, "output"))
    comparison = compared(row("block.down"), block)
    lines = table(comparison).splitlines()
    below = next(index for index, line in enumerate(lines) if "block.down" in line) + 1
    assert lines[below].strip() == "= block"
    assert "1 folded" in line_with(table(comparison), "not listed")
    assert line_with(table(comparison, everything=True), " block ").count("0.0300") == 1


def test_a_row_whose_earlier_one_is_not_listed_stands_for_itself():
    block = row("block", 1, same_as=Place("block.down", 0, "output"))
    assert "0.0300" in line_with(table(compared(block)), "block")


def test_equal_rows_are_counted_and_can_be_shown():
    same = row("twin", status="identical", peir=0.0)
    exact = row("flag", path="kwargs.flag", status="exact")
    comparison = compared(row(), same, exact)
    text = table(comparison)
    assert not any(name in text for name in ("twin", "flag"))
    assert "1 identical, 1 equal integers and values" in line_with(text, "not listed")
    everything = table(comparison, everything=True)
    assert line_with(everything, " twin ").endswith("identical")
    assert line_with(everything, "flag").endswith("equal")
    assert "not listed" not in everything


def test_rows_that_top_cut_are_counted():
    coverage = Coverage(2, 2, 2, 5, 5, 0, 0)
    assert "4 rows beyond --top" in table(compared(row(), coverage=coverage))


def test_an_undefined_metric_is_a_dash_with_its_reason():
    undefined = {"peir": "constant reference", "token_sqnr_p50": "no token axis"}
    metrics = Metrics(max_abs_error=0.5, mean_abs_error=0.25)
    text = table(compared(row(metrics=metrics, undefined=undefined)))
    line = line_with(text, " fc ")
    assert "- constant reference" in line
    assert "- no token axis" in line


def test_a_percentile_on_an_exact_token_is_a_dash_beside_the_other():
    metrics = Metrics(max_abs_error=0.5, peir=0.1, token_sqnr_p5=12.0)
    text = table(compared(row(metrics=metrics, undefined={"token_sqnr_p50": "identical"})))
    assert "- identical / 12.0 dB" in text


def test_findings_that_are_not_finite_are_counted_under_the_row():
    counts = Nonfinite(reference_nan=3, candidate_nan=5, new_nan=2, inf_mismatches=1)
    text = table(compared(row(status="nonfinite", nonfinite=counts)))
    assert "2 new NaN, 3 NaN on both sides, 1 infinities that differ" in text


def test_a_row_with_new_infinities_does_not_look_like_an_equal_one():
    found = Nonfinite(inf_mismatches=3, new_inf=2, equal_inf=4)
    rest = dict.fromkeys(("token_sqnr_p50", "token_sqnr_p5", "sqnr"), "identical")
    metrics = Metrics(max_abs_error=0.0, peir=0.0)
    broken = row("fc", metrics=metrics, status="nonfinite", nonfinite=found, undefined=rest)

    text = table(compared(broken))

    assert "0 + inf  - the rest identical" in line_with(text, "fc  ")
    assert "2 new infinities, 1 infinities that differ, 4 infinities on both sides" in text


def test_a_mask_that_only_the_candidate_has_makes_no_bar_and_is_explained():
    peak = Peak((0, 1, 2), 0.5, -3.4028234663852886e38)
    found = Nonfinite(sentinel_mismatches=1)
    masked = row("masked", peir=1e38, status="nonfinite", peak=peak, nonfinite=found)

    text = table(compared(row("fc", peir=0.03), masked))

    assert "0.0300   ######" in line_with(text, "fc  ")
    assert "the largest error is a mask that only the candidate has" in text


def test_a_call_that_raised_on_both_sides_is_listed():
    reason = "raised KeyError on both sides"
    nothing = {"metrics": Metrics(), "undefined": dict.fromkeys(METRICS, "not stored")}
    failed = row("risky", status="opaque", reason=reason, peak=None, **nothing)

    text = table(compared(row(), failed))

    assert line_with(text, "risky").split(maxsplit=2)[2] == reason


def test_shapes_that_differ_stand_in_place_of_numbers():
    shapes = {"status": "shape", "reason": "[1, 2] against [2, 1]", "metrics": Metrics()}
    assert "shapes differ: [1, 2] against [2, 1]" in table(compared(row(**shapes)))


def test_integers_that_differ_are_counted():
    metrics = Metrics(max_abs_error=2, mismatches=3)
    text = table(compared(row("ids", status="mismatch", metrics=metrics)))
    assert line_with(text, "ids").endswith("3 elements differ, by at most 2")


def test_values_that_differ_are_named():
    value = row(
        path="kwargs.n",
        status="mismatch",
        shape=(None, None),
        dtype=(None, None),
        reason="2 against 3",
        metrics=Metrics(mismatches=1),
    )
    assert line_with(table(compared(value)), "kwargs.n").endswith("2 against 3")


def test_dtypes_are_shown_where_the_head_does_not_tell_them():
    other = row(dtype=("float32", "bfloat16"))
    assert "dtypes float32 against bfloat16" in table(compared(other))
    candidate = Side("b.st", {**MODEL, "dtype": "bfloat16"}, {"name": "quant"}, ENVIRONMENT)
    assert "dtypes" not in table(compared(other, candidate=candidate))


def test_a_module_called_twice_is_shown_with_its_calls():
    text = table(compared(row("norm"), row("norm", 1, call=1), row("once", 2)))
    assert "norm#0" in text
    assert "norm#1" in text
    assert "once#" not in text


def test_the_root_has_a_name_in_the_table():
    assert "(root)" in table(compared(row("")))


def test_unmatched_modules_are_counted_and_named_on_request():
    places = tuple(Place(f"layers.{index}", 0, "output") for index in range(20))
    comparison = compared(
        row(), coverage=replace(compared(row()).coverage, only_in_reference=places)
    )
    text = table(comparison)
    assert "20 only in the reference: layers.0," in text
    assert "and 12 more" in text
    assert "layers.19" in table(comparison, everything=True)


def test_rules_other_than_equal_names_are_counted():
    text = table(compared(row(), row("b", 1, matched_by="alias")))
    assert line_with(text, "matched").endswith("1 by exact, 1 by alias")


def test_warnings_of_a_side_are_shown_with_its_file():
    side = replace(compared(row()).candidate, warnings=("incomplete: killed",))
    assert "quant.st: incomplete: killed" in table(compared(row(), candidate=side))


def test_metrics_that_are_asked_for_are_the_columns():
    options = DiffOptions(metrics=("cosine", "token_sqnr_min"))
    text = table(compared(row(), options=options))
    assert line_with(text, "#  module").split()[2:] == ["cosine", "token", "min"]
    assert "0.999500  11.5 dB at token 3" in line_with(text, " fc ")


def test_all_metrics_fit_in_a_terminal_on_several_lines():
    text = table(compared(row(), options=DiffOptions(metrics=METRICS)), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "rel. L2" in text


def test_the_metric_that_sorts_is_shown():
    text = table(compared(row(), options=DiffOptions(sort_by="relative_l2")))
    assert "rel. L2" in line_with(text, "#  module")


@pytest.mark.parametrize("metric", ["sqnr", "cosine"])
def test_the_metric_that_sorts_is_shown_once(metric):
    titles = line_with(table(compared(row(), options=DiffOptions(sort_by=metric))), "#  module")
    assert titles.count("  SQNR ") == titles.count("  cosine ") == 1


def test_a_name_that_looks_like_markup_is_shown_as_it_is():
    assert "[red]0[0]" in table(compared(row("[red]0[0]")))


def parsed(comparison):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(comparison_text(comparison, "1.2.3"), parse_constant=refuse)


def test_a_row_in_json_has_every_key_of_the_contract():
    (found,) = parsed(compared(row()))["rows"]
    conditional = {"same_as", "judgement", "residual", "floor", "groups", "details", "unseen"}
    conditional |= {"sampled", "samples", "padding_tokens"}
    assert set(found) == {field.name for field in fields(Row)} - conditional
    assert set(found["metrics"]) == set(METRICS) - set(LOCAL_METRICS)
    assert found["peak"] == {"index": [0, 17, 40], "reference": 1.0, "candidate": 1.25}


def test_json_has_the_keys_that_other_tools_read():
    report = parsed(compared(row()))
    assert set(report) == {
        "format",
        "qvtrace",
        "complete",
        "reference",
        "candidate",
        "comparable",
        "coverage",
        "rows",
        "verdict",
    }
    assert (report["format"], report["qvtrace"], report["complete"]) == (1, "1.2.3", True)
    assert set(report["reference"]) == {"file", "model", "variant", "environment"}
    assert report["comparable"] == {"ok": True, "differences": []}
    assert set(report["coverage"]) == {
        "compared",
        "identical",
        "not_comparable",
        "only_in_reference",
        "only_in_candidate",
    }
    assert report["verdict"] == {
        "text": "worst: fc, PEIR 0.03",
        "exit_code": 0,
        "gates": [],
        "origins": [],
        "lines": [],
        "findings": [],
    }


def test_json_stays_strict_where_a_file_says_what_json_cannot():
    side = Side("fp.st", MODEL, {"name": "fp", "settings": {"clip": float("inf")}}, {})
    report = parsed(compared(row(), reference=side))
    assert report["reference"]["variant"]["settings"] == {"clip": "Infinity"}


def test_json_has_every_row_even_a_folded_one():
    rows = parsed(compared(row("a"), row("b", 1, same_as=Place("a", 0, "output"))))["rows"]
    assert [found["module"] for found in rows] == ["a", "b"]


def test_json_has_the_metrics_that_were_asked_for():
    options = DiffOptions(metrics=("peir",))
    report = parsed(compared(row(), options=options, complete=False))
    assert report["rows"][0]["metrics"] == {"peir": 0.03}
    assert report["complete"] is False


def test_json_gives_reasons_for_the_metrics_that_it_has():
    one = row("fc", undefined={"mismatches": "floating point", "local_noise": "not replayed"})

    (told,) = comparison_json(compared(one), "1.0")["rows"]
    assert told["undefined"] == {"mismatches": "floating point"}
    cut = replace(compared(one), options=DiffOptions(metrics=("peir",)))
    assert comparison_json(cut, "1.0")["rows"][0]["undefined"] == {}


def test_json_says_why_a_side_is_incomplete():
    side = replace(compared(row()).candidate, complete=False, error="RuntimeError: boom")
    report = parsed(compared(row(), candidate=side))
    assert report["candidate"]["incomplete"] == "RuntimeError: boom"


def drawn(modules, chosen=None):
    trace = replace(manifest(), modules=tuple(modules))
    names = frozenset(entry.name for entry in modules) if chosen is None else frozenset(chosen)
    return [f"{'  ' * branch.depth}{branch.label}" for branch in branches(trace, names)]


def test_modules_stand_under_their_parents_with_the_rest_of_their_names():
    names = ["", "model", "model.layers", "model.layers.0", "model.norm", "head"]
    parents = [None, "", "model", "model.layers", "model", ""]
    modules = [ModuleEntry(name, "C", up) for name, up in zip(names, parents, strict=True)]
    assert drawn(modules) == ["(root)", "  model", "    layers", "      0", "    norm", "  head"]
    assert drawn(modules, ["model.norm"]) == ["(root)", "  model", "    norm"]


def test_parents_in_a_circle_or_missing_hide_no_module():
    modules = [
        ModuleEntry("a", "A", "b"),
        ModuleEntry("b", "B", "a"),
        ModuleEntry("c", "C", "gone"),
        ModuleEntry("d", "D", "d"),
    ]
    assert sorted(line.strip() for line in drawn(modules)) == ["a", "b", "c", "d"]


def test_a_number_of_decibels_is_not_parted_from_its_unit():
    pieces = words("(inputs agree, output -14 dB): dBs of two kinds")

    assert [piece.plain for piece in pieces] == [
        *("(inputs", "agree,", "output", "-14 dB):", "dBs", "of", "two", "kinds"),
    ]
