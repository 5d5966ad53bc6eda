"""What a quantizer that does not say so has changed: each module compared with what it was."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qvtrace.digests import Hasher
from qvtrace.errors import ModelError
from qvtrace.models.quantizers.outcome import Quantized


def observed(
    model: nn.Module,
    quantize: Callable[[], object],
    label: str,
    versions: dict[str, str] | None = None,
) -> Quantized:
    """Call `quantize`, which returns `model` quantized or another model.

    What it returns as `Quantized` is taken at its word. Raises `ModelError` when it returns
    anything else than a model.
    """
    before = _fingerprints(model)
    quantized = quantize()
    if isinstance(quantized, Quantized):
        return quantized
    if not isinstance(quantized, nn.Module):
        raise ModelError(
            f"{label}: returned {type(quantized).__name__}; return the quantized model"
        )
    after = _fingerprints(quantized)
    changed = tuple(name for name in after if after[name] != before.get(name))
    left = tuple(
        name
        for name, module in quantized.named_modules()
        if isinstance(module, nn.Linear) and name not in changed
    )
    left_float = {"left as it was": left} if left else {}
    return Quantized(quantized, {}, changed, left_float, versions or {})


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
