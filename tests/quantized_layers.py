"""Layers quantized by other libraries, each in one line."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

INPUT = torch.linspace(-1, 1, 128).reshape(2, 64)


def layer() -> nn.Linear:
    """64 inputs, 32 outputs; the same every time."""
    torch.manual_seed(0)
    return nn.Linear(64, 32).eval()


def with_torchao(model: nn.Module, config: str) -> nn.Module:
    """The model quantized in place, int4 in groups of 32."""
    from torchao import quantization

    int4: dict[str, Any] = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    options = int4 if config == "IntxWeightOnlyConfig" else {}
    quantization.quantize_(model, getattr(quantization, config)(**options))
    return model


def with_compressed_tensors(scheme_name: str, *, compress: bool = True) -> nn.Sequential:
    """A layer as compressed-tensors keeps it in a checkpoint, or before it is compressed."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model = nn.Sequential(layer())
    scheme = quantization.preset_name_to_scheme(scheme_name, ["Linear"])
    if scheme_name == "W4A16":
        scheme.weights.group_size = 32
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme})
    quantization.apply_quantization_config(model, config)
    linear, arguments = model[0], scheme.weights
    groups = linear.weight.reshape(32, -1, arguments.group_size or 64)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    with torch.no_grad():
        linear.weight_scale.copy_(scale.reshape(linear.weight_scale.shape))
        linear.weight_zero_point.copy_(zero_point.reshape(linear.weight_zero_point.shape))
    linear.quantization_status = quantization.QuantizationStatus.FROZEN
    if compress:
        ModelCompressor.from_pretrained_model(model).compress_model(model)
    return model


def with_bitsandbytes(kind: str) -> nn.Sequential:
    """`int8`, `nf4`, `fp4`, or `nested-fp4`, whose scales are quantized too."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized: Any
    if kind == "int8":
        quantized = bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    else:
        quantized = bitsandbytes.nn.Linear4bit(
            64, 32, quant_type=kind[-3:], compress_statistics=kind.startswith("nested")
        )
    quantized.load_state_dict(layer().state_dict())
    return nn.Sequential(quantized.to("cpu").eval())


def with_quanto(*, freeze: bool = True, **what: str) -> nn.Sequential:
    """`weights="qint8"`, `activations="qint8"`: calibrated on `INPUT`."""
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(layer())
    quanto.quantize(model, **{name: getattr(quanto, value) for name, value in what.items()})
    if "activations" in what:
        with torch.no_grad(), quanto.Calibration(streamline=False):
            model(INPUT)
    if freeze:
        quanto.freeze(model)
    return model


def with_tico() -> nn.Module:
    """A layer in TICO's wrapper, which is the root, calibrated on `INPUT`."""
    tico = pytest.importorskip("tico")
    from tico.quantization.config.ptq import PTQConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = tico.quantization.prepare(layer(), PTQConfig(), inplace=True)
        with torch.no_grad():
            prepared(INPUT)
        quantized: nn.Module = tico.quantization.convert(prepared, inplace=True)
    return quantized.eval()


def with_torch_dynamic() -> nn.Sequential:
    """A layer with packed int8 weights that are no parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer()), {nn.Linear})


class PackedWeights(nn.Module):
    """Keeps its weight in a form that only it can read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2, 32))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden
