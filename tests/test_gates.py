"""Gates: what they cover, when they hold, and the ways in which one could be fooled."""

import math
from dataclasses import replace

import pytest
from small_comparisons import row

from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import NOT_STORED, PLAIN_VALUE, SHAPES_DIFFER, TYPES_DIFFER
from qvtrace.errors import UsageError
from qvtrace.judging.decision import gate_text
from qvtrace.judging.gates import (
    ONLY_IN_CANDIDATE,
    ONLY_IN_REFERENCE,
    Gate,
    Place,
    Scope,
    judge_gates,
)
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite


def of_peir(module, peir, **changes):
    return row(module, metrics=Metrics(max_abs_error=0.1, peir=peir, sqnr=20.0), **changes)


def undefined(module, why, **changes):
    return row(module, metrics=Metrics(), undefined=dict.fromkeys(METRICS, why), **changes)


IDENTICAL = row(
    "same",
    status="identical",
    metrics=Metrics(max_abs_error=0.0, peir=0.0),
    undefined={"sqnr": "identical", "mismatches": "floating point"},
)
EXACT = undefined("count", "integer", status="exact")
MISMATCH = row("ids", status="mismatch", metrics=Metrics(max_abs_error=2, mismatches=3))
SHAPE = undefined("grown", SHAPES_DIFFER, status="shape", reason="[1] against [2]")
OPAQUE = undefined("cache", NOT_STORED, status="opaque", reason="an object of type Cache")
OTHER_TYPE = undefined("object", TYPES_DIFFER, status="opaque", reason="types differ: A against B")
NONFINITE = of_peir("nan", 0.001, status="nonfinite", nonfinite=Nonfinite(new_nan=2))


def judged(gates, *rows, missing=(), surplus=()):
    """The results of gates; `missing` and `surplus` are modules that one side only has."""
    places = ([Place(name, 0, "output") for name in names] for names in (missing, surplus))
    texts = [gates] if isinstance(gates, str) else gates
    results = judge_gates([Gate.parse(text) for text in texts], Scope(rows, *places))
    return results[0] if isinstance(gates, str) else results


@pytest.mark.parametrize(
    ("text", "subject", "operator", "limit", "pattern"),
    [
        ("peir>0.05", "peir", ">", 0.05, None),
        (" sqnr < 20 @ *.mlp.* ", "sqnr", "<", 20.0, "*.mlp.*"),
        ("token_sqnr_p5<=-1.5e1@(root)", "token_sqnr_p5", "<=", -15.0, "(root)"),
        ("nonfinite", "nonfinite", None, 0.0, None),
        ("structure @ a@b", "structure", None, 0.0, "a@b"),
    ],
)
def test_a_gate_is_a_condition_and_where_it_holds(text, subject, operator, limit, pattern):
    gate = Gate.parse(text)
    found = (gate.subject, gate.operator, gate.limit, gate.pattern, gate.text)
    assert found == (subject, operator, limit, pattern, text.strip())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("peir>nan", "'nan' is no finite number"),
        ("peir>inf", "'inf' is no finite number"),
        ("peir>-Infinity", "no finite number"),
        ("peir>1e999", "'1e999' is no finite number"),
        ("peir>5%", "'5%' is no finite number"),
        ("peir>1_0", "no finite number"),
        ("peir>\u0660.\u0665", "no finite number"),
        ("peir>", "is no 'METRIC OP NUMBER"),
        ("peir", "has no limit"),
        ("worst(peir)", "has no limit; write one, such as 'worst(peir)>0.05'"),
        ("peir==0", "is no 'METRIC OP NUMBER"),
        ("", "is no 'METRIC OP NUMBER"),
        ("PEIR>0.1", "'PEIR' is not known; choose one of max_abs_error"),
        ("nonfinite>0", "takes no number"),
        ("peir>0.1 @", "no pattern after '@'"),
        ("0.05<peir", "write 'peir>0.05'"),
        ("peir<0.05", "would fail good rows"),
        ("sqnr>20", "would fail good rows"),
    ],
)
def test_what_is_no_gate_is_an_error_that_says_why(text, wanted):
    with pytest.raises(UsageError, match=r"^--fail-on ") as raised:
        Gate.parse(text)
    assert wanted in str(raised.value)
    assert repr(text) in str(raised.value)


def test_a_gate_holds_up_to_its_limit():
    assert judged("peir>0.05", of_peir("a", 0.05)).ok
    assert not judged("peir>=0.05", of_peir("a", 0.05)).ok
    assert not judged("peir>0.05", of_peir("a", math.nextafter(0.05, 1))).ok


def test_higher_is_better_for_some_metrics():
    assert judged("sqnr<20", of_peir("a", 0.1)).ok
    assert not judged("sqnr<20.5", of_peir("a", 0.1)).ok


def test_a_shift_down_is_as_far_as_one_up():
    shifted = row("a", metrics=Metrics(mean_error=-0.5))
    assert not judged("mean_error>0.1", shifted).ok


def test_a_negative_gain_is_small():
    assert judged("gain>1", row("a", metrics=Metrics(gain=-30.0))).ok


def test_a_result_names_the_worst_row_and_by_how_much():
    result = judged("peir>0.05", of_peir("a", 0.07), of_peir("b", 0.09), of_peir("c", 0.01))
    assert (result.ok, result.rows, result.failed) == (False, 3, 2)
    assert [finding.place.module for finding in result.failures] == ["b", "a"]
    assert (result.worst.place.module, result.worst.value) == ("b", 0.09)
    assert result.worst.excess == pytest.approx(0.04)


def test_a_gate_that_holds_names_the_row_that_is_nearest_to_the_limit():
    result = judged("peir>0.05", of_peir("a", 0.02), of_peir("b", 0.04), IDENTICAL)
    assert (result.ok, result.rows, result.worst.place.module) == (True, 3, "b")
    assert result.worst.excess == pytest.approx(-0.01)


@pytest.mark.parametrize(
    "bad",
    [
        of_peir("nan", math.nan),
        NONFINITE,
        undefined("constant", "constant reference"),
        undefined("empty", "empty"),
        undefined("no reason", ""),
        SHAPE,
        undefined("tree", "structure differs", status="structure"),
        undefined("expert", "routing", status="routing"),
        OTHER_TYPE,
        MISMATCH,
    ],
    ids=lambda bad: bad.module,
)
def test_a_row_that_was_not_compared_or_is_undefined_is_not_within(bad):
    result = judged("peir>1000", of_peir("good", 0.0), bad)
    assert (result.ok, result.rows, result.failed) == (False, 2, 1)
    assert result.worst.place.module == bad.module


def test_a_reason_is_undefined_even_where_the_row_has_none():
    bare = row("a", metrics=Metrics(), undefined={})
    assert not judged("peir>1000", bare).ok


def test_what_is_missing_in_the_candidate_is_not_within():
    result = judged("peir>1000", of_peir("a", 0.0), missing=["b"])
    assert (result.ok, result.rows, result.failed) == (False, 2, 1)
    assert (result.worst.place.module, result.worst.status) == ("b", ONLY_IN_REFERENCE)
    assert judged("peir>1000 @ a", of_peir("a", 0.0), missing=["b"]).ok


def test_what_only_the_candidate_has_is_for_another_gate():
    assert judged("peir>1000", of_peir("a", 0.0), surplus=["b"]).ok
    result = judged("unmatched", of_peir("a", 0.0), surplus=["b"])
    assert (result.ok, result.rows, result.failed) == (False, 2, 1)
    assert result.worst.status == ONLY_IN_CANDIDATE


@pytest.mark.parametrize("gate", ["peir>0", "peir>=0", "sqnr<500", "cosine<0.99"])
def test_identical_satisfies_every_gate(gate):
    result = judged(gate, IDENTICAL)
    assert (result.ok, result.rows) == (True, 1)


def test_a_percentile_that_falls_on_an_exact_token_is_within():
    exact_median = row("a", metrics=Metrics(peir=0.1), undefined={"token_sqnr_p50": "identical"})
    assert judged("token_sqnr_p50<500", exact_median).ok


def test_equal_integers_hold_and_objects_of_one_type_are_not_judged():
    result = judged("peir>0.05", of_peir("a", 0.01), EXACT, OPAQUE)
    assert (result.ok, result.rows, result.unjudged) == (True, 2, 1)
    assert "held in 2 rows (1 opaque one not judged)" in gate_text(result, RowNames([]))


@pytest.mark.parametrize("gate", ["peir>0.05", "sqnr<1", "mismatches>0", "nonfinite"])
def test_a_gate_that_could_judge_nothing_does_not_hold(gate):
    result = judged(gate, OPAQUE)
    assert (result.ok, result.rows) == (False, 0)
    assert "nothing" in result.note


def test_mismatches_are_about_integers_and_values():
    equal = row("ids", status="exact", metrics=Metrics(max_abs_error=0, mismatches=0))
    floats = row("a", undefined={"mismatches": "floating point"})
    assert judged("mismatches>0", floats, equal).rows == 1
    assert judged("mismatches>0", floats, equal).ok
    assert not judged("mismatches>2", floats, MISMATCH).ok
    assert judged("mismatches>3", floats, MISMATCH).ok
    assert not judged("mismatches>3", MISMATCH, SHAPE).ok


def test_a_value_that_differs_is_no_small_error():
    assert not judged("max_abs_error>100", MISMATCH).ok


def test_nonfinite_fails_on_new_nan_and_says_how_many():
    result = judged("nonfinite", of_peir("a", 0.5), NONFINITE, SHAPE)
    assert (result.ok, result.rows, result.failed) == (False, 2, 1)
    assert result.worst.reason == "2 new NaN"
    assert judged("nonfinite", of_peir("a", 0.5)).ok


def test_structure_fails_on_other_shapes_and_types():
    assert judged("structure", of_peir("a", 0.5), NONFINITE, MISMATCH, OPAQUE).ok
    result = judged("structure", of_peir("a", 0.5), SHAPE, OTHER_TYPE)
    assert (result.ok, result.rows, result.failed) == (False, 3, 2)


def test_unmatched_fails_on_both_sides_and_holds_where_all_are_paired():
    assert judged("unmatched", of_peir("a", 0.5)).ok
    assert judged("unmatched", of_peir("a", 0.5), missing=["b"], surplus=["c"]).failed == 2


def test_the_first_gate_on_a_metric_whose_pattern_matches_a_row_decides():
    rows = of_peir("head", 0.4), of_peir("mlp", 0.04)
    loose_first = judged(["peir>0.5 @ head", "peir>0.05"], *rows)
    assert [(result.ok, result.rows) for result in loose_first] == [(True, 1), (True, 1)]
    strict_first = judged(["peir>0.05", "peir>0.5 @ head"], *rows)
    assert [(result.ok, result.rows) for result in strict_first] == [(False, 2), (True, 0)]
    assert "earlier gate" in strict_first[1].note


def test_gates_on_several_metrics_do_not_decide_for_each_other():
    results = judged(["peir>0.5 @ *", "sqnr<30"], of_peir("a", 0.1))
    assert [result.ok for result in results] == [True, False]


@pytest.mark.parametrize("gate", ["peir>0.05 @ layers.9", "nonfinite @ layers.9", "unmatched @ x"])
def test_a_pattern_that_matches_nothing_is_an_error(gate):
    with pytest.raises(UsageError, match="matches none of the 1 modules"):
        judged(gate, of_peir("layers.1", 0.1))


def test_a_pattern_is_an_exact_name_first():
    rows = of_peir("layers[0]", 0.9), of_peir("layers0", 0.1)
    assert judged("peir>0.5 @ layers[0]", *rows).rows == 1
    assert not judged("peir>0.5 @ layers[0]", *rows).ok


def test_the_root_has_a_name_in_a_pattern():
    assert judged("peir>0.5 @ (root)", of_peir("", 0.1), of_peir("a", 0.9)).rows == 1


def test_plain_values_that_are_equal_hold():
    assert judged("peir>0", undefined("n", PLAIN_VALUE, status="exact")).ok


def test_a_gate_on_a_place_that_lacks_the_metric_is_not_silently_met():
    flat = replace(of_peir("a", 0.1), undefined={"token_sqnr_p5": "no token axis"})
    result = judged("token_sqnr_p5<20", flat)
    assert not result.ok
    assert result.worst.reason == "undefined: no token axis"
