"""Ready inputs from a `.safetensors` or `.json` file."""

import json
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


def read_inputs(file: str, model: nn.Module) -> Sample:
    """The keyword arguments in `file`, checked against the forward of `model`.

    In JSON, a list is a tensor (integers int64, others float32) and anything else is itself.
    Raises `UsageError`, naming the first name that is unknown or missing.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--inputs {file}: there is no such file; check the path")
    if path.suffix == ".safetensors":
        kwargs = _read_safetensors(path)
    elif path.suffix == ".json":
        kwargs = _read_json(path)
    else:
        raise UsageError(
            f"--inputs {file}: is neither .safetensors nor .json; "
            "convert it (the inputs of an archive come with --like)"
        )
    _check_names(file, kwargs, model)
    return Sample((), kwargs, {"kind": "file", "file": relative(file)})


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"--inputs {path}: is no whole safetensors file ({error}); write it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"--inputs {path}: is no JSON ({error}); correct it") from error
    if not isinstance(values, dict):
        raise UsageError(f'--inputs {path}: is no object; write {{"input_ids": [[1, 2, 3]]}}')
    return {name: _from_json(value, f"--inputs {path}: {name}") for name, value in values.items()}


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


def _check_names(file: str, kwargs: dict[str, Any], model: nn.Module) -> None:
    accepted = accepted_names(model)
    if not kwargs:
        raise UsageError(f"--inputs {file}: is empty; it must hold what the model is called with")
    for name in kwargs:
        if accepted is not None and name not in accepted:
            raise UsageError(
                f"--inputs {file}: {name} is unknown to {type(model).__name__}; "
                f"it takes {', '.join(_nearest(name, accepted) or parameters(model))}"
            )
    missing = missing_names(model, (), set(kwargs))
    if missing:
        raise UsageError(
            f"--inputs {file}: {', '.join(missing)} missing, which {type(model).__name__} needs; "
            "add it"
        )
