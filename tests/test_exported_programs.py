"""Models that `torch.export` made: graphs in the mode that they were exported in."""

from pathlib import Path

import pytest
import torch
from model_fixtures import record
from torch import nn

import qvtrace
from qvtrace.archive import Archive
from qvtrace.errors import ModelError
from qvtrace.models import ModelRequest, prepare

FUNCTIONS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(self.linear(x))


class Stubborn(nn.Linear):
    def eval(self):
        raise RuntimeError("not now")


def network():
    return Net().eval(), torch.ones(2, 8)


def export(model):
    return torch.export.export(model, (torch.ones(2, 8),)).module()


def exported():
    model, inputs = network()
    return export(model), inputs


def stubborn():
    return Stubborn(8, 8), torch.ones(2, 8)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def test_an_exported_program_is_a_model_and_what_a_quantizer_may_return(tmp_path: Path) -> None:
    reference = record(prepare(ModelRequest("own.py:exported")), tmp_path / "fp.st")
    request = ModelRequest("own.py:network", variant="quant", quantizer="own.py:export")
    candidate = record(prepare(request), tmp_path / "quant.st")

    rows = {row.module: row.status for row in qvtrace.diff(reference, candidate).rows}
    assert rows[""] == "identical"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_an_exported_program_is_what_its_graph_computes_in(
    training: bool, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).train(training)
    program = torch.export.export(network, (torch.ones(2, 8),)).module()

    with qvtrace.record(program, tmp_path / "program.st"):
        program(torch.ones(2, 8))

    with Archive.open(tmp_path / "program.st") as archive:
        assert archive.manifest.model.training is training


def test_a_model_that_cannot_be_switched_to_eval_mode_is_named() -> None:
    with pytest.raises(ModelError, match=r"own\.py:stubborn: eval\(\) raised RuntimeError: not"):
        prepare(ModelRequest("own.py:stubborn"))
