"""The options of commands: how one is declared, in which panel of `--help`, and how a command takes
a group of them as one argument."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import typer

from qvtrace.errors import UsageError

MODEL = "Model"
SAMPLE = "Sample"
STORED = "What is stored"
MODULES = "Which modules"
ROWS = "Which rows"
ELEMENTS = "Elements"
WATCHED = "What is seen while it runs"
GATES = "Gates"
OUTPUT = "Output"

PATTERN = "PATTERN"  # on module names, as `--help` calls it


def option(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """An option with its help, in a panel of `--help`; unless it has a callback of its own, it is
    refused with an empty value."""
    settings.setdefault("callback", _refuse_empty)
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


def _refuse_empty(parameter: typer.CallbackParam, value: Any) -> Any:
    """What a shell makes of a variable that is not set is never taken for a value. The empty
    pattern is the name of the root."""
    empty = value == "" or (isinstance(value, list) and "" in value)
    if empty and parameter.metavar != PATTERN:
        raise UsageError(f"{parameter.opts[0]}: is empty; give a value, or leave the option out")
    return value


def flag(panel: str, text: str, *names: str, **settings: Any) -> Any:
    """A switch, in a panel of `--help`."""
    return option(panel, text, *names, metavar="", **settings)


def file_option(panel: str, text: str, *names: str) -> Any:
    """A file to be written, as a `Path`."""
    return option(panel, text, *names, metavar="FILE", parser=str, callback=_to_file)


def _to_file(parameter: typer.CallbackParam, value: str | None) -> Path | None:
    if value is None:
        return None
    from qvtrace.archive.destinations import name_fault

    fault = name_fault(value)
    if fault is not None:
        raise UsageError(f"{parameter.opts[0]} {value}: {fault}")
    return Path(value)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each group that it takes as an argument, but for those that
    it has itself under the same name."""
    asked = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, type] = {
        one.name: one.annotation
        for one in asked
        if isinstance(one.annotation, type) and is_dataclass(one.annotation)
    }
    own = {one.name for one in asked} - groups.keys()
    parameters: list[inspect.Parameter] = []
    for parameter in asked:
        if parameter.name in groups:
            grouped = _parameters(parameter.annotation)
            parameters.extend(one for one in grouped if one.name not in own)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, group in groups.items():
            taken = [field.name for field in fields(group) if field.name not in own]
            values[name] = group(**{flag: values.pop(flag) for flag in taken})
        command(**values)

    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
