"""Commands that read archives start quickly: they never import torch or transformers."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from qvtrace.recorder import record

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "torchao"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocked())
from qvtrace.cli import main
main()
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    file = tmp_path_factory.mktemp("imports") / "trace.st"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    with torch.no_grad(), record(model, file, variant="fp"):
        model(torch.ones(2, 16))
    return str(file)


def run_without_torch(*arguments):
    words = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("diff", "ARCHIVE", "ARCHIVE"),
        ("diff", "ARCHIVE", "ARCHIVE", "--format", "json", "--path", "all"),
        ("diff", "ARCHIVE", "ARCHIVE", "--format", "csv", "--floor", "ARCHIVE"),
        ("diff", "ARCHIVE", "ARCHIVE", "--format", "markdown", "--fail-on", "nonfinite"),
        ("diff", "ARCHIVE", "ARCHIVE", "--format", "junit"),
        ("gate", "--help"),
        ("show", "ARCHIVE", "--stats"),
        ("show", "ARCHIVE", "--json", "--values", "0"),
        ("verify", "ARCHIVE"),
        ("recover", "ARCHIVE"),
        ("merge", "--help"),
        ("--help",),
        ("record", "--help"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_commands_that_read_do_without_torch(archive, arguments):
    words = (archive if word == "ARCHIVE" else word for word in arguments)
    result = run_without_torch(*words)
    assert (result.returncode, result.stdout != "") == (0, True), result.stderr


def test_an_import_of_torch_would_be_noticed(tmp_path):
    result = run_without_torch("record", "-o", str(tmp_path / "trace.st"))
    assert result.returncode == 2
    assert "torch is not to be imported" in result.stderr


def test_the_library_compares_without_torch(archive):
    code = (
        "import sys, qvtrace; qvtrace.diff(sys.argv[1], sys.argv[1]); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, archive], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
