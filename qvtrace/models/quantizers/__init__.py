"""Quantizers by name: what each takes and returns, and which there are.

A quantizer is a module here with a class of the form of `Quantizer`, and its place in QUANTIZERS.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from qvtrace.errors import UsageError
from qvtrace.models.functions import FunctionName
from qvtrace.models.quantizers.function import FunctionQuantizer
from qvtrace.models.quantizers.outcome import Context, Quantized, as_quantized
from qvtrace.models.quantizers.torchao import TorchaoQuantizer

__all__ = ["QUANTIZERS", "Chosen", "Context", "Quantized", "as_quantized", "choose"]


class Quantizer(Protocol):
    """Turns a float model into a quantized one."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Its ways to quantize, by name; empty when it has only one."""

    @property
    def default_scheme(self) -> str:
        """The scheme that its name alone stands for."""

    def installed(self) -> bool:
        """Whether the package that it needs is there."""

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


QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer for quantizer in (TorchaoQuantizer(),)
}
_DEFAULT = "torchao"


def choose(text: str | None) -> Chosen:
    """The quantizer that `NAME`, `NAME:SCHEME` or `FILE.py:FUNCTION` stands for.

    Raises `UsageError`, listing what there is, for any other text and for a missing package.
    """
    name, _, scheme = (text or _DEFAULT).partition(":")
    if name not in QUANTIZERS:
        function = FunctionName.parse(text or "")
        if function is None:
            raise UsageError(
                f"--quantizer {text}: is unknown; there are {', '.join(_known())}, "
                "or FILE.py:FUNCTION"
            )
        return Chosen(FunctionQuantizer(function), "")
    quantizer = QUANTIZERS[name]
    scheme = scheme or quantizer.default_scheme
    if scheme not in quantizer.schemes:
        raise UsageError(
            f"--quantizer {text}: {name} has no scheme {scheme}; "
            f"there are {', '.join(quantizer.schemes)}"
        )
    if not quantizer.installed():
        raise UsageError(f"--quantizer {text}: is not installed; pip install {name}")
    return Chosen(quantizer, scheme)


def _known() -> list[str]:
    return [f"{q.name}:{scheme}" for q in QUANTIZERS.values() for scheme in q.schemes]
