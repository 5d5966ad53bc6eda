"""Quantizers that other packages bring, by the entry point `qvtrace.quantizers`.

The entry point names a function that takes a model and returns it quantized (as on the command
line), or a class or object with

    apply(model, scheme, context)   the quantized model, or a `Quantized` that says more
    schemes                         names; the first is the default (none: there is only one way)
    calibrated                      those of them that need calibration (None: any may)
    wraps                           whether it heeds `context.wrap_only`
    keeps_float                     whether it heeds `context.keep_float`

of which only `apply` is needed.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from qvtrace.errors import ModelError, QvtraceError
from qvtrace.models.chatter import one_line, silent
from qvtrace.models.quantizers.changes import observed
from qvtrace.models.quantizers.function import call_function, named, takes_keep_float
from qvtrace.models.quantizers.outcome import Context, Quantized

GROUP = "qvtrace.quantizers"


def plugins() -> dict[str, "PluginQuantizer"]:
    """The quantizers of all installed packages; of two with one name, the first that is found."""
    found: dict[str, PluginQuantizer] = {}
    for plugin in all_plugins():
        found.setdefault(plugin.name, plugin)
    return found


def all_plugins() -> list["PluginQuantizer"]:
    """Those that no name stands for included."""
    return [PluginQuantizer(point) for point in entry_points(group=GROUP)]


class _MistakenError(Exception):
    """A quantizer that says of itself what cannot be."""


@dataclass(frozen=True)
class _Declared:
    """What a quantizer says of itself, looked through."""

    quantizer: Any  # a function, or an object with `apply`
    schemes: tuple[str, ...] = ()
    calibrated: tuple[str, ...] | None = None
    wraps: bool = False
    keeps_float: bool = False

    @classmethod
    def of(cls, loaded: Any) -> "_Declared":
        """Raises `_MistakenError` for what is neither, and for attributes of the wrong kind."""
        quantizer = loaded() if isinstance(loaded, type) else loaded
        if not hasattr(quantizer, "apply"):
            if not callable(quantizer):
                raise _MistakenError(
                    f"it names a {type(quantizer).__name__}, "
                    "which is no function and no class with `apply`"
                )
            return cls(quantizer, keeps_float=takes_keep_float(quantizer))
        if not callable(quantizer.apply):
            raise _MistakenError(f"its `apply` is a {type(quantizer.apply).__name__}, no method")
        schemes = _names("schemes", getattr(quantizer, "schemes", ()))  # in order: a default first
        calibrated = getattr(quantizer, "calibrated", None)
        if calibrated is not None:
            unordered = isinstance(calibrated, set | frozenset)
            calibrated = _names("calibrated", sorted(calibrated) if unordered else calibrated)
            for name in calibrated:
                if name not in schemes:
                    raise _MistakenError(
                        f"its `calibrated` has {name!r}, which is none of its schemes"
                    )
        flags = (_flag(name, getattr(quantizer, name, False)) for name in ("wraps", "keeps_float"))
        return cls(quantizer, schemes, calibrated, *flags)


def _names(attribute: str, value: Any) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(isinstance(name, str) and name for name in names):
        raise _MistakenError(f"its `{attribute}` is {value!r:.80}, no tuple of names")
    return names


def _flag(attribute: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _MistakenError(f"its `{attribute}` is {value!r:.80}, neither True nor False")
    return value


class PluginQuantizer:
    """A quantizer behind an entry point, which is imported when something of it is asked for.

    All that it says of itself raises `ModelError` where it cannot be imported, or says what cannot
    be.
    """

    package = None

    def __init__(self, entry_point: EntryPoint) -> None:
        self.name = entry_point.name
        self._entry_point = entry_point

    @property
    def origin(self) -> str:
        """The distribution that brings it."""
        distribution = self._entry_point.dist
        return self._entry_point.value if distribution is None else distribution.name

    @property
    def version(self) -> str | None:
        """Of that distribution."""
        distribution = self._entry_point.dist
        return None if distribution is None else distribution.version

    @property
    def schemes(self) -> tuple[str, ...]:
        """Its ways to quantize."""
        return self._declared.schemes

    @property
    def calibrated(self) -> tuple[str, ...] | None:
        """Those of them that need calibration."""
        return self._declared.calibrated

    @property
    def wraps(self) -> bool:
        """Whether it puts wrappers around modules."""
        return self._declared.wraps

    @property
    def keeps_float(self) -> bool:
        """Whether it leaves modules float on demand."""
        return self._declared.keeps_float

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Let it quantize; raises `ModelError` when it raises or returns no model."""
        label = f"--quantizer {self.name}"
        quantizer = self._declared.quantizer

        def quantize() -> object:
            if not hasattr(quantizer, "apply"):
                return call_function(quantizer, label, model, context)
            try:
                return quantizer.apply(model, scheme, context)
            except ModelError as error:
                raise named(label, error) from error.__cause__
            except QvtraceError:
                raise
            except (Exception, SystemExit) as error:
                raise ModelError(
                    f"{label}: raised {one_line(error)}; --traceback shows where"
                ) from error

        versions = {} if self.version is None else {self.origin: self.version}
        return observed(model, quantize, label, context, versions)

    @cached_property
    def _declared(self) -> _Declared:
        try:
            with silent():
                return _Declared.of(self._entry_point.load())
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"--quantizer {self.name}: {self.origin} cannot be used, {_said(error)}; "
                "mend or uninstall it"
            ) from error


def _said(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"its import ends the program with {error.code!r:.80}"
    return str(error) if isinstance(error, _MistakenError) else one_line(error)
