"""What a project asks of every comparison: `[tool.qvtrace]` of its pyproject.toml, or a file."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvtrace.errors import UsageError
from qvtrace.judging.gates import Gate
from qvtrace.judging.regression import RegressionLimit

PYPROJECT = "pyproject.toml"
_KEYS = ("fail-on", "max-regression")


@dataclass(frozen=True)
class Configuration:
    """The keys of the file; an option of the command line replaces the key of its name."""

    fail_on: tuple[Gate, ...] = ()
    max_regression: tuple[RegressionLimit, ...] = ()
    file: Path | None = None  # that has it


def load_configuration(file: Path | None = None) -> Configuration:
    """From `file`, else from the nearest pyproject.toml, here or above, that has the table.

    Raises `UsageError`, which names the file, for one that cannot be read, for an unknown key, for
    a gate that is none, and for a `file` that asks for nothing.
    """
    if file is None:
        return _nearest()
    document = _parsed(file)
    table = _tool_table(document)
    if table is None and (file.name == PYPROJECT or "tool" in document):
        raise UsageError(f"{file}: has no table [tool.qvtrace]; add one, or name another file")
    found = _configuration(file, document if table is None else table)
    if not found.fail_on and not found.max_regression:
        example = 'fail-on = ["peir>0.05"]'
        raise UsageError(f"{file}: asks for nothing; write {example}, or leave --config out")
    return found


def _nearest() -> Configuration:
    for file in configuration_files():
        table = _tool_table(_parsed(file))
        if table is not None:
            return _configuration(file, table)
    return Configuration()


def configuration_files() -> Iterator[Path]:
    """Where the table is looked for unless a file is named, the nearest first."""
    here = Path.cwd()
    files = (folder / PYPROJECT for folder in (here, *here.parents))
    for file in filter(Path.is_file, files):
        yield Path(PYPROJECT) if file.parent == here else file


def _parsed(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        fault = error.strerror or str(error)
        raise UsageError(f"{file}: cannot be read: {fault}; name a TOML file") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or no TOML
        raise UsageError(f"{file}: is no valid TOML: {error}; correct it") from error


def _tool_table(document: dict[str, Any]) -> object:
    """None where there is none."""
    tool = document.get("tool")
    return tool.get("qvtrace") if isinstance(tool, dict) else None


def _configuration(file: Path, table: object) -> Configuration:
    if not isinstance(table, dict):
        raise UsageError(f"{file}: 'qvtrace' is no table; write [tool.qvtrace]")
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        named = ", ".join(map(repr, unknown))
        raise UsageError(f"{file}: {named}: not known; the keys are {', '.join(_KEYS)}")
    gates = (Gate.parse(text, f"{file}: fail-on") for text in _texts(file, table, "fail-on"))
    limits = (
        RegressionLimit.parse(text, f"{file}: max-regression")
        for text in _texts(file, table, "max-regression")
    )
    return Configuration(tuple(gates), tuple(limits), file)


def _texts(file: Path, table: dict[str, Any], key: str) -> Sequence[str]:
    value = table.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f'{file}: {key!r} is no list of texts; write {key} = ["..."]')
    return texts
