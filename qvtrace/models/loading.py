"""An origin and a request -> a model in memory, placed, with the inputs that came with it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qvtrace.errors import ModelError, UsageError
from qvtrace.models import placement
from qvtrace.models.chatter import one_line
from qvtrace.models.checkpoints import build_from_config, load_config, load_weights
from qvtrace.models.embedded import embedded_config
from qvtrace.models.functions import FunctionName, call
from qvtrace.models.gguf_files import check_file, check_package, quantization_of
from qvtrace.models.layers import keep_first_layers
from qvtrace.models.modes import to_eval_mode
from qvtrace.models.origins import Checkpoint, Embedded, Origin
from qvtrace.models.quantizers.checkpoint import check_weights, remedy
from qvtrace.models.request import ModelRequest, Sample
from qvtrace.trees import Json


@dataclass(frozen=True)
class Loaded:
    """A model, float unless its checkpoint holds it quantized."""

    model: nn.Module
    given: Sample | None = None  # by the function that made the model
    warnings: tuple[str, ...] = ()
    quantization: Json | None = None  # the checkpoint's own


def load_model(origin: Origin, request: ModelRequest) -> Loaded:
    """The model of `origin` in eval mode, on the devices and in the dtype that were asked for.

    Raises `UsageError` and `ModelError`.
    """
    match origin:
        case Embedded():
            loaded = _build_embedded(origin, request)
        case Checkpoint():
            loaded = _load_checkpoint(origin, request)
        case FunctionName():
            loaded = _call_function(origin, request)
    if request.device is not None:
        loaded.model.to(placement.parse_device(request.device))
    to_eval_mode(loaded.model, origin.name)
    return loaded


def attention_of(request: ModelRequest) -> str | None:
    """The attention implementation that was asked for; maps come from eager attention only."""
    return request.attn or ("eager" if request.attention_maps else None)


def _build_embedded(origin: Embedded, request: ModelRequest) -> Loaded:
    config = embedded_config()
    if request.num_layers is not None:
        keep_first_layers(config, request.num_layers, origin.name)
    built = build_from_config(config, request, origin.name)
    placement.set_attention(built.model, request.attn or "eager")
    return Loaded(_distributed(built.model, request), warnings=built.warnings)


def _load_checkpoint(origin: Checkpoint, request: ModelRequest) -> Loaded:
    if origin.gguf is not None:
        check_package(origin.name)
        check_file(origin.gguf_file, origin.name)
    config = load_config(origin, request)
    attention = attention_of(request)
    if request.from_config:
        built = build_from_config(config, request, origin.name)
        if attention is not None:
            placement.set_attention(built.model, attention)
        return Loaded(_distributed(built.model, request), warnings=built.warnings)
    quantization, warnings = _quantization(origin, config, request)
    with _naming_packages(origin, quantization):
        loaded = load_weights(origin, config, request, attention)
    if quantization is not None:
        check_weights(loaded.model, quantization, loaded.missing, origin.name)
    return Loaded(loaded.model, warnings=(*warnings, *loaded.warnings), quantization=quantization)


@contextmanager
def _naming_packages(origin: Checkpoint, quantization: Json | None) -> Iterator[None]:
    """Say what to install where a package is missing that reads such a checkpoint."""
    try:
        yield
    except ModelError as error:
        missing = error.__cause__
        if quantization is None or not isinstance(missing, ImportError):
            raise
        method = quantization.get("quant_method")
        raise ModelError(
            f"{origin.name}: is quantized by {method}, which transformers reads with a package "
            f"that is not here ({one_line(missing)}); {remedy(method)}"
        ) from missing


def _quantization(
    origin: Checkpoint, config: Any, request: ModelRequest
) -> tuple[Json | None, tuple[str, ...]]:
    """How the model comes quantized, None if it comes as floats; and warnings of it."""
    if origin.gguf is not None:
        return _gguf_quantization(origin, request)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None, ()
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
    quantization = dict(json.loads(json.dumps(settings, default=str)))
    _check_quantized(origin, request, quantization)
    return quantization, ()


def _gguf_quantization(
    origin: Checkpoint, request: ModelRequest
) -> tuple[Json | None, tuple[str, ...]]:
    """What the weights in the file were; transformers makes floats of them, which can stand for a
    float model, or be quantized otherwise."""
    quantization = quantization_of(origin.gguf_file, origin.name)
    if quantization is None or (request.variant == "quant" and request.quantizer is None):
        return quantization, ()
    types = ", ".join(quantization["types"])
    warning = (
        f"{origin.name} holds quantized weights ({types}), which are dequantized here: "
        "this is not the float original"
    )
    return None, (warning,)


def _check_quantized(origin: Checkpoint, request: ModelRequest, quantization: Json) -> None:
    method = quantization.get("quant_method", "by an unnamed method")
    if request.variant == "fp":
        raise UsageError(
            f"--variant fp: {origin.name} is already quantized ({method}); record it with "
            "--variant quant, and the original that it was made from with --variant fp"
        )
    if request.quantizer is not None:
        raise UsageError(
            f"--quantizer {request.quantizer}: {origin.name} is already quantized ({method}); "
            "leave the option out"
        )


def _call_function(origin: FunctionName, request: ModelRequest) -> Loaded:
    label = f"--model {origin.name}"
    model, given = _taken_apart(call(origin.load("--model"), label), label)
    dtype, attention = placement.parse_dtype(request.dtype), attention_of(request)
    if dtype is not None:
        model.to(dtype)
    if attention is not None:
        option = "--attention-maps" if request.attn is None else f"--attn {attention}"
        placement.set_attention(model, attention, option)
    return Loaded(_distributed(model, request), given)


def _taken_apart(result: Any, label: str) -> tuple[nn.Module, Sample | None]:
    if isinstance(result, nn.Module):
        return result, None
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        return result[0], _given_sample(result[1], label)
    raise ModelError(
        f"{label}: returned {type(result).__name__}; return a torch.nn.Module, or (model, inputs)"
    )


def _given_sample(inputs: Any, label: str) -> Sample:
    source = {"kind": "function"}
    if isinstance(inputs, Tensor):
        return Sample((inputs,), {}, source)
    if isinstance(inputs, tuple):
        return Sample(inputs, {}, source)
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return Sample((), dict(inputs), source)
    raise ModelError(
        f"{label}: returned inputs that are {type(inputs).__name__}; "
        "return a dict (keyword arguments), a tuple (positional ones) or a tensor (the only one)"
    )


def _distributed(model: nn.Module, request: ModelRequest) -> nn.Module:
    device_map = placement.parse_device_map(request.device_map)
    return model if device_map is None else placement.distribute(model, device_map)
