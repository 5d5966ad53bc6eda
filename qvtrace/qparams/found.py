"""What a reader says of one quantized tensor, while the model is at hand."""

from dataclasses import dataclass
from typing import TypeAlias

import torch

Values: TypeAlias = torch.Tensor | float | None


@dataclass(frozen=True)
class Found:
    """`Parameters` before their values are stored; what is not known is None."""

    of: str
    class_name: str
    dtype: str | None = None
    scheme: str | None = None
    granularity: str | None = None
    group_size: int | None = None
    axis: int | None = None
    dynamic: bool = False
    quant_min: float | None = None
    quant_max: float | None = None
    scale: Values = None
    zero_point: Values = None
    minimum: Values = None
    maximum: Values = None
    observer: bool = False


def dtype_name(dtype: object) -> str:
    """torch's name without its prefix; of another library's dtype what it calls itself."""
    return str(dtype).removeprefix("torch.")


def integer_range(name: str | None) -> tuple[float | None, float | None]:
    """The smallest and largest value of `int8`, `uint4` and the like, and of float8."""
    if name is None:
        return None, None
    kind = name.rstrip("0123456789")
    digits = name[len(kind) :]
    if kind == "int" and digits:
        return -(2 ** (int(digits) - 1)), 2 ** (int(digits) - 1) - 1
    if kind == "uint" and digits:
        return 0, 2 ** int(digits) - 1
    if name.startswith("float8"):
        limit = torch.finfo(getattr(torch, name)).max
        return -limit, limit
    return None, None
