"""What a model that came quantized holds."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qvtrace.models.quantizers.linears import other_matrices
from qvtrace.models.quantizers.outcome import Quantized
from qvtrace.trees import Json

_REMEDIES = {
    "awq": "pip install gptqmodel",
    "bitsandbytes": "pip install 'qvtrace[bitsandbytes]'",
    "compressed-tensors": "pip install 'qvtrace[compressed-tensors]'",
    "gptq": "pip install gptqmodel optimum",
    "quanto": "pip install 'qvtrace[quanto]'",
}
_PLAIN = (Tensor, nn.Parameter)
_REPLACEMENTS = "transformers.integrations"  # where transformers keeps classes of quantizers


def remedy(method: object) -> str:
    """What to do where a package is missing that reads checkpoints of a method."""
    return _REMEDIES.get(str(method), "install it")


def as_quantized(model: nn.Module, settings: Json) -> Quantized:
    """What a model that came quantized holds: weights of a quantized class, integers or fp8, and
    modules of classes that neither torch nor the model brings."""
    modules = dict(model.named_modules())
    own = _package(model)
    quantized = tuple(
        name
        for name, module in modules.items()
        if _holds_quantized(module) or _is_foreign(_package(module), own)
    )
    float_linears = (name for name, module in modules.items() if isinstance(module, nn.Linear))
    left = dict.fromkeys(float_linears, "float in the checkpoint") | dict(other_matrices(model))
    left_float: dict[str, tuple[str, ...]] = {}
    for name, reason in left.items():
        if name not in quantized:
            left_float[reason] = (*left_float.get(reason, ()), name)
    return Quantized(model, settings, quantized, left_float, otherwise=tuple(_dequantized(model)))


def _dequantized(model: Any) -> Iterator[str]:
    """Where a machine has no kernels for a format, transformers makes floats of it as it loads."""
    settings = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if getattr(settings, "dequantize", False):
        yield "its weights were dequantized when they were loaded"


def _is_foreign(package: str, own: str) -> bool:
    if package.startswith("transformers."):
        return package == _REPLACEMENTS
    return package not in ("torch.nn", own)


def _package(module: nn.Module) -> str:
    """The first two names of where its class is."""
    return ".".join(type(module).__module__.split(".")[:2])


def _holds_quantized(module: nn.Module) -> bool:
    return hasattr(module, "quantization_scheme") or any(map(is_quantized, _weights(module)))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """All parameters, and those buffers that hold weights: others are integers by nature."""
    yield from module.parameters(recurse=False)
    buffers = module.named_buffers(recurse=False)
    yield from (buffer for name, buffer in buffers if "weight" in name)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is of a tensor class of its own, an integer or an fp8."""
    wide_float = weight.is_floating_point() and weight.element_size() >= 2
    return type(weight) not in _PLAIN or not wide_float
