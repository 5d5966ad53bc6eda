"""`record` and `run` while somebody watches: lines for programs, a debugger for people."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import invoke
from terminals import terminal

from qvtrace.archive import Archive

FUNCTIONS = """
import sys
import torch
from torch import nn

class Talks(nn.Module):
    def forward(self, x, mask=None):
        print("from the model")
        return x

def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Talks()).eval(), torch.ones(2, 8)

def mask():
    return Talks(), ((torch.ones(2, dtype=torch.bfloat16), [torch.tensor(3)]), "text")

def keywords():
    return Talks(), {"x": torch.arange(2000), "mask": {"full": None}}

def idle():
    model, x = sequential()
    model[2].idle = Talks()
    return model, x

def debugger():
    found = sys._getframe(1).f_locals
    print("stop", sorted(found), found["name"], found["call"], found["output"] is None)
"""
PROMPT = "(Pdb) "


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a file of functions."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    return tmp_path


def record(*arguments, model="sequential"):
    return invoke("record", "-m", f"functions.py:{model}", *arguments)


def lines_of(text):
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_standard_output_has_the_calls_and_nothing_else():
    result = record("--print", "--values", "0")

    assert result.exit_code == 0
    assert [call["module"] for call in lines_of(result.stdout)] == ["0", "1", "2", ""]
    assert result.stdout == invoke("show", "traces/fp.st", "--json", "--values", "0").stdout
    for said in ("from the model", "traces/fp.st", "next "):
        assert said in result.stderr


def test_a_dry_run_prints_calls_and_says_the_rest_on_standard_error():
    result = record("--print", "--dry-run", "--include", "[01]")

    assert [call["module"] for call in lines_of(result.stdout)] == ["0", "1"]
    assert result.stderr.splitlines()[-1].startswith("file ")
    assert not Path("traces").exists()


def test_a_limit_is_lifted_on_request():
    cut = lines_of(record("--print", "--values", "(root)", model="keywords").stdout)
    whole = record("--print", "--values", "(root)", "--all-values", "--force", model="keywords")

    assert (len(cut[0]["kwargs"]["x"]["values"]), cut[0]["output"]["values_cut"]) == (1000, 1000)
    assert lines_of(whole.stdout)[0]["kwargs"]["x"]["values"] == list(range(2000))
    for arguments in (["--json"], []):
        shown = invoke("show", "traces/fp.st", "--values", "(root)", "--all-values", *arguments)
        assert "1998" in shown.stdout
        assert "1998" not in invoke("show", "traces/fp.st", "--values", "(root)", *arguments).stdout


def test_run_prints_the_calls_of_both_variants_and_the_report_on_standard_error():
    result = invoke("run", "-m", "functions.py:sequential", "--print", "--values", "0")

    assert result.exit_code == 0
    calls = lines_of(result.stdout)
    assert [call["module"] for call in calls] == ["0", "1", "2", ""] * 2
    assert "values" in calls[4]["output"]
    assert any(line.startswith("verdict ") for line in result.stderr.splitlines())


def test_run_writes_other_reports_to_a_file_when_it_prints_calls():
    arguments = ["run", "-m", "functions.py:sequential", "--print", "--format", "json"]

    refused = invoke(*arguments)
    result = invoke(*arguments, "-o", "report.json")

    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--output FILE" in refused.stderr
    assert len(lines_of(result.stdout)) == 8
    assert json.loads(Path("report.json").read_text())["complete"] is True


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--values", "0"], ["--values", "--print"]),
        (["--print", "--all-values"], ["--all-values", "--values PATTERN"]),
        (["--print", "--values", "fc"], ["--values 'fc'", "matches none of 4 modules"]),
        (["--break-before"], ["--break-before", "--break PATTERN"]),
        (["--break", "0"], ["--break: standard input is no terminal", "PYTHONBREAKPOINT"]),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_line(arguments, wanted):
    result = record(*arguments)

    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("qvtrace: ")
    assert all(text in result.stderr for text in wanted)
    assert not Path("traces").exists()


def test_without_a_terminal_the_model_is_not_even_loaded():
    for command in ("record", "run"):
        result = invoke(command, "-m", "nowhere.py:model", "--break", "0")
        assert "--break: standard input is no terminal" in result.stderr


def test_a_reader_that_stops_early_leaves_the_archive_whole():
    words = [sys.executable, "-m", "qvtrace", "record", "-m", "functions.py:sequential", "--print"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()

    assert process.returncode == 0
    assert [line.split()[0] for line in said.splitlines()] == ["from", "archive", "modules", "next"]
    assert Archive.open("traces/fp.st").manifest.complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_lines_that_could_not_be_written_are_an_error_and_the_archive_is_whole():
    words = [sys.executable, "-m", "qvtrace", "record", "-m", "functions.py:sequential", "--print"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert result.returncode == 2
    assert result.stderr.splitlines()[1].startswith("qvtrace: traces/fp.st: recorded as a whole")
    assert Archive.open("traces/fp.st").manifest.complete


def test_inputs_are_printed_as_torch_prints_them():
    result = record("--print-inputs", model="mask")

    assert result.stdout.splitlines() == [
        "x.0  torch.bfloat16 [2]",
        "tensor([1., 1.], dtype=torch.bfloat16)",
        "x.1.0  torch.int64 []",
        "tensor(3)",
        "mask  'text'",
    ]
    assert record("--print-inputs", "--dry-run", model="mask").stdout.startswith(result.stdout)


def test_inputs_give_way_to_calls_and_reports_on_standard_output():
    result = record("--print-inputs", "--print", model="keywords")
    model = ["-m", "functions.py:sequential", "--traces", "both"]
    report = invoke("run", *model, "--print-inputs", "--format", "json")

    assert len(lines_of(result.stdout)) == 1
    assert "x  torch.int64 [2000]\ntensor([   0,    1,    2,  ..., 1997," in result.stderr
    assert "mask.full  None\n" in result.stderr
    assert json.loads(report.stdout)["complete"] is True
    assert report.stderr.count("input  torch.float32 [2, 8]") == 1


def test_another_debugger_needs_no_terminal(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("PYTHONBREAKPOINT", "functions.debugger")

    result = record("--print", "--break", "0", "--break", "1", "--break-before")

    assert result.exit_code == 0
    assert len(lines_of(result.stdout)) == 4
    names = ["call", "inputs", "kwargs", "module", "name", "output"]
    assert [line for line in result.stderr.splitlines() if line.startswith("stop")] == [
        f"stop {names} 0 0 True",
        f"stop {names} 0 0 False",
        f"stop {names} 1 0 True",
        f"stop {names} 1 0 False",
    ]


def test_breakpoints_that_are_switched_off_stop_nowhere(monkeypatch):
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")

    result = record("--break", "0")

    assert result.exit_code == 0
    assert "--break" not in result.stderr


def test_the_debugger_at_a_terminal():
    arguments = ["record", "-m", "functions.py:sequential", "--print", "--break", "[01]"]
    with terminal(*arguments) as screen:
        begin = screen.until(PROMPT)
        screen.type("print(sorted(locals()), tuple(output.shape))")
        found = screen.until(PROMPT)
        screen.type("output = None")
        screen.until(PROMPT)
        screen.type("continue")
        further = screen.until(PROMPT)
        screen.type("continue")
        code = screen.exit_code()

    names = ["call", "inputs", "kwargs", "module", "name", "output"]
    assert "recording fp" not in begin  # a progress bar
    assert json.loads(begin.splitlines()[0])["module"] == "0"
    assert "after 0, call 0, Linear\n" in begin
    assert f"{names} (2, 8)" in found
    assert "after 1, call 0, ReLU\n" in further
    assert code == 0
    calls = Archive.open("traces/fp.st").manifest.calls
    assert [call.error for call in calls] == [None] * 4


@pytest.mark.parametrize("steps", [0, 12], ids=["at the stop", "after some steps"])
def test_quitting_the_debugger_ends_as_ctrl_c_does(steps):
    with terminal("record", "-m", "functions.py:sequential", "--break", "0") as screen:
        for _ in range(steps):
            screen.until(PROMPT)
            screen.type("next")
        screen.until(PROMPT)
        screen.type("quit")
        shown = len(screen.shown)
        code = screen.exit_code()

    said = [line for line in screen.shown[shown:].splitlines() if line and line != "quit"]
    assert said == ["qvtrace: interrupted; what was recorded until then is in traces/fp.st.partial"]
    assert code == 130
    assert invoke("verify", "traces/fp.st.partial").exit_code == 0
    assert "0 Linear" in invoke("show", "traces/fp.st.partial").stdout


def test_ctrl_c_ends_the_recording_also_after_a_stop():
    waiting = "import time\ndef forward(x):\n    print('waiting')\n    time.sleep(60)\n"
    patched = "\ndef waiting():\n    model, x = sequential()\n    model[2].forward = forward\n"
    Path("functions.py").write_text(f"{waiting}{FUNCTIONS}{patched}    return model, x\n")
    with terminal("record", "-m", "functions.py:waiting", "--break", "0") as screen:
        screen.until(PROMPT)
        screen.type("continue")
        screen.until("waiting")
        screen.press("\x03")
        code = screen.exit_code()

    assert "qvtrace: interrupted; " in screen.shown
    assert code == 130


def test_modules_that_never_stop_are_a_warning(monkeypatch):
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setenv("PYTHONBREAKPOINT", "functions.debugger")

    result = record("--break", "*.idle", model="idle")

    assert result.exit_code == 0
    assert "warning     --break stopped nowhere: none of its modules was called" in result.stderr


@pytest.mark.parametrize("name", ["nowhere.at_all", "pdb.nothing", "a b"])
def test_a_debugger_that_is_not_there_is_refused_before_a_model_runs(folder, monkeypatch, name):
    monkeypatch.setenv("PYTHONBREAKPOINT", name)

    result = invoke("record", "-m", "nothing.py:nowhere", "--break", "0", "-o", "new.st")

    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"qvtrace: PYTHONBREAKPOINT {name!r}: cannot be imported")
