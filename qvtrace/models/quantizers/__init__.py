"""Quantizers by name: what each takes and returns, and which there are.

A quantizer is a module here with a class of the form of `Quantizer`, and its place in QUANTIZERS;
or it comes with another package, see `plugins`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from torch import nn

from qvtrace.errors import UsageError
from qvtrace.models.functions import FunctionName
from qvtrace.models.quantizers.bitsandbytes import BitsandbytesQuantizer
from qvtrace.models.quantizers.checkpoint import as_quantized
from qvtrace.models.quantizers.compressed_tensors import CompressedTensorsQuantizer
from qvtrace.models.quantizers.function import FunctionQuantizer
from qvtrace.models.quantizers.outcome import Context, Quantized
from qvtrace.models.quantizers.packages import Package
from qvtrace.models.quantizers.plugins import PluginQuantizer, all_plugins, plugins
from qvtrace.models.quantizers.quanto import QuantoQuantizer
from qvtrace.models.quantizers.tico import TicoQuantizer
from qvtrace.models.quantizers.torchao import TorchaoQuantizer

__all__ = [
    "QUANTIZERS",
    "Chosen",
    "Context",
    "Quantized",
    "Quantizer",
    "as_quantized",
    "choose",
    "not_chosen",
]


class Quantizer(Protocol):
    """Turns a float model into a quantized one."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Its ways to quantize, by name, the default first; empty when it has only one."""

    @property
    def calibrated(self) -> tuple[str, ...] | None:
        """The schemes that need calibration; None: only quantizing shows it."""

    @property
    def wraps(self) -> bool:
        """Whether it puts wrappers around modules, which can be left without quantization."""

    @property
    def keeps_float(self) -> bool:
        """Whether it leaves the modules float that `Context.keep_float` names."""

    @property
    def package(self) -> Package | None:
        """The package that it needs; None: it is there if the quantizer is."""

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Quantize `model`, in place or not; raises `ModelError` when it cannot."""


@dataclass(frozen=True)
class Chosen:
    """A quantizer and one of its schemes."""

    quantizer: Quantizer
    scheme: str

    @property
    def label(self) -> str:
        """As it stands in the manifest: `torchao:int8-dynamic`, or the function."""
        name = self.quantizer.name
        return f"{name}:{self.scheme}" if self.scheme else name

    def check(
        self, *, calibration: str | None, wrap_only: bool, keep_float: Sequence[str] = ()
    ) -> None:
        """Raise `UsageError` for options that mean nothing to this quantizer."""
        calibrated = self.quantizer.calibrated
        if calibration is not None and calibrated is not None and self.scheme not in calibrated:
            raise UsageError(
                f"--calibration {calibration}: {self.label} needs none; leave the option out"
            )
        if wrap_only and not self.quantizer.wraps:
            raise UsageError(
                f"--no-quantize: {self.label} puts no wrappers around modules; "
                "leave the option out, and compare with --variant fp"
            )
        if keep_float and not self.quantizer.keeps_float:
            raise UsageError(
                f"--keep-float {keep_float[0]!r}: {self.label} does not say that it can; "
                "give its function a parameter `keep_float`, or its class `keeps_float = True`"
            )
        if isinstance(self.quantizer, FunctionQuantizer):
            self.quantizer.check()


QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (
        TorchaoQuantizer(),
        BitsandbytesQuantizer(),
        CompressedTensorsQuantizer(),
        QuantoQuantizer(),
        TicoQuantizer(),
    )
}
_DEFAULT = "torchao"


def choose(text: str | None) -> Chosen:
    """The quantizer that `NAME`, `NAME:SCHEME` or `FILE.py:FUNCTION` stands for.

    Raises `UsageError`, listing what there is, for any other text and for a missing package.
    """
    text = _DEFAULT if text is None else text
    name, colon, scheme = text.partition(":")
    quantizer = QUANTIZERS.get(name) or plugins().get(name)
    if quantizer is None:
        return Chosen(FunctionQuantizer(_function(text)), "")
    schemes = quantizer.schemes
    if colon and not scheme:
        raise UsageError(
            f"--quantizer {text}: names no scheme after the colon; {_there(name, schemes)}"
        )
    if (colon or schemes) and (scheme or next(iter(schemes), "")) not in schemes:
        raise UsageError(
            f"--quantizer {text}: {name} has no scheme {scheme}; {_there(name, schemes)}"
        )
    if quantizer.package is not None and not quantizer.package.installed:
        raise UsageError(f"--quantizer {text}: is not installed; {quantizer.package.remedy}")
    return Chosen(quantizer, scheme or next(iter(schemes), ""))


def _there(name: str, schemes: Sequence[str]) -> str:
    return f"there are {', '.join(schemes)}" if schemes else f"it has none, write {name}"


def not_chosen(chosen: Chosen) -> Iterator[str]:
    """Says of each quantizer of another package that its name stands for this one."""
    for plugin in all_plugins():
        if plugin.name == chosen.quantizer.name and not _is(plugin, chosen.quantizer):
            whose = "qvtrace's own" if plugin.name in QUANTIZERS else "another package's"
            name = f"the quantizer {plugin.name} of {plugin.origin}"
            yield f"{name} is not used: {whose} has its name"


def _is(plugin: PluginQuantizer, quantizer: Quantizer) -> bool:
    return isinstance(quantizer, PluginQuantizer) and quantizer.origin == plugin.origin


def _function(text: str) -> FunctionName:
    function = FunctionName.parse(text)
    if function is None or not (function.is_file or _may_be_imported(function.place)):
        raise UsageError(
            f"--quantizer {text}: is unknown; there are {', '.join(_known())}, or FILE.py:FUNCTION"
        )
    return function


def _may_be_imported(place: str) -> bool:
    """Whether there may be such a module: a name without a dot may be a quantizer's, mistyped."""
    beside = Path(place)
    return "." in place or beside.is_dir() or beside.with_suffix(".py").is_file() or _found(place)


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _known() -> Iterator[str]:
    for quantizer in QUANTIZERS.values():
        yield from (f"{quantizer.name}:{scheme}" for scheme in quantizer.schemes)
    yield from plugins().keys() - QUANTIZERS.keys()
