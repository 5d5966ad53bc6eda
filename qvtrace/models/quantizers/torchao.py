"""torchao: Linear modules quantized in place, by tensor classes that take over their weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qvtrace.models.quantizers.linears import GROUP_SIZE, find_linears
from qvtrace.models.quantizers.outcome import Context, Quantized, cannot_quantize
from qvtrace.models.quantizers.packages import Package
from qvtrace.trees import Json


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
    """`quantize_` on the Linear modules, which keep their class."""

    name = "torchao"
    schemes = tuple(_SCHEMES)
    calibrated = ()
    wraps = False
    keeps_float = True
    package = Package("torchao", "torchao")

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Quantize `model` in place.

        Raises `ModelError` for weights that are not in memory, and when torchao raises.
        """
        chosen, label = _SCHEMES[scheme], f"{self.name}:{scheme}"
        linears = find_linears(model, context, label, grouped=chosen.granularity is not None)
        _quantize(model, list(linears.targets.values()), chosen, label)
        untouched = {
            name: "torchao left it as it was"
            for name, linear in linears.targets.items()
            if type(linear.weight) is nn.Parameter
        }
        linears = linears.without(untouched)
        return Quantized(
            model,
            chosen.settings(),
            tuple(linears.targets),
            linears.left_float,
            self.package.versions,
        )


def _quantize(model: nn.Module, targets: list[nn.Linear], chosen: _Scheme, label: str) -> None:
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
        raise cannot_quantize(label, error) from error
