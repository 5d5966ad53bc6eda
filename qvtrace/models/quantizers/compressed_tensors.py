"""compressed-tensors: the formats of llm-compressor, as fake quantization inside each Linear."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvtrace.models.quantizers.linears import GROUP_SIZE, find_linears
from qvtrace.models.quantizers.outcome import Context, Quantized, cannot_quantize
from qvtrace.models.quantizers.packages import Package
from qvtrace.trees import Json

_PRESETS = {"w8a8": "W8A8", "w4a16": "W4A16", "fp8-dynamic": "FP8_DYNAMIC"}
_GROUPED = "w4a16"


class CompressedTensorsQuantizer:
    """Weights rounded to nearest on the range of each channel or group; activations, where the
    scheme has them, on the range of each token as it comes."""

    name = "compressed-tensors"
    schemes = tuple(_PRESETS)
    calibrated = ()
    wraps = False
    keeps_float = True
    package = Package("compressed_tensors", "compressed-tensors", extra="compressed-tensors")

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Quantize `model` in place; its Linear modules keep class and float weight.

        Raises `ModelError` for weights that are not in memory, and when the package raises.
        """
        label, grouped = f"{self.name}:{scheme}", scheme == _GROUPED
        linears = find_linears(model, context, label, grouped=grouped)
        try:
            quantize = _quantization(scheme)
            with torch.no_grad():
                for linear in linears.targets.values():
                    quantize(linear)
        except Exception as error:
            raise cannot_quantize(label, error) from error
        return Quantized(
            model,
            _settings(scheme),
            tuple(linears.targets),
            linears.left_float,
            self.package.versions,
        )


def _settings(scheme: str) -> Json:
    settings: Json = {"preset": _PRESETS[scheme], "weights": "round to nearest"}
    return {**settings, "group_size": GROUP_SIZE} if scheme == _GROUPED else settings


def _quantization(scheme: str) -> Callable[[Any], None]:
    """What gives a Linear the scheme, with scales from its own weight."""
    from compressed_tensors.quantization import (
        QuantizationStatus,
        initialize_module_for_quantization,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    preset: Any = preset_name_to_scheme(_PRESETS[scheme], ["Linear"])
    if scheme == _GROUPED:
        preset.weights.group_size = GROUP_SIZE

    def quantize(linear: Any) -> None:
        initialize_module_for_quantization(linear, preset)
        low, high = _ranges(linear.weight, preset.weights)
        scale, zero_point = calculate_qparams(low, high, preset.weights)
        linear.weight_scale.copy_(scale.reshape(linear.weight_scale.shape))
        if hasattr(linear, "weight_zero_point"):
            linear.weight_zero_point.copy_(zero_point.reshape(linear.weight_zero_point.shape))
        linear.quantization_status = QuantizationStatus.FROZEN

    return quantize


def _ranges(weight: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest weight of each output channel, or of each of its groups."""
    if arguments.group_size is not None and arguments.group_size > 0:
        groups = weight.reshape(weight.shape[0], -1, arguments.group_size)
        return groups.amin(dim=-1), groups.amax(dim=-1)
    return weight.amin(dim=-1, keepdim=True), weight.amax(dim=-1, keepdim=True)
