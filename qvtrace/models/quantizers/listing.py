"""Which quantizers there are, as a table of plain data."""

from collections.abc import Iterator
from dataclasses import dataclass

from qvtrace.errors import ModelError
from qvtrace.models.quantizers import QUANTIZERS, Quantizer
from qvtrace.models.quantizers.plugins import PluginQuantizer, all_plugins


@dataclass(frozen=True)
class ListedQuantizer:
    """One quantizer that `--quantizer` takes."""

    name: str
    schemes: tuple[str, ...]  # the default first; empty: there is only one way
    calibrated: tuple[str, ...] | None  # the schemes that need calibration; None: not known
    installed: bool
    version: str | None  # of its package
    remedy: str | None  # what to do when it cannot be used
    origin: str  # the package that brings it


def quantizers() -> tuple[ListedQuantizer, ...]:
    """All quantizers: qvtrace's own, then those of other packages."""
    own = (_own(quantizer) for quantizer in QUANTIZERS.values())
    return (*own, *_others())


def _own(quantizer: Quantizer) -> ListedQuantizer:
    package = quantizer.package
    assert package is not None
    return ListedQuantizer(
        name=quantizer.name,
        schemes=quantizer.schemes,
        calibrated=quantizer.calibrated,
        installed=package.installed,
        version=package.version,
        remedy=None if package.installed else package.remedy,
        origin="qvtrace",
    )


def _others() -> Iterator[ListedQuantizer]:
    taken = set(QUANTIZERS)
    for plugin in all_plugins():
        if plugin.name in taken:
            whose = "one of qvtrace's own" if plugin.name in QUANTIZERS else "another that is used"
            yield _unusable(plugin, f"its name is that of {whose}")
            continue
        taken.add(plugin.name)
        try:
            yield _usable(plugin)
        except ModelError as error:
            yield _unusable(plugin, str(error))


def _usable(plugin: PluginQuantizer) -> ListedQuantizer:
    return ListedQuantizer(
        plugin.name, plugin.schemes, plugin.calibrated, True, plugin.version, None, plugin.origin
    )


def _unusable(plugin: PluginQuantizer, reason: str) -> ListedQuantizer:
    return ListedQuantizer(plugin.name, (), None, False, plugin.version, reason, plugin.origin)
