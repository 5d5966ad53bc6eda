"""Flags of commands that record and of commands that compare."""

from dataclasses import dataclass, field
from typing import Annotated

import typer

from qvtrace.cli.group import SHOW_TRACEBACK
from qvtrace.cli.options import ELEMENTS, MODULES, OUTPUT, PATTERN, flag, option
from qvtrace.errors import UsageError


@dataclass(frozen=True)
class ModulePatterns:
    """Which modules, by their names."""

    include: Annotated[
        list[str],
        option(MODULES, "Only modules whose name is or fits this; repeatable.", metavar=PATTERN),
    ] = field(default_factory=list)
    exclude: Annotated[
        list[str],
        option(MODULES, "No modules that are or fit this; repeatable.", metavar=PATTERN),
    ] = field(default_factory=list)


@dataclass(frozen=True)
class ElementFlags:
    """Of which modules the elements are shown too, and how many of each tensor."""

    values: Annotated[
        list[str],
        option(
            ELEMENTS,
            "With elements of modules that are or fit this (diff: of the difference); repeatable.",
            metavar=PATTERN,
        ),
    ] = field(default_factory=list)
    all_values: Annotated[
        bool, flag(ELEMENTS, "All of them, however many a tensor has.", "--all-values")
    ] = False

    def limit(self, otherwise: int) -> int | None:
        """How many elements of one tensor are shown; None: all. Raises `UsageError` where no
        module is named of which any are."""
        if self.all_values and not self.values:
            raise UsageError("--all-values: shows all of what --values shows; add --values PATTERN")
        return None if self.all_values else otherwise


def _remember_traceback(context: typer.Context, wanted: bool) -> bool:
    context.meta[SHOW_TRACEBACK] = wanted
    return wanted


Force = Annotated[bool, flag(OUTPUT, "Overwrite a file that is there.", "--force")]
Traceback = Annotated[
    bool,
    flag(
        OUTPUT,
        "Show where a model raised, not only what.",
        "--traceback",
        callback=_remember_traceback,
    ),
]
