"""What comes in from modules that were not recorded is never told as clean."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_archives import edit_manifest
from torch import Tensor, nn

from qvtrace import diff, record
from qvtrace.comparison.answer import answer
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.origins import Origin, Origins
from qvtrace.comparison.row_names import RowNames

LINEARS = ("*.0",)  # of each block; the second linear layer of it is not recorded


def chain() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()) for _ in range(5)
    ]
    return nn.Sequential(*blocks)


def rounded(model: nn.Module, bits: int, *names: str) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            step = weight.abs().amax() / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step).round() * step)
    return model


@pytest.fixture
def against(tmp_path: Path):
    """Compares the chain with a changed one, of which the patterns `recorded` were."""

    def run(changed: nn.Module, recorded: tuple[str, ...], **options: object) -> Comparison:
        torch.manual_seed(1)
        inputs: Tensor = torch.randn(24, 32)
        files = tmp_path / "fp.st", tmp_path / "quant.st"
        for model, file in zip((chain(), changed), files, strict=True):
            with torch.no_grad(), record(model.eval(), file, include=recorded, overwrite=True):
                model(inputs)
        return diff(*files, **options)

    return run


def test_a_fault_in_a_module_that_was_not_recorded_comes_in_before_the_next_that_was(against):
    verdict = against(rounded(chain(), 4, "2.2"), LINEARS).verdict

    (origin,) = verdict.origins
    assert (origin.module, origin.path, origin.noise_in) == ("3.0", "inputs.0", 0.0)
    assert verdict.text.startswith("first seen at 3.0 (its inputs differ by -")
    assert "comes in before it, in what was not recorded" in verdict.text


def test_a_fault_in_a_module_that_was_recorded_is_named_beside_such_that_were_not(against):
    verdict = against(rounded(chain(), 4, "2.0"), LINEARS).verdict

    assert [(origin.module, origin.path) for origin in verdict.origins] == [("2.0", "output")]


def test_what_a_filter_of_the_comparison_leaves_out_is_not_clean_either(against):
    verdict = against(rounded(chain(), 4, "2.2"), (), include=LINEARS).verdict

    assert [origin.module for origin in verdict.origins] == ["3.0"]
    assert "in what was left out" in verdict.text


def test_noise_that_modules_that_were_not_recorded_add_as_usual_is_no_all_clear(against):
    quantized = rounded(chain(), 8, *(f"{block}.2" for block in range(5)))
    verdict = against(quantized, LINEARS).verdict

    assert not any("no place adds" in line for line in verdict.lines)
    assert "comes in before" in verdict.lines[0]
    assert "in what was not recorded" in verdict.lines[0]


def test_new_nan_in_what_a_recorded_call_is_given_is_told_before_it(against):
    broken = copy.deepcopy(chain())
    with torch.no_grad():
        broken.get_submodule("1.2").weight[3] = float("nan")
    (origin, *_) = against(broken, LINEARS).verdict.origins

    assert (origin.module, origin.path) == ("2.0", "inputs.0")


def test_a_recording_of_one_block_says_that_its_inputs_were_not_clean(against):
    (origin, *_) = against(rounded(chain(), 4, "1.0"), ("3", "3.*")).verdict.origins

    assert (origin.module, origin.path) == ("3", "inputs.0")


def test_what_is_recorded_with_all_that_holds_it_needs_no_such_place(against):
    verdict = against(rounded(chain(), 4, "2.2"), ()).verdict

    assert [(origin.module, origin.path) for origin in verdict.origins] == [("2.2", "output")]


def test_what_is_not_known_and_not_unusual_stands_in_place_of_an_all_clear():
    before = Origin("fc", 0, "inputs.0", 0.0, 1e-3, 1e-3, "in-out", "comes in before it, in a gap")

    (line,) = answer(Origins(level="usual noise", before=before), RowNames([]), None)

    assert line == (
        "error comes in before fc (its inputs differ by -30 dB), in a gap; "
        "no other place adds much more than is usual; usual noise"
    )


def test_calls_that_a_file_says_are_within_each_other_are_compared_all_the_same(tmp_path):
    files = tmp_path / "fp.st", tmp_path / "quant.st"
    for model, file in zip((chain(), rounded(chain(), 4, "1.0")), files, strict=True):
        with torch.no_grad(), record(model, file):
            model(torch.linspace(-1, 1, 24 * 32).reshape(24, 32))
        edit_manifest(file, close_the_circle)

    assert diff(*files).rows


def close_the_circle(manifest: dict[str, Any]) -> None:
    calls = {call["module"]: call for call in manifest["calls"]}
    calls["0"]["parent"], calls["1"]["parent"] = ["1", 0], ["0", 0]
