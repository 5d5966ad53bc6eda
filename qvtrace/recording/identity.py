"""What tells one model and one environment from another: digests, versions, dtype, device."""

import inspect
import json
import platform
import re
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qvtrace.digests import Hasher, digest_bytes, digest_json
from qvtrace.manifest import ModelInfo
from qvtrace.recording.snapshots import host_bytes
from qvtrace.redaction import error_text
from qvtrace.trees import Json

Answer = TypeVar("Answer")

# Parts of a configuration that say how a model is run, not which one it is.
_NOT_IDENTITY = frozenset(
    {
        "quantization_config",
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_cache",
        "output_attentions",
    }
)
# What torch.compile and DataParallel put into names: the weights are the same.
_PARALLEL_OR_COMPILED = re.compile(r"^(module\.)+|(?<![^.])_orig_mod\.")
_QUANTIZERS = (
    "torchao",
    "bitsandbytes",
    "compressed_tensors",
    "optimum.quanto",
    "tico",
)


@cache
def version() -> str:
    """The version of this qvtrace."""
    return metadata.version("qvtrace")


_TRAINING = ("train", "training", "is_training")  # arguments of dropout and of normalizations


class Questions:
    """Asks a model about itself. What it raises instead of an answer becomes a warning."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def ask(self, what: str, answer: Callable[[], Answer]) -> Answer | None:
        """What `answer` returns; None where it raises."""
        try:
            return answer()
        except Exception as error:  # a property, a method or a `__getattr__` of the user's
            self.warnings.append(f"{what} unknown: the model raised {error_text(error)}")
            return None


def describe_model(model: nn.Module, questions: Questions, *, weights: bool) -> ModelInfo:
    """What can be said of a model that somebody else built.

    `weights`: whether its weights are the float ones, so that their digest tells the model.
    """
    ask = questions.ask
    return ModelInfo(
        class_name=type(model).__name__,
        dtype=ask("dtype", lambda: model_dtype(model)),
        config_digest=ask("configuration", lambda: config_digest(model)),
        weights_digest=ask("float weights", lambda: weights_digest(model)) if weights else None,
        training=ask("training mode", lambda: is_training(model)) is True,
    )


def is_training(model: nn.Module) -> bool:
    """Whether a model is in training mode: an exported program is in the mode that it was exported
    in, which its operators say."""
    if not isinstance(model, torch.fx.GraphModule) or "eval" not in vars(model):
        return model.training
    return any(_trains(node) for node in model.graph.nodes)


def _trains(node: torch.fx.Node) -> bool:
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    named = dict(zip([argument.name for argument in arguments], node.args, strict=False))
    return any({**named, **node.kwargs}.get(name) is True for name in _TRAINING)


def describe_environment(model: nn.Module, questions: Questions) -> Json:
    """Versions, device, threads, attention implementation, and place among processes."""
    environment: Json = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": questions.ask("device", lambda: _device(model)),
        "threads": torch.get_num_threads(),
    }
    if "transformers" in sys.modules:
        environment["transformers"] = sys.modules["transformers"].__version__
    for name in _QUANTIZERS:
        if name in sys.modules:
            package = name.replace("_", "-").replace(".", "-")
            environment[package] = _package_version(package)
    attention = questions.ask("attention implementation", lambda: _attention(model))
    if isinstance(attention, str):
        environment["attention"] = attention
    place = process_place()
    if place is not None:
        environment["rank"], environment["world_size"] = place
    return environment


def _attention(model: nn.Module) -> object:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def process_place() -> tuple[int, int] | None:
    """The rank of this process and the size of its group; None where it is the only one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    size = torch.distributed.get_world_size()
    return (torch.distributed.get_rank(), size) if size > 1 else None


def config_digest(model: nn.Module) -> str | None:
    """Digest of the model's configuration but for quantization; None when it has none."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return None
    return digest_json(json.loads(json.dumps(_identity(to_dict()), default=str)))


def weights_digest(model: nn.Module) -> str | None:
    """Digest of names, dtypes, shapes and bytes of all weights.

    None where they are not at hand (on the meta device, a GPU or a disk) or are no plain floats.
    """
    hasher = Hasher()
    named = model.state_dict(keep_vars=True).items()
    weights = {_PARALLEL_OR_COMPILED.sub("", name): weight for name, weight in named}
    for name, weight in sorted(weights.items()):
        if not isinstance(weight, torch.Tensor) or is_lazy(weight) or not _is_plain(weight):
            return None
        digest = digest_bytes(host_bytes(weight.detach()))
        hasher.update(f"{name} {weight.dtype} {tuple(weight.shape)} {digest}\n".encode())
    return str(hasher.hexdigest()) if weights else None


def model_dtype(model: nn.Module) -> str | None:
    """The dtype of most float weights."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and not is_lazy(parameter):
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name], default=None)


def positional_parameters(module: nn.Module) -> tuple[str | None, ...]:
    """The names of forward's positional parameters, up to a `*args`."""
    try:
        forward = module.forward
        function = getattr(forward, "__func__", forward)
        return _positional_parameters(function, inspect.ismethod(forward))
    except Exception:  # a callable of the user's, which may raise anything when it is looked at
        return ()


@lru_cache(maxsize=4096)
def _positional_parameters(forward: Callable[..., Any], is_bound: bool) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[is_bound:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def _identity(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            str(name): _identity(value)
            for name, value in config.items()
            if name not in _NOT_IDENTITY
        }
    return [_identity(item) for item in config] if isinstance(config, list | tuple) else config


def _is_plain(weight: torch.Tensor) -> bool:
    return (
        type(weight) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and not weight.is_quantized
    )


def _device(model: nn.Module) -> str:
    devices = sorted({parameter.device.type for parameter in model.parameters()})
    return ", ".join(devices) or "cpu"


@cache
def _package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
