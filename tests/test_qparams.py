"""Quantization parameters: what each quantizer's modules say, and what of it is suspect."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_layers import (
    INPUT,
    layer,
    with_bitsandbytes,
    with_compressed_tensors,
    with_quanto,
    with_tico,
    with_torch_dynamic,
    with_torchao,
)
from recordings import Returning, Wrapper
from small_archives import edit_manifest
from tiny_models import build
from torch import Tensor, nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.archive import Archive, recover
from qvtrace.cli import app
from qvtrace.errors import DamagedArchiveError
from qvtrace.qparams.findings import Finding, parameters_of, suspect
from qvtrace.qparams.parameters import Parameters, Summary, all_from_json
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording


def record(model: nn.Module, file: Path, value: Any = INPUT, **options: Any) -> Archive:
    with qvtrace.record(model, file, overwrite=True, **options), torch.no_grad():
        model(value)
    return Archive.open(file)


def parameters(archive: Archive, module: str) -> dict[str, Parameters]:
    """What is about a module, by what is quantized."""
    return {found.of: found for found in parameters_of(archive).of(module)}


def values(archive: Archive, summary: Summary | None) -> Tensor:
    assert summary is not None
    assert summary.values is not None
    return torch.from_numpy(archive.array(summary.values).copy())


def run(*arguments: object) -> str:
    """What a command prints on standard output."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code in (0, 3), result.output
    return result.stdout


class FakeQuantized(nn.Module):
    """Rounds to a grid, as fake-quantizing wrappers do."""

    def __init__(self, scale: float, zero_point: int, limits: tuple[int, int] = (0, 255)) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point))
        self.quant_min, self.quant_max = limits

    def forward(self, hidden: Tensor) -> Tensor:
        steps = torch.round(hidden / self.scale) + self.zero_point
        return (steps.clamp(self.quant_min, self.quant_max) - self.zero_point) * self.scale


class Observer(FakeQuantized):
    """Also says what it saw."""

    def __init__(self, scale: float, zero_point: int, seen: tuple[float, float]) -> None:
        super().__init__(scale, zero_point)
        self.register_buffer("min_val", torch.tensor(seen[0]))
        self.register_buffer("max_val", torch.tensor(seen[1]))
        self.dtype = torch.quint8


class Observed(nn.Module):
    """A module with an observer of what it returns."""

    def __init__(self, observer: nn.Module) -> None:
        super().__init__()
        self.obs_act_out = observer

    def forward(self, hidden: Tensor) -> Tensor:
        quantized: Tensor = self.obs_act_out(hidden)
        return quantized


EXPECTED = {
    "Int8DynamicActivationInt8WeightConfig": ("Int8Tensor", "int8", "channel", None),
    "Int8WeightOnlyConfig": ("Int8Tensor", "int8", "channel", None),
    "IntxWeightOnlyConfig": ("IntxUnpackedToInt8Tensor", "int4", "group", 32),
    "Float8WeightOnlyConfig": ("Float8Tensor", "float8_e4m3fn", "channel", None),
}


@pytest.mark.parametrize("config", EXPECTED)
def test_weights_of_torchao_tell_class_dtype_granularity_and_scales(
    config: str, file: Path
) -> None:
    model = nn.Sequential(layer())
    with_torchao(model, config)

    with record(model, file) as archive:
        weight = parameters(archive, "0")["weight"]
        stored = values(archive, weight.scale)

    assert (weight.class_name, weight.dtype, weight.granularity, weight.group_size) == (
        EXPECTED[config]
    )
    assert weight.scheme == "symmetric"
    assert torch.equal(stored, model[0].weight.scale)
    assert weight.range is not None
    assert weight.range.minimum < 0 < weight.range.maximum


def test_dynamic_activations_are_told_without_values(file: Path) -> None:
    model = with_torchao(nn.Sequential(layer()), "Int8DynamicActivationInt8WeightConfig")

    with record(model, file) as archive:
        found = parameters(archive, "0")["input"]

    assert (found.dtype, found.granularity, found.dynamic, found.scale) == (
        "int8",
        "token",
        True,
        None,
    )


def test_quanto_tells_weights_and_the_scales_of_activations(file: Path) -> None:
    model: Any = with_quanto(weights="qint8", activations="qint8")

    with record(model, file) as archive:
        found = parameters(archive, "0")
        assert values(archive, found["input"].scale) == model[0].input_scale

    assert found["weight"].class_name == "WeightQBytesTensor"
    assert found["output"].granularity == "tensor"
    model[0].disable_output_quantization()
    with record(model, file) as archive:
        assert parameters(archive, "0").keys() == {"weight", "input"}


def test_compressed_tensors_are_read_before_the_first_forward_unpacks_them(file: Path) -> None:
    model: Any = with_compressed_tensors("W4A16")
    scale = model[0].weight_scale.clone()

    with qvtrace.record(model, file):
        assert "weight_packed" in dict(model[0].named_parameters())  # reading did not unpack it
    with Archive.open(file) as archive:
        weight = parameters(archive, "0")["weight"]
        stored = values(archive, weight.scale)

    assert (weight.dtype, weight.granularity, weight.group_size) == ("int4", "group", 32)
    assert torch.equal(stored, scale)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nested-fp4"])
def test_bitsandbytes_tells_the_scales_of_rows_and_blocks(kind: str, file: Path) -> None:
    model, linear = with_bitsandbytes(kind), layer()

    with qvtrace.record(model, file):
        pass
    with Archive.open(file) as archive:
        weight = parameters(archive, "0")["weight"]

    assert weight.dtype == kind.removeprefix("nested-")
    assert weight.scale is not None
    if kind == "int8":
        largest = float(linear.weight.detach().abs().max()) / 127
        assert weight.scale.count == 32
        assert weight.scale.maximum == pytest.approx(largest, rel=1e-3)
    else:
        assert (weight.group_size, weight.scale.count) == (64, 32)
        assert weight.scale.maximum == pytest.approx(
            float(linear.weight.detach().abs().max()), rel=0.02
        )


def test_tico_observers_are_about_the_module_that_holds_them(file: Path) -> None:
    with record(with_tico(), file) as archive:
        found = parameters(archive, "")

    assert found["weight"].granularity == "channel"
    assert found["input"].class_name == "MinMaxObserver"
    assert found["input"].minimum is not None
    assert found["input"].minimum.minimum == -1.0
    assert found["input"].maximum is not None
    assert found["input"].maximum.maximum == 1.0
    assert "quantized input MinMaxObserver uint8 affine per tensor" in run("show", file, "wrapped")


def test_observers_of_torch_tell_what_they_saw(file: Path) -> None:
    from torch.ao.quantization import FakeQuantize

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fake = FakeQuantize(quant_min=0, quant_max=255)
        fake(INPUT)
        archive = record(nn.Sequential(fake).eval(), file)

    with archive:
        found = parameters(archive, "0")["0"]

    assert (found.dtype, found.scheme, found.granularity) == ("uint8", "affine", "tensor")
    assert found.minimum is not None
    assert found.minimum.minimum == -1.0
    assert found.zero_point is not None
    assert found.zero_point.count == 1


def test_dynamically_quantized_layers_of_torch_tell_their_packed_weights(file: Path) -> None:
    with record(with_torch_dynamic(), file) as archive:
        found = parameters(archive, "0")

    assert (found["weight"].dtype, found["weight"].granularity) == ("int8", "tensor")
    assert found["input"].dynamic


def test_a_scale_and_a_zero_point_are_enough_in_any_module(file: Path) -> None:
    with record(nn.Sequential(FakeQuantized(0.01, 128)), file) as archive:
        (found,) = parameters(archive, "0").values()

    assert found.scheme == "affine"
    assert found.scale is not None
    assert found.scale.minimum == pytest.approx(0.01)
    assert found.zero_point is not None
    assert found.zero_point.minimum == 128


def test_a_float_model_has_none(file: Path) -> None:
    class Attention(Returning):
        scale = 0.125

        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.5
            self.logit_scale = nn.Parameter(torch.ones(()))

    with record(nn.Sequential(layer(), Attention()), file) as archive:
        entries = archive.manifest.modules

    assert [entry.quantization for entry in entries] == [None] * 3


def test_the_parameters_of_modules_left_out_are_told_without_values(file: Path) -> None:
    model = nn.Sequential(FakeQuantized(0.01, 128), FakeQuantized(0.02, 100))

    with record(model, file, include=["1"]) as archive:
        stored = [
            found.scale is not None and found.scale.values is not None
            for name in ("0", "1")
            for found in parameters(archive, name).values()
        ]

    assert stored == [False, True]


def test_a_module_that_raises_when_asked_does_not_fail_the_recording(file: Path) -> None:
    class Hostile(FakeQuantized):
        @property
        def quantization_scheme(self) -> object:
            raise RuntimeError("not now")

    with record(nn.Sequential(Hostile(0.01, 128)), file) as archive:
        manifest = archive.manifest

    assert manifest.complete
    assert manifest.modules[1].quantization is None
    assert manifest.skipped.warnings == (
        "quantization parameters of 1 module cannot be read (RuntimeError): 0",
    )


def test_parameters_on_the_meta_device_are_told_without_values(file: Path) -> None:
    model = nn.Sequential(layer())
    model.spare = FakeQuantized(0.01, 128).to("meta")

    with qvtrace.record(model, file):
        model[0](INPUT)
    with Archive.open(file) as archive:
        (found,) = parameters(archive, "spare").values()
        warned = archive.manifest.skipped.warnings

    assert found.scale is None
    assert any("not at hand (on the meta device or offloaded): spare" in text for text in warned)


def test_a_module_that_replaces_another_has_parameters_of_its_own(file: Path) -> None:
    model = nn.Sequential(FakeQuantized(0.01, 128))

    with qvtrace.record(model, file), torch.no_grad():
        model(INPUT)
        model[0] = FakeQuantized(0.02, 100)
        model(INPUT)

    with Archive.open(file) as archive:
        (found,) = parameters(archive, "0").values()
        assert float(values(archive, found.scale)) == pytest.approx(0.02)
        assert list(archive.damaged_tensors()) == []


def test_parameters_survive_a_kill(tmp_path: Path) -> None:
    with qvtrace.record(nn.Sequential(FakeQuantized(0.01, 128)), tmp_path / "killed.st"):
        for name in ("killed.st.partial", "killed.st.partial.journal"):
            shutil.copy(tmp_path / name, tmp_path / f"copy.{name}")
    copy = tmp_path / "copy.killed.st.partial"

    recover(copy)

    with Archive.open(copy) as archive:
        (found,) = parameters(archive, "0").values()
        assert float(values(archive, found.scale)) == pytest.approx(0.01)


def test_a_dry_run_counts_them(file: Path) -> None:
    model = nn.Sequential(FakeQuantized(0.01, 128))
    dry = Recording(model, file, RecordOptions(dry_run=True))
    with dry, torch.no_grad():
        model(INPUT)

    assert dry.report is not None
    assert dry.report.bytes_by_kind["quantization parameters"] == 12


def suspicions(archive: Archive) -> list[str]:
    return [str(finding) for finding in suspect(parameters_of(archive))]


def test_a_scale_too_small_for_what_was_observed_is_a_finding(file: Path) -> None:
    """The first release of TICO gave norm1 a scale of 7e-5 and the zero point 0: what it had seen
    excludes zero, and its range did not reach it."""
    model = nn.Sequential()
    model.norm1 = Observed(Observer(7e-5, 0, (0.98, 0.998)))

    with record(model, file) as archive:
        (found,) = suspicions(archive)

    assert found == (
        "norm1 output: range [0, 0.0179] does not hold what was observed, [0.98, 0.998]: "
        "scale 7e-05, zero point 0; what was observed excludes zero"
    )


def test_a_range_that_was_widened_to_zero_is_none(file: Path) -> None:
    with record(nn.Sequential(Observed(Observer(0.998 / 255, 0, (0.98, 0.998)))), file) as archive:
        assert suspicions(archive) == []


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ((float("inf"), -float("inf")), []),
        ((float("nan"), float("nan")), ["norm output: scale is not finite"]),
    ],
    ids=["nothing", "NaN"],
)
def test_an_observer_that_saw_nothing_is_no_finding(
    seen: tuple[float, float], found: list[str], file: Path
) -> None:
    model = nn.Sequential()
    model.norm = Observed(Observer(float("inf"), 0, seen))

    with record(model, file) as archive:
        assert suspicions(archive) == found


def test_show_takes_the_name_of_a_wrapped_module_with_the_wrappers_and_without(file: Path) -> None:
    inner = nn.Sequential(Wrapper(nn.Sequential(nn.Linear(64, 2), Wrapper(nn.Linear(2, 2)))))
    record(Wrapper(inner), file).close()

    float_name = run("show", file, "0.1")
    assert float_name.split("(root)")[1] == run("show", file, "*.0.wrapped.1*").split("(root)")[1]
    assert "1 Wrapper" in float_name
    assert "wrapped Linear  (float32[2,2])" in float_name
    assert "0 Linear" not in float_name
    assert "float32[2,2]" in run("show", file, "--values", "0.1")


def test_a_range_that_excludes_zero_is_a_finding(file: Path) -> None:
    with record(nn.Sequential(FakeQuantized(0.01, -50)), file) as archive:
        assert suspicions(archive) == ["0 output: range [0.5, 3.05] excludes zero"]


@pytest.mark.parametrize(
    ("scale", "said"), [(0.0, "scale is 0"), (float("nan"), "scale is not finite")]
)
def test_a_scale_that_is_no_scale_is_a_finding(scale: float, said: str, file: Path) -> None:
    model = nn.Sequential()
    model.spare = FakeQuantized(scale, 0)

    with qvtrace.record(model, file):
        pass

    with Archive.open(file) as archive:
        assert suspicions(archive)[0] == f"spare output: {said}"


@pytest.fixture(name="clipped")
def two_archives(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A float model, and one whose range holds half of its values."""
    reference, candidate = tmp_path / "fp.st", tmp_path / "quant.st"
    record(nn.Sequential(nn.Identity()), reference).close()
    record(nn.Sequential(FakeQuantized(1 / 255, 127)), candidate).close()
    yield reference, candidate


def test_values_beyond_the_range_are_a_finding_of_show_and_of_diff(
    clipped: tuple[Path, Path],
) -> None:
    reference, candidate = clipped

    shown = run("show", candidate)
    compared = json.loads(run("diff", reference, candidate, "--format", "json"))
    text = run("diff", reference, candidate)

    said = "50 % of the values are beyond its range [-0.498, 0.502]"
    assert said in shown
    assert f"finding     {candidate}: 0 output: {said}" in text
    assert f"1 suspect quantization range, first 0 output: {said}" in text.replace("\n", " ")
    assert compared["candidate"]["findings"] == [{"module": "0", "of": "output", "text": said}]
    assert "findings" not in compared["reference"]


def test_diff_shows_the_parameters_of_modules_whose_values_are_wanted(
    clipped: tuple[Path, Path],
) -> None:
    text = run("diff", *clipped, "--values", "0", "--all")
    report = json.loads(run("diff", *clipped, "--values", "0", "--format", "json"))

    assert text.count("candidate output FakeQuantized affine per tensor, scale 0.00392") == 1
    assert "candidate output FakeQuantized" not in run("diff", *clipped)
    found = {row["module"]: row["quantization"] for row in report["rows"]}
    assert found["0"]["reference"] == []
    assert found["0"]["candidate"][0]["class"] == "FakeQuantized"
    assert found[""] is None


def test_values_within_the_range_are_none(tmp_path: Path) -> None:
    reference, candidate = tmp_path / "fp.st", tmp_path / "quant.st"
    record(nn.Sequential(nn.Identity()), reference).close()
    record(nn.Sequential(FakeQuantized(2 / 255, 128)), candidate).close()

    assert qvtrace.diff(reference, candidate).candidate.findings == ()
    assert "finding" not in run("show", candidate)


def test_a_factor_folded_into_the_candidate_is_no_saturation(tmp_path: Path) -> None:
    class Folded(FakeQuantized):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden * 0.125)

    reference, candidate = tmp_path / "fp.st", tmp_path / "quant.st"
    record(nn.Sequential(nn.Identity()), reference).close()
    record(nn.Sequential(Folded(0.26 / 255, 128)), candidate).close()

    assert qvtrace.diff(reference, candidate).candidate.findings == ()


def test_findings_stand_at_the_module_that_holds_the_observer(file: Path) -> None:
    model = nn.Sequential(Observed(Observer(7e-5, 0, (0.98, 0.998))))

    with record(model, file) as archive:
        assert {found.module for found in suspect(parameters_of(archive))} == {"0"}
    assert "0 output: range" in run("show", file, "0")
    assert str(Finding("", "weight", "scale is 0")) == "(root) weight: scale is 0"


@pytest.mark.parametrize(
    "damage",
    [
        {"scale": 3},
        {"scale": {"count": -1}},
        {"range": {"min": "low"}},
        {"group_size": 1.5},
        {"also": 7},
        {"of": ["weight"]},
        {"scale": {"count": 1, "min": 10**400, "max": 1, "zeros": 0, "nonfinite": 0}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_damaged_parameters_are_an_error_that_names_the_file(
    damage: dict[str, Any], file: Path
) -> None:
    record(nn.Sequential(FakeQuantized(0.01, 128)), file).close()
    edit_manifest(file, lambda json: json["modules"][1]["quantization"].update(damage))

    result = CliRunner().invoke(app, ["show", str(file)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"qvtrace: {file}: the quantization parameters are damaged")
    with pytest.raises(DamagedArchiveError, match="record again"):
        qvtrace.diff(file, file)


def test_values_that_were_lost_leave_the_summary() -> None:
    json = {
        "of": "weight",
        "class": "Int8Tensor",
        "scale": {
            "count": 2,
            "min": 0.1,
            "max": 0.2,
            "zeros": 0,
            "nonfinite": 0,
            "values": {"type": "opaque", "class": "Tensor", "reason": "lost"},
        },
    }

    (found,) = all_from_json(json)

    assert found.scale == Summary(2, 0.1, 0.2)


def test_a_real_model_says_what_was_quantized(tmp_path: Path) -> None:
    model, inputs = build("llama")
    with_torchao(model, "Int8WeightOnlyConfig")
    with qvtrace.record(model, tmp_path / "quant.st"), torch.no_grad():
        model(**inputs)

    shown = run("show", tmp_path / "quant.st", "*.q_proj")

    assert "quantized weight Int8Tensor int8 symmetric per channel, scale " in shown
