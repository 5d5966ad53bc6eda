"""What libraries say does not reach the terminal; what the user's code says does."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from model_fixtures import change_config, save

from qvtrace.models.chatter import one_line, quiet

PREPARE = """
import sys
from qvtrace.models import ModelRequest, prepare

for variant in ("fp", "quant"):
    prepare(ModelRequest(model=sys.argv[1], variant=variant)).run()
"""


def run(model: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREPARE, str(model)], capture_output=True, text=True, timeout=120
    )


def test_loading_quantizing_and_running_write_nothing_to_the_terminal(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "llama")
    change_config(directory, num_hidden_layers=3)  # so that there is a load report

    completed = run(directory)

    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_a_function_that_loads_a_model_itself_is_as_quiet_and_can_speak(tmp_path: Path) -> None:
    save("llama", tmp_path / "llama")
    (tmp_path / "own.py").write_text(
        "import logging, warnings\n"
        "from transformers import LlamaModel\n"
        "TEXT = 'from the user'\n"
        "def build():\n"
        "    warnings.warn(TEXT)\n"
        "    logging.getLogger('user').warning(TEXT)\n"
        f"    return LlamaModel.from_pretrained({str(tmp_path / 'llama')!r})\n"
    )

    completed = run(f"{tmp_path}/own.py:build")

    assert completed.returncode == 0
    assert completed.stdout == ""
    lines = [line.split("UserWarning: ")[-1].strip() for line in completed.stderr.splitlines()]
    assert lines == ["from the user", "warnings.warn(TEXT)", "from the user"] * 2


def test_quiet_leaves_levels_and_filters_as_they_were() -> None:
    logger, filters = logging.getLogger("torch"), list(warnings.filters)
    level = logger.level

    with pytest.raises(KeyError), quiet():
        assert logger.level >= logging.ERROR
        raise KeyError

    assert logger.level == level
    assert warnings.filters == filters


def test_a_long_foreign_message_is_told_in_one_line() -> None:
    error = RuntimeError("first line\n   second line\n" + "word " * 500)

    text = one_line(error)

    assert text.startswith("RuntimeError: first line second line word")
    assert len(text) < 450


def test_an_exception_without_a_message_is_told_by_its_type() -> None:
    assert one_line(torch.OutOfMemoryError()) == "OutOfMemoryError"
