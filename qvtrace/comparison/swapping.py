"""Whether two sides stand in the wrong order: every error is relative to the reference."""

from qvtrace.manifest import Manifest
from qvtrace.trees import Json

_FLOAT_NAMES = (None, "fp")  # a variant of another name may be anything


def look_swapped(reference: Manifest, candidate: Manifest) -> bool:
    """Whether the reference is quantized and the candidate is not, by what both say of themselves
    and by the quantization parameters that were found in their modules."""
    if _has_parameters(candidate):
        return False
    return variants_look_swapped(
        vars(reference.variant), vars(candidate.variant), has_parameters=_has_parameters(reference)
    )


def variants_look_swapped(
    reference: Json, candidate: Json, *, has_parameters: bool = False
) -> bool:
    """The same by the variants alone; `has_parameters`: quantization parameters are known to be in
    the reference."""
    is_float = candidate.get("name") in _FLOAT_NAMES or bool(reference.get("quantized"))
    is_quantized = has_parameters or _is_quantized(reference)
    return is_quantized and is_float and not _is_quantized(candidate)


def _is_quantized(variant: Json) -> bool:
    """Whether it says so."""
    named = variant.get("name") == "quant"
    return named or bool(variant.get("quantizer") or variant.get("quantized"))


def _has_parameters(manifest: Manifest) -> bool:
    return any(entry.quantization is not None for entry in manifest.modules)
