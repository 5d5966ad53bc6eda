"""Rotations that are declared: orthogonal matrices in a safetensors file."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from qvtrace.archive.layout import DTYPES, NAME_OF_CODE
from qvtrace.comparison.rotating import Declared
from qvtrace.errors import UsageError
from qvtrace.metrics.elements import Array, Floats, format_of
from qvtrace.metrics.rotations import FEWEST_CHANNELS, Rotation, deviation

_OF_HEADS = ".R2"  # as SpinQuant calls them
_LARGEST = 4 << 30  # bytes
_ORTHOGONAL = 0.05  # what rounding to bfloat16 leaves is far less


def load_rotations(file: str | os.PathLike[str]) -> Declared:
    """The rotations in a file: each tensor is one, square, `candidate = reference @ rotation` or
    its inverse, and is for vectors of its size. One that is called `MODULE.R2` is that of the heads
    of values in an attention module, [channels, channels], or [heads, channels, channels] where
    each has its own.

    Raises `UsageError`, which names the file, for one that cannot be read or holds anything else.
    """
    path = Path(file)
    rotations: dict[int, Rotation] = {}
    heads: dict[str, Floats] = {}
    for name, matrix in _tensors(path).items():
        if name.endswith(_OF_HEADS):
            heads[name.removesuffix(_OF_HEADS)] = _of_heads(f"--transform {path}: {name}", matrix)
            continue
        _check(f"--transform {path}: {name}", matrix)
        if len(matrix) in rotations:
            raise UsageError(
                f"--transform {path}: holds several rotations of {len(matrix)} channels; keep that "
                "of the residual stream"
            )
        rotations[len(matrix)] = Rotation(matrix)
    if not rotations and not heads:
        raise UsageError(f"--transform {path}: holds no tensor; store the rotation in it")
    return Declared(tuple(rotations.values()), heads)


def require_modules(
    declared: Declared, file: str | os.PathLike[str], modules: Collection[str]
) -> None:
    """Raise `UsageError` for a rotation of the heads of a module that is not there."""
    for name in declared.heads:
        if name not in modules:
            raise UsageError(
                f"--transform {os.fspath(file)}: {name}{_OF_HEADS} is of no module of the "
                f"reference; name an attention module, as in MODULE{_OF_HEADS}"
            )


def _of_heads(what: str, matrices: Array) -> Floats:
    if matrices.ndim != 3:
        matrices = matrices[None]
    if not len(matrices):
        raise UsageError(f"{what} has no heads; give [channels, channels] or one for each head")
    for matrix in matrices:
        _check(what, matrix)
    return matrices


def _check(what: str, matrix: Array) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise UsageError(
            f"{what} has the shape {list(matrix.shape)}; a rotation is square: [channels, channels]"
        )
    if len(matrix) < FEWEST_CHANNELS:
        raise UsageError(
            f"{what} turns {len(matrix)} channels; give one of {FEWEST_CHANNELS} or more"
        )
    error = deviation(matrix)
    if error > _ORTHOGONAL:
        raise UsageError(
            f"{what} is no rotation: M^T M differs from 1 by {error:.2g}; give an orthogonal matrix"
        )


def _tensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError, deserialize

    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"--transform {path}: is larger than 4 GiB; store the rotation alone")
        stored = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
    except OSError as error:
        fault = error.strerror or str(error)
        raise UsageError(f"--transform {path}: cannot be read: {fault}; check the path") from error
    except SafetensorError as error:
        raise UsageError(
            f"--transform {path}: is no whole safetensors file ({error}); write it again"
        ) from error
    return {name: _matrix(f"--transform {path}: {name}", entry) for name, entry in stored.items()}


def _matrix(what: str, entry: dict[str, Any]) -> Array:
    dtype = DTYPES.get(NAME_OF_CODE.get(str(entry["dtype"]), ""))
    if dtype is None or format_of(dtype.numpy).kind != "float" or dtype.bits < 16:
        raise UsageError(f"{what} has the dtype {entry['dtype']}; store it as float32")
    elements = np.frombuffer(entry["data"], dtype.numpy)
    matrix: Array = elements.astype(np.float64).reshape(entry["shape"])
    return matrix
