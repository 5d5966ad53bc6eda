"""Modules that a quantizer leaves float because it was told to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import invoke
from model_fixtures import Saved
from test_quantizer_packages import PACKAGES
from test_quantizer_plugins import ENTRY_POINTS
from torch import nn

import qvtrace
from qvtrace.errors import UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare

DOWN = "model.layers.1.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"
SCHEMES = (
    "torchao:int8-dynamic",
    "torchao:int4-weight",
    "bitsandbytes:int8",
    "bitsandbytes:nf4",
    "compressed-tensors:w8a8",
    "quanto:int8",
    "quanto:w8a8",
    "tico:uint8",
)
USER = """
import torch


def model():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(32, 32) for _ in range(3)]
    return torch.nn.Sequential(*linears), torch.ones(2, 32)


def halve(model, keep_float=()):
    with torch.no_grad():
        for name, module in model.named_children():
            if name not in keep_float:
                module.weight.mul_(0.5)
    return model


def deaf(model):
    return model
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the working folder."""
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    return "user.py:model"


def quantize(model: object, quantizer: str | None, *patterns: str) -> PreparedModel:
    pytest.importorskip({"torchao": "torchao", **PACKAGES}[str(quantizer).partition(":")[0]])
    return prepare(
        ModelRequest(
            model=str(model), variant="quant", quantizer=quantizer, keep_float=tuple(patterns)
        )
    )


def local_errors(prepared: PreparedModel, reference: Path, file: Path) -> dict[str, float]:
    qvtrace.replay(prepared.model, reference, file, overwrite=True)
    rows = qvtrace.diff(reference, file).rows
    return {row.module: row.metrics.max_abs_error or 0.0 for row in rows}


@pytest.mark.parametrize("quantizer", SCHEMES)
def test_what_is_kept_float_has_no_error_of_its_own_and_the_rest_has(
    quantizer: str, saved: Saved, file: Path
) -> None:
    prepared = quantize(saved("llama"), quantizer, DOWN, f"{ATTENTION}*")
    assert invoke("record", "-m", saved("llama"), "-o", file).exit_code == 0

    errors = local_errors(prepared, file, file.with_name("local.st"))

    linears = {name for name in errors if name.endswith("_proj")}
    kept = {name for name in linears if name == DOWN or name.startswith(ATTENTION)}
    assert len(kept) == 5
    # TICO folds the attention's scale into the keys, which is no error.
    exact = kept - {f"{ATTENTION}.k_proj"} if quantizer.startswith("tico") else kept
    assert max(errors[name] for name in exact) < 1e-6
    assert min(errors[name] for name in linears - kept) > 1e-5
    assert prepared.variant.settings["left_float"]["kept float"] >= 5
    assert prepared.variant.settings["keep_float"] == [DOWN, f"{ATTENTION}*"]


def test_a_block_is_kept_with_all_that_is_in_it(saved: Saved) -> None:
    variant = quantize(saved("llama"), "torchao", "model.layers.0").variant

    assert len(variant.quantized) == 7
    assert all(name.startswith("model.layers.1.") for name in variant.quantized)


def test_a_module_with_two_names_is_kept_by_either(user: str) -> None:
    Path("shared.py").write_text(
        "import torch\n"
        "def build():\n"
        "    linear = torch.nn.Linear(32, 32)\n"
        "    parts = linear, torch.nn.Linear(32, 32), linear\n"
        "    return torch.nn.Sequential(*parts), torch.ones(1, 32)\n"
    )

    assert quantize("shared.py:build", "torchao", "2").variant.quantized == ("1",)


def test_a_pattern_that_matches_nothing_is_an_error(user: str) -> None:
    with pytest.raises(UsageError, match=r"--keep-float 'down': matches none of 4 modules"):
        quantize(user, "torchao", "0", "down")


def test_a_function_is_told_the_names_when_it_asks_for_them(user: str) -> None:
    request = ModelRequest(model=user, variant="quant", quantizer="user.py:halve")

    everything = prepare(request).variant
    some = prepare(ModelRequest(**{**vars(request), "keep_float": ("[12]",)})).variant

    assert everything.quantized == ("0", "1", "2")
    assert some.quantized == ("0",)


def test_a_function_that_does_not_ask_for_them_is_refused(user: str) -> None:
    request = ModelRequest(model=user, variant="quant", quantizer="user.py:deaf", keep_float=("0",))

    with pytest.raises(UsageError, match="give its function a parameter `keep_float`"):
        prepare(request)


PLUGIN = """
import torch


class Rounding:
    keeps_float = True

    def apply(self, model, scheme, context):
        with torch.no_grad():
            for name, module in model.named_children():
                if name not in context.keep_float:
                    module.weight.copy_((module.weight * 10).round() / 10)
        return model


def zeroing(model):
    return model


telling = failing = zeroing
number = 3
"""


def test_a_plugin_says_whether_it_heeds_them(
    user: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    metadata = site / "keeping_quantizers-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "keeping_quantizers.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: keeping\nVersion: 1.0\n")
    points = ENTRY_POINTS.replace("rounding_quantizers", "keeping_quantizers")
    (metadata / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(site))

    def prepared(quantizer: str) -> PreparedModel:
        return prepare(
            ModelRequest(model=user, variant="quant", quantizer=quantizer, keep_float=("1",))
        )

    assert prepared("rounding").variant.quantized == ("0", "2")
    with pytest.raises(UsageError, match="zeroing does not say that it can"):
        prepared("zeroing")


def test_a_float_variant_keeps_nothing(user: str) -> None:
    result = invoke("record", "-m", user, "--keep-float", "0")

    assert result.exit_code == 2
    assert "--keep-float: the variant fp is not quantized; add --variant quant" in result.stderr


def test_a_quantized_checkpoint_is_refused(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    model.save_pretrained(tmp_path / "quantized")

    with pytest.raises(UsageError, match="already quantized; quantize its float original"):
        prepare(
            ModelRequest(
                model=str(tmp_path / "quantized"), variant="quant", keep_float=("model.layers.0",)
            )
        )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("# these two\n0\n\n 2 \n", id="lines"),
        pytest.param('["0", "2"]', id="list"),
        pytest.param('{"keep_float": ["0", "2"], "reached": true}', id="suggestion"),
    ],
)
def test_a_file_names_them_too_and_run_and_replay_take_both(user: str, text: str) -> None:
    Path("keep").write_text(text)

    ran = invoke("run", "-m", user, "--keep-float-file", "keep", "--format", "json", "-o", "r.json")
    again = invoke(
        *("replay", "traces/fp.st", "-m", user, "-o", "local.st"),
        *("--keep-float", "0", "--keep-float", "2"),
    )

    assert (ran.exit_code, again.exit_code) == (0, 0), ran.stderr + again.stderr
    variant = json.loads(Path("r.json").read_text())["candidate"]["variant"]
    assert (variant["quantized"], variant["left_float"]) == (["1"], ["0", "2"])
    assert variant["settings"]["keep_float"] == ["0", "2"]
    rows = qvtrace.diff("traces/fp.st", "local.st").rows
    assert {row.module: row.status for row in rows} == {
        "0": "identical",
        "1": "ok",
        "2": "identical",
    }
    assert "2 kept float" in invoke("diff", "traces/fp.st", "traces/quant.st").stdout


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param("# nothing\n", "names no module", id="empty"),
        pytest.param("[0, 1]", "holds no list of module names", id="numbers"),
        pytest.param('{"kept": ["0"]}', "holds no list of module names", id="another object"),
        pytest.param("[0", "is no JSON", id="cut"),
    ],
)
def test_a_file_that_names_none_is_an_error(user: str, text: str | None, fault: str) -> None:
    if text is not None:
        Path("keep").write_text(text)

    result = invoke("record", "-m", user, "--variant", "quant", "--keep-float-file", "keep")

    assert result.exit_code == 2
    assert result.stderr.startswith("qvtrace: --keep-float-file keep: ")
    assert fault in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_cannot_keep_modules_is_told_before_the_first_recording_of_a_run(user: str) -> None:
    result = invoke("run", "-m", user, "--quantizer", "user.py:deaf", "--keep-float", "0")

    assert result.exit_code == 2
    assert "user.py:deaf does not say that it can" in result.stderr
    assert not Path("traces").exists()


def test_everything_may_be_kept(user: str) -> None:
    prepared = quantize(user, "torchao", "(root)")

    assert prepared.variant.quantized == ()
    assert isinstance(prepared.model[0], nn.Linear)
    assert type(prepared.model[0].weight) is nn.Parameter
    assert torch.isfinite(prepared.model(*prepared.args)).all()
