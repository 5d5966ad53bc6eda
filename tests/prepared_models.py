"""What prepared models give, and how far two are apart."""

from typing import Any

import torch

from qvtrace.models import PreparedModel


def logits(prepared: PreparedModel) -> torch.Tensor:
    with torch.no_grad():
        output: Any = prepared.model(*prepared.args, **prepared.kwargs)
    return output.logits


def sqnr(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    return float(20 * torch.log10(reference.norm() / (reference - candidate).norm()))
