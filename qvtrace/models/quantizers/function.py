"""A user's own quantizer: a function that takes a model and returns one."""

import torch
from torch import Tensor, nn

from qvtrace.digests import Hasher
from qvtrace.errors import ModelError
from qvtrace.models.functions import FunctionName, call
from qvtrace.models.quantizers.outcome import Context, Quantized


class FunctionQuantizer:
    """What changed is told by comparing each module with what it was."""

    schemes = ()
    default_scheme = ""

    def __init__(self, function: FunctionName) -> None:
        self.name = function.name
        self._function = function

    def installed(self) -> bool:
        """Always: the function is the user's."""
        return True

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Call the function; raises `ModelError` when it raises or returns no model."""
        before = _fingerprints(model)
        function = self._function.load("--quantizer", reuse=True)
        quantized = call(function, f"--quantizer {self.name}", model)
        if not isinstance(quantized, nn.Module):
            raise ModelError(
                f"--quantizer {self.name}: returned {type(quantized).__name__}; "
                "return the quantized model"
            )
        after = _fingerprints(quantized)
        changed = tuple(name for name in after if after[name] != before.get(name))
        left = tuple(
            name
            for name, module in quantized.named_modules()
            if isinstance(module, nn.Linear) and name not in changed
        )
        return Quantized(
            quantized, quantized=changed, left_float={"left as it was": left} if left else {}
        )


def _fingerprints(model: nn.Module) -> dict[str, str]:
    """Of each module: its class, its own tensors and whether its forward was replaced."""
    return {name: _fingerprint(module) for name, module in model.named_modules()}


def _fingerprint(module: nn.Module) -> str:
    hasher = Hasher(f"{type(module).__qualname__} {'forward' in vars(module)}".encode())
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(recurse=False):
            hasher.update(f"{name} {type(tensor).__name__} {tensor.dtype}".encode())
            if _is_plain(tensor):
                contents = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                hasher.update(contents.numpy().data)
    return str(hasher.hexdigest())


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
