"""A user's own quantizer: a function that takes a model and returns one."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.functions import FunctionName, call, check_call
from qvtrace.models.quantizers.changes import observed
from qvtrace.models.quantizers.outcome import Context, Quantized


class FunctionQuantizer:
    """A function named on the command line.

    One with a parameter `calibrate` is given a function that runs a model on the calibration
    inputs; one with a parameter `keep_float` the names of the modules that are to stay float.
    """

    schemes = ()
    calibrated = None
    wraps = False
    package = None

    def __init__(self, function: FunctionName) -> None:
        self.name = function.name
        self._function = function

    @property
    def keeps_float(self) -> bool:
        """Raises `UsageError` and `ModelError` where there is no such function."""
        return takes_keep_float(self._function.load("--quantizer", reuse=True))

    def check(self) -> None:
        """Raise `UsageError` and `ModelError` where there is no such function of a model."""
        function = self._function.load("--quantizer", reuse=True)
        check_call(function, f"--quantizer {self.name}", None, **dict.fromkeys(_offered(function)))

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Call the function; raises `ModelError` when it raises or returns no model."""
        label = f"--quantizer {self.name}"
        function = self._function.load("--quantizer", reuse=True)
        return observed(
            model, lambda: call_function(function, label, model, context), label, context
        )


def call_function(
    function: Callable[..., Any], label: str, model: nn.Module, context: Context
) -> object:
    """What a function makes of a model; raises `ModelError` naming it when it raises, or when the
    model does while it calibrates."""
    try:
        return call(function, label, model, **_wanted(function, context))
    except ModelError as error:
        raise named(label, error) from error.__cause__


def named(label: str, error: ModelError) -> ModelError:
    """The error with the quantizer that it comes from."""
    text = str(error)
    return error if text.startswith(label) else ModelError(f"{label}: {text}")


def takes_keep_float(function: Callable[..., Any]) -> bool:
    """Whether a function has the parameter that says which modules stay float."""
    return "keep_float" in _parameters(function)


def _wanted(function: Callable[..., Any], context: Context) -> dict[str, Any]:
    offers = {"calibrate": context.calibrate, "keep_float": sorted(context.keep_float)}
    return {name: offers[name] for name in _offered(function)}


def _offered(function: Callable[..., Any]) -> list[str]:
    """The parameters that are given beside the model where a function has them."""
    parameters = _parameters(function)
    return [name for name in ("calibrate", "keep_float") if name in parameters]


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
