"""TICO: every module of a model wrapped in one that quantizes what goes in, out and between."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qvtrace.comparison.alignment import unwrapped
from qvtrace.errors import ModelError, UsageError
from qvtrace.models.keep_float import KEPT
from qvtrace.models.quantizers.outcome import Context, Quantized, cannot_quantize
from qvtrace.models.quantizers.packages import Package
from qvtrace.patterns import above
from qvtrace.trees import Json

_FAMILIES = "TICO has wrappers for Llama and Qwen3-VL"
_VERSIONS = "TICO 0.3.0 runs Qwen3-VL with transformers 4.57.3 and 5.9.0 to 5.22.2; install one"


class TicoQuantizer:
    """Fake quantization by TICO's wrappers: weights, activations and what lies between.

    A wrapped module's name has `wrapped` in it. Nothing is left float that is not to be: TICO
    refuses a model with a module that it has no wrapper for.
    """

    name = "tico"
    schemes = ("uint8", "int8", "int16", "uint4", "int4")
    calibrated = schemes
    wraps = True
    keeps_float = True
    package = Package("tico", "tico", extra="tico")

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Wrap `model`, calibrate it, and switch quantization on unless `context.wrap_only`.

        Raises `ModelError` for a model that TICO has no wrappers for or cannot run, and
        `UsageError` for inputs of Qwen3-VL that it cannot take.
        """
        label = f"{self.name}:{scheme}"
        settings: Json = {"activations": scheme, "weights": scheme}
        vision = _vision(getattr(model, "config", None), context.inputs, label)
        try:
            model = _wrap(model, scheme, vision)
        except Exception as error:
            raise cannot_quantize(label, error, _FAMILIES) from error
        if context.wrap_only:  # until they are converted, wrappers only look on
            return Quantized(model, settings, versions=self.package.versions)
        _calibrate(model, context, label)
        kept = _switch_off(model, context.keep_float)
        quantizing = tuple(name for name in _quantizing(model) if name not in kept)
        left_float = {KEPT: tuple(kept)} if kept else {}
        return Quantized(model, settings, quantizing, left_float, self.package.versions)


def _wrap(model: nn.Module, scheme: str, vision: dict[str, Any]) -> nn.Module:
    from tico.quantization import prepare
    from tico.quantization.config.ptq import PTQConfig
    from tico.quantization.config.specs import affine
    from tico.quantization.wrapq.dtypes import DType

    signed, bits = not scheme.startswith("u"), int(scheme.removeprefix("u").removeprefix("int"))
    spec = affine(DType(bits, signed=signed))
    config = PTQConfig(activation=spec, weight=spec, model_args={"vision": vision})
    return prepare(model, config, inplace=True)  # type: ignore[no-any-return]


def _calibrate(model: nn.Module, context: Context, label: str) -> None:
    from tico.quantization import convert

    try:
        context.calibrate(model)
    except ModelError as error:
        if isinstance(error.__cause__, ImportError):
            raise cannot_quantize(label, error.__cause__, _VERSIONS) from error
        raise
    try:
        convert(model, inplace=True)
    except Exception as error:
        raise cannot_quantize(label, error, "calibrate it on other inputs") from error


def _quantizing(model: nn.Module) -> Iterator[str]:
    """The wrappers that quantize something themselves, by their names in the wrapped model."""
    from tico.quantization.wrapq.wrappers.quant_module_base import QuantModuleBase

    for name, module in model.named_modules():
        if isinstance(module, QuantModuleBase) and any(module.named_observers(recurse=False)):
            yield name


def _switch_off(model: nn.Module, keep_float: frozenset[str]) -> list[str]:
    """Let the wrappers of these float modules hand on what they would quantize; their names."""
    from tico.quantization.wrapq.control import set_fake_quant_enabled

    def is_kept(name: str) -> bool:
        # TICO puts modules into its wrappers that the float model does not have.
        name = unwrapped(name)
        return name in keep_float or not keep_float.isdisjoint(above(name))

    set_fake_quant_enabled(model, lambda site: is_kept(site.module_path), False)
    return [name for name in _quantizing(model) if is_kept(name)]


def _vision(config: Any, inputs: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    """What TICO is told of pictures: their grid, and where in every text their tokens begin."""
    if not hasattr(config, "vision_config") or not hasattr(config, "image_token_id"):
        return {}
    starts = {_start(each.get("input_ids"), config.image_token_id, label) for each in inputs}
    if len(starts) > 1:
        raise UsageError(
            f"--quantizer {label}: the picture begins at token {' or '.join(map(str, starts))}, "
            "and TICO takes one place; give calibration inputs with the sample's text"
        )
    grids = [each["image_grid_thw"] for each in inputs if each.get("image_grid_thw") is not None]
    return {
        "grid_thw": tuple(grids[0][0].tolist()) if grids else (1, 2, 2),
        "visual_start_idx": starts.pop() if starts else 0,
        "spatial_merge_size": config.vision_config.spatial_merge_size,
    }


def _start(ids: Any, image_token: int, label: str) -> int:
    """Where the picture's tokens begin, in every text of a batch; 0 where there is none."""
    if not isinstance(ids, torch.Tensor) or not bool((ids == image_token).any()):
        return 0
    places = [(row == image_token).nonzero().flatten() for row in ids]
    first = {int(place[0]) for place in places if len(place)}
    whole = all(len(place) and int(place[-1] - place[0]) + 1 == len(place) for place in places)
    if len(first) > 1 or not whole:
        raise UsageError(
            f"--quantizer {label}: TICO takes one picture, at the same place of every text; "
            "give one --image"
        )
    return first.pop()
