"""A result file, read again: what it says comes back, what it cannot say is one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_comparisons import compared, row

from qvtrace.comparison.coverage import Coverage
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.origins import Origin
from qvtrace.comparison.results import load_result
from qvtrace.comparison.rows import Place
from qvtrace.comparison.verdict import Verdict
from qvtrace.errors import ResultError, UsageError
from qvtrace.judging.judge import judge
from qvtrace.metrics.differences import Peak
from qvtrace.metrics.factors import ListedFactors
from qvtrace.metrics.names import METRICS, Metrics
from qvtrace.metrics.nonfinite import Nonfinite
from qvtrace.reports.csv import comparison_csv
from qvtrace.reports.json import comparison_text
from qvtrace.reports.junit import comparison_junit
from qvtrace.reports.markdown import comparison_markdown
from qvtrace.reports.table import TableOptions, comparison_lines


def test_origins_are_read_again(tmp_path):
    origins = (Origin("fc", 1, "output", None, 0.5, 0.25, "local", "scale"),)
    file = written(compared(verdict=Verdict("", 0, origins=origins)), tmp_path / "r.json")
    assert load_result(file).verdict.origins == origins


def test_factors_of_channels_are_read_again(tmp_path):
    factors = ListedFactors(((0, 4, 0.25), (8, 9, 2.0)), 3, 0.1, 4.0)
    for factor in (0.5, factors):
        file = written(compared(row("a", scale_factor=factor)), tmp_path / "r.json")
        assert load_result(file).rows[0].scale_factor == factor


def everything():
    """A comparison in which nothing is as it is by default."""
    rows = (
        row("a.ü|\n", 3, call=2, sample=1, step=4, zero_tokens=2, layout="transpose(1, 2)"),
        row(
            "",
            4,
            path="output.0",
            type=("A", "B"),
            dtype=("int64", None),
            shape=((2, 3), None),
            status="mismatch",
            matched_by="alias",
            reason="2 against 3",
            metrics=Metrics(max_abs_error=2**70, mismatches=1),
            undefined={"peir": "integer"},
            peak=Peak((), True, 2**70),
            worst_token=None,
            nonfinite=Nonfinite(1, 2, 3, 4, 5, 6, 7, 8),
            floor=Metrics(peir=0.5),
        ),
    )
    places = (Place("w", 0, "output"), Place("x", 1, "inputs.0"))
    comparison = compared(
        *rows,
        coverage=Coverage.of(rows, places, places[:1], wrappers=["w"]),
        options=DiffOptions(include="a*", exclude=["b"], path="all"),
        floor=replace(compared().reference, file="bf16.st"),
    )
    side = replace(
        comparison.candidate,
        complete=False,
        error="boom",
        warnings=("careful",),
    )
    return replace(comparison, candidate=side)


def written(comparison, file):
    file.write_text(comparison_text(comparison, "1.2.3"), encoding="utf-8")
    return file


def test_what_was_written_is_read_again(tmp_path):
    comparison = everything()
    found = load_result(written(comparison, tmp_path / "r.json"))
    for name in ("reference", "candidate", "floor", "comparable", "coverage", "rows"):
        assert getattr(found, name) == getattr(comparison, name)
    assert found.options.rows_asked == comparison.options.rows_asked
    assert found.options.filters == comparison.options.filters


def test_a_result_is_judged_as_the_archives_are(tmp_path, archives):
    gates = ["peir>0.001", "sqnr<90 @ fc", "nonfinite", "unmatched"]
    fresh = diff(*archives, fail_on=gates, include=["fc", "(root)"])
    file = written(diff(*archives, include=["fc", "(root)"]), tmp_path / "r.json")
    again = judge(load_result(file), fail_on=gates)
    assert again.verdict == fresh.verdict


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A layer, and the same with other weights."""
    import torch

    from qvtrace.recording.recorder import record

    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(16, 16))
    model.add_module("relu", torch.nn.ReLU())
    files = folder / "fp.st", folder / "quant.st"
    for file, variant in zip(files, ("fp", "quant"), strict=True):
        with torch.no_grad(), record(model, file, variant=variant):
            model(torch.ones(2, 16))
        with torch.no_grad():
            model.fc.weight.mul_(1.01)
    return files


def refused(file, *wanted):
    with pytest.raises(ResultError) as raised:
        load_result(file)
    message = str(raised.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    for text in wanted:
        assert text in message


def edited(tmp_path, edit):
    report = json.loads(comparison_text(compared(row("a"), row("b", 1)), "1.2.3"))
    edit(report)
    file = tmp_path / "r.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda report: report.update(format=2), "has format 2 (written by qvtrace 1.2.3)"),
        (lambda report: report.update(format=True), "'format' of the result is bool"),
        (lambda report: report.update(complete=False), "was cut by --top or --metrics"),
        (lambda report: report.update(complete=1), "'complete'"),
        (lambda report: report.pop("rows"), "'rows' of the result is NoneType"),
        (lambda report: report["rows"].append(3), "row 2: the row is int"),
        (lambda report: report["rows"].append(report["rows"][0]), "row 2: stands at the place"),
        (lambda report: report["rows"][1].pop("module"), "row 1: 'module'"),
        (lambda report: report["rows"][1].update(call=-1), "row 1: 'call' of the row is negative"),
        (lambda report: report["rows"][1].update(status="fine"), "row 1: the status 'fine'"),
        (lambda report: report["rows"][1].update(type=["A"]), "row 1: 'type'"),
        (lambda report: report["rows"][1].update(shape=[[1, -1], None]), "row 1: 'shape'"),
        (lambda report: report["rows"][1].update(metrics=[]), "row 1: 'metrics'"),
        (lambda report: report["rows"][1]["metrics"].update(peir="0.1"), "row 1: 'peir'"),
        (lambda report: report["rows"][1]["metrics"].update(peir=True), "row 1: 'peir'"),
        (lambda report: report["rows"][1]["undefined"].update(peir=1), "row 1: 'peir'"),
        (lambda report: report["rows"][1]["peak"].update(index=[1.5]), "row 1: 'index'"),
        (lambda report: report["rows"][1]["peak"].update(reference="1"), "row 1: the reference"),
        (lambda report: report["rows"][1].update(nonfinite={"new_nan": 1}), "row 1: 'reference_"),
        (
            lambda report: report["rows"][1].update(
                scale_factor={"channels": [[0, 1]], "factors": []}
            ),
            "row 1: the channels and factors",
        ),
        (lambda report: report["verdict"].pop("findings"), "'findings' of the verdict"),
        (lambda report: report["coverage"].update(only_in_reference=["a"]), "the place is str"),
        (lambda report: report["comparable"].update(differences=[1]), "'differences'"),
        (lambda report: report.update(filters={"include": [], "exclude": [], "path": "x"}), "'x'"),
        (lambda report: report["reference"].update(environment=3), "'environment'"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused_by_name(tmp_path, edit, wanted):
    refused(edited(tmp_path, edit), wanted)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is no result"),
        (b"[]", "the result is list"),
        (b"{", "is no result"),
        (b"\xff\xfe", "utf-8"),
        (b'{"format": NaN}', "NaN is no JSON"),
        (b'{"format": 1e999}', "1e999 is beyond every float"),
        (b'{"format": 1' + b"0" * 400 + b"}", "is beyond every float"),
        (b"[" * 200_000, "is nested too deeply"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_file_that_is_no_result_is_refused_by_name(tmp_path, content, wanted):
    file = tmp_path / "r.json"
    file.write_bytes(content)
    refused(file, wanted)


def test_no_file_and_what_is_no_file_are_told_apart(tmp_path):
    refused(tmp_path / "none.json", "No such file")
    refused(tmp_path, "it is no file")
    refused(Path("/dev/zero"), "it is no file")


def test_a_deep_environment_is_refused(tmp_path):
    deep = current = {}
    for _ in range(100):
        current["x"] = current = {}
    refused(edited(tmp_path, lambda report: report["reference"].update(environment=deep)), "deep")


def test_metrics_of_a_later_version_do_not_hinder(tmp_path):
    file = edited(tmp_path, lambda report: report["rows"][0]["metrics"].update(novel=1))
    assert load_result(file).rows[0].metrics.peir == 0.03


def test_a_result_without_counts_of_later_versions_is_read(tmp_path):
    file = written(everything(), tmp_path / "r.json")
    result = json.loads(file.read_text())
    for count in ("new_inf", "equal_inf"):
        del result["rows"][1]["nonfinite"][count]
    file.write_text(json.dumps(result))

    assert load_result(file).rows[1].nonfinite == Nonfinite(1, 2, 3, 4, 5, 6)


def test_a_metric_that_is_missing_is_within_no_limit(tmp_path):
    file = edited(tmp_path, lambda report: report["rows"][0]["metrics"].pop("peir"))
    assert judge(load_result(file), fail_on=["peir>1000"]).verdict.exit_code == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_damage_is_a_traceback(tmp_path, data):
    """A random place of a result is replaced by something random."""
    report = json.loads(comparison_text(everything(), "1.2.3"))
    node = report
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(JSON)
            break
        node = node[key]
    file = tmp_path / "r.json"
    file.write_text(json.dumps(report), encoding="utf-8")
    try:
        comparison = judge(load_result(file), fail_on=[f"{metric}<=0" for metric in ("cosine",)])
    except (ResultError, UsageError):
        return
    comparison_text(comparison, "1.2.3")
    for report in (comparison_csv, comparison_junit, comparison_markdown):
        assert report(comparison)
    for rows in (True, False):
        assert list(comparison_lines(comparison, TableOptions(width=80, rows=rows)))


def test_every_metric_is_written_and_read(tmp_path):
    numbers = {name: index + 0.5 for index, name in enumerate(METRICS)}
    comparison = compared(row("a", metrics=Metrics(**numbers)))
    comparison = replace(comparison, local=comparison.candidate)  # a replay has metrics of its own
    file = written(comparison, tmp_path / "r.json")
    assert load_result(file).rows[0].metrics == Metrics(**numbers)
