"""bitsandbytes: Linear modules replaced by its own, with int8 or 4-bit weights."""

from typing import Any

from torch import nn

from qvtrace.models.quantizers.linears import find_linears, replace_module
from qvtrace.models.quantizers.outcome import Context, Quantized, cannot_quantize
from qvtrace.models.quantizers.packages import Package
from qvtrace.trees import Json

_OUTLIERS = 6.0  # inputs beyond it are multiplied in float16, as transformers' default has it
_SETTINGS: dict[str, Json] = {
    "int8": {"module": "Linear8bitLt", "threshold": _OUTLIERS},
    "nf4": {"module": "Linear4bit", "quant_type": "nf4", "double_quant": False},
}


class BitsandbytesQuantizer:
    """Weights quantized one module after the other, from the float ones in memory.

    int8 casts its inputs to float16 within the module; what goes in and comes out keeps its dtype.
    """

    name = "bitsandbytes"
    schemes = tuple(_SETTINGS)
    calibrated = ()
    wraps = False
    keeps_float = True
    package = Package("bitsandbytes", "bitsandbytes", extra="bitsandbytes")

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Replace modules of `model`.

        Raises `ModelError` for weights that are not in memory, and when bitsandbytes raises.
        """
        label = f"{self.name}:{scheme}"
        linears = find_linears(model, context, label, swapped=True)
        convert = _int8 if scheme == "int8" else _nf4
        try:
            for linear in linears.targets.values():
                replace_module(model, linear, convert(linear))
        except Exception as error:
            raise cannot_quantize(label, error) from error
        return Quantized(
            model,
            _SETTINGS[scheme],
            tuple(linears.targets),
            linears.left_float,
            self.package.versions,
        )


def _int8(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    quantized = Linear8bitLt(
        *_shape(linear), has_fp16_weights=False, threshold=_OUTLIERS, device="meta"
    )
    weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return _filled(quantized, weight, linear)


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized = Linear4bit(
        *_shape(linear), compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta"
    )
    # On a CPU with AVX512-BF16 it would compute in bfloat16 whatever compute_dtype says, and fail
    # for outputs that are no multiple of 32.
    quantized.support_avx512bf16_for_cpu = False
    weight = Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=quantized,
    )
    return _filled(quantized, weight, linear)


def _shape(linear: nn.Linear) -> tuple[int, int, bool]:
    return linear.in_features, linear.out_features, linear.bias is not None


def _filled(quantized: Any, weight: Any, linear: nn.Linear) -> nn.Module:
    """With the weight, which is quantized as it moves to its device, and the bias."""
    quantized.weight = weight.to(linear.weight.device)
    quantized.bias = linear.bias
    return quantized  # type: ignore[no-any-return]
