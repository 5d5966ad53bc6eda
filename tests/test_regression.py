"""What got worse since an earlier comparison, and the ways in which that could be hidden."""

from dataclasses import replace

import pytest
from small_comparisons import compared, row

from qvtrace.comparison.comparability import Comparable
from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.rows import NOT_STORED, Place
from qvtrace.errors import UsageError
from qvtrace.judging.decision import measured
from qvtrace.judging.judge import judge
from qvtrace.judging.noise_floor import is_noise, times_floor
from qvtrace.judging.regression import RegressionLimit
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite


def of_peir(peir, module="a", **changes):
    metrics = Metrics(max_abs_error=0.1, peir=peir, sqnr=20.0)
    return row(module, metrics=metrics, **changes)


def without(why, status="ok", module="a"):
    return row(module, metrics=Metrics(), undefined=dict.fromkeys(METRICS, why), status=status)


IDENTICAL = row(
    "a",
    status="identical",
    metrics=Metrics(max_abs_error=0.0, peir=0.0),
    undefined={"sqnr": "identical"},
)
CONSTANT = without("constant reference")
OTHER_SHAPE = without("shapes differ", "shape")
NAN = of_peir(0.1, status="nonfinite", nonfinite=Nonfinite(new_nan=1))
OPAQUE = without(NOT_STORED, "opaque")


def comparison(*rows, missing=(), surplus=(), **changes):
    places = ([Place(name, 0, "output") for name in names] for names in (missing, surplus))
    return compared(*rows, coverage=Coverage.of(rows, *places), **changes)


def judged(now, earlier, limit="peir 1.2x", **options):
    """The result of one limit, for rows or whole comparisons."""
    good = of_peir(0.001, "good")
    sides = [one if hasattr(one, "rows") else comparison(one, good) for one in (now, earlier)]
    return judge(sides[0], baseline=sides[1], max_regression=limit, **options).verdict


def failures(verdict):
    return [finding.place.module for finding in verdict.gates[0].failures]


@pytest.mark.parametrize(
    ("text", "metric", "amount"),
    [
        ("peir 1.2x", "peir", 1.2),
        ("  mean_error  2x ", "mean_error", 2.0),
        ("sqnr 3dB", "sqnr", 3.0),
        ("token_sqnr_p5 .5 dB", "token_sqnr_p5", 0.5),
        ("cosine 1e-3", "cosine", 0.001),
        ("gain 1dB", "gain", 1.0),
    ],
)
def test_a_limit_is_a_factor_or_a_difference(text, metric, amount):
    limit = RegressionLimit.parse(text)
    assert (limit.metric, limit.amount) == (metric, amount)


@pytest.mark.parametrize(
    "text",
    [
        *("", "peir", "peir x", "peir 1.2", "peir nanx", "peir infx", "peir 1e999x", "peir 0.9x"),
        *("peir 3dB", "sqnr 1.2x", "sqnr 3", "sqnr -1dB", "beauty 2x", "peir>1.2x", "nonfinite 1x"),
    ],
)
def test_what_is_no_limit_is_an_error(text):
    with pytest.raises(UsageError, match=r"^--max-regression '"):
        RegressionLimit.parse(text)


@pytest.mark.parametrize(
    ("now", "earlier", "limit", "ok"),
    [
        (of_peir(0.012), of_peir(0.01), "peir 1.2x", True),
        (of_peir(0.0121), of_peir(0.01), "peir 1.2x", False),
        (of_peir(0.001), of_peir(0.01), "peir 1x", True),
        (of_peir(0.01), of_peir(0.0), "peir 5x", False),
        (of_peir(0.01), IDENTICAL, "peir 5x", False),
        (of_peir(0.01), IDENTICAL, "sqnr 30dB", False),
        (IDENTICAL, of_peir(0.01), "sqnr 1dB", True),
        (
            row("a", metrics=Metrics(gain=-9.0)),
            row("a", metrics=Metrics(gain=-10)),
            "gain 1dB",
            True,
        ),
        (
            row("a", metrics=Metrics(gain=-8.0)),
            row("a", metrics=Metrics(gain=-10)),
            "gain 1dB",
            False,
        ),
        (row("a", metrics=Metrics(sqnr=17.0)), of_peir(0.1), "sqnr 3dB", True),
        (row("a", metrics=Metrics(sqnr=16.9)), of_peir(0.1), "sqnr 3dB", False),
        (
            row("a", metrics=Metrics(mean_error=-3.0)),
            row("a", metrics=Metrics(mean_error=1.0)),
            "mean_error 2x",
            False,
        ),
    ],
)
def test_a_row_is_held_against_what_it_was(now, earlier, limit, ok):
    assert judged(now, earlier, limit).exit_code == (0 if ok else 1)


@pytest.mark.parametrize("bad", [CONSTANT, OTHER_SHAPE, NAN], ids=lambda bad: bad.status)
def test_what_became_undefined_or_not_comparable_got_worse_what_was_so_did_not(bad):
    assert judged(bad, of_peir(0.5)).exit_code == 1
    assert judged(bad, IDENTICAL).exit_code == 1
    for earlier in (CONSTANT, OTHER_SHAPE, NAN):
        assert judged(bad, earlier).exit_code == 0
    assert judged(of_peir(0.5), bad).exit_code == 0


STATISTICS = without("statistics only", "opaque")
INTEGERS = row(
    "a",
    metrics=Metrics(mismatches=1, max_abs_error=1),
    undefined={"peir": "integer"},
    status="mismatch",
)


@pytest.mark.parametrize("earlier", [STATISTICS, OPAQUE, without("private", "opaque")])
def test_figures_that_are_not_to_be_had_are_counted_and_not_judged(earlier):
    for now in (STATISTICS, OPAQUE, of_peir(0.5), CONSTANT):
        (gate,) = judged(now, earlier).gates
        assert (gate.ok, gate.rows) == (True, 1)
        assert gate.asides == ("1 row not judged: no figures to be had",)
    for now in (NAN, OTHER_SHAPE):
        assert failures(judged(now, earlier)) == ["a"]
    assert judged(IDENTICAL, earlier).gates[0].rows == 2


@pytest.mark.parametrize("same", [CONSTANT, INTEGERS, NAN, OTHER_SHAPE], ids=lambda one: one.status)
def test_what_was_undefined_and_still_is_counts_as_judged(same):
    (gate,) = judged(same, same).gates
    assert (gate.ok, gate.rows, gate.asides) == (True, 2, ())


def test_a_limit_on_figures_that_none_has_does_not_hold():
    both = comparison(STATISTICS), comparison(STATISTICS)
    (gate,) = judged(*both).gates
    assert not gate.ok
    assert judged(of_peir(0.1), of_peir(0.1), "local_peir 2x").exit_code == 1


def test_a_row_that_is_no_longer_stored_got_worse():
    both = comparison(OPAQUE, of_peir(0.1, "b")), comparison(of_peir(0.1), of_peir(0.1, "b"))
    assert failures(judged(*both)) == ["a"]
    assert judged(both[1], both[0]).exit_code == 0


def test_a_module_that_the_candidate_lost_got_worse():
    earlier = comparison(of_peir(0.1), of_peir(0.1, "b"))
    now = comparison(of_peir(0.1), missing=["b"])
    assert failures(judged(now, earlier)) == ["b"]
    assert judged(now, comparison(of_peir(0.1), missing=["b"])).exit_code == 0


def test_the_worst_row_is_named_with_what_it_was():
    earlier = comparison(of_peir(0.1), of_peir(0.1, "b"))
    verdict = judged(comparison(of_peir(0.2), of_peir(0.4, "b")), earlier)
    (gate,) = verdict.gates
    assert (gate.gate, gate.rows, gate.failed) == ("peir 1.2x since the baseline", 2, 2)
    assert gate.worst.place.module == "b"
    assert gate.worst.excess == pytest.approx(0.4 - 0.12)
    assert "b (0.4, 0.28 beyond the limit, 0.1 before)" in verdict.text


def test_cosines_are_told_with_the_digits_that_tell_them_apart():
    now, earlier = (row("a", metrics=Metrics(cosine=1 - d)) for d in (3.4e-5, 2e-9))
    (gate,) = judged(comparison(now), comparison(earlier), "cosine 0.001").gates
    told = measured(gate.worst, "cosine")
    assert told == "0.9999660, 0.000966 on the good side, 0.99999999800 before"


def test_new_and_vanished_modules_are_named_and_do_not_fail():
    now = comparison(of_peir(0.1), of_peir(0.9, "new"), surplus=["extra"])
    earlier = comparison(of_peir(0.1), of_peir(0.1, "old"), missing=["gone"])
    result = judge(now, baseline=earlier, max_regression="peir 1.2x")
    assert result.verdict.exit_code == 0
    assert result.verdict.gates[0].rows == 1
    not_judged = "1 row not judged: vanished since", "1 row not judged: new since"
    assert result.verdict.gates[0].asides == not_judged
    assert (result.changes.new, result.changes.vanished) == (("new", "extra"), ("old", "gone"))
    assert "2 modules new since the baseline: new, extra" in result.verdict.text
    assert "2 modules vanished since the baseline: old, gone" in result.verdict.text


def test_nothing_in_common_is_not_comparable():
    verdict = judged(comparison(of_peir(0.1, "a")), comparison(of_peir(0.1, "b")))
    assert verdict.exit_code == 3
    assert "no row at the place of any of these" in verdict.text


@pytest.mark.parametrize(
    "changes",
    [
        {"comparable": Comparable(False, ("inputs differ in call 0 of (root): inputs.0",))},
        {"candidate": replace(compared().candidate, complete=False)},
    ],
    ids=["inputs", "incomplete"],
)
def test_a_baseline_that_means_nothing_lets_nothing_pass(changes):
    earlier = comparison(of_peir(0.9), **changes)
    verdict = judged(comparison(of_peir(0.1)), earlier)
    assert verdict.exit_code == 3
    assert "nothing can be told by the baseline" in verdict.text


def test_results_of_other_rows_are_not_held_against_each_other():
    earlier = comparison(of_peir(0.1), options=DiffOptions(include="a"))
    with pytest.raises(UsageError, match="compared with --include a, this with no filter"):
        judged(comparison(of_peir(0.1)), earlier)


def test_paths_are_named_where_results_are_of_others():
    earlier = comparison(of_peir(0.1))
    now = comparison(of_peir(0.1), options=DiffOptions(path="all"))
    with pytest.raises(UsageError, match="compared with no filter, this with --path all; comp"):
        judged(now, earlier)


@pytest.mark.parametrize("cut", ["now", "earlier"])
def test_a_comparison_that_was_cut_is_not_judged(cut):
    sides = {"now": comparison(of_peir(0.1)), "earlier": comparison(of_peir(0.1))}
    sides[cut] = replace(sides[cut], complete=False)
    with pytest.raises(UsageError, match="was cut by --top or --metrics"):
        judged(sides["now"], sides["earlier"])


def test_a_limit_needs_a_baseline_and_a_baseline_a_limit():
    with pytest.raises(UsageError, match="add --baseline"):
        judge(comparison(of_peir(0.1)), max_regression=["peir 2x"])
    with pytest.raises(UsageError, match="add --max-regression"):
        judge(comparison(of_peir(0.1)), baseline=comparison(of_peir(0.1)))


def test_gates_and_limits_are_judged_together():
    verdict = judged(of_peir(0.1), of_peir(0.1), fail_on=["peir>0.05"])
    assert [gate.ok for gate in verdict.gates] == [False, True]
    assert verdict.exit_code == 1


def test_what_is_below_rounding_is_not_worse():
    assert judged(of_peir(9e-7), of_peir(1e-8)).exit_code == 0
    assert judged(of_peir(1.1e-6), of_peir(1e-8)).exit_code == 1


def test_what_is_below_the_floor_that_was_measured_is_not_worse():
    now = of_peir(0.03, floor=Metrics(peir=0.04, sqnr=10.0))
    assert judged(now, of_peir(0.01)).exit_code == 0
    assert judged(now, IDENTICAL, "sqnr 3dB").exit_code == 0
    assert judged(replace(now, floor=Metrics(peir=0.02)), of_peir(0.01)).exit_code == 1


@pytest.mark.parametrize(
    ("metric", "below", "above"),
    [
        ("relative_l2", 1e-6, 2e-6),
        ("sqnr", 121.0, 119.0),
        ("cosine", 1.0, 1 - 1e-9),
        ("mean_abs_error", 3e-6, 5e-6),
        ("mismatches", 0, 1),
        ("noise_out", 1e-12, 1e-11),
    ],
)
def test_rounding_is_measured_in_the_units_of_the_metric(metric, below, above):
    interval_of_4 = row("a", metrics=Metrics(max_abs_error=0.4, peir=0.1))
    assert is_noise(interval_of_4, metric, below)
    assert not is_noise(interval_of_4, metric, above)


def test_a_difference_is_a_multiple_of_the_floor():
    noisy = row(
        "a",
        metrics=Metrics(peir=0.03, sqnr=14.0, cosine=0.97),
        floor=Metrics(peir=0.01, sqnr=34.0, cosine=0.99),
    )
    assert times_floor(noisy) == pytest.approx(3)
    assert times_floor(noisy, "sqnr") == pytest.approx(10)
    assert times_floor(noisy, "cosine") == pytest.approx(3)


@pytest.mark.parametrize("floor", [None, Metrics(), Metrics(peir=0.0), Metrics(peir=5e-324)])
def test_without_noise_there_is_no_multiple_of_it(floor):
    assert times_floor(of_peir(0.03, floor=floor)) is None
