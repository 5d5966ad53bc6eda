"""What a command reads is never lost by what it writes, `--force` or not."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_lines import invoke
from PIL import Image
from safetensors.numpy import save_file

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.ones(2, 8)

def quantize(model):
    return model
"""
LINKS = pytest.mark.parametrize(
    "link", [None, os.symlink, os.link], ids=["itself", "symlink", "hard"]
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "model.py").write_text(MODEL)
    before = Path.cwd()
    os.chdir(folder)
    for name in ("fp.st", "quant.st"):
        assert invoke("record", "-m", "model.py:model", "-o", name).exit_code == 0
    assert invoke("diff", "fp.st", "quant.st", "-o", "result.json").exit_code == 0
    os.chdir(before)
    return folder


@pytest.fixture
def folder(recorded, tmp_path, monkeypatch):
    """A working folder with archives, and with a file for each option that names one."""
    for file in recorded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    Path("keep.txt").write_text("0\n")
    Path("map.txt").write_text("a=b\n")
    Path("gates.toml").write_text('fail-on = ["peir>0.5"]\n')
    Path("inputs.json").write_text('{"input": [[1, 1, 1, 1, 1, 1, 1, 1]]}')
    Path("key").write_text("0123456789abcdef" * 4)
    save_file({"rotation": np.eye(8, dtype=np.float32)}, "rotation.dat")
    Image.new("RGB", (4, 4)).save("picture.png")
    return tmp_path


def assert_kept(file, arguments, output):
    before = Path(file).read_bytes()
    names = {path.name for path in Path().iterdir()}

    result = invoke(*arguments, "-o", output)

    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert f"--output {output}: " in result.stderr
    assert "choose another" in result.stderr
    assert Path(file).read_bytes() == before
    assert {path.name for path in Path().iterdir()} == names


RECORD = ("record", "-m", "model.py:model", "--force")
QUANT = (*RECORD, "--variant", "quant", "--quantizer", "model.py:quantize")
DIFF = ("diff", "fp.st", "quant.st")


@pytest.mark.parametrize(
    ("file", "arguments"),
    [
        ("model.py", RECORD),
        ("model.py", ("record", "-m", "model:model", "--force")),
        ("model.py", ("record", "--variant", "quant", "--quantizer", "model.py:f", "--force")),
        ("inputs.json", (*RECORD, "--inputs", "inputs.json")),
        ("inputs.json", (*QUANT, "--calibration", "inputs.json")),
        ("keep.txt", (*QUANT, "--keep-float-file", "keep.txt")),
        ("picture.png", ("record", "--image", "picture.png", "--force")),
        ("key", (*RECORD, "--private", "--private-key", "key")),
        ("fp.st", (*RECORD, "--like", "fp.st")),
        ("fp.st", ("replay", "fp.st", "-m", "model.py:model", "--force")),
        ("model.py", ("replay", "fp.st", "-m", "model.py:model", "--force")),
        ("keep.txt", ("suggest", "fp.st", "--target", "peir 1", "--keep-float-file", "keep.txt")),
        ("model.py", ("suggest", "fp.st", "--target", "peir 1", "-m", "model.py:model")),
        ("map.txt", (*DIFF, "--map-file", "map.txt")),
        ("gates.toml", (*DIFF, "--config", "gates.toml")),
        ("rotation.dat", (*DIFF, "--transform", "rotation.dat")),
        ("quant.st", ("diff", "fp.st", "fp.st", "--floor", "quant.st")),
        ("quant.st", ("diff", "fp.st", "fp.st", "--local", "quant.st")),
        ("result.json", ("gate", "result.json", "--fail-on", "peir>1")),
        ("inputs.json", ("gate", "result.json", "--baseline", "inputs.json")),
        ("gates.toml", ("gate", "result.json", "--config", "gates.toml")),
        ("model.py", ("run", "-m", "model.py:model")),
        ("inputs.json", ("run", "-m", "model.py:model", "--inputs", "inputs.json")),
        (
            "map.txt",
            ("run", "--in-flight", "fp.st", "-m", "model.py:model", "--map-file", "map.txt"),
        ),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, tuple) else value,
)
@LINKS
def test_no_output_is_a_file_that_an_option_names(folder, file, arguments, link):
    output = file
    if link is not None:
        output = "other"
        link(file, output)

    assert_kept(file, arguments, output)


@LINKS
def test_a_report_is_not_written_over_the_manifest_beside_an_archive(folder, link):
    output = "fp.manifest.json"
    if link is not None:
        output = "report.json"
        link("fp.manifest.json", output)

    assert_kept("fp.manifest.json", DIFF, output)


def test_a_report_is_not_written_over_the_manifest_beside_any_archive(folder):
    assert_kept("quant.manifest.json", ("diff", "fp.st", "fp.st"), "quant.manifest.json")


def test_an_archive_does_not_take_the_manifest_of_one_that_it_is_like(folder):
    arguments = (*RECORD, "--like", "fp.st")

    assert_kept("fp.manifest.json", arguments, "fp.safetensors")


def test_an_archive_does_not_take_an_input_by_what_is_beside_it(folder):
    Path("inputs.json").rename("new.manifest.json")

    assert_kept("new.manifest.json", (*RECORD, "--inputs", "new.manifest.json"), "new.st")


def test_run_does_not_write_its_report_over_what_it_has_just_recorded(folder):
    result = invoke(
        "run", "-m", "model.py:model", "--traces", ".", "--force", "-o", "fp.manifest.json"
    )

    assert result.exit_code == 2
    assert "--output fp.manifest.json: is fp.manifest.json, which belongs to fp.st" in result.stderr


def test_the_configuration_of_a_project_is_not_written_over(folder):
    Path("pyproject.toml").write_text('[tool.qvtrace]\nfail-on = ["peir>0.5"]\n')

    assert_kept("pyproject.toml", DIFF, "pyproject.toml")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_is_not_written_over_by_what_is_recorded_of_it(folder, saved, name):
    shutil.copytree(saved("llama"), "llama")

    assert_kept(f"llama/{name}", ("record", "-m", "llama", "--force"), f"llama/{name}")
    assert invoke("record", "-m", "llama", "-o", "llama/fp.st").exit_code == 0
    assert invoke("record", "-m", "llama", "-o", "llama/fp.st", "--force").exit_code == 0


def test_an_extract_does_not_replace_a_folder_with_an_archive_of_it(folder):
    assert invoke("extract", "fp.st", "quant.st", "0", "-o", "report").exit_code == 0
    moved = Path("quant.st").rename("report/quant.st")

    result = invoke("extract", "fp.st", str(moved), "0", "-o", "report", "--force")

    assert result.exit_code == 2
    assert "--output report: holds report/quant.st" in result.stderr
    assert moved.exists()


def test_a_report_replaces_an_older_report(folder):
    assert invoke(*DIFF, "-o", "result.json").exit_code == 0
    assert invoke(*DIFF, "-o", "report.txt").exit_code == 0
    assert invoke(*DIFF, "-o", "report.txt", "--format", "json").exit_code == 0
    assert Path("report.txt").read_text().startswith("{")
