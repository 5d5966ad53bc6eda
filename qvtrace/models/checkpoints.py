"""Models from a Hugging Face directory or hub id: configuration, class, weights, load report."""

import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtrace.errors import ModelError, QvtraceError, UsageError
from qvtrace.models.chatter import one_line
from qvtrace.models.hub import hub_address
from qvtrace.models.layers import keep_first_layers
from qvtrace.models.origins import Checkpoint
from qvtrace.models.placement import (
    offloading,
    parse_device_map,
    parse_dtype,
    refused_attention,
)
from qvtrace.models.request import ModelRequest

_LAYER_OF_KEY = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")
# What transformers calls attention implementations when it refuses one.
_ATTENTION_NAMES = ("attn_implementation", "attention implementation", "FlashAttention")
_NAMED = 3  # how many weights a message names


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model with its weights, and what its load report said."""

    model: nn.Module
    warnings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # weights that the model has and the checkpoint has not


def load_config(checkpoint: Checkpoint, request: ModelRequest) -> Any:
    """The configuration, cut to `request.num_layers`.

    Raises `ModelError` for a directory without one, or with one that transformers does not know.
    """
    import transformers

    if checkpoint.local and checkpoint.gguf is None:
        _check_config_file(Path(checkpoint.place), checkpoint.name, request)
    options = source_options(checkpoint, request)
    with _told_as_errors_of(checkpoint, request):
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.place, trust_remote_code=request.trust_remote_code, **options
        )
    if checkpoint.gguf is not None and not config.architectures:
        config.architectures = _architectures(config.model_type)
    if request.num_layers is not None:
        keep_first_layers(config, request.num_layers, checkpoint.name)
    return config


def load_weights(
    checkpoint: Checkpoint, config: Any, request: ModelRequest, attention: str | None
) -> LoadedCheckpoint:
    """The model with the weights of the checkpoint, as many as its configuration has room for."""
    model_class, warnings, options = _model_class(config, request)
    options |= {
        "config": config,
        "dtype": parse_dtype(request.dtype) or "auto",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # the report is read below, and names them
        **source_options(checkpoint, request),
    }
    if attention is not None:
        options["attn_implementation"] = attention
    device_map = parse_device_map(request.device_map)
    report: dict[str, Any] = {}

    def load(folder: str | None) -> nn.Module:
        if folder is not None:
            options.update(device_map=device_map, offload_folder=folder)
        model, info = model_class.from_pretrained(checkpoint.place, **options)
        report.update(info)
        return model  # type: ignore[no-any-return]

    with _told_as_errors_of(checkpoint, request, attention):
        model = load(None) if device_map is None else offloading(load)
    told = _read_report(report, checkpoint.name, request)
    return LoadedCheckpoint(
        model, (*warnings, *told), tuple(sorted(report.get("missing_keys") or ()))
    )


def build_from_config(config: Any, request: ModelRequest, label: str) -> LoadedCheckpoint:
    """The model of a configuration with random weights, from the seed that is set."""
    model_class, warnings, options = _model_class(config, request)
    dtype = parse_dtype(request.dtype) or getattr(config, "dtype", None) or torch.float32
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        from_config = getattr(model_class, "from_config", None)  # of an Auto class
        model = model_class(config) if from_config is None else from_config(config, **options)
    except Exception as error:
        raise ModelError(f"{label}: cannot be built, {one_line(error)}") from error
    return LoadedCheckpoint(model.to(dtype), warnings)


def source_options(checkpoint: Checkpoint, request: ModelRequest) -> dict[str, Any]:
    """What transformers is told about the hub and the file; nothing that was not asked for."""
    options = {
        "gguf_file": checkpoint.gguf,
        "revision": request.revision,
        "cache_dir": request.cache_dir,
        "token": request.hf_token,
        "local_files_only": True if checkpoint.is_out_of_reach else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _model_class(config: Any, request: ModelRequest) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """The class that was saved, a warning when another stands in, and options for an Auto class.

    AutoModel would drop the head.
    """
    import transformers

    name = next(iter(config.architectures or ()), None)
    remote = getattr(config, "auto_map", None) or {}
    if request.trust_remote_code and remote:
        autos = [auto for auto, place in remote.items() if str(place).endswith(f".{name}")]
        if autos and autos[0].startswith("AutoModel"):
            return getattr(transformers, autos[0]), (), {"trust_remote_code": True}
    known = getattr(transformers, str(name), None)
    if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
        return known, (), {}
    stands_in = "transformers' AutoModel chose the class, which may leave out a head"
    said = f"the architecture {name} is unknown to transformers {transformers.__version__}"
    warning = f"{said if name else 'the configuration names no architecture'}; {stands_in}"
    return transformers.AutoModel, (warning,), {"trust_remote_code": request.trust_remote_code}


def _architectures(model_type: str) -> list[str] | None:
    """The class with a head, of a model whose file names none."""
    from transformers.models.auto import modeling_auto as known

    for names in (
        known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        if model_type in names:
            return [names[model_type]]
    return None


def _check_config_file(directory: Path, label: str, request: ModelRequest) -> None:
    file = directory / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{label}: has no config.json; give a directory written by save_pretrained"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{label}/config.json: cannot be read ({error}); restore it") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(
            f"{label}/config.json: names no model_type; "
            "give a directory written by transformers, or FILE.py:FUNCTION"
        )
    settings = config.get("quantization_config")
    if settings is None or (request.from_config and isinstance(settings, dict)):
        return
    if not isinstance(settings, dict) or not isinstance(settings.get("quant_method"), str):
        raise ModelError(
            f"{label}/config.json: its quantization_config names no quant_method; restore it, or "
            "take it out if the weights are floats"
        )


@contextmanager
def _told_as_errors_of(
    checkpoint: Checkpoint, request: ModelRequest, attention: str | None = None
) -> Iterator[None]:
    """Tell what transformers raises in one line, with what to do."""
    try:
        yield
    except QvtraceError:
        raise
    except Exception as error:
        message = _explain(error, checkpoint, request, attention)
        raise message from error


def _explain(
    error: Exception, checkpoint: Checkpoint, request: ModelRequest, attention: str | None
) -> QvtraceError:
    text, label = str(error), checkpoint.name
    said = one_line(error, request.hf_token)
    if "trust_remote_code" in text and not request.trust_remote_code:
        return ModelError(
            f"{label}: needs the Python code that comes with it; "
            "read it, then allow it with --trust-remote-code"
        )
    if "does not recognize this architecture" in text:
        return ModelError(
            f"{label}: its model_type is unknown to this transformers; "
            "upgrade it with pip install -U transformers"
        )
    if attention is not None and any(name in text for name in _ATTENTION_NAMES):
        return UsageError(refused_attention(attention, error))
    if isinstance(error, ImportError):
        return ModelError(f"{label}: needs a package that is not here, {said}; install it")
    if "device_map" in text:
        return UsageError(
            f"--device-map {request.device_map}: {said}; "
            "give auto, a device, disk, or a JSON object of modules and devices"
        )
    if checkpoint.is_out_of_reach and isinstance(error, OSError):
        return ModelError(
            f"--model {label}: is no local directory, and not all of it is in the cache of the "
            f"Hugging Face hub ({hub_address()}), which cannot be reached; "
            "check the name and the connection"
        )
    if not checkpoint.local and isinstance(error, OSError):
        return ModelError(
            f"--model {label}: is no local directory, and cannot be had from the Hugging Face hub "
            f"({said}); check the name, the connection and the token"
        )
    if isinstance(error, OSError) and "no file named" in text:
        return ModelError(f"{label}: has no weights; add them, or use --from-config")
    return ModelError(f"{label}: cannot be loaded, {said}; check the files in it")


def _read_report(report: dict[str, Any], label: str, request: ModelRequest) -> Iterator[str]:
    """Warnings of a load report; weights of the wrong shape are an error."""
    mismatched = sorted(report.get("mismatched_keys") or ())
    if mismatched:
        raise ModelError(
            f"{label}: {_counted(len(mismatched), 'weight')} of the checkpoint do not fit its "
            f"config.json, first {_misfit(mismatched[0])}; check that both belong together"
        )
    errors = list(report.get("error_msgs") or ())
    if errors:
        raise ModelError(f"{label}: cannot be loaded, {' '.join(str(errors[0]).split())}")
    beyond = _beyond(request.num_layers)
    unused = sorted(key for key in report.get("unexpected_keys") or () if not beyond(key))
    if unused:
        yield f"{_named(unused)} of the checkpoint {_were(unused)} not used"
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        yield f"{_named(missing)} {_were(missing)} not in the checkpoint: random now"


def _misfit(found: str | tuple[str, Any, Any]) -> str:
    """A weight of the wrong shape; transformers 4 gives nothing but its name."""
    if isinstance(found, str):
        return found
    name, stored, expected = found
    return f"{name}: {list(stored)} stored, {list(expected)} expected"


def _beyond(num_layers: int | None) -> Callable[[str], bool]:
    """Whether a key belongs to a layer that was left out on purpose."""

    def beyond(key: str) -> bool:
        if num_layers is None:
            return False
        layers = _LAYER_OF_KEY.findall(f".{key}")
        return ".deepstack_" in key or any(int(layer) >= num_layers for layer in layers)

    return beyond


def _named(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{_counted(len(names), 'weight')} ({shown})"


def _were(names: Collection[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
