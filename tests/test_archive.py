"""The file that a recording leaves: safetensors for everybody, and every element as it was."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import (
    Mlp,
    Returning,
    bytes_of,
    calls_of,
    quantized,
    recorded,
    seeded,
    tree_of,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import qvtrace
from qvtrace.archive import Archive, recover
from qvtrace.archive.layout import LENGTH, MANIFEST_KEY, reserve_for
from qvtrace.errors import ArchiveError, ExistingFileError
from qvtrace.recording.recorder import record
from qvtrace.trees import Container, Original, TensorLeaf, tensor_leaves

DATA = Path(__file__).parent / "data"


def leaf_of(archive: Archive, module: str = "") -> TensorLeaf:
    leaf = tree_of(archive, module)
    assert isinstance(leaf, TensorLeaf)
    return leaf


def data_of(file: Path) -> bytes:
    """Everything behind the header but for the manifest."""
    content = file.read_bytes()
    (length,) = LENGTH.unpack(content[: LENGTH.size])
    header = json.loads(content[LENGTH.size : LENGTH.size + length])
    begin = LENGTH.size + length
    return content[begin : begin + header[MANIFEST_KEY]["data_offsets"][0]]


def test_the_safetensors_library_reads_the_same_elements(file: Path) -> None:
    archive = recorded(seeded(Mlp), file, torch.randn(3, 4))

    tensors = load_file(file)
    keys = {entry.key: entry for entry in archive.manifest.tensors}
    assert tensors.keys() == {*keys, MANIFEST_KEY}
    for key, entry in keys.items():
        leaf = TensorLeaf(entry.dtype, entry.shape, entry.digest)
        assert bytes_of(tensors[key]) == archive.array(leaf).tobytes()
        assert tuple(tensors[key].shape) == entry.shape


def test_the_safetensors_library_reads_it_without_torch_too(file: Path) -> None:
    archive = recorded(seeded(Mlp), file, torch.randn(3, 4))

    with safe_open(file, "numpy") as tensors:
        metadata = tensors.metadata()
        manifest = tensors.get_tensor(MANIFEST_KEY).tobytes()
        output = tensors.get_tensor("down#0/output")
    assert metadata["qvtrace"] == "1"
    assert metadata["model"] == "Mlp"
    assert json.loads(manifest)["complete"] is True
    np.testing.assert_array_equal(output, archive.array(leaf_of(archive)))


def test_the_manifest_is_the_last_tensor(file: Path) -> None:
    recorded(seeded(Mlp), file, torch.randn(3, 4))

    content = file.read_bytes()
    with safe_open(file, "numpy") as tensors:
        assert content.endswith(tensors.get_tensor(MANIFEST_KEY).tobytes())


def test_a_key_is_the_first_place_of_its_contents(file: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Returning()

        def forward(self, hidden: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
            return {"a.b": self.inner((hidden + 1, mask))[0] + 1}

    archive = recorded(Model(), file, torch.ones(2), mask=torch.zeros(3))

    assert [entry.key for entry in archive.manifest.tensors] == [
        "#0/inputs.0",
        "#0/kwargs.mask",
        "inner#0/inputs.0.0",
        r"#0/output.a\.b",
    ]


def test_equal_contents_are_stored_once(file: Path) -> None:
    model = nn.Sequential(Returning(), Returning(), Returning())

    archive = recorded(model, file, torch.arange(1000.0))

    assert len(archive.manifest.tensors) == 1
    assert len(data_of(file)) == 4000


def test_equal_bytes_keep_the_dtype_and_shape_of_each_place(file: Path) -> None:
    bits = torch.arange(12, dtype=torch.int32)
    value = [bits, bits.view(torch.float32), bits.reshape(3, 4), bits.view(torch.uint8)]

    archive = recorded(Returning(), file, value)

    assert len(archive.manifest.tensors) == 1
    leaves = [leaf for _, leaf in tensor_leaves(tree_of(archive, ""), "output")]
    assert [(leaf.dtype, leaf.shape) for leaf in leaves] == [
        ("int32", (12,)),
        ("float32", (12,)),
        ("int32", (3, 4)),
        ("uint8", (48,)),
    ]
    for leaf, tensor in zip(leaves, value, strict=True):
        np.testing.assert_array_equal(archive.array(leaf), tensor.numpy())


def test_a_header_that_outgrows_its_reserve_moves_the_data(file: Path) -> None:
    value = [torch.full((3,), float(number)) for number in range(1000)]

    archive = recorded(Returning(), file, value)

    (length,) = LENGTH.unpack(file.read_bytes()[: LENGTH.size])
    assert length > reserve_for(1)
    leaves = [leaf for _, leaf in tensor_leaves(tree_of(archive, ""), "output")]
    assert [archive.array(leaf)[0] for leaf in leaves] == list(range(1000))
    assert not list(archive.damaged_tensors())
    assert len(load_file(file)) == 1001


def test_two_runs_give_the_same_data_and_the_same_manifest_but_for_times(tmp_path: Path) -> None:
    files = [tmp_path / "one.st", tmp_path / "two.st"]
    manifests = []
    for file in files:
        recorded(seeded(Mlp), file, torch.ones(3, 4))
        manifests.append(without_times(json.loads(Archive.open(file).manifest_bytes())))

    assert data_of(files[0]) == data_of(files[1])
    assert manifests[0] == manifests[1]


def without_times(manifest: dict[str, Any]) -> dict[str, Any]:
    del manifest["created"], manifest["environment"]
    for call in manifest["calls"]:
        assert call.pop("seconds") >= 0
    return manifest


def test_the_readable_copy_is_the_manifest_of_the_archive(file: Path) -> None:
    archive = recorded(seeded(Mlp), file, torch.randn(3, 4))

    assert (file.parent / "fp.manifest.json").read_bytes() == archive.manifest_bytes()


def test_the_readable_copy_is_strict_json(file: Path) -> None:
    recorded(Returning(), file, [float("nan"), float("inf"), "\ud800", 2**80])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    copy = (file.parent / "fp.manifest.json").read_bytes()
    assert json.loads(copy.decode("ascii"), parse_constant=refuse)["format"] == 1


def test_nothing_else_is_left_beside_a_whole_archive(file: Path) -> None:
    recorded(seeded(Mlp), file, torch.randn(3, 4))

    assert sorted(path.name for path in file.parent.iterdir()) == ["fp.manifest.json", "fp.st"]


def test_folders_are_made_for_an_archive(tmp_path: Path) -> None:
    recorded(seeded(Mlp), tmp_path / "a" / "b" / "fp.st", torch.randn(3, 4))

    assert (tmp_path / "a" / "b" / "fp.st").exists()


@pytest.mark.parametrize("there", ["fp.st", "fp.st.partial", "fp.manifest.json"])
def test_an_existing_file_is_refused_and_left_as_it_is(file: Path, there: str) -> None:
    existing = file.parent / there
    existing.write_text("precious")

    with pytest.raises(ExistingFileError, match=rf"{there}: .*--force"), record(Mlp(), file):
        pass

    assert existing.read_text() == "precious"
    assert [path.name for path in file.parent.iterdir()] == [there]


def test_an_existing_archive_is_overwritten_when_asked_for(file: Path) -> None:
    recorded(seeded(Mlp), file, torch.zeros(3, 4))

    with record(seeded(Mlp), file, overwrite=True) as recording:
        recording._model(torch.ones(3, 4))

    with Archive.open(file) as archive:
        assert archive.array(leaf_of_inputs(archive)).max() == 1


def leaf_of_inputs(archive: Archive) -> TensorLeaf:
    ((_, leaf),) = tensor_leaves(tree_of(archive, "", "inputs"), "inputs")
    return leaf


def test_an_overwritten_archive_stays_until_the_new_one_is_whole(file: Path) -> None:
    recorded(seeded(Mlp), file, torch.zeros(3, 4))
    before = file.read_bytes()

    with pytest.raises(RuntimeError, match="boom"), record(Mlp(), file, overwrite=True):
        raise RuntimeError("boom")

    assert file.read_bytes() == before
    assert (file.parent / "fp.st.partial").exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")

    with (
        pytest.raises(ArchiveError, match=r"fp\.st: cannot be written: .*folder is no folder"),
        record(Mlp(), tmp_path / "folder" / "fp.st"),
    ):
        pass


def test_a_second_recording_to_the_same_file_is_refused(file: Path) -> None:
    with (
        record(Mlp(), file),
        pytest.raises(ArchiveError, match=r"fp\.st\.partial: .*recording"),
        record(Mlp(), file, overwrite=True),
    ):
        pass

    assert Archive.open(file).manifest.complete


DTYPES = [
    "float64 float32 float16 bfloat16",
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu",
    "int64 int32 int16 int8",
    "uint64 uint32 uint16 uint8 bool complex64",
]


@pytest.mark.parametrize("name", " ".join(DTYPES).split())
def test_every_dtype_of_safetensors_is_stored_as_it_is(file: Path, name: str) -> None:
    dtype = getattr(torch, name)
    tensor = torch.arange(2 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    if dtype is torch.bool:
        tensor = torch.tensor([True, False])

    archive = recorded(Returning(), file, tensor)

    leaf = leaf_of(archive)
    assert (leaf.dtype, leaf.stored_dtype, leaf.original) == (name, None, None)
    array = archive.array(leaf)
    assert (array.dtype.name, array.shape, array.tobytes()) == (name, (2,), bytes_of(tensor))
    stored = load_file(file)["#0/inputs.0"]
    assert stored.dtype == dtype
    assert bytes_of(stored) == bytes_of(tensor)


def test_packed_float4_is_stored_as_it_is_and_read_element_by_element(file: Path) -> None:
    packed = torch.tensor([[0x21, 0x43], [0x0F, 0x80]], dtype=torch.uint8)
    tensor = packed.view(torch.float4_e2m1fn_x2)

    archive = recorded(Returning(), file, tensor)

    leaf = leaf_of(archive)
    assert (leaf.dtype, leaf.shape) == ("float4_e2m1fn_x2", (2, 2))
    assert (leaf.file_dtype, leaf.file_shape) == ("float4_e2m1fn", (2, 4))
    np.testing.assert_array_equal(
        archive.array(leaf).astype(np.float32), [[0.5, 1.0, 1.5, 2.0], [-6.0, 0.0, 0.0, -0.0]]
    )
    stored = load_file(file)["#0/inputs.0"]
    assert stored.dtype == torch.float4_e2m1fn_x2
    assert torch.equal(stored.view(torch.uint8), packed)


def test_complex128_is_stored_as_pairs_and_read_as_it_was(file: Path) -> None:
    tensor = torch.tensor([[1 + 2j], [3 - 4j]], dtype=torch.complex128)

    archive = recorded(Returning(), file, tensor)

    leaf = leaf_of(archive)
    assert (leaf.dtype, leaf.shape) == ("complex128", (2, 1))
    assert (leaf.stored_dtype, leaf.stored_shape) == ("float64", (2, 1, 2))
    np.testing.assert_array_equal(archive.array(leaf), tensor.numpy())


def test_conjugate_and_negative_views_are_stored_by_value(file: Path) -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])

    archive = recorded(Returning(), file, [tensor.conj(), tensor.conj().imag])

    conjugate, negative = (leaf for _, leaf in tensor_leaves(tree_of(archive, ""), "output"))
    np.testing.assert_array_equal(archive.array(conjugate), [1 - 2j, 3 + 4j])
    np.testing.assert_array_equal(archive.array(negative), [-2, 4])


def sparse_csr(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta, says torch
        return dense.to_sparse_csr()


@pytest.mark.parametrize("build", [Tensor.to_sparse, sparse_csr], ids=["coo", "csr"])
def test_a_sparse_tensor_is_stored_with_its_zeros(file: Path, build: Any) -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])

    archive = recorded(Returning(), file, build(dense))

    leaf = leaf_of(archive)
    assert leaf.original == Original(str(build(dense).layout).removeprefix("torch."))
    np.testing.assert_array_equal(archive.array(leaf), dense.numpy())


def test_a_quantized_tensor_is_stored_dequantized_with_its_scale_beside_it(file: Path) -> None:
    archive = recorded(Returning(), file, quantized(torch.tensor([0.0, 1.0, 2.2]), 0.5, 3))

    leaf = leaf_of(archive)
    np.testing.assert_array_equal(archive.array(leaf), np.arange(3, dtype=np.float32))
    assert leaf.original is not None
    assert leaf.original.class_name == "quint8"
    assert leaf.original.scale is not None
    assert leaf.original.zero_point is not None
    assert archive.array(leaf.original.scale) == 0.5
    assert archive.array(leaf.original.zero_point) == 3


def test_a_tensor_subclass_is_stored_dequantized_with_its_scale_beside_it(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports that are not ours
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    linear = nn.Linear(32, 16, bias=False)
    quantize_(linear, Int8WeightOnlyConfig(version=2))
    weight: Any = linear.weight

    archive = recorded(Returning(), file, weight)

    leaf = leaf_of(archive)
    np.testing.assert_array_equal(archive.array(leaf), weight.dequantize().detach().numpy())
    assert leaf.original is not None
    assert leaf.original.class_name == type(weight).__name__ != "Parameter"
    assert leaf.original.scale is not None
    scale = archive.array(leaf.original.scale)
    np.testing.assert_array_equal(scale, weight.scale.numpy())


VIEWS = {
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "strided": torch.arange(20.0)[3::4],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "a part": torch.arange(1000.0)[10:12],
    "0-d": torch.tensor(3.0),
    "one element, stride 2": torch.arange(2.0)[::2],
    "zero-size": torch.ones(0, 3),
    "zero-size, stride 2": torch.ones(0)[::2],
    "channels last": torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("tensor", VIEWS.values(), ids=VIEWS)
def test_a_view_is_stored_by_its_own_elements_only(file: Path, tensor: Tensor) -> None:
    archive = recorded(Returning(), file, tensor)

    leaf = leaf_of(archive)
    np.testing.assert_array_equal(archive.array(leaf), tensor.numpy(), strict=True)
    assert len(data_of(file)) == tensor.numel() * 4


@pytest.mark.parametrize(
    "name",
    [
        "a#b",
        "a/b",
        "m[0]",
        "__metadata__",
        "a b",
        "\\",
        "a\\#0",
        "é",
        "\ud800",
        "qvtrace",
        "(root)",
    ],
)
def test_any_name_of_a_module_can_be_recorded(file: Path, name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))

    archive = recorded(model, file, torch.ones(1, 2))

    (call,) = calls_of(archive, name)
    assert isinstance(call.tree("output"), TensorLeaf)
    assert len(load_file(file)) == len(archive.manifest.tensors) + 1


def test_names_that_could_be_taken_for_a_call_of_another_share_no_key(file: Path) -> None:
    class Model(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            for module in self.children():
                hidden = module(hidden)
            return hidden

    model = Model()
    model.add_module("a", nn.Linear(2, 2))
    model.add_module("a#0/output", nn.Linear(2, 2))

    archive = recorded(model, file, torch.ones(1, 2))

    keys = [entry.key for entry in archive.manifest.tensors]
    assert keys == ["#0/inputs.0", "a#0/output", r"a\#0/output#0/output"]


def test_what_a_file_gives_away_is_said_in_it(file: Path) -> None:
    archive = recorded(Returning(), file, torch.ones(2))

    assert set(archive.manifest.contains) == {"inputs", "elements"}


def test_no_environment_variable_and_no_token_reaches_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_that_nobody_may_see")
    recorded(seeded(Mlp), file, torch.randn(3, 4))

    assert b"hf_a_secret" not in file.read_bytes()
    assert os.environ["HOME"].encode() + b"/" not in file.read_bytes()


def test_arrays_are_read_only_views_of_the_file(file: Path) -> None:
    archive = recorded(Returning(), file, torch.ones(2))

    array = archive.array(leaf_of(archive))
    assert not array.flags.writeable
    assert not array.flags.owndata


def test_an_array_outlives_its_archive(file: Path) -> None:
    with recorded(Returning(), file, torch.ones(2)) as archive:
        array = archive.array(leaf_of(archive))

    assert array.sum() == 2


def test_qvtrace_load_opens_an_archive(file: Path) -> None:
    recorded(Returning(), file, torch.ones(2))

    with qvtrace.load(file) as archive:
        assert len(archive.manifest.calls) == 1


def test_an_archive_of_format_1_stays_readable() -> None:
    with Archive.open(DATA / "format_1.st") as archive:
        manifest = archive.manifest
        assert (manifest.format, manifest.complete, manifest.variant.name) == (1, True, "fp")
        assert [call.module for call in manifest.calls] == ["up", "up", "pick", ""]
        assert not list(archive.damaged_tensors())
        output = tree_of(archive, "")
        assert isinstance(output, Container)
        for path, leaf in tensor_leaves(output, "output"):
            assert archive.array(leaf).shape in {(2, 3), (), (1, 2)}, path
        assert [component for component, _ in output.items] == [
            "first",
            "second",
            r"a\.b",
            "[1]",
            "note",
        ]


@pytest.mark.parametrize(
    ("given", "gives_away"),
    [
        ({"prompt": "Describe the image."}, True),
        ({"batch": [{"text": ["Hi"]}]}, True),
        ({"return_dict": True, "text": ""}, False),
        ({"ids": [1, 2]}, False),
    ],
    ids=repr,
)
def test_text_that_the_model_is_given_is_among_what_the_file_gives_away(
    file: Path, given: Any, gives_away: bool
) -> None:
    class Reading(nn.Module):
        def forward(self, hidden: Tensor, **texts: Any) -> Tensor:
            return hidden

    archive = recorded(Reading(), file, torch.ones(1), **given)

    assert ("prompts" in archive.manifest.contains) == gives_away


def test_text_is_told_of_though_the_recording_was_killed(tmp_path: Path) -> None:
    model = Returning()
    with record(model, tmp_path / "running.st"):
        model("Describe the image.")
        partial = tmp_path / "fp.st.partial"
        for end in ("", ".journal"):
            shutil.copy(tmp_path / f"running.st.partial{end}", f"{partial}{end}")
    recover(partial)

    with Archive.open(partial) as archive:
        assert "prompts" in archive.manifest.contains
