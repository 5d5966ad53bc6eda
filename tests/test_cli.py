"""The command line as its users meet it: what is printed where, and with which exit code."""

import fcntl
import io
import json
import os
import pty
import resource
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from command_lines import invoke
from torch import nn

import qvtrace.recording.recorder
from qvtrace.archive import Archive
from qvtrace.cli.terminal import print_next
from qvtrace.errors import ArchiveError

FUNCTIONS = """
import time
import torch
from torch import nn

class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.error = error

    def forward(self, x):
        self.linear(x)
        raise self.error

def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.ones(4, 16)

class Prints(nn.Module):
    def forward(self, x):
        print("from the model")
        return x

def printing():
    return nn.Sequential(nn.Linear(16, 16), Prints()), torch.ones(4, 16)

def without_inputs():
    return nn.Linear(4, 4)

class Secretive(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def __getattr__(self, name):
        if name.startswith("_") or name == "linear":
            return super().__getattr__(name)
        raise RuntimeError(f"nobody asks for {name}")

    def forward(self, x):
        return self.linear(x)

def secretive():
    return Secretive(), torch.ones(2, 4)

def raising_when_it_is_loaded():
    raise RuntimeError("loaded in vain")

def raising():
    return Raises(RuntimeError("no such luck")), torch.ones(2, 4)

def interrupted():
    return Raises(KeyboardInterrupt()), torch.ones(2, 4)

class Sleeps(nn.Module):
    def forward(self, x):
        print("sleeping", flush=True)
        time.sleep(60)

def sleeping():
    return nn.Sequential(nn.Linear(4, 4), Sleeps()), torch.ones(2, 4)
"""
HOSTILE = "x\x1b[31m[red]"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x, mask=None, scale=1):
        return self.down(torch.relu(self.up(x))) * 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_module(HOSTILE, nn.Identity())

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, mask=None, scale=2)
        return {"hidden": self.get_submodule(HOSTILE)(self.blocks[0](x)), "count": x.shape[1]}


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids)["count"] * 0.5


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Archives of one model, of the same with another weight, and of that in a wrapper."""
    folder = tmp_path_factory.mktemp("archives")
    torch.manual_seed(0)
    model = Net().eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        with qvtrace.recording.recorder.record(model, folder / "fp.st", variant="fp"):
            model(ids)
        model.blocks[1].up.weight.mul_(1.01)
        with qvtrace.recording.recorder.record(model, folder / "quant.st", variant="quant"):
            model(ids)
        wrapper = Wrapper(model).eval()
        with qvtrace.recording.recorder.record(wrapper, folder / "wrapped.st"):
            wrapper(ids)
    return folder


@pytest.fixture
def folder(archives, tmp_path, monkeypatch):
    """An empty working folder with copies of the archives and a file of functions."""
    for name in ("fp.st", "quant.st", "wrapped.st"):
        (tmp_path / name).write_bytes((archives / name).read_bytes())
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def record(*arguments):
    return invoke("record", "--model", "functions.py:sequential", *arguments)


def assert_one_line_error(result, *wanted):
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("qvtrace: ")
    assert result.stderr.count("\n") == 1
    for text in wanted:
        assert text in result.stderr


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["frobnicate"], ["no such command 'frobnicate'", "qvtrace --help"]),
        (["diff"], ["REFERENCE: missing", "qvtrace diff --help"]),
        (["diff", "a.st"], ["CANDIDATE: missing"]),
        (["diff", "a.st", "b.st", "c.st"], ["unexpected extra argument", "c.st"]),
        (["diff", "a.st", "b.st", "--tpo", "3"], ["--tpo: no such option", "--top"]),
        (["diff", "a.st", "b.st", "--top", "many"], ["--top: should be a valid integer"]),
        (["diff", "a.st", "b.st", "--top", "0"], ["--top: should be greater than or equal to 1"]),
        (["diff", "a.st", "b.st", "--format", "xml"], ["--format", "'table', 'json'"]),
        (["diff", "a.st", "b.st", "--sort-by", "beauty"], ["--sort-by", "peir"]),
        (["diff", "a.st", "b.st", "--metrics", "peir,x"], ["--metrics 'x'", "cosine"]),
        (["diff", "a.st", "b.st", "--path", "elsewhere"], ["--path", "kwargs"]),
        (["diff", "a.st", "b.st", "--map-file", "no.txt"], ["no.txt"]),
        (["diff", "a.st", "b.st", "-o", "c.st"], ["--output c.st", "archive"]),
        (["record", "--variant", "int8"], ["--variant", "'fp', 'quant'"]),
        (["record", "--num-layers", "0"], ["--num-layers"]),
        (["record", "--like", "nowhere.st"], ["nowhere.st"]),
        (["diff", "fp.st", "quant.st", "--values", "blocks.7"], ["--values 'blocks.7'", "none of"]),
        (["diff", "fp.st", "quant.st", "--all-values"], ["--all-values", "--values PATTERN"]),
        (["show", "fp.st", "--all-values"], ["--all-values", "--values PATTERN"]),
        (["diff", "nowhere.st", "b.st"], ["nowhere.st", "no such file"]),
        (["show", "functions.py"], ["functions.py"]),
        (["show", "fp.st", "blocks.7"], ["blocks.7", "none of"]),
        (["show", "fp.st", "--values", "blocks.7"], ["--values", "none of"]),
        (["verify", "nowhere.st"], ["nowhere.st"]),
        (["recover", "nowhere.st.partial"], ["nowhere.st.partial"]),
        (["run", "-o", "quant.st"], ["--output quant.st", "archive"]),
    ],
)
def test_wrong_usage_is_one_line_on_standard_error(folder, arguments, wanted):
    assert_one_line_error(invoke(*arguments), *wanted)


def test_no_command_shows_the_help_and_counts_as_wrong_usage():
    result = invoke()
    assert result.exit_code == 2
    assert "record" in result.stdout


def test_help_has_a_line_for_each_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("run", "record", "diff", "gate", "show", "verify", "recover"):
        lines = [line for line in result.stdout.splitlines() if f"│ {command} " in line]
        assert len(lines) == 1


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    result = invoke("--version")
    assert result.stdout == f"qvtrace {version('qvtrace')}\n"


def test_diff_prints_a_table_and_nothing_on_standard_error(folder):
    result = invoke("diff", "fp.st", "quant.st", "--sort-by", "peir")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "blocks.1.up" in result.stdout
    assert any(line.startswith("verdict") for line in result.stdout.splitlines()[-6:])


def test_names_of_a_file_reach_the_terminal_escaped(folder):
    result = invoke("diff", "fp.st", "quant.st", "--all")
    assert r"x\x1b[31m[red]" in result.stdout
    assert "\x1b" not in result.stdout


def test_diff_as_json_is_one_object(folder):
    result = invoke("diff", "fp.st", "quant.st", "--format", "json")
    report = json.loads(result.stdout)
    assert report["reference"]["file"] == "fp.st"
    assert {row["status"] for row in report["rows"]} == {"ok", "identical", "exact"}


def test_top_and_metrics_make_json_incomplete(folder):
    whole = json.loads(invoke("diff", "fp.st", "quant.st", "--format", "json").stdout)
    for cut in (["--top", "1"], ["--metrics", "peir"]):
        report = json.loads(invoke("diff", "fp.st", "quant.st", "--format", "json", *cut).stdout)
        assert (whole["complete"], report["complete"]) == (True, False)


def test_elements_of_the_difference_are_shown_of_the_modules_that_are_asked_for(folder):
    text = invoke("diff", "fp.st", "quant.st", "--values", "blocks.1.up").stdout.splitlines()
    place = next(i for i, line in enumerate(text) if "blocks.1.up" in line.split())
    assert text[place + 1].split()[0] == "difference"
    assert text[place + 1].endswith("] and 320 more")
    assert sum("difference [" in line for line in text) == 1


def test_a_row_that_is_asked_for_is_neither_folded_nor_hidden(folder):
    asked = invoke("diff", "fp.st", "quant.st", "--values", "embed", "--values", "(root)").stdout
    assert "identical" in line_of(asked, "embed")
    assert "difference " in asked[asked.index("(root) output.hidden") :]
    hidden = invoke("diff", "fp.st", "quant.st").stdout
    assert not any("embed" in line.split() for line in hidden.splitlines())


def test_elements_of_the_difference_are_in_json_where_they_are_asked_for(folder):
    arguments = ["diff", "fp.st", "quant.st", "--format", "json", "--path", "all"]
    report = json.loads(invoke(*arguments, "--values", "blocks.1.up").stdout)
    rows = {(row["module"], row["path"]): row["difference"] for row in report["rows"]}
    with Archive.open("fp.st") as reference, Archive.open("quant.st") as candidate:
        sides = [_output(archive, "blocks.1.up") for archive in (reference, candidate)]
        wanted = sides[1].astype(float) - sides[0].astype(float)
    assert rows["blocks.1.up", "output"] == {"values": wanted.tolist()}
    assert rows["blocks.1.up", "inputs.0"] == {"values": [[[0.0] * 16] * 12]}
    assert rows["blocks.1.down", "output"] is None
    assert all("difference" not in row for row in json.loads(invoke(*arguments).stdout)["rows"])


def _output(archive, module):
    (call,) = (call for call in archive.manifest.calls if call.module == module)
    return archive.array(call.tree("output"))


def line_of(text, module):
    return next(line for line in text.splitlines() if module in line.split())


def test_the_elements_of_a_difference_fit_into_the_terminal(folder):
    arguments = ["diff", "fp.st", "quant.st", "--values", "blocks.1.up"]
    text = screen(*arguments, columns=80, NO_COLOR="1", TERM="xterm-256color")
    assert "] and 320 more " in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_report_goes_to_a_file_in_a_new_folder(folder):
    result = invoke("diff", "fp.st", "quant.st", "-o", "reports/today.txt")
    assert result.stdout == ""
    assert "reports/today.txt" in result.stderr
    assert "verdict" in Path("reports/today.txt").read_text(encoding="utf-8")


def test_maps_of_a_file_are_applied(folder):
    Path("maps.txt").write_text("# the wrapper\n^inner[.]=\n")
    result = invoke("diff", "fp.st", "wrapped.st", "--map-file", "maps.txt")
    assert "8 of 9 modules" in result.stdout
    assert "^inner[.]=" in next(x for x in result.stdout.splitlines() if x.startswith("matched"))


def test_nothing_in_common_is_exit_code_3(folder):
    result = invoke("diff", "fp.st", "wrapped.st")
    assert result.exit_code == 3
    assert "nothing was comparable" in result.stdout


def test_equal_archives_have_nothing_to_list(folder):
    result = invoke("diff", "fp.st", "fp.st")
    assert result.exit_code == 0
    assert "no difference" in result.stdout
    assert "identical" in next(x for x in result.stdout.splitlines() if x.startswith("not listed"))


def test_show_has_the_modules_as_a_tree_and_a_line_a_call(folder):
    result = invoke("show", "fp.st")
    lines = result.stdout.splitlines()
    root = next(index for index, line in enumerate(lines) if line.startswith("(root) Net"))
    assert lines[root + 1].startswith("│ embed Embedding  (int64[1,12]) -> float32[1,12,16]")
    block = next(index for index, line in enumerate(lines) if line.endswith("│ │ 0 Block"))
    assert lines[block + 1].endswith("#0 (float32[1,12,16], scale=2) -> float32[1,12,16]")
    assert "#1 " in lines[block + 2]


def test_show_tells_what_ran_and_what_was_recorded(folder):
    text = invoke("show", "fp.st").stdout
    for wanted in ("fp.st", "Net · fp · float32", "torch 2.", "1 root call", "9 recorded"):
        assert wanted in text


def test_show_with_a_pattern_has_these_modules_and_those_above(folder):
    text = invoke("show", "fp.st", "blocks.1.up").stdout
    assert text.split("\n\n")[1].splitlines() == [
        "(root) Net",
        "│ blocks ModuleList",
        "│ │ 1 Block",
        "│ │ │ up Linear  (float32[1,12,16]) -> float32[1,12,32]",
    ]


def test_show_json_is_one_strict_object_a_line(folder):
    lines = invoke("show", "fp.st", "--json").stdout.splitlines()
    calls = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    with Archive.open("fp.st") as archive:
        assert len(calls) == len(archive.manifest.calls)
    (embed,) = (call for call in calls if call["module"] == "embed")
    assert list(embed) == ["module", "type", "call", "inputs", "kwargs", "output"]
    assert (embed["type"], embed["call"], embed["kwargs"]) == ("Embedding", 0, {})
    ids = embed["inputs"]["0"]
    assert (ids["type"], ids["dtype"], ids["shape"]) == ("Tensor", "int64", [1, 12])
    assert {"mean", "min", "max", "stddev"} <= set(ids["statistics"])
    assert (ids["statistics"]["mean"], ids["statistics"]["max"]) == (5.5, 11)
    assert "values" not in ids


def test_show_json_has_plain_values_and_structure(folder):
    lines = invoke("show", "fp.st", "--json", "(root)", "blocks.1").stdout.splitlines()
    block, root = map(json.loads, lines)
    assert block["kwargs"] == {"mask": None, "scale": 2}
    assert root["output"]["count"] == 12
    assert root["output"]["hidden"]["type"] == "Tensor"


def test_elements_are_shown_of_the_modules_that_are_asked_for(folder):
    lines = invoke("show", "fp.st", "--json", "embed", "blocks.1.up", "--values", "embed").stdout
    embed, up = map(json.loads, lines.splitlines())
    assert embed["inputs"]["0"]["values"] == [list(range(12))]
    assert "values" not in up["output"]
    text = invoke("show", "fp.st", "embed", "--values", "embed").stdout
    assert "inputs.0  [[0, 1, 2," in text
    assert "and 128 more" in text


def test_statistics_are_shown_on_request(folder):
    text = invoke("show", "fp.st", "embed", "--stats").stdout
    assert "inputs.0  mean 5.50, min 0, max 11, stddev 3.45" in text


def test_verify_counts_what_it_checked(folder):
    result = invoke("verify", "fp.st")
    assert result.exit_code == 0
    assert result.stdout.startswith("fp.st: ")
    assert "every digest matches" in result.stdout


def test_verify_names_the_damaged_tensor(folder):
    with Archive.open("fp.st") as archive:
        tensor = archive.manifest.tensors[0]
    data = bytearray(Path("fp.st").read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin] ^= 1
    Path("fp.st").write_bytes(data)
    result = invoke("verify", "fp.st")
    assert result.exit_code == 2
    assert result.stdout == f"{tensor.key}\n"
    assert f"the first is {tensor.key}" in result.stderr


def test_record_says_where_the_archive_is_and_what_comes_next(folder):
    result = record()
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "traces/fp.st" in result.stderr
    assert "4 registered, 4 called, 4 recorded" in result.stderr
    follow_up = result.stderr.splitlines()[-1].split()
    assert follow_up[:2] == ["next", "qvtrace"]
    assert invoke(*follow_up[2:]).exit_code == 0
    assert Path("traces/quant.st").exists()


def test_the_command_after_a_quantized_recording_compares(folder):
    record("-o", "new/fp.st")
    result = record("--variant", "quant", "--like", "new/fp.st", "-o", "new/quant.st")
    assert result.stderr.endswith("qvtrace diff new/fp.st new/quant.st --sort-by peir\n")
    assert "torchao:int8-dynamic: 2 modules" in result.stderr
    compared = invoke("diff", "new/fp.st", "new/quant.st")
    assert compared.exit_code == 0
    assert "comparable  yes" in compared.stdout


def test_the_command_after_a_lone_quantized_recording_records_the_float_variant(folder):
    result = record("--variant", "quant", "-o", "alone/quant.st")
    wanted = "record --variant fp --like alone/quant.st --model functions.py:sequential"
    assert result.stderr.endswith(f"qvtrace {wanted}\n")
    record("-o", "alone/fp.st")
    result = record("--variant", "quant", "-o", "alone/quant.st", "--force")
    assert result.stderr.endswith("qvtrace diff alone/fp.st alone/quant.st --sort-by peir\n")


def test_record_overwrites_on_request_only(folder):
    before = Path("fp.st").read_bytes()
    assert_one_line_error(record("-o", "fp.st"), "fp.st: already exists", "--force")
    assert Path("fp.st").read_bytes() == before
    assert record("-o", "fp.st", "--force").exit_code == 0
    assert Path("fp.st").read_bytes() != before


def test_filters_of_the_archive_that_is_followed_are_taken_over(folder):
    record("-o", "a.st", "--include", "0", "--include", "2", "--no-inputs")
    record("-o", "b.st", "--like", "a.st")
    for name in ("a.st", "b.st"):
        with Archive.open(name) as archive:
            calls = archive.manifest.calls
            assert {call.module for call in calls} == {"0", "2"}
            assert all(call.inputs is None for call in calls)


def test_what_a_model_prints_is_kept_out_of_standard_output(folder):
    result = invoke("run", "-m", "functions.py:printing", "--format", "json")
    assert json.loads(result.stdout)["complete"] is True
    assert "from the model" in result.stderr


def test_a_dry_run_writes_nothing_and_ends_with_the_size(folder):
    result = record("--dry-run", "-o", "dry/fp.st")
    assert result.exit_code == 0
    assert not Path("dry").exists()
    size = result.stdout.splitlines()[-1].split()
    record("-o", "dry/fp.st")
    written = Path("dry/fp.st").stat().st_size
    assert size[0] == "file"
    assert float(size[1]) == pytest.approx(written / 1000, rel=0.02)


def test_a_model_that_raised_is_one_line_and_its_trace_is_kept(folder):
    result = invoke("record", "-m", "functions.py:raising", "-o", "t/fp.st")
    wanted = ("RuntimeError: no such luck", "t/fp.st.partial", "--traceback")
    assert_one_line_error(result, *wanted)
    shown = invoke("show", "t/fp.st.partial")
    assert "incomplete" in shown.stdout
    assert "linear Linear" in shown.stdout


def test_traceback_shows_where_a_model_raised(folder):
    result = invoke("record", "-m", "functions.py:raising", "-o", "t/fp.st", "--traceback")
    assert result.exit_code == 2
    assert "raise self.error" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("qvtrace: ")


def test_a_model_that_raises_when_it_is_asked_for_anything_is_quantized(folder):
    result = invoke(
        *("record", "--model", "functions.py:secretive", "--variant", "quant", "-o", "new.st")
    )

    assert result.exit_code == 0, result.stderr
    assert "quantized   torchao:int8-dynamic: 1 module\n" in result.stderr


def test_an_interrupted_recording_is_named_and_kept(folder):
    result = invoke("record", "-m", "functions.py:interrupted", "-o", "t/fp.st")
    assert result.exit_code == 130
    assert result.stderr.startswith("qvtrace: interrupted; ")
    assert "t/fp.st.partial" in result.stderr
    assert invoke("verify", "t/fp.st.partial").exit_code == 0


def test_an_interrupted_replay_is_named_and_kept(folder):
    invoke("record", "-m", "functions.py:interrupted", "-o", "half.st")

    result = invoke(
        *("replay", "half.st.partial", "-m", "functions.py:interrupted", "--variant", "fp"),
        *("--include", "(root)", "--include", "linear", "-o", "local.st"),
    )

    assert result.exit_code == 130
    assert result.stderr == (
        "qvtrace: interrupted; what was replayed until then is in local.st.partial\n"
    )
    with Archive.open("local.st.partial") as archive:
        assert [call.module for call in archive.manifest.calls] == ["linear", ""]


def test_the_token_reaches_neither_a_message_nor_a_file(folder, monkeypatch):
    token = "hf_averysecrettoken"
    monkeypatch.setenv("HF_TOKEN", token)
    result = record("-o", "a.st", "--hf-token", token)
    assert result.exit_code == 0
    assert token not in result.output + invoke("record", "--help").output
    assert token.encode() not in Path("a.st").read_bytes()


def test_run_records_both_variants_and_compares_them(folder):
    result = invoke("run", "-m", "functions.py:sequential", "--sort-by", "peir")
    assert result.exit_code == 0
    assert "comparable  yes" in result.stdout
    assert "torchao:int8-dynamic" in result.stdout
    assert sorted(path.name for path in Path("traces").glob("*.st")) == ["fp.st", "quant.st"]


def test_run_replaces_what_it_wrote_but_not_what_record_wrote(folder):
    arguments = ["run", "-m", "functions.py:sequential", "--traces", "mine"]
    assert invoke(*arguments).exit_code == 0
    assert invoke(*arguments, "-o", "report.json", "--format", "json").exit_code == 0
    assert json.loads(Path("report.json").read_text())["complete"] is True
    record("-o", "mine/quant.st", "--force")
    assert_one_line_error(invoke(*arguments), "mine/quant.st", "--force", "--traces")
    assert invoke(*arguments, "--force").exit_code == 0


def command(*arguments, **settings):
    environment = {**os.environ, **settings.pop("environment", {})}
    words = [sys.executable, "-m", "qvtrace", *arguments]
    return subprocess.Popen(words, env=environment, **settings)


def test_a_killed_recording_can_be_recovered(folder):
    arguments = ["record", "-m", "functions.py:sleeping", "-o", "t/fp.st"]
    with command(*arguments, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"sleeping\n"
        process.send_signal(signal.SIGKILL)
    assert "recover" in invoke("show", "t/fp.st.partial").stderr
    result = invoke("recover", "t/fp.st.partial")
    assert result.exit_code == 0
    assert "is readable again: " in result.stdout
    assert "0 Linear" in invoke("show", "t/fp.st.partial").stdout


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_recovery_of_a_folder_is_one_line(folder, name):
    assert_one_line_error(invoke("recover", name), "is a folder; name the .partial file")


def test_recovery_says_that_the_journal_is_damaged(folder):
    arguments = ["record", "-m", "functions.py:sleeping", "-o", "fp.st.killed"]
    with command(*arguments, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"sleeping\n"
        process.send_signal(signal.SIGKILL)
    journal = Path("fp.st.killed.partial.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[-2] = lines[-2].replace(b"Tensor", b"Sensor").replace(b"module", b"modula")
    lines[-2] = lines[-2].replace(b"tensor", b"sensor").replace(b"dtype", b"dtypo")
    journal.write_bytes(b"".join(lines))

    result = invoke("recover", "fp.st.killed.partial")

    assert result.exit_code == 0
    number = len(lines) - 1
    assert f"line {number} of its journal is damaged: 2 lines of it could not" in result.stderr
    assert (
        f"line {number} of its journal was damaged" in invoke("show", "fp.st.killed.partial").stdout
    )


@pytest.mark.parametrize("name", [".", "..", "there", "there/", ""])
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_record_refuses_a_folder_before_it_loads_a_model(folder, name, force):
    Path("there").mkdir()

    result = invoke("record", "--model", "nothing.py:nowhere", "-o", name, *force)

    assert_one_line_error(result, "--output ", "is a folder; name a file in it")
    assert not list(Path("there").iterdir())


MODEL = ("--model", "functions.py:sequential")
NEVER_LOADED = ("--model", "functions.py:raising_when_it_is_loaded")


@pytest.mark.parametrize(
    "arguments",
    [("record", *NEVER_LOADED), ("replay", "fp.st", *NEVER_LOADED)],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "link"])
def test_an_archive_never_takes_the_place_of_a_pipe_or_a_device(folder, arguments, linked):
    os.mkfifo("pipe")
    if linked:
        Path("link").symlink_to("pipe")
    output = "link" if linked else "pipe"

    result = invoke(*arguments, "-o", output, "--force")

    assert_one_line_error(result, f"--output {output}: is a device or a pipe", "name a file")
    assert Path(output).is_fifo()
    with (
        pytest.raises(ArchiveError, match=f"{output}: is a device or a pipe"),
        qvtrace.recording.recorder.record(nn.Linear(1, 1), output, overwrite=True),
    ):
        pass
    assert Path(output).is_fifo()


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", *NEVER_LOADED),
        ("replay", "fp.st", *NEVER_LOADED),
        ("run", *NEVER_LOADED),
        ("suggest", "fp.st", "--target", "peir 1", *NEVER_LOADED),
        ("diff", "fp.st", "quant.st"),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ("-", "standard output"),
        (".", "is a folder; name a file in it"),
        ("new/", "is a folder; name a file in it"),
        ("functions.py/new/file", "functions.py is no folder; choose another"),
    ],
)
def test_what_cannot_be_written_is_said_before_a_model_is_loaded(folder, arguments, output, fault):
    before = {path.name for path in Path().iterdir()}

    result = invoke(*arguments, "-o", output)

    assert_one_line_error(result, f"--output {output}: ", fault)
    assert {path.name for path in Path().iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--map", "blocks"), "--map 'blocks': is no 'PATTERN=REPLACEMENT'"),
        (("--map", "(=x"), "--map '(=x': '(' is no regular expression"),
        (("--floor", "nowhere.st"), "nowhere.st: there is no such file"),
        (("--transform", "nowhere"), "--transform nowhere: cannot be read"),
        (("--path", "weights"), "--path weights: needs the weights of both variants"),
        (("--traces", "functions.py/new"), "--traces functions.py/new: cannot be written"),
        (("--quantizer", "functions.py:sequential"), "--quantizer functions.py:sequential: cannot"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_run_says_what_cannot_be_compared_before_it_records(folder, arguments, fault):
    result = invoke("run", *NEVER_LOADED, *arguments)

    assert_one_line_error(result, fault)
    assert not Path("traces").exists()


def test_run_says_that_there_is_no_module_to_show_before_it_quantizes(folder):
    result = invoke("run", *MODEL, "--values", "nowhere")

    assert result.exit_code == 2
    assert "--values 'nowhere': matches none of 4 modules" in result.stderr
    assert not Path("traces/quant.st").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", "--model", ""),
        ("record", "--variant", "quant", "--quantizer", ""),
        ("record", "--variant", "quant", "--calibration", ""),
        ("record", "--variant", "quant", "--keep-float-file", ""),
        ("record", "--like", ""),
        ("record", "--image", ""),
        ("record", "--inputs", ""),
        ("record", "--private", "--private-key", ""),
        ("record", "--max-bytes", ""),
        ("run", "--metrics", ""),
        ("run", "--floor", ""),
        ("run", "--transform", ""),
        ("run", "--in-flight", ""),
        ("suggest", "fp.st", "--target", "peir 1", "--budget", ""),
        ("extract", "fp.st", "quant.st", "embed", "-o", "new", "--map", ""),
        ("diff", "fp.st", "quant.st", "--local", ""),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
def test_an_empty_value_is_refused_and_never_taken_for_none(folder, arguments):
    result = invoke(*arguments)

    assert_one_line_error(result, f"{arguments[-2]}: is empty; give a value")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("record", "--revision", "x"), "--revision x: qwen3-vl-tiny does not come from the hub"),
        (("record", *MODEL, "--cache-dir", "x"), "--cache-dir x: functions.py:sequential does"),
        (("record", *MODEL, "--use-cache"), "--use-cache: Sequential takes no use_cache"),
        (("record", *MODEL, "--attention-maps"), "--attention-maps: Sequential is no transformers"),
        (
            ("record", "--model", "functions.py:without_inputs", "--prompt", "hi"),
            "--prompt: Linear is no transformers model",
        ),
        (("run", "--in-flight", "fp.st", "--force"), "--force: nothing is stored in flight"),
        (("run", "--in-flight", "fp.st", "--private"), "--private: fp.st is not private"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_would_change_nothing_is_refused(folder, arguments, fault):
    before = {path.name for path in Path().iterdir()}

    assert_one_line_error(invoke(*arguments), fault, "; ")
    assert {path.name for path in Path().iterdir()} - before <= {"__pycache__"}


@pytest.mark.parametrize("option", ["--like", "--inputs", "--image", "--calibration"])
@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_in_place_of_a_file_is_one_line(folder, option, name):
    variant = ("--variant", "quant", "--quantizer", "tico") if option == "--calibration" else ()

    result = invoke("record", option, name, *variant, "-o", "new.st")

    assert_one_line_error(result, name)
    assert not Path("new.st").exists()


@pytest.mark.parametrize("side", ["fp.st", "quant.st"])
@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "hard"])
def test_diff_refuses_to_write_its_report_over_what_it_compares(folder, side, link):
    output = side
    if link is not None:
        output = "report.txt"
        link(side, output)
    elif side == "fp.st":  # a name that no archive has by itself
        output = side = "fp.txt"
        Path("fp.st").rename(side)
    sides = [side, "quant.st"] if side != "quant.st" else ["fp.st", side]
    before = Path(side).read_bytes()

    result = invoke("diff", *sides, "-o", output)

    assert_one_line_error(result, f"--output {output}: is ", "choose another name")
    assert Path(side).read_bytes() == before


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "hard"])
def test_a_recording_like_an_archive_does_not_overwrite_it(folder, link):
    assert record("-o", "keep.st").exit_code == 0
    before = Path("keep.st").read_bytes()
    if link is not None:
        link("keep.st", "other.st")
    output = "keep.st" if link is None else "other.st"

    result = record("--like", "keep.st", "-o", output, "--force")

    assert_one_line_error(result, f"--output {output}: is keep.st, which --like names")
    assert Path("keep.st").read_bytes() == before
    assert record("--like", "keep.st", "-o", output, "--dry-run").exit_code == 0


@pytest.mark.parametrize("variant", ["fp", "quant"])
def test_run_does_not_overwrite_what_it_is_to_be_like(folder, variant):
    Path("traces").mkdir()
    like = f"traces/{variant}.st"
    assert record("-o", like).exit_code == 0
    before = Path(like).read_bytes()

    result = invoke("run", "-m", "functions.py:sequential", "--like", like, "--force")

    assert_one_line_error(result, f"--output {like}: is {like}, which --like names")
    assert Path(like).read_bytes() == before
    assert [path.name for path in Path("traces").glob("*.st")] == [f"{variant}.st"]


def test_a_reader_that_stops_early_gets_no_complaint(folder):
    with command(
        "show", "fp.st", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


PRINTING = pytest.mark.parametrize(
    "arguments",
    [("show", "fp.st"), ("diff", "fp.st", "quant.st", "--format", "json"), ("show", "--help")],
    ids=["show", "diff", "help"],
)


@PRINTING
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_standard_output_that_takes_nothing_more_is_named(folder, arguments, unbuffered):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "qvtrace", *arguments],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    wanted = "qvtrace: standard output: No space left on device; check path and space\n"
    assert (ended.returncode, ended.stderr) == (2, wanted)


@PRINTING
def test_a_process_without_standard_output_is_no_trouble(folder, arguments):
    words = [sys.executable, "-m", "qvtrace", *arguments]
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, check=False
    )

    assert (ended.returncode, ended.stderr) == (0, b"")


def screen(*arguments, columns, **environment):
    """What a command writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with command(*arguments, stdout=slave, stderr=slave, environment=environment) as process:
        os.close(slave)
        written = b""
        while chunk := _read(master):
            written += chunk
    os.close(master)
    assert process.returncode == 0
    return written.decode().replace("\r\n", "\n")


def _read(descriptor):
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_a_terminal_gets_colours_and_lines_that_fit(folder):
    text = screen("diff", "fp.st", "quant.st", columns=80, NO_COLOR="", TERM="xterm-256color")
    assert "\x1b[" in text
    assert "█" in text


def test_no_color_means_no_escape_codes(folder):
    text = screen("diff", "fp.st", "quant.st", columns=80, NO_COLOR="1", TERM="xterm-256color")
    assert "\x1b" not in text
    assert "blocks.1.up" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_at_once(option):
    def seconds(words):
        """Of processor time, since other processes may keep this one waiting."""
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime

    yardstick = min(seconds(["-c", "import rich, typer"]) for _ in range(3))
    assert min(seconds(["-m", "qvtrace", option]) for _ in range(3)) < max(3 * yardstick, 0.3)


def test_a_report_that_cannot_be_written_names_its_file(folder):
    result = invoke("diff", "fp.st", "quant.st", "-o", "/dev/full")

    assert_one_line_error(result, "--output /dev/full: cannot be written: No space left")


def test_a_report_that_does_not_fit_leaves_the_older_one_and_nothing_else(folder):
    Path("report.txt").write_text("an older report")
    before = {path.name for path in Path().iterdir()}
    words = [sys.executable, "-m", "qvtrace", "diff", "fp.st", "quant.st", "--format", "json"]
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *words, "-o", "report.txt"]

    ended = subprocess.run(limited, capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "qvtrace: --output report.txt: cannot be written: File too large"
    )
    assert Path("report.txt").read_text() == "an older report"
    assert {path.name for path in Path().iterdir()} == before


def test_run_takes_patterns_from_a_pipe(folder):
    os.mkfifo("patterns")

    writer = threading.Thread(target=Path("patterns").write_text, args=("2\n",))
    writer.start()
    result = invoke("run", *MODEL, "--keep-float-file", "patterns")
    writer.join()

    assert result.exit_code == 0, result.stderr
    with Archive.open("traces/quant.st") as archive:
        assert archive.manifest.variant.settings["keep_float"] == ["2"]


def test_a_pipe_of_inputs_is_named_as_one(folder):
    os.mkfifo("pipe")

    assert_one_line_error(record("--inputs", "pipe"), "--inputs pipe: is a device or a pipe")


def test_a_replay_of_nothing_that_was_asked_for_is_refused(folder):
    record("-o", "new.st")

    result = invoke("replay", "new.st", *MODEL, "--exclude", "*", "-o", "local.st")

    assert_one_line_error(result, "--include and --exclude: leave no recorded module")
    assert not Path("local.st").exists()


def test_archives_of_a_run_need_a_folder(folder):
    result = invoke("run", "-m", "functions.py:sequential", "--traces", "fp.st")

    assert_one_line_error(result, "--traces fp.st: is no folder")


def test_a_missing_candidate_is_not_to_be_recorded_as_a_float_one(folder):
    result = invoke("diff", "fp.st", "missing.st")

    assert_one_line_error(result, "missing.st: there is no such file")
    assert "-o missing.st" not in result.stderr


class Screen(io.StringIO):
    """A terminal as wide as `COLUMNS` says."""

    def isatty(self):
        return True


def test_the_next_command_fits_the_terminal_and_a_shell_takes_it_as_it_stands(monkeypatch):
    kept = [f"model.language_model.layers.{layer}.mlp.down_proj" for layer in range(20)]
    options = [word for name in kept for word in ("--keep-float", name)]
    words = ["--like", "it's fp.st", *options, "--from-config", "-o", "traces/kept.st"]
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")

    print_next(shlex.join(["printf", r"%s\n", *words]))

    shown = screen.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[-1].endswith("--from-config -o traces/kept.st")
    typed = subprocess.check_output(["sh", "-c", shown.removeprefix("next")], text=True)
    assert typed.splitlines() == words


def test_the_next_command_is_one_line_where_no_terminal_is(capsys):
    command = "qvtrace show " + "long-" * 30

    print_next(command)

    assert capsys.readouterr().err == f"next        {command}\n"
