"""Ready inputs from a `.safetensors`, `.json` or `.jsonl` file."""

import json
import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtrace.errors import UsageError
from qvtrace.models.origins import relative
from qvtrace.models.request import Sample
from qvtrace.models.signatures import accepted_names, missing_names, parameters


def read_inputs(file: str, model: nn.Module, option: str = "--inputs") -> Sample:
    """The keyword arguments in `file`, checked against the forward of `model`.

    In JSON, a list is a tensor (integers int64, others float32) and anything else is itself.
    Raises `UsageError`, naming `option` and the first name that is unknown or missing.
    """
    return as_sample(_read(file, option), file, option, model)


def read_samples(file: str, model: nn.Module, option: str) -> tuple[Sample, ...]:
    """As `read_inputs`, but a JSON file may hold a list of objects: several samples."""
    values = _read(file, option)
    several = values if isinstance(values, list) else [values]
    if not several:
        raise UsageError(f"{option} {file}: is empty; it must hold what the model is called with")
    return tuple(as_sample(value, file, option, model) for value in several)


def read_lines(file: str, option: str = "--inputs") -> list[Any]:
    """The samples in a `.jsonl` file, or in a `.json` file that holds a list: what each is.

    Raises `UsageError`, naming the first line that is no JSON object.
    """
    path = _existing(file, option)
    if path.suffix == ".json":
        items = [(f"sample {number}", item) for number, item in enumerate(_read_json(path, option))]
    else:
        lines = enumerate(_text(path, option).splitlines(), start=1)
        items = [
            (f"line {number}", _line(line, number, path, option))
            for number, line in lines
            if line.strip()
        ]
    if not items:
        raise UsageError(f"{option} {file}: is empty; write one JSON object a line")
    for place, item in items:
        if not isinstance(item, dict):
            raise UsageError(
                f'{option} {file}: {place} is no object; write {{"prompt": "..."}} or '
                '{"input_ids": [[1, 2, 3]]}'
            )
    return [item for _, item in items]


def holds_several(file: str) -> bool:
    """Whether a file of inputs holds samples one after the other."""
    path = Path(file)
    if path.suffix == ".json" and path.is_file():
        return isinstance(_read_json(path, "--inputs"), list)
    return path.suffix == ".jsonl"


def as_sample(values: Any, file: str, option: str, model: nn.Module) -> Sample:
    """What one sample of a file says, checked as `read_inputs` does."""
    if not isinstance(values, dict):
        raise UsageError(f'{option} {file}: is no object; write {{"input_ids": [[1, 2, 3]]}}')
    label = f"{option} {file}"
    kwargs = {name: _from_json(value, f"{label}: {name}") for name, value in values.items()}
    _check_names(label, kwargs, model)
    return Sample((), kwargs, {"kind": "file", "file": relative(file)})


def _read(file: str, option: str) -> Any:
    path = _existing(file, option)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, option)
    if path.suffix == ".json":
        return _read_json(path, option)
    raise UsageError(
        f"{option} {file}: is neither .safetensors nor .json nor .jsonl; "
        "convert it (the inputs of an archive come with --like)"
    )


def _existing(file: str, option: str) -> Path:
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{option} {file}: is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {file}: is a device or a pipe; name a file")
    if not path.is_file():
        raise UsageError(f"{option} {file}: there is no such file; check the path")
    return path


def _line(line: str, number: int, path: Path, option: str) -> Any:
    try:
        return _strict(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{option} {path}: line {number} is no JSON ({error}); correct it"
        ) from error


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        fault = error.strerror or error
        raise UsageError(f"{option} {path}: cannot be read ({fault}); check it") from error
    except ValueError as error:
        raise UsageError(f"{option} {path}: is no UTF-8 text ({error}); correct it") from error


def _read_safetensors(path: Path, option: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{option} {path}: is no whole safetensors file ({error}); write it again"
        ) from error


def _read_json(path: Path, option: str) -> Any:
    text = _text(path, option)
    try:
        return _strict(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} {path}: is no JSON ({error}); correct it") from error


def _strict(text: str) -> Any:
    """Strict JSON; raises `ValueError` also for what the parser would take for something else:
    NaN, a number beyond all floats, a second value of one name."""
    return json.loads(
        text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_without_doubles
    )


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number there")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} is there twice")
    return values


def _from_json(value: Any, label: str) -> Any:
    if not isinstance(value, list):
        return value
    try:
        tensor = torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise UsageError(
            f"{label} is no array of numbers ({error}); give all its rows the same length"
        ) from error
    return tensor.float() if tensor.is_floating_point() else tensor


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    return get_close_matches(name, names, n=3, cutoff=0.7)


def _check_names(label: str, kwargs: dict[str, Any], model: nn.Module) -> None:
    accepted = accepted_names(model)
    if not kwargs:
        raise UsageError(f"{label}: is empty; it must hold what the model is called with")
    for name in kwargs:
        if accepted is not None and name not in accepted:
            raise UsageError(
                f"{label}: {name} is unknown to {type(model).__name__}; "
                f"it takes {', '.join(_nearest(name, accepted) or parameters(model))}"
            )
    missing = missing_names(model, (), set(kwargs))
    if missing:
        raise UsageError(
            f"{label}: {', '.join(missing)} missing, which {type(model).__name__} needs; add it"
        )
