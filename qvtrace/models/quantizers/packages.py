"""Packages that quantizers rest on: whether they are there, and how to get them."""

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from qvtrace.extras import install


@dataclass(frozen=True)
class Package:
    """One package, by its names."""

    module: str  # as it is imported
    distribution: str  # as the package registry has it
    extra: str | None = None  # of qvtrace, that brings it

    @property
    def installed(self) -> bool:
        """Whether it can be found, without importing it."""
        try:
            return find_spec(self.module) is not None
        except (ImportError, ValueError):  # of a parent that is missing, or of a broken finder
            return False

    @property
    def version(self) -> str | None:
        """The installed version; None where it says none."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    @property
    def versions(self) -> dict[str, str]:
        """The installed version by the distribution's name, as a manifest's environment has it."""
        return {} if self.version is None else {self.distribution: self.version}

    @property
    def remedy(self) -> str:
        """What to type when it is missing."""
        return f"pip install {self.distribution}" if self.extra is None else install(self.extra)
