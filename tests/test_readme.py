"""What the README promises: its commands run as printed, and its Python does what it says."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

from qvtrace.cli import app
from qvtrace.judging.gates import parse_gates

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SET_UP = ("pip install . && qvtrace run", "pip install '.[test]' && pytest")
FOREIGN_TOOLS = re.compile(r"^.*\b(pip|ruff|pytest)\b.*$", flags=re.MULTILINE)


def blocks(language):
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def typed():
    """What a reader types after a prompt; MODEL stands for any model."""
    lines = "".join(blocks("console")).splitlines()
    return [line[2:].replace("MODEL", "qwen3-vl-tiny") for line in lines if line.startswith("$ ")]


def run(line):
    program, *words = shlex.split(line)
    assert program == "qvtrace"
    return CliRunner().invoke(app, words, prog_name="qvtrace")


WORKFLOW_MODEL = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU()), torch.ones(2, 16)

def quantize(model):
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    return model
"""


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x) * 2


@pytest.mark.parametrize("line", SET_UP)
def test_the_set_up_is_one_line(line):
    assert line in "".join(blocks("sh")).splitlines()


def test_commands_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [*typed(), SET_UP[0].split(" && ")[1]]
    assert len(lines) > 1
    for line in lines:
        result = run(line)
        assert result.exit_code == 0, f"{line}\n{result.stderr}"
    assert {"fp.st", "quant.st", "traces"} <= {path.name for path in tmp_path.iterdir()}


def test_python_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"model": Doubles(), "quantized": Doubles(), "inputs": {"x": torch.ones(2, 16)}}
    for example in blocks("python"):
        exec(compile(example, "README.md", "exec"), names)
    assert names["comparison"].worst("peir", 1)
    assert names["hidden"].shape == (2, 16)


def test_the_workflow_runs_as_printed(tmp_path, monkeypatch):
    junitparser = pytest.importorskip("junitparser")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    Path("model.py").write_text(WORKFLOW_MODEL)
    (workflow,) = map(yaml.safe_load, blocks("yaml"))
    steps = workflow["jobs"]["compare"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("qvtrace")]
    assert len(lines) == 4
    for line in lines:
        result = run(line)
        assert result.exit_code == 0, f"{line}\n{result.stderr}"
    assert junitparser.JUnitXml.fromfile("junit.xml").tests == 4
    assert "every gate held" in Path("summary.md").read_text()
    for pattern in steps[-1]["with"]["path"].split():
        assert list(tmp_path.glob(pattern))


def test_gates_of_the_configuration_are_gates():
    (table,) = map(tomllib.loads, blocks("toml"))
    assert parse_gates(table["tool"]["qvtrace"]["fail-on"])


def test_every_flag_exists():
    commands = get_command(app).commands.values()
    known = {flag for command in commands for option in command.params for flag in option.opts}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", FOREIGN_TOOLS.sub("", README)))
    assert mentioned
    assert mentioned <= known | {"--help", "--version"}


def test_every_command_is_described():
    for name in get_command(app).commands:
        assert f"`qvtrace {name}" in README
