"""Where and in which number format a model computes: dtype, device, attention."""

import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvtrace.errors import ModelError, UsageError
from qvtrace.models.chatter import one_line

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
# Nothing else: a name with a slash would have transformers download and run a kernel.
ATTENTIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)


_MAPS = 'give a name such as auto, or {"MODULE": "DEVICE"}'


def parse_dtype(dtype: str | None) -> torch.dtype | None:
    """The float dtype of that name; None: the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: is unknown; there are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | int | None, option: str = "--device") -> torch.device:
    """A device that this torch can use, the CPU by default."""
    if device is None:
        return torch.device("cpu")
    try:
        parsed = torch.device(device)
        torch.empty(1, device=parsed)
    except Exception as error:
        raise UsageError(
            f"{option} {device}: cannot be used by torch {torch.__version__} on this machine "
            f"({_first_sentence(error)}); use cpu"
        ) from error
    if parsed.type == "meta":
        raise UsageError(f"{option} meta: holds no values to record; use cpu")
    return parsed


def parse_device_map(device_map: str | None) -> str | dict[str, Any] | None:
    """What accelerate takes: a name, or an object of module names and devices.

    Raises `UsageError` for an object that is none, or that names what is no device here.
    """
    if device_map is None:
        return None
    if device_map == "disk":
        return {"": "disk"}
    if not device_map.lstrip().startswith("{"):
        return device_map
    try:
        parsed = json.loads(device_map)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"--device-map {device_map}: is no JSON object ({error}); {_MAPS}"
        ) from error
    for module, device in parsed.items():
        if not isinstance(device, str | int) or isinstance(device, bool):
            raise UsageError(
                f"--device-map: {json.dumps(device)} for {module!r} is no device; {_MAPS}"
            )
        if device != "disk":
            parse_device(device, "--device-map")
    return dict(parsed)


def check_attention(attention: str | None) -> None:
    """Raise `UsageError` for an attention implementation that there is not."""
    if attention is not None and attention not in ATTENTIONS:
        raise UsageError(f"--attn {attention}: is unknown; there are {', '.join(ATTENTIONS)}")


def set_attention(model: Any, attention: str, option: str = "--attn") -> None:
    """Switch a transformers model to an attention implementation that an option asks for."""
    if not hasattr(model, "set_attn_implementation"):
        raise UsageError(
            f"{option}: {type(model).__name__} is no transformers model; leave the option out"
        )
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UsageError(refused_attention(attention, error)) from error


def refused_attention(attention: str, error: Exception) -> str:
    """The message for an attention implementation that a model or a machine does not have."""
    return f"--attn {attention}: {_first_sentence(error)}; use eager"


def offloading(load: Callable[[str], nn.Module]) -> nn.Module:
    """The model that `load` makes, given a new folder for weights that do not fit into memory.

    The folder is deleted with the model.
    """
    folder = tempfile.mkdtemp(prefix="qvtrace-offload-")
    try:
        model = load(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def distribute(model: nn.Module, device_map: str | dict[str, Any]) -> nn.Module:
    """Spread a model that is in memory over devices and the disk.

    Raises `ModelError` with accelerate's words when the map does not fit the model.
    """
    import accelerate

    def dispatch(folder: str) -> Any:
        if device_map == {"": "disk"}:
            return accelerate.disk_offload(model, folder, torch.device("cpu"))
        places = _device_map(model, device_map)
        return accelerate.dispatch_model(model, places, offload_dir=folder)

    try:
        return offloading(dispatch)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"--device-map: {one_line(error)}; give auto or a whole map") from error


def _device_map(model: nn.Module, device_map: str | dict[str, Any]) -> dict[str, Any]:
    import accelerate

    if isinstance(device_map, dict):
        return device_map
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return dict(accelerate.infer_auto_device_map(model))
    return {"": parse_device(device_map, "--device-map")}


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
