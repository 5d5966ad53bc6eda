"""GGUF files: where one is meant, and which of its weights are quantized.

transformers reads them and dequantizes every weight; what they were is read here from the file.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qvtrace.errors import ModelError, UsageError
from qvtrace.models.chatter import one_line
from qvtrace.models.quantizers.outcome import Quantized
from qvtrace.models.quantizers.packages import Package
from qvtrace.qparams.modules import GGUF_TYPE
from qvtrace.trees import Json

SUFFIX = ".gguf"
PACKAGE = Package("gguf", "gguf", extra="gguf")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAGIC = b"GGUF"
_HEADER = 24  # bytes: magic, version, how many tensors and fields
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt")


def gguf_in(directory: Path) -> str | None:
    """The GGUF file of a directory that holds no other weights; None: it has none.

    Raises `UsageError` where there are several to choose from.
    """
    files = [file.name for file in sorted(directory.iterdir()) if file.is_file()]
    found = [name for name in files if name.endswith(SUFFIX)]
    if not found or any(name.endswith(_OTHER_WEIGHTS) for name in files):
        return None
    if len(found) > 1:
        raise UsageError(
            f"--model {directory}: holds several GGUF files ({', '.join(found)}); name one of them"
        )
    return found[0]


def check_package(label: str) -> None:
    """Raise `UsageError` where the package that reads the files is missing."""
    if not PACKAGE.installed:
        raise UsageError(f"--model {label}: is a GGUF file, which needs gguf; {PACKAGE.remedy}")


def check_file(file: Path, label: str) -> None:
    """Raise `ModelError` for a file that cannot be read, naming the cause."""
    _read(file, label)


def quantization_of(file: Path, label: str) -> Json | None:
    """How the tensors of a file are quantized; None where all of them are floats.

    Raises `ModelError` for a file that cannot be read.
    """
    types = Counter(_types(file, label).values())
    if _FLOATS.issuperset(types):
        return None
    return {"quant_method": "gguf", "types": dict(types.most_common()), "dequantized": True}


def as_quantized(model: nn.Module, file: Path, settings: Json, label: str) -> Quantized:
    """Which modules of `model` had a quantized weight in the file, and which a float one.

    The modules keep the type, for those who read how they are quantized.
    """
    types = _types(file, label)
    of_module = {name: types.get(tensor) for name, tensor in _tensor_names(model, file, label)}
    quantized = tuple(name for name, kind in of_module.items() if kind and kind not in _FLOATS)
    for name in quantized:
        setattr(model.get_submodule(name), GGUF_TYPE, of_module[name])
    left = tuple(name for name, kind in of_module.items() if kind in _FLOATS)
    left_float = {"float in the file": left} if left else {}
    return Quantized(model, settings, quantized, left_float, PACKAGE.versions)


def has_tokenizer(file: Path, label: str) -> bool:
    """Whether a file brings a tokenizer."""
    return _read(file, label).get_field("tokenizer.ggml.model") is not None


def _types(file: Path, label: str) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in _read(file, label).tensors}


def _read(file: Path, label: str) -> Any:
    try:
        status = file.stat()
        return _reader(file, status.st_mtime_ns, status.st_size)
    except Exception as error:
        raise ModelError(f"{label}: {_cause(file, error)}; get the file again") from error


@lru_cache(maxsize=1)
def _reader(file: Path, *stamp: int) -> Any:
    """Kept for the next question: a large vocabulary takes seconds."""
    from gguf import GGUFReader

    return GGUFReader(file)


def _cause(file: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read, {one_line(error)}"
    size = file.stat().st_size
    with file.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if not _MAGIC.startswith(magic):
        return "is no GGUF file"
    # The reader asks for what is not there, in its own words.
    asks = ("reshape", "larger dtype")
    if size < _HEADER or isinstance(error, IndexError) or any(word in str(error) for word in asks):
        return f"is cut short: it ends after {size} bytes, before what it says that it holds"
    return f"cannot be read as GGUF, {one_line(error)}"


def _tensor_names(model: nn.Module, file: Path, label: str) -> Iterator[tuple[str, str]]:
    """The modules whose weight is a matrix with a place in such files, and its name there."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    reader = _read(file, label)
    architecture = _value(reader, "general.architecture")
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return
    names = get_tensor_name_map(
        known[architecture], int(_value(reader, f"{architecture}.block_count") or 0)
    )
    for name, module in model.named_modules():
        tensor = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        weight = getattr(module, "weight", None)
        if tensor is not None and isinstance(weight, Tensor) and weight.dim() > 1:
            yield name, tensor


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
