"""Which modules a quantizer is to leave float: patterns, also from a file, and what they fit."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qvtrace.errors import UsageError
from qvtrace.patterns import match
from qvtrace.recording.module_tree import walk_modules

KEPT = "kept float"  # the reason that is told of them
_OPTION = "--keep-float-file"


def read_keep_float(file: str) -> tuple[str, ...]:
    """The patterns in a file: one a line, a JSON list, or what `qvtrace suggest` wrote as JSON.

    Raises `UsageError` for a file that cannot be read or names nothing.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{_OPTION} {file}: cannot be read: {error}; give a text file") from error
    patterns = _from_json(file, text) if text.lstrip()[:1] in ("{", "[") else _from_lines(text)
    if not patterns:
        raise UsageError(f"{_OPTION} {file}: names no module; give one a line")
    return tuple(patterns)


def _from_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def _from_json(file: str, text: str) -> list[str]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{_OPTION} {file}: is no JSON ({error}); give a list of module names"
        ) from error
    names = value.get("keep_float") if isinstance(value, dict) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(
            f"{_OPTION} {file}: holds no list of module names; give one, or what "
            "`qvtrace suggest --format json` wrote"
        )
    return [name for name in names if name]


def names_kept(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """The modules that are or fit a pattern and all that is in them, by every name they have.

    Raises `UsageError` for a pattern that fits none.
    """
    walked = walk_modules(model)
    named = {name: each for each in walked for name in (each.name, *each.aliases)}
    kept: set[int] = set()
    for pattern in patterns:
        found = match(named, pattern)
        if not found:
            raise UsageError(
                f"--keep-float {pattern!r}: matches none of {len(walked)} modules of the model; "
                "list them with `qvtrace show ARCHIVE`"
            )
        kept.update(id(inner) for name in found for inner in named[name].module.modules())
    return frozenset(name for name, each in named.items() if id(each.module) in kept)
