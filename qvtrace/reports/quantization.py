"""How a variant was quantized, in words: on what it was calibrated, and whether it is switched off.

The settings of a variant come from a file, which may say anything.
"""

from collections.abc import Mapping
from typing import Any

from qvtrace.reports.formatting import counted

_DIGEST_SHOWN = 8
_TEST_INPUT = "calibrated on the test input"


def calibration_text(variant: Mapping[str, Any]) -> str | None:
    """`calibrated on the test input`, or the file with its digest; None: not calibrated."""
    calibration = _settings(variant).get("calibration")
    if not isinstance(calibration, dict):
        return None
    if calibration.get("source") != "file":
        return _TEST_INPUT
    samples, digest = calibration.get("samples"), str(calibration.get("digest"))
    number = f"{counted(samples, 'sample')}, " if isinstance(samples, int) else ""
    file = f"{calibration.get('file')} ({number}digest {digest[:_DIGEST_SHOWN]})"
    if calibration.get("of_the_test_input"):
        return f"{_TEST_INPUT}, which is in {file}"
    return f"calibrated on {file}"


def is_switched_off(variant: Mapping[str, Any]) -> bool:
    """Whether only the quantizer's wrappers were in."""
    return _settings(variant).get("no_quantize") is True


def types_text(variant: Mapping[str, Any]) -> str | None:
    """`Q8_0 (14), F32 (7)`: of the tensors of the file that the weights came from."""
    types = _settings(variant).get("types")
    if not isinstance(types, dict) or not types:
        return None
    return ", ".join(f"{name} ({count})" for name, count in types.items())


def kept_text(variant: Mapping[str, Any]) -> str | None:
    """`2 kept float`; None: none was to be."""
    settings = _settings(variant)
    patterns, left_float = settings.get("keep_float"), settings.get("left_float")
    if not isinstance(patterns, list) or not patterns:
        return None
    counted = left_float.get("kept float") if isinstance(left_float, dict) else None
    return f"{counted if isinstance(counted, int) else len(patterns)} kept float"


def otherwise_texts(settings: Mapping[str, Any]) -> list[str]:
    """What a quantizer did beside changing modules."""
    told = settings.get("otherwise")
    return list(map(str, told)) if isinstance(told, list) else []


def _settings(variant: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = variant.get("settings")
    return settings if isinstance(settings, dict) else {}
