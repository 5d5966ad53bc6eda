"""The bytes of an archive: a safetensors header in reserved space, then contents, then the
manifest.

8 bytes   length of the header, unsigned little-endian
header    JSON, padded with spaces up to the reserved length
data      each distinct content once, in the order in which it came; `qvtrace.manifest` last
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qvtrace.trees import Json

LENGTH = struct.Struct("<Q")
MAX_HEADER_BYTES = 100_000_000  # what the safetensors library reads at most
MANIFEST_KEY = "qvtrace.manifest"
METADATA_KEY = "__metadata__"
RECORDING = "recording"  # the state that the header of an unfinished file names

# JSON values that a reader takes in. A call takes about 65: a quarter of a million fit.
MAX_MANIFEST_NODES = 16_000_000
MAX_MANIFEST_BYTES = 1 << 30
MAX_HEADER_NODES = 6_000_000

_RESERVE = 16 << 10
_RESERVE_PER_MODULE = 1 << 10


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Dtype:
    """How one dtype stands in a safetensors header, and what numpy calls it."""

    code: str
    numpy: np.dtype
    bits: int


def _dtype(code: str, scalar: type, bits: int | None = None) -> Dtype:
    numpy = np.dtype(scalar)
    return Dtype(code, numpy, bits or 8 * numpy.itemsize)


# By torch's name. Two float4 elements share a byte, in the file as in torch.
DTYPES = {
    "float64": _dtype("F64", np.float64),
    "float32": _dtype("F32", np.float32),
    "float16": _dtype("F16", np.float16),
    "bfloat16": _dtype("BF16", ml_dtypes.bfloat16),
    "float8_e4m3fn": _dtype("F8_E4M3", ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": _dtype("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": _dtype("F8_E5M2", ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": _dtype("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": _dtype("F8_E8M0", ml_dtypes.float8_e8m0fnu),
    "float4_e2m1fn": _dtype("F4", ml_dtypes.float4_e2m1fn, 4),
    "int64": _dtype("I64", np.int64),
    "int32": _dtype("I32", np.int32),
    "int16": _dtype("I16", np.int16),
    "int8": _dtype("I8", np.int8),
    "uint64": _dtype("U64", np.uint64),
    "uint32": _dtype("U32", np.uint32),
    "uint16": _dtype("U16", np.uint16),
    "uint8": _dtype("U8", np.uint8),
    "bool": _dtype("BOOL", np.bool_),
    "complex64": _dtype("C64", np.complex64),
}
NAME_OF_CODE = {dtype.code: name for name, dtype in DTYPES.items()}


def reserve_for(modules: int) -> int:
    """Bytes to set aside for the header before anything is known but how many modules there are."""
    return _RESERVE + _RESERVE_PER_MODULE * modules


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The bytes that a tensor of this dtype and shape takes in the file."""
    return (math.prod(shape) * DTYPES[dtype].bits + 7) // 8


def journal_of(file: Path) -> Path:
    """The journal beside the `.partial` file."""
    return file.with_name(file.name + ".journal")


def partial_of(file: Path) -> Path:
    """The name that an archive has while it is written."""
    return file.with_name(file.name + ".partial")


def manifest_copy_of(file: Path) -> Path:
    """The readable copy of the manifest beside an archive."""
    stem = file.stem if file.suffix in (".st", ".safetensors") else file.name
    return file.with_name(stem + ".manifest.json")


def count_nodes(text: bytes) -> int:
    """At least as many as there are values in this JSON."""
    return text.count(b"{") + text.count(b"[") + text.count(b",")


def encode_json(value: object) -> str:
    """Strict JSON on one line, in ASCII: what is written is never refused by a reader."""
    return _ENCODER.encode(value)


def tensor_header_entry(key: str, dtype: str, shape: tuple[int, ...], begin: int) -> str:
    """One tensor as it stands in the safetensors header."""
    described: Json = {
        "dtype": DTYPES[dtype].code,
        "shape": list(shape),
        "data_offsets": [begin, begin + nbytes(dtype, shape)],
    }
    return f"{encode_json(key)}:{encode_json(described)}"


def placeholder_header(reserve: int, metadata: dict[str, str]) -> bytes:
    """The header of a file that is still being recorded, with its length."""
    text = encode_json({METADATA_KEY: {**metadata, "state": RECORDING}}).encode()
    return LENGTH.pack(reserve) + text.ljust(reserve)
