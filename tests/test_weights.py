"""Weights: recorded once each as the model computes with them, and compared apart from
activations."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_layers import (
    INPUT,
    PackedWeights,
    layer,
    with_bitsandbytes,
    with_compressed_tensors,
    with_quanto,
    with_tico,
    with_torch_dynamic,
    with_torchao,
)
from recordings import Wrapper
from small_archives import edit_manifest
from torch import Tensor, nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.archive import Archive, recover
from qvtrace.cli import app
from qvtrace.comparison.rows import Row
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import WeightEntry
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording
from qvtrace.trees import OpaqueLeaf, TensorLeaf


def record(model: nn.Module, file: Path, **options: Any) -> Archive:
    with qvtrace.record(model, file, overwrite=True, weights=True, **options), torch.no_grad():
        model(INPUT)
    return Archive.open(file)


def entries(archive: Archive) -> dict[str, WeightEntry]:
    """The weights by their full names."""
    assert archive.manifest.weights is not None
    return {f"{entry.module}.{entry.name}": entry for entry in archive.manifest.weights}


def values(archive: Archive, name: str) -> Tensor:
    node = entries(archive)[name].node()
    assert isinstance(node, TensorLeaf)
    return torch.from_numpy(archive.array(node).astype(np.float32))


def rows(reference: Path, candidate: Path, **options: Any) -> dict[str, Row]:
    """The compared weights by module and path."""
    comparison = qvtrace.diff(reference, candidate, path="weights", **options)
    return {f"{row.module} {row.path}": row for row in comparison.rows}


def sqnr(reference: Tensor, candidate: Tensor) -> Tensor:
    """Of each vector along the last dimension, in dB."""
    noise = (reference - candidate).double().square().sum(-1)
    return 10 * torch.log10(reference.double().square().sum(-1) / noise)


@pytest.fixture(name="fp", scope="module")
def float_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of the float layer."""
    file = tmp_path_factory.mktemp("weights") / "fp.st"
    record(nn.Sequential(layer()), file).close()
    return file


def test_weights_are_recorded_as_they_are(file: Path) -> None:
    model = nn.Sequential(layer())

    with record(model, file) as archive:
        assert torch.equal(values(archive, "0.weight"), model[0].weight)
        assert torch.equal(values(archive, "0.bias"), model[0].bias)
        assert "weights" in archive.manifest.contains
        assert "0/weights.weight" in {entry.key for entry in archive.manifest.tensors}
        assert list(archive.damaged_tensors()) == []


def test_nothing_is_said_of_weights_unless_they_are_asked_for(file: Path) -> None:
    with qvtrace.record(nn.Sequential(layer()), file):
        pass

    with Archive.open(file) as archive:
        assert archive.manifest.weights is None
        assert b'"weights":[' not in archive.manifest_bytes()


def test_a_tied_weight_is_stored_once_with_all_its_names(file: Path) -> None:
    model = nn.Sequential(layer(), nn.Linear(32, 64), layer(), nn.Linear(32, 64))
    model[2].weight = model[0].weight

    with record(nn.Sequential(model, model), file) as archive:
        weight = entries(archive)["0.0.weight"]

    assert weight.aliases == ("1.0.weight", "0.2.weight")
    assert len(entries(archive)) == 7


class Tied(nn.Module):
    """A head whose weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.head(self.embed(hidden[..., 0].abs().long()))
        return result


@pytest.fixture(name="tied")
def tied_pair(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model, files = Tied(), (tmp_path / "tied.st", tmp_path / "rounded.st")
    record(model, files[0]).close()
    with torch.no_grad():
        model.embed.weight.copy_((model.embed.weight * 16).round() / 16)
    record(model, files[1]).close()
    return files


def test_a_tied_weight_is_found_by_the_name_of_any_module_that_has_it(tied):
    assert [*rows(*tied)] == ["embed weights.weight"]
    assert [*rows(*tied, include=["head"])] == ["head weights.weight"]
    assert [*rows(*tied, exclude=["head"])] == ["embed weights.weight"]
    assert [*rows(*tied, include=["head", "embed"])] == ["embed weights.weight"]


def test_a_head_with_a_tied_weight_is_extracted_with_it(tied, tmp_path):
    folder = tmp_path / "head"
    result = CliRunner().invoke(app, ["extract", *map(str, tied), "head", "-o", str(folder)])

    assert result.exit_code == 0, result.stderr
    assert (folder / "reference_weights.safetensors").exists()
    script = [sys.executable, str(next(folder.glob("*.py")))]
    told = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert "equals the reference" in told


def test_where_only_the_reference_has_a_weight_tied_each_place_has_its_own(tied, tmp_path):
    apart, file = Tied(), tmp_path / "apart.st"
    with Archive.open(tied[0]) as archive, torch.no_grad():
        apart.embed.weight.copy_(values(archive, "embed.weight"))
    apart.head.weight = nn.Parameter(apart.embed.weight.detach() * 2)
    record(apart, file).close()

    found = rows(tied[0], file)
    assert {name: row.status for name, row in found.items()} == {
        "embed weights.weight": "identical",
        "head weights.weight": "ok",
    }
    assert [row.status for row in rows(tied[0], file, include=["head"]).values()] == ["ok"]


def test_weights_that_torchao_quantized_are_dequantized(file: Path) -> None:
    model = with_torchao(nn.Sequential(layer()), "IntxWeightOnlyConfig")

    with record(model, file) as archive:
        assert torch.equal(values(archive, "0.weight"), model[0].weight.dequantize())
        assert entries(archive)["0.weight"].class_name == "IntxUnpackedToInt8Tensor"


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_DYNAMIC"])
def test_weights_of_compressed_tensors_are_those_of_the_first_forward(
    scheme: str, file: Path, tmp_path: Path
) -> None:
    """Packed before it, and rounded in each call while they are not compressed."""
    with record(with_compressed_tensors(scheme, compress=False), file) as archive:
        rounded = values(archive, "0.weight")
    model = with_compressed_tensors(scheme)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with qvtrace.record(model, tmp_path / "packed.st", weights=True):
        assert {name: tensor.shape for name, tensor in model.named_parameters()} == {
            name: tensor.shape for name, tensor in before.items()
        }

    with Archive.open(tmp_path / "packed.st") as archive:
        assert torch.allclose(values(archive, "0.weight"), rounded, rtol=1e-6, atol=0)
    assert 0 < (rounded - layer().weight).abs().max() < 0.02


@pytest.mark.parametrize(
    ("kind", "least"), [("int8", 40), ("nf4", 17), ("fp4", 15), ("nested-fp4", 15)]
)
def test_weights_of_bitsandbytes_are_dequantized(kind: str, least: float, file: Path) -> None:
    model = with_bitsandbytes(kind)

    with qvtrace.record(model, file, weights=True):
        pass

    with Archive.open(file) as archive:
        found = values(archive, "0.weight")
    assert sqnr(layer().weight.detach(), found).median() > least


def test_weights_that_bitsandbytes_has_repacked_are_the_same(file: Path, tmp_path: Path) -> None:
    model = with_bitsandbytes("nf4")
    with record(model, file) as archive:
        before = values(archive, "0.weight")

    with record(model, tmp_path / "again.st") as archive:
        again = values(archive, "0.weight")

    assert torch.allclose(before, again, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("freeze", [True, False])
def test_weights_of_quanto_are_rounded_whether_frozen_or_not(freeze: bool, file: Path) -> None:
    model: Any = with_quanto(weights="qint8", freeze=freeze)

    with record(model, file) as archive:
        assert torch.equal(values(archive, "0.weight"), model[0].qweight.dequantize())


def test_weights_in_wrappers_of_tico_are_rounded_as_in_a_call(fp: Path, file: Path) -> None:
    model: Any = with_tico()
    expected = model.wrapped.obs_weight.fake_quant(model.wrapped.module.weight)

    with record(model, file) as archive:
        assert torch.equal(values(archive, "wrapped.weight"), expected)
        assert set(entries(archive)) == {"wrapped.weight", "wrapped.bias"}


@pytest.mark.parametrize("enabled", [True, False])
def test_weights_in_training_are_rounded_without_a_call_of_what_rounds_them(
    enabled: bool, file: Path
) -> None:
    from torch.ao.quantization import FakeQuantize

    model: Any = nn.Sequential(layer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = FakeQuantize(quant_min=-8, quant_max=7, dtype=torch.qint8)
        rounded = fake(model[0].weight).detach()
    fake.fake_quant_enabled.fill_(int(enabled))
    model[0].weight_fake_quant = fake

    with record(model, file) as archive:
        found = values(archive, "0.weight")

    assert torch.equal(found, rounded if enabled else model[0].weight)
    assert not torch.equal(rounded, model[0].weight)


def test_packed_weights_of_torch_are_asked_for(file: Path) -> None:
    model: Any = with_torch_dynamic()

    with record(model, file) as archive:
        assert torch.equal(values(archive, "0.weight"), model[0].weight().dequantize())
        assert torch.equal(values(archive, "0.bias"), model[0].bias())


def test_integers_beside_a_scale_are_multiplied(file: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(8, dtype=torch.int8).reshape(2, 4), False)
            self.register_buffer("weight_scale", torch.tensor([0.5, 2.0]))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    with record(nn.Sequential(Scaled()), file) as archive:
        found = values(archive, "0.weight")

    assert found.tolist() == [[0, 0.5, 1, 1.5], [8, 10, 12, 14]]


def test_weights_that_cannot_be_read_are_named(file: Path) -> None:
    model = nn.Sequential(PackedWeights())
    model.spare = layer().to("meta")

    with qvtrace.record(model, file, weights=True), torch.no_grad():
        model[0](INPUT)

    with Archive.open(file) as archive:
        manifest = archive.manifest
        nodes = {name: entry.node() for name, entry in entries(archive).items()}
    assert manifest.complete
    assert manifest.skipped.warnings[-2:] == (
        "1 weight not stored, packed in a form that is not known: 0.weight",
        "2 weights not stored, on the meta device or offloaded: spare.weight, spare.bias",
    )
    assert all(isinstance(node, OpaqueLeaf) for node in nodes.values())


def test_filters_choose_the_weights_too(file: Path) -> None:
    model = nn.Sequential(layer(), nn.Linear(32, 8))

    with record(model, file, include=["1"]) as archive:
        assert set(entries(archive)) == {"1.weight", "1.bias"}


def test_weights_survive_a_kill(tmp_path: Path) -> None:
    with qvtrace.record(nn.Sequential(layer()), tmp_path / "killed.st", weights=True):
        for name in ("killed.st.partial", "killed.st.partial.journal"):
            shutil.copy(tmp_path / name, tmp_path / f"copy.{name}")
    copy = tmp_path / "copy.killed.st.partial"

    recover(copy)

    with Archive.open(copy) as archive:
        assert torch.equal(values(archive, "0.weight"), layer().weight)


def test_a_dry_run_tells_the_size_with_weights(file: Path) -> None:
    sizes = []
    for dry_run in (True, False):
        recording = Recording(
            nn.Sequential(layer()), file, RecordOptions(weights=True, dry_run=dry_run)
        )
        with recording, torch.no_grad():
            recording._model(INPUT)
        assert recording.report is not None
        sizes.append(recording.report.size)
        assert recording.report.bytes_by_kind["weights"] == 4 * (64 * 32 + 32)

    assert abs(sizes[0] - sizes[1]) < 64  # seconds have more or fewer digits


def test_each_parameter_is_a_row_with_its_channels_as_vectors(fp: Path, file: Path) -> None:
    model = with_torchao(nn.Sequential(layer()), "Int8WeightOnlyConfig")
    record(model, file).close()

    found = rows(fp, file)

    assert list(found) == ["0 weights.weight", "0 weights.bias"]
    assert found["0 weights.bias"].status == "identical"
    weight = found["0 weights.weight"]
    channels = sqnr(layer().weight.detach(), model[0].weight.dequantize()).sort().values
    assert weight.metrics.token_sqnr_p50 == pytest.approx(float(channels[15]), rel=1e-6)
    assert weight.metrics.token_sqnr_min == pytest.approx(float(channels[0]), rel=1e-6)
    assert weight.groups is None


def test_a_weight_that_is_quantized_in_groups_has_figures_of_each(fp: Path, file: Path) -> None:
    model = with_torchao(nn.Sequential(layer()), "IntxWeightOnlyConfig")
    record(model, file).close()

    groups = rows(fp, file)["0 weights.weight"].groups

    reference, candidate = layer().weight.detach(), model[0].weight.dequantize()
    expected = sqnr(reference.reshape(32, 2, 32), candidate.reshape(32, 2, 32))
    assert groups is not None
    assert groups.size == 32
    assert groups.sqnr_p50 == pytest.approx(float(expected.flatten().sort().values[31]), rel=1e-6)
    assert groups.sqnr_min == pytest.approx(float(expected.min()), rel=1e-6)
    assert groups.worst == divmod(int(expected.argmin()), 2)


def test_the_kernels_of_a_convolution_are_one_vector_a_channel(tmp_path: Path) -> None:
    class Convolution(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            with torch.no_grad():
                self.conv.weight[2] += noise * torch.randn(3, 3, 3)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    files = [tmp_path / "fp.st", tmp_path / "quant.st"]
    for file, noise in zip(files, (0.0, 0.1), strict=True):
        record(Convolution(noise), file).close()

    row = rows(*files)["conv weights.weight"]

    assert row.shape == ((4, 27), (4, 27))
    assert row.worst_token == (2,)
    assert row.reason == "[4, 3, 3, 3], flattened: a vector for each channel"


def test_weights_in_wrappers_are_paired_as_the_modules_are(tmp_path: Path) -> None:
    reference, candidate = tmp_path / "fp.st", tmp_path / "quant.st"
    record(nn.Sequential(layer()), reference).close()
    record(Wrapper(nn.Sequential(Wrapper(layer()))), candidate).close()

    found = rows(reference, candidate)

    assert list(found) == ["0 weights.weight", "0 weights.bias"]
    assert {row.status for row in found.values()} == {"identical"}
    assert {row.matched_by for row in found.values()} == {"suffix .wrapped"}


def test_weights_of_a_compiled_model_are_those_of_the_model(fp: Path, file: Path) -> None:
    record(torch.compile(nn.Sequential(layer()), backend="eager"), file).close()

    assert {row.status for row in rows(fp, file).values()} == {"identical"}
    assert {row.status for row in rows(file, fp).values()} == {"identical"}


def test_weights_are_paired_through_maps_and_what_one_side_lacks_is_told(tmp_path: Path) -> None:
    reference, candidate = tmp_path / "fp.st", tmp_path / "quant.st"
    record(nn.Sequential(layer()), reference).close()
    other = nn.Sequential()
    other.fc = nn.Linear(64, 32, bias=False)
    record(other, candidate).close()

    comparison = qvtrace.diff(reference, candidate, path="weights", maps=["fc=0"])

    assert [(row.module, row.path) for row in comparison.rows] == [("0", "weights.weight")]
    assert [place.path for place in comparison.coverage.only_in_reference] == ["weights.bias"]


def test_a_weight_that_is_tied_on_one_side_is_compared_at_each_place(tmp_path: Path) -> None:
    files = [tmp_path / "fp.st", tmp_path / "quant.st"]
    for file, tied in zip(files, (True, False), strict=True):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        if tied:
            model[1].weight = model[0].weight
        record(model, file).close()

    for reference, candidate in (files, files[::-1]):
        assert {row.module for row in rows(Path(reference), Path(candidate)).values()} == {"0", "1"}


def test_filters_of_diff_choose_weights_by_their_modules(fp: Path, file: Path) -> None:
    model: Any = nn.Sequential(layer())
    model[0].spare = nn.Linear(4, 4)  # no call has its name
    with record(model, file):
        assert list(rows(file, file, include=["0.spare"])) == [
            "0.spare weights.weight",
            "0.spare weights.bias",
        ]
    with pytest.raises(UsageError, match="--include"):
        rows(file, file, include=["nothing"])


def test_all_has_weights_where_both_sides_have_them(fp: Path, tmp_path: Path) -> None:
    without = tmp_path / "without.st"
    with qvtrace.record(nn.Sequential(layer()), without), torch.no_grad():
        torch.nn.Module.__call__(without_model := nn.Sequential(layer()), INPUT)
        del without_model

    both = {row.path for row in qvtrace.diff(fp, fp, path="all").rows}
    one = {row.path for row in qvtrace.diff(fp, without, path="all").rows}

    assert {"weights.weight", "output"} <= both
    assert not any(path.startswith("weights") for path in one)


def test_an_archive_without_weights_is_named(fp: Path, file: Path) -> None:
    with qvtrace.record(nn.Sequential(layer()), file):
        pass

    result = CliRunner().invoke(app, ["diff", str(fp), str(file), "--path", "weights"])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"qvtrace: {file}: holds no weights, which --path weights compares; "
        "record it again with --weights\n"
    )


def test_the_table_says_channel_where_vectors_are_channels(fp: Path, file: Path) -> None:
    record(with_torchao(nn.Sequential(layer()), "IntxWeightOnlyConfig"), file).close()

    table = CliRunner().invoke(app, ["diff", str(fp), str(file), "--path", "weights"]).stdout
    report = CliRunner().invoke(
        app, ["diff", str(fp), str(file), "--path", "weights", "--format", "json"]
    )

    assert "channel SQNR p50 / p5" in table
    assert "group SQNR p50 / p5" in table
    assert "dB of 32" in table
    assert "token" not in table
    weight, bias = json.loads(report.stdout)["rows"]
    assert weight["groups"]["size"] == 32
    assert "groups" not in bias


def test_show_tells_of_weights(file: Path) -> None:
    record(with_torchao(nn.Sequential(layer()), "Int8WeightOnlyConfig"), file).close()

    shown = CliRunner().invoke(app, ["show", str(file), "0", "--stats"]).stdout

    assert "1 call, " not in shown
    assert ", 2 weights" in shown
    assert "weights weight float32[32,64] from Int8Tensor" in shown
    assert "weights.weight  mean " in shown


def test_show_tells_of_the_weights_that_a_wrapper_holds(file: Path) -> None:
    record(nn.Sequential(Wrapper(layer())), file).close()

    for patterns in (["0"], ["0", "0.wrapped"]):
        shown = CliRunner().invoke(app, ["show", str(file), *patterns]).stdout
        assert shown.count("weights weight float32[32,64] from Parameter") == 1


@pytest.mark.parametrize(
    "value", [{"type": "tensor"}, {"type": "nothing"}], ids=["no digest", "unknown"]
)
def test_a_damaged_weight_is_an_error_that_names_the_file(
    value: dict[str, Any], fp: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(fp, tmp_path / "damaged.st"))
    edit_manifest(file, lambda json: json["weights"][0].update(value=value))

    with pytest.raises(DamagedArchiveError, match=r"damaged\.st: the weight of 0"):
        rows(fp, file)
    assert CliRunner().invoke(app, ["show", str(file)]).exit_code == 2


def test_record_and_run_take_weights_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.py").write_text(
        "import torch\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), torch.ones(1, 64)\n"
    )
    monkeypatch.chdir(tmp_path)
    first = ["record", "-m", "toy.py:model", "-o", "fp.st", "--weights"]
    second = ["record", "-m", "toy.py:model", "--variant", "quant", "--like", "fp.st"]

    for arguments in (first, [*second, "-o", "quant.st"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0

    assert {row.status for row in rows(Path("fp.st"), Path("quant.st")).values()} == {
        "ok",
        "identical",
    }
