"""Arrays as a plain safetensors file, which any reader opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvtrace.archive.layout import DTYPES, LENGTH, encode_json
from qvtrace.metrics.elements import Array
from qvtrace.trees import Json

_NAMES = {dtype.numpy: name for name, dtype in DTYPES.items() if dtype.bits >= 8}


def write_tensors(file: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays under their names. What safetensors cannot hold is written in a wider form:
    complex128 with its two parts as a last dimension, elements of half a byte as float32."""
    stored = {name: _storable(array) for name, array in arrays.items()}
    header: dict[str, Json] = {}
    position = 0
    for name, array in stored.items():
        header[name] = {
            "dtype": DTYPES[_NAMES[array.dtype]].code,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = encode_json(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that elements are aligned
    with file.open("wb") as out:
        out.write(LENGTH.pack(len(text)))
        out.write(text)
        for array in stored.values():
            out.write(array.tobytes())


def _storable(array: Array) -> np.ndarray[Any, Any]:
    if array.dtype == np.complex128:
        return np.stack([array.real, array.imag], axis=-1)
    return array if array.dtype in _NAMES else array.astype(np.float32)
