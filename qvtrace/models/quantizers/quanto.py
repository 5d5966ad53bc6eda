"""optimum-quanto: Linear modules replaced by its own, with int8, int4 or float8 weights."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.quantizers.linears import Linears, find_linears, replace_module
from qvtrace.models.quantizers.outcome import Context, Quantized, cannot_quantize
from qvtrace.models.quantizers.packages import Package
from qvtrace.trees import Json


@dataclass(frozen=True)
class _Scheme:
    weights: str  # names of quanto's types
    activations: str | None = None

    def settings(self) -> Json:
        """What the manifest says of it."""
        return {"weights": self.weights, "activations": self.activations}


_COMPILING_SECONDS = 180  # half a minute is usual
_ABOUT_COMPILING = ("extension", "ninja", "compiler", "g++")
_SCHEMES = {
    "int8": _Scheme("qint8"),
    "int4": _Scheme("qint4"),
    "float8": _Scheme("qfloat8"),
    "w8a8": _Scheme("qint8", "qint8"),
}


class QuantoQuantizer:
    """Weights frozen in place of the float ones; activations on ranges seen while calibrating."""

    name = "quanto"
    schemes = tuple(_SCHEMES)
    calibrated = tuple(name for name, scheme in _SCHEMES.items() if scheme.activations)
    wraps = False
    keeps_float = True
    package = Package("optimum.quanto", "optimum-quanto", extra="quanto")

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Replace modules of `model`, and calibrate it where activations are quantized.

        Raises `ModelError` for weights that are not in memory, for a model that cannot be
        calibrated, and when quanto raises.
        """
        chosen, label = _SCHEMES[scheme], f"{self.name}:{scheme}"
        linears = find_linears(model, context, label, swapped=True)
        try:
            _quantize(model, linears, chosen, context)
        except ModelError:
            raise
        except Exception as error:
            raise cannot_quantize(label, error) from error
        if chosen.weights == "qint4":
            _compile(model, context, label)
        return Quantized(
            model,
            chosen.settings(),
            tuple(linears.targets),
            linears.left_float,
            self.package.versions,
        )


def _quantize(model: nn.Module, linears: Linears, chosen: _Scheme, context: Context) -> None:
    from optimum import quanto

    weights = getattr(quanto, chosen.weights)
    activations = getattr(quanto, chosen.activations) if chosen.activations else None
    for name, linear in linears.targets.items():
        quantized: Any = quanto.QLinear.from_module(linear, weights, activations)
        quantized.name = name
        replace_module(model, linear, quantized)
    if activations is not None:
        with torch.no_grad(), quanto.Calibration():
            context.calibrate(model)
    quanto.freeze(model)


def _compile(model: nn.Module, context: Context, label: str) -> None:
    """Run the model once: quanto compiles what unpacks 4-bit weights when it first needs it, which
    should not happen while recording."""
    with _compiler_on_path(), _waiting_in_reason():
        try:
            context.run(model)
        except ModelError as error:
            cause = error.__cause__
            if isinstance(cause, TimeoutError):
                raise ModelError(f"{label}: {cause}; delete it if none is at work") from error
            if not isinstance(cause, Exception) or not any(
                word in str(cause).lower() for word in _ABOUT_COMPILING
            ):
                raise
            remedy = "4-bit weights need g++ and ninja the first time"
            raise cannot_quantize(label, cause, remedy) from error


@contextmanager
def _waiting_in_reason() -> Iterator[None]:
    """Who is to compile waits until nobody else does, which a killed process does forever: give up
    where that takes longer than compiling can."""
    from torch.utils import file_baton

    waiter: Any = file_baton.FileBaton

    def wait(baton: Any) -> None:
        lock = Path(baton.lock_file_path)
        while lock.exists():
            with suppress(FileNotFoundError):
                seconds = time.time() - lock.stat().st_mtime
                if seconds > _COMPILING_SECONDS:
                    raise TimeoutError(
                        f"would wait for another process that compiles what 4-bit weights need, "
                        f"since {lock} is there, {seconds:.0f} s old"
                    )
            time.sleep(baton.wait_seconds)

    before = waiter.wait
    waiter.wait = wait
    try:
        yield
    finally:
        waiter.wait = before


@contextmanager
def _compiler_on_path() -> Iterator[None]:
    """Find a `ninja` that was installed beside this Python, whose folder may not be on the path."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
