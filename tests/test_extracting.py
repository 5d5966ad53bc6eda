"""The folder that a bug report on one module needs, and the script in it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.errors import UsageError


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Unusual(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class Network(nn.Module):
    """One module of each class whose computation is known, and one whose is not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, stride=1, groups=2)
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.groups = nn.GroupNorm(4, 16)
        self.batch = nn.BatchNorm1d(16)
        self.rms = RMSNorm(16)
        self.fc = nn.Linear(16, 8)
        self.unusual = Unusual()

    def forward(self, ids):
        hidden = self.conv(self.embed(ids).transpose(1, 2))
        hidden = self.batch(self.groups(hidden)).transpose(1, 2)
        return self.unusual(self.fc(self.rms(self.norm(hidden))))


def record(model, file, *inputs, **options):
    with torch.no_grad(), qvtrace.record(model, file, **options):
        for one in inputs:
            model(one)
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two calls of a network, and of the same with weights that are a little off."""
    folder = tmp_path_factory.mktemp("extracting")
    torch.manual_seed(0)
    model, ids = Network().eval(), torch.arange(10).reshape(1, 10)
    reference = record(model, folder / "fp.st", ids, ids + 1, weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return reference, record(model, folder / "quant.st", ids, ids + 1, weights=True)


def run(*arguments):
    return CliRunner().invoke(app, ["extract", *map(str, arguments)])


def reproduced(folder):
    """What the script prints, run by itself where qvtrace cannot be found by chance."""
    result = subprocess.run(
        [sys.executable, "-I", str(folder / "reproduce.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_the_folder_has_inputs_outputs_weights_metrics_and_says_what_it_gives_away(files, tmp_path):
    result = run(*files, "fc", "-o", tmp_path / "report")

    assert result.exit_code == 0
    folder = tmp_path / "report"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "candidate_inputs.safetensors",
        "candidate_output.safetensors",
        "candidate_weights.safetensors",
        "inputs.safetensors",
        "metrics.json",
        "module.json",
        "reference_output.safetensors",
        "reference_weights.safetensors",
        "report.txt",
        "reproduce.py",
    }
    inputs = load_file(folder / "inputs.safetensors")["inputs.0"]
    weights = load_file(folder / "reference_weights.safetensors")
    output = load_file(folder / "reference_output.safetensors")["output"]
    torch.testing.assert_close(nn.functional.linear(inputs, **weights), output)
    assert "a prompt" in (folder / "README.md").read_text()
    assert "can reveal the prompt" in result.stdout
    assert "no parameters are known" in result.stdout


def test_the_script_prints_the_figures_of_the_comparison(files, tmp_path):
    qvtrace.extract(*files, "fc", tmp_path / "report")

    printed = reproduced(tmp_path / "report")

    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())["rows"]
    metrics = next(row["metrics"] for row in rows if row["path"] == "output")
    line = next(line for line in printed.splitlines() if line.startswith("output: "))
    assert f"max |d| {metrics['max_abs_error']:.6g}, PEIR {metrics['peir']:.6g}" in line
    assert f"SQNR {metrics['sqnr']:.4f} dB" in line


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.complex(x, self.fc(x))


def test_the_script_sees_the_imaginary_part_of_a_complex_output(tmp_path):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(Complex()), torch.randn(4, 8)
    reference = record(model, tmp_path / "fp.st", inputs)
    with torch.no_grad():
        model[0].fc.weight += 0.1
    candidate = record(model, tmp_path / "quant.st", inputs)

    qvtrace.extract(reference, candidate, "0", tmp_path / "report")

    (row,) = (row for row in qvtrace.diff(reference, candidate).rows if row.module == "0")
    assert f"PEIR {row.metrics.peir:.6g}" in reproduced(tmp_path / "report")


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("fc", ""),
        ("embed", ""),
        ("conv", "(stride [1], padding 1, groups 2)"),
        ("norm", "(eps 1e-06)"),
        ("groups", "(groups 4, eps 1e-05)"),
        ("rms", "(eps 1e-06)"),
    ],
)
def test_the_script_computes_the_output_of_the_classes_it_knows(files, tmp_path, module, settings):
    qvtrace.extract(*files, module, tmp_path / "report")

    printed = reproduced(tmp_path / "report")

    assert "equals the reference" in printed
    assert settings in printed
    assert "the same inputs with the candidate's weights: max |d| 0" in printed


def test_a_script_with_other_weights_says_that_they_give_another_output(files, tmp_path):
    qvtrace.extract(*files, "fc", tmp_path / "report")
    folder = tmp_path / "report"
    wrong = (folder / "candidate_weights.safetensors").read_bytes()
    (folder / "reference_weights.safetensors").write_bytes(wrong)

    printed = reproduced(folder)
    assert "IS NOT the reference's output" in printed
    assert "candidate's weights" not in printed
    assert printed.count("dB") == 1  # of what is stored


class Linear(nn.Linear):
    """Its class has a name that is known, and it computes something else."""

    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize(
    ("module", "inputs", "told"),
    [
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2), (1, 4, 9, 9), "padding 2, groups 1, dilation"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), (1, 4, 9), "padding mode reflect"),
        (nn.Conv2d(4, 8, (1, 5), padding=(0, 2), stride=3), (1, 4, 9, 9), "[3, 3], padding [0, 2]"),
        (nn.LayerNorm(16, eps=1e-2), (2, 16), "eps 0.01"),
        (nn.Linear(16, 8).half(), (40, 16), "equals the reference"),
    ],
    ids=["dilation", "padding mode", "stride", "eps", "float16"],
)
def test_settings_that_are_not_the_default_are_found(tmp_path, module, inputs, told):
    assert told in printed_of(tmp_path, module.eval(), torch.randn(inputs))


@pytest.mark.parametrize(
    ("module", "inputs", "told"),
    [
        (nn.Conv1d(4, 4, 3, padding=5, dilation=5), (1, 4, 19), "padding, dilation, groups"),
        (nn.LayerNorm(16, eps=0.3), (2, 16), "its eps"),
        (Linear(16, 8), (4, 16), "a forward of its own"),
    ],
    ids=["dilation", "eps", "forward"],
)
def test_settings_that_are_not_found_are_named_in_a_line_without_a_figure(
    tmp_path, module, inputs, told
):
    _, _, *rest = printed_of(tmp_path, module.eval(), torch.randn(inputs)).splitlines()

    assert len(rest) == 1
    assert rest[0].startswith("not recomputed: ")
    assert told in rest[0]
    assert "dB" not in rest[0]


def test_a_difference_at_the_level_of_rounding_is_told_as_that(tmp_path):
    module = nn.Linear(16, 8).half()
    inputs = torch.randn(40, 16).half()
    wide = {name: value.detach().float() for name, value in module.named_parameters()}
    module.forward = lambda x: nn.functional.linear(x.float(), **wide).half() * (1 + 2**-10)

    printed = printed_of(tmp_path, module, inputs)

    assert "equals the reference up to rounding in float16: " in printed
    assert "candidate's weights" in printed


def printed_of(folder, module, inputs):
    """What the script says of one module, and of the same with weights that are a little off."""
    torch.manual_seed(0)
    model = nn.Sequential(module)
    inputs = inputs.to(next(module.parameters()).dtype)
    reference = record(model, folder / "fp.st", inputs, weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    candidate = record(model, folder / "quant.st", inputs, weights=True)
    qvtrace.extract(reference, candidate, "0", folder / "report")
    return reproduced(folder / "report")


def test_of_a_class_that_is_not_known_the_outputs_are_compared(files, tmp_path):
    made = qvtrace.extract(*files, "unusual", tmp_path / "report")

    printed = reproduced(tmp_path / "report")

    assert "output: max |d| " in printed
    assert "not recomputed" in printed
    assert not any("record with --weights" in text for text in made.missing)
    assert (
        "reference_weights: the archive has weights, and none of this module: it may have none"
        in made.missing
    )


def test_where_no_weights_were_recorded_it_is_said_how_to_have_them(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    files = [record(model, tmp_path / name, torch.randn(2, 16)) for name in ("fp.st", "quant.st")]

    made = qvtrace.extract(*files, "0", tmp_path / "report")

    assert "candidate_weights: no weights are stored; record with --weights" in made.missing


def test_running_statistics_are_missed_by_name(files, tmp_path):
    qvtrace.extract(*files, "batch", tmp_path / "report")

    printed = reproduced(tmp_path / "report")

    assert "not recomputed: its running mean and variance are not recorded" in printed


def test_the_script_imports_nothing_of_qvtrace(files, tmp_path):
    qvtrace.extract(*files, "fc", tmp_path / "report")
    assert "qvtrace" not in (tmp_path / "report" / "reproduce.py").read_text()


def test_another_call_is_taken_by_its_index(files, tmp_path):
    made = qvtrace.extract(*files, "embed", tmp_path / "report", call=1)

    ids = load_file(tmp_path / "report" / "inputs.safetensors")["inputs.0"]
    assert made.call == 1
    assert ids[0, 0] == 1
    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())["rows"]
    assert {row["call"] for row in rows if not row["path"].startswith("weights")} == {1}
    assert "candidate_inputs.safetensors" not in made.files


def test_a_block_has_the_weights_of_what_is_in_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    files = [record(model, tmp_path / name, torch.randn(2, 4), weights=True) for name in "ab"]

    qvtrace.extract(*files, "0", tmp_path / "report")

    weights = load_file(tmp_path / "report" / "candidate_weights.safetensors")
    assert set(weights) == {"0.weight", "0.bias"}
    assert "output: max |d| " in reproduced(tmp_path / "report")


def test_bfloat16_and_complex_tensors_are_read_back_by_safetensors(tmp_path):
    class Mixed(nn.Module):
        def forward(self, half, number):
            return half * 2, number * 2

    inputs = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(3, dtype=torch.complex64)
    files = [tmp_path / "fp.st", tmp_path / "quant.st"]
    model = Mixed()
    for file in files:
        with qvtrace.record(model, file):
            model(*inputs)

    qvtrace.extract(*files, "(root)", tmp_path / "report")

    read = load_file(tmp_path / "report" / "inputs.safetensors")
    assert torch.equal(read["inputs.0"], inputs[0])
    assert torch.equal(read["inputs.1"], inputs[1])


def test_quantization_parameters_come_with_their_values(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(2, 16)
    reference = record(model, tmp_path / "fp.st", inputs, weights=True)
    quantize_(model, Int8WeightOnlyConfig())
    candidate = record(model, tmp_path / "quant.st", inputs, weights=True)

    qvtrace.extract(reference, candidate, "0", tmp_path / "report")

    report = json.loads((tmp_path / "report" / "quantization.json").read_text())
    assert report["reference"] == []
    assert report["candidate"][0]["of"] == "weight"
    scale = load_file(tmp_path / "report" / "candidate_quantization.safetensors")["weight.scale"]
    assert scale.numel() == 8
    readme = (tmp_path / "report" / "README.md").read_text()
    assert "`candidate_quantization.safetensors`: scales" in readme
    assert "with the candidate's weights" in reproduced(tmp_path / "report")


def test_it_is_said_where_the_candidate_quantizes_its_input_too(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(8, 64)
    reference = record(model, tmp_path / "fp.st", inputs, weights=True)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    candidate = record(model, tmp_path / "quant.st", inputs, weights=True)

    qvtrace.extract(reference, candidate, "0", tmp_path / "report")

    assert (
        "the stored difference may be another: the candidate's input is quantized too "
        "(int8 per token dynamic), which is not done here"
    ) in reproduced(tmp_path / "report")


def test_a_folder_that_is_there_is_kept_unless_forced(files, tmp_path):
    folder = tmp_path / "report"
    assert run(*files, "fc", "-o", folder).exit_code == 0

    again = run(*files, "norm", "-o", folder)
    assert again.exit_code == 2
    assert again.stderr == (
        f"qvtrace: {folder}: is already there; overwrite it with --force, or choose -o\n"
    )
    assert run(*files, "norm", "-o", folder, "--force").exit_code == 0
    assert json.loads((folder / "module.json").read_text())["module"] == "norm"
    assert [file.name for file in tmp_path.iterdir()] == ["report"]


def test_force_replaces_no_folder_of_somebody_else(files, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")

    result = run(*files, "fc", "-o", tmp_path, "--force")

    assert result.exit_code == 2
    assert "is no folder that `qvtrace extract` wrote" in result.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_nothing_half_written_is_left_behind(files, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvtrace.extracting.extraction.write_tensors", full)
    result = run(*files, "fc", "-o", tmp_path / "report")

    assert result.exit_code == 2
    assert result.stderr.endswith("report: cannot be written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("*m*", "fits 3 modules; name one of embed, norm, rms"),
        ("fcc", "is none of 9 modules; did you mean fc?"),
        ("zzz", "is none of 9 modules; list them with `qvtrace show`"),
    ],
)
def test_a_name_that_is_not_one_module_is_refused_with_candidates(files, tmp_path, module, told):
    result = run(*files, module, "-o", tmp_path / "report")

    assert result.exit_code == 2
    assert told in result.stderr


def test_a_call_or_sample_that_is_not_there_is_refused(files, tmp_path):
    with pytest.raises(UsageError, match="--call 7: is no paired call of fc; there is 0, 1"):
        qvtrace.extract(*files, "fc", tmp_path / "report", call=7)
    with pytest.raises(UsageError, match="--sample 9: has no call of fc"):
        qvtrace.extract(*files, "fc", tmp_path / "report", sample=9)


class Renamed(nn.Module):
    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x):
        return self.dense(x)


def test_a_module_of_one_side_needs_a_map_to_its_name_on_the_other(tmp_path):
    torch.manual_seed(0)
    dense = nn.Linear(16, 8)
    reference = record(nn.Sequential(dense), tmp_path / "fp.st", torch.randn(2, 16))
    other = record(Renamed(dense), tmp_path / "quant.st", torch.randn(2, 16))

    with pytest.raises(UsageError, match="is only in the reference; pair it with --map"):
        qvtrace.extract(reference, other, "0", tmp_path / "report")
    made = qvtrace.extract(reference, other, "0", tmp_path / "report", maps=["^dense$=0"])

    assert made.module == "0"
    about = json.loads((tmp_path / "report" / "module.json").read_text())
    assert about["candidate_module"] == "dense"


def test_what_a_small_archive_does_not_hold_is_told(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    small = [
        record(model, tmp_path / name, torch.randn(2, 9, 16), stats_only=True)
        for name in ("fp.st", "quant.st")
    ]

    made = qvtrace.extract(*small, "0", tmp_path / "report")

    assert "reference_output.safetensors" not in made.files
    assert any("reference_output output: statistics only" in text for text in made.missing)
    assert "no output is stored on both sides" in reproduced(tmp_path / "report")
