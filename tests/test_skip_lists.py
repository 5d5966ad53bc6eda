"""What a suggestion says for each quantizer is what that quantizer takes, as it takes it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from model_fixtures import Saved
from torch import nn

from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.suggesting.skip_lists import skip_list_code, skip_lists

KEPT = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
FLOAT = [*KEPT, "lm_head"]


@pytest.fixture(scope="module")
def llama(saved: Saved) -> PreparedModel:
    """A float Llama; not to be changed."""
    return prepare(ModelRequest(model=str(saved("llama"))))


def ran(quantizer: str, **names: Any) -> dict[str, Any]:
    """The printed lines, run where they find what they name."""
    code = skip_list_code(quantizer, FLOAT)
    assert code is not None
    exec(compile(code, quantizer, "exec"), names)
    return names


def linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What stands where the float model has a Linear."""
    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")):
            yield name, module


def is_float(module: Any) -> bool:
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def float_linears(model: nn.Module) -> list[str]:
    return sorted(name for name, module in linears(model) if is_float(module))


def test_torchao_takes_it_as_a_filter(llama: PreparedModel) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(llama.model)

    ran("torchao:int8-weight", model=model, config=quantization.Int8WeightOnlyConfig())

    assert float_linears(model) == sorted(FLOAT)


def test_transformers_take_it_for_torchao(saved: Saved) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    names = skip_lists(FLOAT)["torchao"]["modules_to_not_convert"]
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=names)
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)

    assert float_linears(model) == sorted(FLOAT)


def test_bitsandbytes_takes_it(saved: Saved) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    config = ran("bitsandbytes:int8")["config"]
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)

    assert (
        config.llm_int8_skip_modules == skip_lists(FLOAT)["bitsandbytes"]["llm_int8_skip_modules"]
    )
    assert float_linears(model) == sorted(FLOAT)


def test_compressed_tensors_take_it(llama: PreparedModel) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = copy.deepcopy(llama.model)
    recipe = yaml.safe_load(skip_list_code("compressed-tensors:w8a8", FLOAT) or "")
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    scheme = quantization.preset_name_to_scheme(modifier["scheme"], modifier["targets"])

    quantization.apply_quantization_config(
        model,
        quantization.QuantizationConfig(
            config_groups={"group_0": scheme}, ignore=modifier["ignore"]
        ),
    )

    assert modifier["ignore"] == skip_lists(FLOAT)["compressed-tensors"]["ignore"]
    without = [name for name, m in linears(model) if not hasattr(m, "quantization_scheme")]
    assert sorted(without) == sorted(FLOAT)


def test_quanto_takes_it(llama: PreparedModel) -> None:
    pytest.importorskip("optimum.quanto")
    model = copy.deepcopy(llama.model)

    ran("quanto:int8", model=model)

    assert float_linears(model) == sorted(FLOAT)


def test_tico_takes_it(saved: Saved) -> None:
    pytest.importorskip("tico")
    request = ModelRequest(model=str(saved("llama")), variant="quant", quantizer="tico:uint8")
    quantized = prepare(request)
    kept = prepare(ModelRequest(**{**vars(request), "keep_float": tuple(FLOAT)}))

    before = logits(quantized)
    ran("tico:uint8", quantized=quantized.model)

    assert not torch.equal(before, logits(quantized))
    assert torch.equal(logits(kept), logits(quantized))


def logits(prepared: PreparedModel) -> torch.Tensor:
    with torch.no_grad():
        output: Any = prepared.model(*prepared.args, **prepared.kwargs)
    return output.logits


def test_a_users_own_quantizer_is_called_with_the_names() -> None:
    assert skip_list_code("quantize.py:mine", FLOAT) is None


def test_names_that_need_quotes_have_them() -> None:
    code = skip_list_code("torchao", ['odd "name"', "back\\slash"]) or ""

    line = next(line for line in code.splitlines() if line.startswith("keep_float = "))
    assert eval(line.removeprefix("keep_float = ")) == ['odd "name"', "back\\slash"]
