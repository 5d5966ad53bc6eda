"""What a model that came quantized holds."""

from collections.abc import Iterator

from torch import Tensor, nn

from qvtrace.models.quantizers.outcome import Quantized
from qvtrace.trees import Json

_PLAIN = (Tensor, nn.Parameter)


def as_quantized(model: nn.Module, settings: Json) -> Quantized:
    """What a model that came quantized holds: weights of a quantized class, integers or fp8."""
    modules = dict(model.named_modules())
    quantized = tuple(name for name, module in modules.items() if _holds_quantized(module))
    linears = (name for name, module in modules.items() if isinstance(module, nn.Linear))
    left = tuple(name for name in linears if name not in quantized)
    left_float = {"float in the checkpoint": left} if left else {}
    return Quantized(model, settings, quantized, left_float)


def _holds_quantized(module: nn.Module) -> bool:
    return hasattr(module, "quantization_scheme") or any(map(is_quantized, _weights(module)))


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module.named_parameters, module.named_buffers):
        yield from (tensor for name, tensor in tensors(recurse=False) if "weight" in name)


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is of a tensor class of its own, an integer or an fp8."""
    wide_float = weight.is_floating_point() and weight.element_size() >= 2
    return type(weight) not in _PLAIN or not wide_float
