"""What can be told wrong in a request before anything is loaded."""

from qvtrace.errors import UsageError
from qvtrace.models import placement
from qvtrace.models.functions import FunctionName
from qvtrace.models.origins import Checkpoint, Origin
from qvtrace.models.request import ModelRequest

_LARGEST_SEED = 2**63 - 1


def check(request: ModelRequest, origin: Origin) -> None:
    """Raise `UsageError` for options that are unknown or contradict each other."""
    if request.variant not in ("fp", "quant"):
        raise UsageError(f"--variant {request.variant}: is unknown; there are fp and quant")
    if request.variant == "fp":
        _check_float(request)
    if request.inputs_file is not None and (request.prompt is not None or request.images):
        raise UsageError("--inputs: takes the place of --prompt and --image; give one or the other")
    if request.prompt == "":
        raise UsageError("--prompt: is empty; give some text")
    if request.seed is not None and not 0 <= request.seed <= _LARGEST_SEED:
        raise UsageError(f"--seed {request.seed}: is out of range; give 0 to {_LARGEST_SEED}")
    if request.generate is not None and request.generate < 1:
        raise UsageError(f"--generate {request.generate}: is no token; give 1 or more")
    if isinstance(origin, FunctionName) and (request.from_config or request.num_layers is not None):
        option = "--from-config" if request.from_config else "--num-layers"
        raise UsageError(f"{option}: a function makes its model itself; leave the option out")
    _check_placement(request)


def check_hub_options(request: ModelRequest, origin: Origin) -> None:
    """Raise `UsageError` for what says how to fetch a model that is not fetched.

    A local directory may name code on the hub, which the cache is for.
    """
    if isinstance(origin, Checkpoint) and not origin.local:
        return
    options = {"--revision": request.revision}
    if not isinstance(origin, Checkpoint):
        options["--cache-dir"] = request.cache_dir
    for option, value in options.items():
        if value is not None:
            raise UsageError(
                f"{option} {value}: {origin.name} does not come from the hub; leave the option out"
            )


def _check_float(request: ModelRequest) -> None:
    asked = {
        "--quantizer": request.quantizer is not None,
        "--calibration": request.calibration is not None,
        "--no-quantize": request.no_quantize,
        "--keep-float": bool(request.keep_float),
    }
    for option, given in asked.items():
        if given:
            raise UsageError(f"{option}: the variant fp is not quantized; add --variant quant")


def _check_placement(request: ModelRequest) -> None:
    if request.device is not None and request.device_map is not None:
        raise UsageError("--device-map: takes the place of --device; give one or the other")
    if request.attention_maps and request.attn not in (None, "eager"):
        raise UsageError(
            f"--attention-maps: {request.attn} attention computes no maps; use --attn eager"
        )
    placement.check_attention(request.attn)
    placement.parse_dtype(request.dtype)
    placement.parse_device(request.device)
    placement.parse_device_map(request.device_map)
