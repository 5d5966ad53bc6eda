"""Quantizers: what they change, what they leave float, and how that is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import TOY, Saved
from tiny_models import FAMILIES
from torch import nn

from qvtrace.errors import ModelError, UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.models.chatter import quiet
from qvtrace.models.quantizers import QUANTIZERS

SCHEMES = QUANTIZERS["torchao"].schemes


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the working folder."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return "toy.py:with_tensor"


def quantize(model: str | None, quantizer: str | None = None) -> PreparedModel:
    return prepare(ModelRequest(model=model, variant="quant", quantizer=quantizer))


def output(prepared: PreparedModel) -> torch.Tensor:
    with torch.no_grad():
        result: Any = prepared.model(*prepared.args, **prepared.kwargs)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_torchao_quantizes_what_each_family_calls_from_the_same_float_weights(
    family: str, saved: Saved
) -> None:
    directory = str(saved(family))

    reference, candidate = prepare(ModelRequest(model=directory)), quantize(directory)

    candidate.run()
    assert candidate.info == reference.info
    assert candidate.variant.quantizer == "torchao:int8-dynamic"
    assert bool(candidate.variant.quantized) == (family != "gpt2")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_changes_the_output_and_nothing_else(scheme: str) -> None:
    reference, candidate = prepare(ModelRequest()), quantize(None, f"torchao:{scheme}")

    assert candidate.info == reference.info
    assert candidate.variant.quantizer == f"torchao:{scheme}"
    assert not torch.equal(output(candidate), output(reference))
    assert torch.allclose(output(candidate), output(reference), atol=0.2)


def test_quantizing_twice_gives_the_same_output_bit_for_bit() -> None:
    assert torch.equal(output(quantize(None)), output(quantize(None)))


def test_the_output_head_stays_float_and_is_named(saved: Saved) -> None:
    variant = quantize(str(saved("llama"))).variant

    assert variant.left_float == ("lm_head",)
    assert variant.settings["left_float"] == {"output head": 1}
    assert len(variant.quantized) == 14


def test_a_linear_whose_weight_is_used_without_calling_it_stays_float(saved: Saved) -> None:
    variant = quantize(str(saved("mamba"))).variant

    assert "backbone.layers.0.mixer.dt_proj" in variant.left_float
    assert "backbone.layers.0.mixer.in_proj" in variant.quantized


def test_fused_experts_stay_float_and_are_named(saved: Saved) -> None:
    variant = quantize(str(saved("qwen3_moe"))).variant

    assert "model.layers.0.mlp.experts" in variant.left_float


def test_a_quantizer_that_changed_nothing_is_told_loudly(saved: Saved) -> None:
    prepared = quantize(str(saved("gpt2")))

    assert prepared.variant.quantized == ()
    assert "transformer.h.0.mlp.c_fc" in prepared.variant.left_float
    assert "CHANGED NOTHING" in prepared.warnings[0]


def test_inputs_that_no_group_divides_stay_float_and_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\n"
        "def build():\n"
        "    linears = torch.nn.Linear(33, 32), torch.nn.Linear(32, 32)\n"
        "    return torch.nn.Sequential(*linears), torch.ones(1, 33)\n"
    )
    monkeypatch.chdir(tmp_path)

    variant = quantize("odd.py:build", "torchao:int4-weight").variant

    assert variant.quantized == ("1",)
    assert variant.left_float == ("0",)
    assert variant.settings["left_float"] == {"33 inputs are no multiple of 32": 1}


def test_a_linear_that_has_two_names_is_quantized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared.py").write_text(
        "import torch\n"
        "def build():\n"
        "    linear = torch.nn.Linear(32, 32)\n"
        "    return torch.nn.Sequential(linear, linear), torch.ones(1, 32)\n"
    )
    monkeypatch.chdir(tmp_path)

    prepared = quantize("shared.py:build")

    prepared.run()
    assert prepared.variant.quantized == ("0",)


def test_looking_for_called_modules_leaves_no_hook_and_does_not_touch_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inplace.py").write_text(
        "import torch\n"
        "class Inplace(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.mul_(2))\n"
        "def build():\n"
        "    return Inplace(32, 32), torch.ones(1, 32)\n"
    )
    monkeypatch.chdir(tmp_path)

    prepared = quantize("inplace.py:build")

    assert torch.equal(prepared.args[0], torch.ones(1, 32))
    assert not any(module._forward_hooks for module in prepared.model.modules())


def test_hooks_come_off_when_the_float_forward_raises(toy: str) -> None:
    with pytest.raises(ModelError, match="the model raised TypeError"):
        quantize("toy.py:model_that_raises")


def test_weights_that_are_not_in_memory_cannot_be_quantized(saved: Saved) -> None:
    with pytest.raises(ModelError, match="weight is not in memory; leave --device-map out"):
        prepare(ModelRequest(model=str(saved("llama")), variant="quant", device_map="disk"))


def test_a_users_quantizer_takes_a_model_and_returns_one(toy: str) -> None:
    reference, candidate = prepare(ModelRequest(model=toy)), quantize(toy, "toy.py:halve")

    assert candidate.variant.quantizer == "toy.py:halve"
    assert candidate.variant.quantized == ("first",)
    assert candidate.variant.left_float == ("second",)
    assert candidate.info == reference.info
    assert not torch.equal(output(candidate), output(reference))


def test_a_users_quantizer_that_changed_nothing_is_told_loudly(toy: str) -> None:
    prepared = quantize(toy, "toy.py:keep")

    assert prepared.variant.quantized == ()
    assert "toy.py:keep CHANGED NOTHING" in prepared.warnings[0]


def test_a_users_quantizer_that_returns_no_model_is_named(toy: str) -> None:
    with pytest.raises(
        ModelError, match=r"toy\.py:forget: returned NoneType; return the quantized"
    ):
        quantize(toy, "toy.py:forget")


@pytest.mark.parametrize(
    ("quantizer", "match"),
    [
        ("magic", "there are torchao:int8-dynamic, .*FILE.py:FUNCTION"),
        ("torchao:int3", "torchao has no scheme int3; there are int8-dynamic, int8-weight"),
        ("toy.py:nothing", "has no function nothing"),
        ("nothing.py:halve", "there is no file nothing.py"),
    ],
    ids=["name", "scheme", "function", "file"],
)
def test_an_unknown_quantizer_lists_what_there_is(quantizer: str, match: str, toy: str) -> None:
    with pytest.raises(UsageError, match=match):
        quantize(toy, quantizer)


@pytest.fixture(scope="module")
def quantized_llama(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that torchao has quantized."""
    directory = tmp_path_factory.mktemp("quantized") / "llama-int8"
    with quiet():
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig())
        model = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=settings)
        model.save_pretrained(directory)
    return directory


def test_a_checkpoint_that_is_already_quantized_needs_no_quantizer(
    saved: Saved, quantized_llama: Path
) -> None:
    reference = prepare(ModelRequest(model=str(saved("llama"))))

    candidate = quantize(str(quantized_llama))

    candidate.run()
    assert candidate.variant.quantizer == "checkpoint:torchao"
    assert "model.layers.0.mlp.up_proj" in candidate.variant.quantized
    assert candidate.variant.left_float == ("lm_head",)
    assert candidate.info.config_digest == reference.info.config_digest
    assert candidate.info.weights_digest is None


def test_a_quantized_checkpoint_is_no_float_variant_and_is_not_quantized_again(
    quantized_llama: Path,
) -> None:
    with pytest.raises(
        UsageError, match=r"already quantized \(torchao\); record it with --variant"
    ):
        prepare(ModelRequest(model=str(quantized_llama)))
    with pytest.raises(UsageError, match=r"already quantized \(torchao\); leave the option out"):
        quantize(str(quantized_llama), "torchao")


def test_the_configuration_of_a_quantized_checkpoint_still_makes_a_float_model(
    quantized_llama: Path,
) -> None:
    prepared = prepare(ModelRequest(model=str(quantized_llama), from_config=True))

    prepared.run()
    assert all(type(parameter) is nn.Parameter for parameter in prepared.model.parameters())
