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

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from qvtrace.errors import ModelError, QvtraceError
from qvtrace.models.chatter import one_line
from qvtrace.models.quantizers.changes import observed
from qvtrace.models.quantizers.function import call_function, named, takes_keep_float
from qvtrace.models.quantizers.outcome import Context, Quantized

GROUP = "qvtrace.quantizers"


def plugins() -> dict[str, "PluginQuantizer"]:
    """The quantizers of all installed packages; of two with one name, the first that is found."""
    found: dict[str, PluginQuantizer] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, PluginQuantizer(point))
    return found


class PluginQuantizer:
    """A quantizer behind an entry point, which is imported when something of it is asked for."""

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
        """Raises `ModelError` when it cannot be imported."""
        return tuple(getattr(self._loaded, "schemes", ()))

    @property
    def calibrated(self) -> tuple[str, ...] | None:
        """Raises `ModelError` when it cannot be imported."""
        calibrated = getattr(self._loaded, "calibrated", None)
        return None if calibrated is None else tuple(calibrated)

    @property
    def wraps(self) -> bool:
        """Raises `ModelError` when it cannot be imported."""
        return bool(getattr(self._loaded, "wraps", False))

    @property
    def keeps_float(self) -> bool:
        """Raises `ModelError` when it cannot be imported."""
        if hasattr(self._loaded, "apply"):
            return bool(getattr(self._loaded, "keeps_float", False))
        return takes_keep_float(self._loaded)

    def apply(self, model: nn.Module, scheme: str, context: Context) -> Quantized:
        """Let it quantize; raises `ModelError` when it raises or returns no model."""
        label = f"--quantizer {self.name}"
        loaded = self._loaded

        def quantize() -> object:
            if not hasattr(loaded, "apply"):
                return call_function(loaded, label, model, context)
            try:
                return loaded.apply(model, scheme, context)
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
    def _loaded(self) -> Any:
        try:
            loaded = self._entry_point.load()
            loaded = loaded() if isinstance(loaded, type) else loaded
        except Exception as error:
            raise ModelError(
                f"--quantizer {self.name}: {self.origin} cannot be used, {one_line(error)}; "
                "mend or uninstall it"
            ) from error
        if not callable(loaded) and not hasattr(loaded, "apply"):
            raise ModelError(
                f"--quantizer {self.name}: {self.origin} names a {type(loaded).__name__}; "
                "it must name a function, or a class with `apply`"
            )
        return loaded
