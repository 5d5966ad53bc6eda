"""Two archives become a decision: exit codes, configuration, and what the verdict says of gates."""

import copy
import json
from pathlib import Path

import pytest
import torch
from command_lines import invoke
from torch import nn

import qvtrace

GATE = ("--fail-on", "peir>0.9")


class Halves(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def record(file, model, x, **options):
    with torch.no_grad(), qvtrace.record(model.eval(), file, **options):
        model(x)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """One model as a float, a coarse and a broken one, on other inputs, and cut off half-way."""
    folder = tmp_path_factory.mktemp("verdicts")
    torch.manual_seed(0)
    model = Halves()
    x = torch.randn(2, 4, 16)
    record(folder / "fp.st", model, x, variant="fp")
    record(folder / "again.st", model, x, variant="fp")
    record(folder / "other_inputs.st", model, x + 1, variant="fp")
    coarse = copy.deepcopy(model)
    with torch.no_grad():
        coarse.second.weight.copy_((coarse.second.weight * 32).round() / 32)
    record(folder / "quant.st", coarse, x, variant="quant")
    record(folder / "first_only.st", coarse, x, variant="quant", include=["first"])
    record(folder / "unrelated.st", nn.Linear(16, 8), x)
    record(folder / "renamed.st", nn.ModuleDict({"third": nn.Linear(16, 16)})["third"], x)
    record(folder / "unnamed.st", model, x)
    record(folder / "named_a.st", model, x, variant="a")
    record(folder / "named_b.st", coarse, x, variant="b")
    scaled = copy.deepcopy(coarse)
    scaled.second.register_buffer("scale", torch.tensor(1 / 32))
    scaled.second.register_buffer("zero_point", torch.tensor(0))
    record(folder / "scales.st", scaled, x)
    with torch.no_grad():
        coarse.second.bias[3] = float("nan")
    record(folder / "nan.st", coarse, x, variant="quant")
    coarse.second.register_forward_pre_hook(raises)
    with pytest.raises(RuntimeError):
        record(folder / "cut.st", coarse, x, variant="quant")
    return folder


def raises(module, args):
    raise RuntimeError("no such luck")


@pytest.fixture
def folder(archives, tmp_path, monkeypatch):
    """An empty working folder; the archives are beside it."""
    for file in archives.glob("*.st*"):
        (tmp_path / file.name).symlink_to(file)
    work = tmp_path
    monkeypatch.chdir(work)
    return work


def verdict(result):
    return json.loads(result.stdout)["verdict"]


def diff(*arguments):
    """The verdict of `diff`, which agrees with the exit code."""
    return judged("diff", *arguments)


def judged(*arguments):
    result = invoke(*arguments, "--format", "json")
    found = verdict(result)
    assert result.exit_code == found["exit_code"]
    return found


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["fp.st", "quant.st"], 0),
        (["fp.st", "quant.st", "--fail-on", "peir>0.9", "--fail-on", "nonfinite"], 0),
        (["fp.st", "again.st", "--fail-on", "peir>0", "--fail-on", "sqnr<400"], 0),
        (["fp.st", "quant.st", "--fail-on", "peir>0.000001"], 1),
        (["fp.st", "quant.st", "--fail-on", "peir>0.9", "--fail-on", "sqnr<400"], 1),
        (["fp.st", "nan.st", "--fail-on", "nonfinite"], 1),
        (["fp.st", "nan.st", "--fail-on", "peir>1000"], 1),
        (["fp.st", "first_only.st", *GATE], 1),
        (["fp.st", "first_only.st", "--fail-on", "unmatched"], 1),
        (["fp.st", "other_inputs.st"], 0),
        (["fp.st", "other_inputs.st", *GATE], 3),
        (["fp.st", "other_inputs.st", "--fail-on", "peir>0.000001"], 3),
        (["fp.st", "cut.st.partial"], 0),
        (["fp.st", "cut.st.partial", *GATE], 3),
        (["fp.st", "first_only.st", "--include", "second", *GATE], 3),
        (["fp.st", "first_only.st", "--include", "second"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_exit_codes(folder, arguments, code):
    assert diff(*arguments)["exit_code"] == code


@pytest.mark.parametrize(
    "arguments",
    [
        ["fp.st", "quant.st", "--fail-on", "peir>nan"],
        ["fp.st", "other_inputs.st", "--fail-on", "peir>0.9 @ third"],
        ["fp.st", "first_only.st", "--include", "second", "--fail-on", "peir>0.9 @ first"],
        ["fp.st", "missing.st", *GATE],
    ],
    ids=" ".join,
)
def test_trouble_comes_before_every_other_exit_code(folder, arguments):
    result = invoke("diff", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_json_gate_has_its_limit_its_rows_and_the_worst_of_them(folder):
    found = diff("fp.st", "quant.st", "--fail-on", "peir>0.001 @ second")
    (gate,) = found["gates"]
    assert set(gate) == {"gate", "ok", "rows", "failed", "worst"}
    assert (gate["gate"], gate["ok"], gate["rows"], gate["failed"]) == (
        *("peir>0.001 @ second", False, 1, 1),
    )
    assert gate["worst"]["module"] == "second"
    assert gate["worst"]["excess"] == pytest.approx(gate["worst"]["value"] - 0.001)


def test_the_verdict_names_each_gate_the_worst_row_and_the_margin(folder):
    gates = ["peir>0.001", "sqnr<10", "nonfinite"]
    text = diff("fp.st", "quant.st", *(word for gate in gates for word in ("--fail-on", gate)))
    failed, held, finding = (
        next(part for part in text["text"].split("; ") if part.startswith(f"gate {gate} "))
        for gate in gates
    )
    assert "FAILED in 2 of 3 rows, worst: second (" in failed
    assert failed.endswith(" beyond the limit)")
    assert "held in 3 rows, worst: second (" in held
    assert held.endswith(" dB on the good side)")
    assert finding == "gate nonfinite held in 3 rows"
    assert "\n" not in text["text"]


def test_top_and_metrics_never_narrow_a_gate(folder):
    whole = diff("fp.st", "quant.st", "--fail-on", "peir>0.001")
    cut = diff("fp.st", "quant.st", "--fail-on", "peir>0.001", "--top", "1", "--metrics", "sqnr")
    assert cut["gates"] == whole["gates"]


def test_include_and_path_narrow_a_gate_and_the_verdict_says_so(folder):
    found = diff("fp.st", "quant.st", "--fail-on", "peir>0.001", "--include", "first")
    assert (found["exit_code"], found["gates"][0]["rows"]) == (0, 1)
    assert "(--include first)" in found["text"]
    found = diff("fp.st", "quant.st", "--fail-on", "peir>0.001", "--path", "inputs")
    assert found["exit_code"] == 0
    assert "(--path inputs)" in found["text"]


def test_archives_that_look_swapped_are_called_so(folder):
    assert "look SWAPPED" in diff("quant.st", "fp.st", *GATE)["text"]
    assert "SWAPPED" not in diff("fp.st", "quant.st", *GATE)["text"]
    assert "SWAPPED" not in diff("quant.st", "nan.st", *GATE)["text"]


def test_a_gate_holds_in_no_archives_that_look_swapped(folder):
    for swapped in (["quant.st", "fp.st"], ["quant.st", "unnamed.st"], ["scales.st", "unnamed.st"]):
        assert diff(*swapped, "--fail-on", "peir>1000")["exit_code"] == 3
        assert "look SWAPPED" in diff(*swapped)["text"]
        assert diff(*swapped)["exit_code"] == 0
        written(*swapped)
        assert gate("result.json", "--fail-on", "peir>1000")["exit_code"] == 3
    for right in (
        ["unnamed.st", "quant.st"],
        ["quant.st", "named_a.st"],
        ["scales.st", "scales.st"],
    ):
        assert diff(*right, "--fail-on", "peir>1000")["exit_code"] == 0


def test_the_library_judges_as_the_command_line_does(folder):
    comparison = qvtrace.diff("fp.st", "quant.st", fail_on=["peir>0.001", "nonfinite"])
    assert comparison.verdict.exit_code == 1
    failed, held = comparison.verdict.gates
    assert [finding.place.module for finding in failed.failures] == ["second", ""]
    assert held.ok
    assert qvtrace.diff("fp.st", "quant.st", fail_on="peir>0.9").verdict.exit_code == 0
    with pytest.raises(qvtrace.UsageError, match="no finite number"):
        qvtrace.diff("fp.st", "quant.st", fail_on=["peir>nan"])


def configure(text, name="pyproject.toml"):
    Path(name).write_text(text, encoding="utf-8")


def test_gates_of_the_project_are_judged(folder):
    configure('[tool.qvtrace]\nfail-on = ["peir>0.001", "nonfinite"]\n')
    gates = diff("fp.st", "quant.st")["gates"]
    assert [(gate["gate"], gate["ok"]) for gate in gates] == [
        ("peir>0.001", False),
        ("nonfinite", True),
    ]


def test_gates_of_a_project_are_found_from_a_folder_in_it(folder, monkeypatch):
    configure('[tool.qvtrace]\nfail-on = "peir>0.001"\n')
    (folder / "deep" / "er").mkdir(parents=True)
    configure("[tool.other]\n", "deep/pyproject.toml")
    monkeypatch.chdir("deep/er")
    assert diff("../../fp.st", "../../quant.st")["exit_code"] == 1


def test_a_gate_on_the_command_line_takes_the_place_of_those_of_the_project(folder):
    configure('[tool.qvtrace]\nfail-on = ["peir>0.001"]\n')
    gates = diff("fp.st", "quant.st", *GATE)["gates"]
    assert [gate["gate"] for gate in gates] == ["peir>0.9"]


@pytest.mark.parametrize("text", ['fail-on = ["sqnr<400"]', '[tool.qvtrace]\nfail-on = "sqnr<400"'])
def test_another_file_takes_the_place_of_the_project(folder, text):
    configure('[tool.qvtrace]\nfail-on = ["peir>0.9"]\n')
    configure(text, "strict.toml")
    gates = diff("fp.st", "quant.st", "--config", "strict.toml")["gates"]
    assert [gate["gate"] for gate in gates] == ["sqnr<400"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[tool.qvtrace]\nfail_on = ["peir>0.9"]\nfailon = 1\n', "'fail_on', 'failon': not known"),
        ("[tool.qvtrace]\nfail-on = 3\n", "'fail-on' is no list of texts"),
        ("[tool.qvtrace]\nfail-on = [3]\n", "'fail-on' is no list of texts"),
        ('[tool.qvtrace]\nfail-on = ["peir>inf"]\n', "fail-on 'peir>inf': the limit"),
        ('[tool.qvtrace]\nfail-on = ["peir>1 @ no"]\n', "fail-on 'peir>1 @ no': the pattern 'no'"),
        ("[tool]\nqvtrace = 3\n", "is no table"),
        ("[tool.qvtrace\n", "is no valid TOML"),
        ("a = '\udcff'", "is no valid TOML"),
    ],
)
def test_trouble_with_the_configuration_names_the_file(folder, text, wanted):
    Path("pyproject.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    result = invoke("diff", "fp.st", "quant.st")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("qvtrace: pyproject.toml: ")
    assert wanted in result.stderr


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no.toml", "cannot be read"),
        ("deep/pyproject.toml", "has no table [tool.qvtrace]"),
        ("ruff.toml", "has no table [tool.qvtrace]"),
        ("empty.toml", "asks for nothing"),
        ("none.toml", "asks for nothing"),
    ],
)
def test_a_configuration_that_is_asked_for_has_to_be_there(folder, name, wanted):
    Path("deep").mkdir()
    configure("[tool.ruff]\nline-length = 100\n", "ruff.toml")
    configure("", "empty.toml")
    configure("[tool.qvtrace]\nfail-on = []\n", "none.toml")
    configure("[tool.other]\n", "deep/pyproject.toml")
    result = invoke("diff", "fp.st", "quant.st", "--config", name)
    assert result.exit_code == 2
    assert f"{name}: {wanted}" in result.stderr


MODEL = """
import torch


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 16), torch.ones(2, 16)
"""


@pytest.mark.parametrize("table", ["[tool.qvtrace]\n", "[tool.qvtrace]\nfail-on = []\n"])
def test_a_project_that_sets_no_gate_is_said_to(folder, table):
    configure(table)
    result = invoke("diff", "fp.st", "quant.st")
    assert result.exit_code == 0
    assert result.stderr == "qvtrace: pyproject.toml: sets no gate, nothing is judged\n"
    assert invoke("diff", "fp.st", "quant.st", "--fail-on", "peir>0.9").stderr == ""


def test_run_does_not_go_on_with_a_gate_that_can_match_nothing(folder):
    configure(MODEL, "model.py")
    gates = ["--fail-on", "unmatched @ new", "--fail-on", "peir>0.9 @ nosuch"]
    result = invoke("run", "-m", "model.py:model", "--traces", "traces", *gates)
    assert result.exit_code == 2
    assert "'nosuch' matches none of the 1 modules" in result.stderr
    assert [file.name for file in Path("traces").glob("*.st")] == ["fp.st"]
    result = invoke("run", "--in-flight", "traces/fp.st", "-m", "model.py:model", *gates)
    assert (result.exit_code, result.stdout) == (2, "")


def test_run_is_judged_as_well(folder):
    configure(MODEL, "model.py")
    result = invoke("run", "-m", "model.py:model", "--format", "json", "--fail-on", "peir>0")
    assert result.exit_code == 1
    assert verdict(result)["gates"][0]["gate"] == "peir>0"
    refused = invoke("run", "-m", "model.py:model", "--traces", "new", "--fail-on", "peir>x")
    assert refused.exit_code == 2
    assert not Path("new").exists()


def written(*arguments, file="result.json"):
    assert invoke("diff", *arguments, "--format", "json", "-o", file).exit_code == 0
    return file


def gate(*arguments):
    """The verdict of `gate`, which agrees with the exit code."""
    return judged("gate", *arguments)


@pytest.mark.parametrize(
    ("candidate", "gates", "code"),
    [
        ("quant.st", ["peir>0.9", "nonfinite"], 0),
        ("quant.st", ["peir>0.001"], 1),
        ("nan.st", ["nonfinite"], 1),
        ("first_only.st", ["peir>0.9"], 1),
        ("first_only.st", ["unmatched"], 1),
        ("other_inputs.st", ["peir>0.9"], 3),
        ("cut.st.partial", ["peir>0.9"], 3),
    ],
)
def test_a_result_is_judged_without_the_archives(folder, candidate, gates, code):
    options = [word for gate in gates for word in ("--fail-on", gate)]
    fresh = diff("fp.st", candidate, *options)
    written("fp.st", candidate)
    for file in folder.glob("*.st*"):
        file.unlink()
    again = gate("result.json", *options)
    assert again == fresh
    assert again["exit_code"] == code


def test_a_result_of_nothing_is_not_comparable_by_any_gate(folder):
    result = invoke("diff", "fp.st", "first_only.st", "--include", "second", "--format", "json")
    Path("result.json").write_text(result.stdout)
    assert gate("result.json", "--fail-on", "peir>1")["exit_code"] == 3


def test_a_judged_result_still_says_what_narrowed_it(folder):
    written("fp.st", "quant.st", "--include", "first", "--path", "inputs")
    assert "(--include first --path inputs)" in gate("result.json", "--fail-on", "peir>1")["text"]


def test_gate_lists_the_rows_that_failed_and_no_others(folder):
    written("fp.st", "quant.st")
    result = invoke("gate", "result.json", "--fail-on", "peir>0.001", "--fail-on", "nonfinite")
    assert result.exit_code == 1
    lines = [line.strip() for line in result.stdout.splitlines()]
    failed = lines.index("gate        FAILED peir>0.001: 2 of 3 rows")
    assert lines[failed + 1].startswith("second: 0.0")
    assert lines[failed + 2].startswith("(root): 0.0")
    assert lines[failed + 3] == "gate        held nonfinite: 3 rows"
    assert not any(line.startswith("first:") for line in lines)


def test_what_got_worse_since_an_earlier_result_fails(folder):
    written("fp.st", "again.st", file="earlier.json")
    written("fp.st", "quant.st")
    options = ["--baseline", "earlier.json", "--max-regression", "peir 1.2x"]
    found = gate("result.json", *options)
    assert found["exit_code"] == 1
    assert found["gates"][0]["gate"] == "peir 1.2x since earlier.json"
    assert found["gates"][0]["failed"] == 2
    options[1] = "result.json"
    assert gate("result.json", *options)["exit_code"] == 0
    assert gate("earlier.json", *options)["exit_code"] == 0


def test_limits_of_the_project_are_taken_with_a_baseline(folder):
    written("fp.st", "quant.st")
    configure('[tool.qvtrace]\nfail-on = "peir>0.9"\nmax-regression = ["sqnr 1dB", "peir 1x"]\n')
    gates = gate("result.json", "--baseline", "result.json")["gates"]
    assert [one["gate"] for one in gates] == [
        "peir>0.9",
        "sqnr 1dB since result.json",
        "peir 1x since result.json",
    ]
    assert len(gate("result.json")["gates"]) == 1


def test_new_and_vanished_modules_are_listed(folder):
    written("fp.st", "fp.st", file="earlier.json")
    written("first_only.st", "first_only.st", file="other.json")
    options = ["--baseline", "earlier.json", "--max-regression", "peir 1.2x"]
    result = invoke("gate", "other.json", *options)
    assert result.exit_code == 0
    assert "vanished    2 modules: second, (root)" in result.stdout
    assert "held in 1 row (2 rows not judged: vanished since)" in result.stdout
    report = json.loads(invoke("gate", "other.json", *options, "--format", "json").stdout)
    assert report["changes"]["vanished"] == ["second", ""]
    assert report["verdict"]["gates"][0]["asides"] == ["2 rows not judged: vanished since"]


REGRESSION = ("--baseline", "earlier.json", "--max-regression", "peir 1.2x")


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        (("other_inputs.st", "other_inputs.st"), "earlier.json: it has other inputs"),
        (("renamed.st", "renamed.st"), "it is of another model, Linear, and this of Halves"),
        (("quant.st", "fp.st"), "its archives look swapped"),
        (("nan.st", "again.st"), "its archives look swapped"),
    ],
    ids=" ".join,
)
def test_a_baseline_of_something_else_lets_nothing_pass(folder, sides, reason):
    written(*sides, file="earlier.json")
    written("fp.st", "quant.st")
    found = gate("result.json", *REGRESSION)
    assert found["exit_code"] == 3
    assert reason in found["text"]


def test_a_baseline_the_other_way_round_is_told_by_its_variants(folder):
    written("named_a.st", "named_b.st", file="earlier.json")
    written("named_b.st", "named_a.st")
    found = gate("result.json", *REGRESSION)
    assert found["exit_code"] == 3
    assert "its reference and its candidate are the other way round" in found["text"]


def test_whether_an_older_result_had_the_same_inputs_is_said_not_to_be_known(folder):
    written("fp.st", "quant.st")
    report = json.loads(Path("result.json").read_text())
    del report["inputs"]
    Path("earlier.json").write_text(json.dumps(report))
    for files in (("result.json", "earlier.json"), ("earlier.json", "result.json")):
        found = gate(files[0], "--baseline", files[1], "--max-regression", "peir 1.2x")
        assert found["exit_code"] == 0
        assert f"whether {files[1]} had the same inputs is not known" in found["text"]


def test_a_baseline_of_other_weights_is_said_to_be(folder):
    written("fp.st", "quant.st", file="earlier.json")
    report = json.loads(Path("earlier.json").read_text())
    report["reference"]["model"]["weights_digest"] = "0" * 32
    Path("result.json").write_text(json.dumps(report))
    found = gate("result.json", *REGRESSION)
    assert found["exit_code"] == 0
    assert "earlier.json had other float weights" in found["text"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["result.json"], "nothing to judge by"),
        (["result.json", "--baseline", "result.json"], "--baseline result.json: needs a limit"),
        (["result.json", "--max-regression", "peir 2x"], "add --baseline"),
        (["result.json", "--max-regression", "peir"], "--max-regression 'peir'"),
        (["result.json", "--fail-on", "peir>1 @ no"], "matches none of the 3 modules"),
        (["none.json", "--fail-on", "nonfinite"], "none.json: cannot be read"),
        (["fp.st", "--fail-on", "nonfinite"], "fp.st: is no result of a comparison"),
        (["cut.json", "--fail-on", "nonfinite"], "cut.json: was cut by --top"),
        (["result.json", "--fail-on", "nonfinite", "-o", "result.json"], "choose another name"),
        (["result.json", "--baseline", "fp.st", "--max-regression", "peir 2x"], "fp.st: is no"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_trouble_with_a_result_is_one_line(folder, arguments, wanted):
    written("fp.st", "quant.st")
    written("fp.st", "quant.st", "--top", "1", file="cut.json")
    result = invoke("gate", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert wanted in result.stderr


def test_a_floor_makes_rows_multiples_of_it(folder):
    comparison = qvtrace.diff("fp.st", "nan.st", floor="quant.st")
    assert [row.floor is None for row in comparison.rows] == [False, False, False]
    report = json.loads(
        invoke("diff", "fp.st", "quant.st", "--floor", "quant.st", "--format", "json").stdout
    )
    rows = {row["module"]: row for row in report["rows"]}
    assert rows["second"]["times_floor"] == 1
    assert rows["second"]["floor"]["sqnr"] == rows["second"]["metrics"]["sqnr"]
    assert rows["first"]["times_floor"] is None
    text = invoke("diff", "fp.st", "quant.st", "--floor", "quant.st").stdout
    assert "floor       quant.st (quant float32): 2 of 2 rows" in text
    assert "x floor" in text


def test_a_floor_in_a_result_is_what_a_regression_is_measured_by(folder):
    written("fp.st", "again.st", file="earlier.json")
    written("fp.st", "quant.st", "--floor", "quant.st")
    options = ["--baseline", "earlier.json", "--max-regression", "peir 1.2x"]
    assert gate("result.json", *options)["exit_code"] == 0


def test_a_floor_in_another_dtype_is_one_with_the_same_inputs(folder, tmp_path):
    torch.manual_seed(0)
    model = Halves().eval()
    x = torch.randn(2, 4, 16)
    record("bf16.st", model.to(torch.bfloat16), x.to(torch.bfloat16), variant="fp")
    comparison = qvtrace.diff("fp.st", "quant.st", floor="bf16.st")
    assert all(row.floor.peir > 1e-4 for row in comparison.rows)


def test_a_floor_of_another_model_measures_nothing(folder):
    result = invoke("diff", "fp.st", "quant.st", "--floor", "unrelated.st")
    assert result.exit_code == 2
    assert "--floor unrelated.st: measures no noise: nothing of it can be comp" in result.stderr
    few = invoke("diff", "fp.st", "quant.st", "--floor", "renamed.st").stdout
    assert "which has ONLY 1 of 3 modules" in " ".join(few.split())


def test_a_floor_of_other_inputs_measures_nothing(folder):
    result = invoke("diff", "fp.st", "quant.st", "--floor", "other_inputs.st")
    assert result.exit_code == 2
    assert "--floor other_inputs.st: measures no noise" in result.stderr


@pytest.mark.parametrize("kind", ["csv", "markdown", "junit", "json", "table"])
def test_every_format_goes_to_standard_output_and_to_a_file(folder, kind):
    arguments = ["diff", "fp.st", "quant.st", "--fail-on", "peir>0.001", "--format", kind]
    printed = invoke(*arguments)
    saved = invoke(*arguments, "-o", "report")
    assert (printed.exit_code, saved.exit_code) == (1, 1)
    assert (printed.stderr, saved.stdout) == ("", "")
    assert Path("report").read_text(encoding="utf-8") == printed.stdout
    assert "second" in printed.stdout


def test_github_gets_a_summary_and_annotations(folder, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    Path("summary.md").write_text("before\n")
    options = ["fp.st", "quant.st", "--fail-on", "peir>0.001", "--fail-on", "nonfinite", "--github"]
    result = invoke("diff", *options)
    assert result.exit_code == 1
    summary = Path("summary.md").read_text(encoding="utf-8")
    assert summary.startswith("before\n### qvtrace: 1 of 2 gates failed\n")
    annotations = [line for line in result.stdout.splitlines() if line.startswith("::")]
    assert len(annotations) == 1
    assert annotations[0].startswith("::error title=qvtrace%3A peir>0.001::gate peir>0.001 FAILED")


def test_annotations_stay_out_of_what_programs_read(folder, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    options = ["fp.st", "quant.st", "--fail-on", "peir>0.001", "--github", "--format", "json"]
    result = invoke("diff", *options)
    assert verdict(result)["exit_code"] == 1
    assert "GITHUB_STEP_SUMMARY is not set" in result.stderr
    assert "\n::error title=" in result.stderr
