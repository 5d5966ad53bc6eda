"""torchao: Linear modules quantized in place, by tensor classes that take over their weights."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.chatter import one_line
from qvtrace.models.quantizers.outcome import Context, Quantized
from qvtrace.trees import Json

GROUP_SIZE = 32


@dataclass(frozen=True)
class _Scheme:
    config: str
    granularity: str | None = None  # the option that takes the group size, for int4 weights

    def settings(self) -> Json:
        """What the manifest says of it."""
        return {"config": self.config} | ({"group_size": GROUP_SIZE} if self.granularity else {})

    def build(self) -> Any:
        """The configuration that `quantize_` takes."""
        from torchao import quantization

        options: dict[str, Any] = {}
        if self.granularity is not None:
            options["weight_dtype"] = torch.int4  # type: ignore[attr-defined]
            options[self.granularity] = quantization.PerGroup(GROUP_SIZE)
        return getattr(quantization, self.config)(**options)


# Of torchao's other schemes, Int4WeightOnlyConfig and those with float8 activations need a GPU.
_SCHEMES = {
    "int8-dynamic": _Scheme("Int8DynamicActivationInt8WeightConfig"),
    "int8-weight": _Scheme("Int8WeightOnlyConfig"),
    "int4-weight": _Scheme("IntxWeightOnlyConfig", "granularity"),
    "int8-int4": _Scheme("Int8DynamicActivationIntxWeightConfig", "weight_granularity"),
    "float8-weight": _Scheme("Float8WeightOnlyConfig"),
}


class TorchaoQuantizer:
    """`quantize_` on the Linear modules that a float forward really calls, but for the output head.

    A Linear whose weight is used without calling it (Mamba's `dt_proj`) fails with a quantized
    weight; the head is left out as transformers does.
    """

    name = "torchao"
    schemes = tuple(_SCHEMES)
    default_scheme = "int8-dynamic"

    def installed(self) -> bool:
        """Whether torchao is there."""
        return find_spec("torchao") is not None

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Quantize `model` in place.

        Raises `ModelError` for weights that are not in memory, and when torchao raises.
        """
        chosen = _SCHEMES[scheme]
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        _check_in_memory(linears)
        reasons = _reasons_to_leave(model, linears, chosen, _called(linears, context))
        targets = [linear for name, linear in linears.items() if name not in reasons]
        _quantize(model, targets, chosen, scheme)
        for name, linear in linears.items():
            if type(linear.weight) is nn.Parameter:
                reasons.setdefault(name, "torchao left it as it was")
        reasons |= dict.fromkeys(_other_matrices(model), "no Linear module")
        return Quantized(
            model,
            settings=chosen.settings(),
            quantized=tuple(name for name in linears if name not in reasons),
            left_float=_by_reason(reasons),
            versions={"torchao": version("torchao")},
        )


def _quantize(model: nn.Module, targets: list[nn.Linear], chosen: _Scheme, scheme: str) -> None:
    from torchao.quantization import quantize_

    waiting = {id(linear) for linear in targets}

    def take(module: nn.Module, _: str) -> bool:
        # Once: a module that has two names is visited twice.
        found = id(module) in waiting
        waiting.discard(id(module))
        return found

    try:
        quantize_(model, chosen.build(), take)
    except Exception as error:
        raise ModelError(
            f"torchao:{scheme}: cannot quantize this model, {one_line(error)}; try another scheme"
        ) from error


def _called(linears: dict[str, nn.Linear], context: Context) -> set[str]:
    """The Linear modules that one float forward calls."""
    called: set[str] = set()

    def remember(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(remember(name)).remove)
        context.run()
    return called


def _reasons_to_leave(
    model: Any, linears: dict[str, nn.Linear], scheme: _Scheme, called: set[str]
) -> dict[str, str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    reasons = {}
    for name, linear in linears.items():
        if linear is head:
            reasons[name] = "output head"
        elif name not in called:
            reasons[name] = "never called as a module"
        elif scheme.granularity and linear.in_features % GROUP_SIZE:
            reasons[name] = f"{linear.in_features} inputs are no multiple of {GROUP_SIZE}"
    return reasons


def _other_matrices(model: nn.Module) -> Iterator[str]:
    """Modules that multiply by weights of their own without being Linear."""
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if class_name == "Conv1D" or class_name.endswith("Experts"):
            yield name


def _check_in_memory(linears: dict[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ModelError(
                f"torchao: cannot quantize {name}, whose weight is not in memory; "
                "leave --device-map out"
            )


def _by_reason(reasons: dict[str, str]) -> dict[str, tuple[str, ...]]:
    by_reason: dict[str, tuple[str, ...]] = {}
    for name, reason in reasons.items():
        by_reason[reason] = (*by_reason.get(reason, ()), name)
    return by_reason
