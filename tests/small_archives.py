"""Archives written without a model, and ways to damage them. Nothing here needs torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qvtrace.archive import Archive, ArchiveWriter, Tensor
from qvtrace.archive.layout import LENGTH, MANIFEST_KEY, METADATA_KEY
from qvtrace.digests import digest_bytes
from qvtrace.manifest import (
    InputsInfo,
    Manifest,
    ModelInfo,
    ModuleEntry,
    RootCall,
    Skipped,
    VariantInfo,
)
from qvtrace.trees import (
    Container,
    Json,
    Node,
    OpaqueLeaf,
    Original,
    TensorLeaf,
    ValueLeaf,
    tensor_leaves,
    to_json,
)

Edit = Callable[[Any], object]


def manifest() -> Manifest:
    """What a recording says of itself, of a model with one layer."""
    return Manifest(
        qvtrace="0.1.0",
        created="2026-11-24T00:00:00+00:00",
        complete=True,
        error=None,
        recorded_by="library",
        model=ModelInfo(class_name="Model", dtype="float32", seed=42),
        variant=VariantInfo(name="fp"),
        inputs=InputsInfo(source={"kind": "crafted"}),
        contains=("inputs", "elements"),
        environment={"torch": "2.13.0"},
        settings={"include": []},
        modules=(
            ModuleEntry("", "Model", None, calls=1),
            ModuleEntry("layer", "Linear", "", ("alias",), calls=2),
        ),
        calls=(),
        tensors=(),
        skipped=Skipped(2, 2, 2, {"never called": ("a", "b")}, {"Iterator": 1}, ("a warning",)),
    )


class SmallTrace:
    """Writes a trace of three calls, with a leaf of every kind."""

    def __init__(self, file: Path, *, overwrite: bool = False) -> None:
        self.writer = ArchiveWriter(file, manifest(), overwrite=overwrite)

    def tensor(self, key: str, array: np.ndarray[Any, Any]) -> TensorLeaf:
        described = Tensor(key, array.dtype.name, array.shape)
        digest = self.writer.add_tensor(array.reshape(-1).view(np.uint8).data, described)
        return TensorLeaf(array.dtype.name, array.shape, digest)

    def call(self, module: str, index: int, inputs: Node, output: Node | None) -> None:
        """Write one call; one without output does not return."""
        number = self.writer.begin_call(
            {
                "module": module,
                "index": index,
                "sample": 0,
                "step": 0,
                "parent": ["", 0] if module else None,
                "parameters": ["hidden", None],
                "inputs": to_json(inputs),
                "kwargs": to_json(Container("dict", "dict", ())),
            }
        )
        if output is not None:
            end = {"output": to_json(output), "seconds": 0.5, "error": None}
            self.writer.end_call(number, end)

    def fill(self) -> None:
        """The calls of the trace."""
        hidden = self.tensor("#0/inputs.0", np.arange(6, dtype=np.float32).reshape(2, 3))
        inputs = to_json(Container("tuple", "tuple", (("0", hidden),)))
        self.writer.add_root_call(
            RootCall("", 0, inputs, to_json(Container("dict", "dict", ())), "1" * 32)
        )
        first = self.tensor("layer#0/output", np.arange(4, dtype=np.int64))
        self.call("layer", 0, hidden, first)
        second = self.tensor("layer#1/output", np.array([1, np.nan], np.float16))
        self.call("layer", 1, first, second)
        self.call("", 0, hidden, self.everything(second))

    def everything(self, hidden: TensorLeaf) -> Node:
        """A tree with a node of every kind."""
        scale = self.tensor("#0/output.quantized.scale", np.array([0.25]))
        pairs = self.tensor("#0/output.complex", np.array([[1.0, 2.0], [3.0, 4.0]]))
        parts: dict[str, Node] = {
            "quantized": TensorLeaf("float16", (2,), hidden.digest, original=Original("Q", scale)),
            "complex": TensorLeaf("complex128", (2,), pairs.digest, "float64", (2, 2)),
            "number": ValueLeaf(float("inf"), "float"),
            "text": ValueLeaf.of("ok"),
            "object": OpaqueLeaf("Iterator", "not looked at"),
            "cache": Container("cache", "DynamicCache", (), 7),
        }
        return Container("dict", "dict", tuple(parts.items()))


def write_small(file: Path) -> Path:
    """A whole archive; returns its name."""
    trace = SmallTrace(file, overwrite=True)
    trace.fill()
    trace.writer.close(manifest())
    return file


def split(file: Path) -> tuple[Json, bytes]:
    """The header of a safetensors file, and its data."""
    content = file.read_bytes()
    (length,) = LENGTH.unpack(content[: LENGTH.size])
    end = LENGTH.size + length
    return json.loads(content[LENGTH.size : end]), content[end:]


def join(file: Path, header: Json | bytes, data: bytes) -> Path:
    """A safetensors file of these parts."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(LENGTH.pack(len(text)) + text + data)
    return file


def edit_header(file: Path, edit: Edit) -> Path:
    """Change the header of a file."""
    header, data = split(file)
    edit(header)
    return join(file, header, data)


def edit_manifest(file: Path, edit: Edit) -> Path:
    """Change the manifest of an archive, as a forger would: its digest fits."""
    header, data = split(file)
    described = json.loads(data[slice(*header[MANIFEST_KEY]["data_offsets"])])
    edit(described)
    return replace_manifest(file, json.dumps(described).encode())


def replace_manifest(file: Path, text: bytes) -> Path:
    """Put another manifest into an archive; its digest fits."""
    header, data = split(file)
    begin = header[MANIFEST_KEY]["data_offsets"][0]
    header[MANIFEST_KEY].update(shape=[len(text)], data_offsets=[begin, begin + len(text)])
    header[METADATA_KEY]["manifest_digest"] = digest_bytes(text)
    return join(file, header, data[:begin] + text)


def read_everything(file: Path) -> int:
    """Read every tree and every array of an archive; returns how many arrays there were."""
    with Archive.open(file) as archive:
        root_calls = archive.manifest.inputs.root_calls
        nodes = [node for call in root_calls for node in call.input_trees()]
        nodes += [
            node
            for call in archive.manifest.calls
            for part in ("inputs", "kwargs", "output")
            if (node := call.tree(part)) is not None
        ]
        arrays = [archive.array(leaf) for node in nodes for _, leaf in tensor_leaves(node, "")]
        assert all(array.tobytes() is not None for array in arrays)
        list(archive.damaged_tensors())
        return len(arrays)
