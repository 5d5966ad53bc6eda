"""What a quantizer is given and what it says of its work."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.chatter import one_line
from qvtrace.trees import Json


@dataclass(frozen=True)
class Context:
    """What a quantizer may need beside the model."""

    run: Callable[[nn.Module], None]  # one forward of a model on the sample that is recorded
    calibrate: Callable[[nn.Module], None]  # a forward on each calibration input
    inputs: Sequence[Mapping[str, Any]] = ()  # the keyword inputs of all these forwards
    wrap_only: bool = False  # wrappers in, quantization off
    keep_float: frozenset[str] = frozenset()  # names of modules that are not to be quantized


@dataclass(frozen=True)
class Quantized:
    """The quantized model, and which of its modules changed."""

    model: nn.Module
    settings: Json = field(default_factory=dict)
    quantized: tuple[str, ...] = ()
    left_float: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> modules
    versions: dict[str, str] = field(default_factory=dict)
    otherwise: tuple[str, ...] = ()  # in words, what else differs that may change the outcome


def checked(outcome: Quantized, label: str) -> Quantized:
    """What another package's quantizer says of its work, as a manifest can hold it.

    Raises `ModelError` for anything else.
    """
    try:
        return replace(
            outcome,
            settings=dict(json.loads(json.dumps(dict(outcome.settings)))),
            quantized=_names(outcome.quantized),
            left_float={str(why): _names(names) for why, names in outcome.left_float.items()},
            versions={str(name): str(each) for name, each in outcome.versions.items()},
            otherwise=_names(outcome.otherwise),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{label}: says of its work what cannot be recorded, {one_line(error)}; "
            "see the fields of Quantized"
        ) from error


def _names(names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{names!r:.80} is no tuple of names")
    return tuple(names)


def cannot_quantize(label: str, error: Exception, remedy: str = "try another scheme") -> ModelError:
    """The error for a quantizer that raised."""
    return ModelError(f"{label}: cannot quantize this model, {one_line(error)}; {remedy}")
