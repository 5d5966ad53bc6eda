"""Commands that read archives start quickly: they never import torch or transformers."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from qvtrace.recording.recorder import record

needs_html = pytest.mark.skipif(
    None in (find_spec("bokeh"), find_spec("itables")), reason="needs pip install '.[html]'"
)

BLOCKED = """
import sys

MODULES = sys.argv.pop(1).split(",")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
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


def run_without(modules, *arguments):
    words = [sys.executable, "-c", BLOCKED, modules, *arguments]
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
        pytest.param(("diff", "ARCHIVE", "ARCHIVE", "--format", "html"), marks=needs_html),
        ("show", "ARCHIVE", "--stats"),
        ("show", "ARCHIVE", "--json", "--values", "0"),
        ("verify", "ARCHIVE"),
        ("recover", "ARCHIVE"),
        ("merge", "--help"),
        ("--help",),
        ("record", "--help"),
        ("suggest", "--help"),
        ("--version",),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_commands_that_read_do_without_torch(archive, arguments):
    words = (archive if word == "ARCHIVE" else word for word in arguments)
    result = run_without("torch,transformers,torchao", *words)
    assert (result.returncode, result.stdout != "") == (0, True), result.stderr


def test_an_import_of_torch_would_be_noticed(tmp_path):
    result = run_without("torch", "record", "-o", str(tmp_path / "trace.st"))
    assert result.returncode == 2
    assert "torch is not to be imported" in result.stderr


@needs_html
def test_a_library_that_the_page_lacks_is_named_with_what_to_install(archive):
    code = "import sys; sys.modules['bokeh'] = None; from qvtrace.cli import main; main()"
    words = [sys.executable, "-c", code, "diff", archive, archive, "--format", "html"]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "qvtrace: --format html: needs bokeh, not installed here; "
        "pip install 'bokeh<4,>=3.6' 'itables<3,>=2.2' 'jinja2>=3.1'\n"
    )


def test_the_library_compares_without_torch(archive):
    code = (
        "import sys, qvtrace; qvtrace.diff(sys.argv[1], sys.argv[1]); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, archive], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
