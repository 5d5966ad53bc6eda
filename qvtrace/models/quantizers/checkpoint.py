"""What a model that came quantized holds."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from qvtrace.errors import ModelError
from qvtrace.extras import install
from qvtrace.models.quantizers.linears import other_matrices
from qvtrace.models.quantizers.outcome import Quantized
from qvtrace.patterns import folded
from qvtrace.reports.formatting import listed
from qvtrace.trees import Json

_EXTRAS = ("bitsandbytes", "compressed-tensors", "quanto")  # methods that an extra is named after
_REMEDIES = {"awq": "pip install gptqmodel", "gptq": "pip install gptqmodel optimum"}
_PLAIN = (Tensor, nn.Parameter)
_PARTS = frozenset({"qweight", "qzeros", "scales", "g_idx", "absmax", "SCB", "packed"})
_FLOATS_FAIL = "bitsandbytes.nn"
_NAMED = 3  # kinds of names in a message
_REPLACEMENTS = "transformers.integrations"  # where transformers keeps classes of quantizers


def remedy(method: object) -> str:
    """What to do where a package is missing that reads checkpoints of a method."""
    if method in _EXTRAS:
        return install(str(method))
    return _REMEDIES.get(str(method), "install it")


def check_weights(model: nn.Module, settings: Json, missing: Sequence[str], label: str) -> None:
    """Raise `ModelError` where the weights are not what config.json says that they are: parts of
    quantized ones are missing, or floats are where a module takes nothing but quantized ones."""
    parts = [name for name in missing if _is_part(name)]
    floats = [
        name
        for name, module in model.named_modules()
        if _package(module) == _FLOATS_FAIL and any(map(_is_float, _weights(module)))
    ]
    if not parts and not floats:
        return
    what = (
        f"{len(parts)} parts of quantized weights are not in it ({listed(folded(parts), _NAMED)})"
        if parts
        else f"its weights are floats ({listed(folded(floats), _NAMED)})"
    )
    raise ModelError(
        f"{label}: config.json says that it is quantized by {settings.get('quant_method')}, but "
        f"{what}; get the quantized weights, or take quantization_config out of config.json"
    )


def _is_part(name: str) -> bool:
    """`weight_scale`, `qweight`, `weight.absmax`: what only a quantized weight has."""
    last = name.rpartition(".")[2]
    return last in _PARTS or last.startswith("weight_")


def _is_float(weight: Tensor) -> bool:
    return not is_quantized(weight) and weight.dim() > 1


def hint(settings: Json) -> str:
    """What to look at first when a model that came quantized raises."""
    method = settings.get("quant_method", "what its config.json says")
    return f"check that its weights are quantized by {method}, as config.json says"


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
    """Where a machine has no kernels for a format, transformers makes floats of it as it loads,
    and takes its settings off the model."""
    kept = getattr(model, "hf_quantizer", None), getattr(model, "config", None)
    settings = [getattr(one, "quantization_config", None) for one in kept]
    if settings[1] is None or getattr(settings[0], "dequantize", False):
        yield "transformers dequantized its weights as it loaded them"


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
