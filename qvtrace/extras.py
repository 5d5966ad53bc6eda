"""What to install where an optional package is missing.

The packages themselves are named: qvtrace may have been installed from a checkout, which no
`qvtrace[EXTRA]` would find again.
"""

import shlex
from collections.abc import Iterator
from importlib import metadata


def install(extra: str) -> str:
    """The command that installs what an extra of qvtrace brings."""
    return shlex.join(["pip", "install", *_requirements(extra)])


def _requirements(extra: str) -> Iterator[str]:
    for line in metadata.requires("qvtrace") or ():
        requirement, _, marker = line.partition(";")
        if marker.strip() == f"extra == '{extra}'":
            yield requirement.strip()
