"""Each quantizer on real tiny models: what it changes, how much, and what it leaves float."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import Saved, record
from prepared_models import logits, sqnr
from torch import nn

import qvtrace
from qvtrace.errors import ModelError, UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.models.quantizers import QUANTIZERS
from qvtrace.qparams.findings import parameters_of, suspect


@dataclass(frozen=True)
class Expected:
    """What a scheme makes of a Linear, and how far the logits of a tiny model may move."""

    module: str  # class
    weight: str  # class
    least_sqnr: float  # dB


# SQNR as measured on Llama, BERT and Qwen3-VL, less a margin.
EXPECTED = {
    "bitsandbytes:int8": Expected("Linear8bitLt", "Int8Params", 30),
    "bitsandbytes:nf4": Expected("Linear4bit", "Params4bit", 10),
    "compressed-tensors:w8a8": Expected("Linear", "Parameter", 30),
    "compressed-tensors:w4a16": Expected("Linear", "Parameter", 10),
    "compressed-tensors:fp8-dynamic": Expected("Linear", "Parameter", 20),
    "quanto:int8": Expected("QLinear", "WeightQBytesTensor", 30),
    "quanto:int4": Expected("QLinear", "WeightQBitsTensor", 10),
    "quanto:float8": Expected("QLinear", "WeightQBytesTensor", 20),
    "quanto:w8a8": Expected("QLinear", "WeightQBytesTensor", 30),
}
FAMILIES = ("llama", "bert", "qwen3_vl")
LINEAR = {
    "llama": "model.layers.0.mlp.up_proj",
    "bert": "bert.encoder.layer.0.intermediate.dense",
    "qwen3_vl": "model.language_model.layers.0.mlp.up_proj",
}
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "quanto": "optimum.quanto",
    "tico": "tico",
}


def needs(quantizer: str) -> None:
    pytest.importorskip(PACKAGES[quantizer.partition(":")[0]])


def quantize(model: str | Path | None, quantizer: str, **request: Any) -> PreparedModel:
    needs(quantizer)
    model = None if model is None else str(model)
    return prepare(ModelRequest(model=model, variant="quant", quantizer=quantizer, **request))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", EXPECTED)
def test_every_linear_that_is_called_is_quantized_and_the_output_stays_near(
    scheme: str, family: str, saved: Saved
) -> None:
    reference = prepare(ModelRequest(model=str(saved(family))))
    linears = [n for n, m in reference.model.named_modules() if isinstance(m, nn.Linear)]
    head = [name for name in linears if name == "lm_head"]

    candidate = quantize(saved(family), scheme)

    expected = EXPECTED[scheme]
    linear = candidate.model.get_submodule(LINEAR[family])
    assert (type(linear).__name__, type(linear.weight).__name__) == (
        expected.module,
        expected.weight,
    )
    assert candidate.variant.quantizer == scheme
    assert sorted(candidate.variant.quantized) == sorted(set(linears) - set(head))
    assert list(candidate.variant.left_float) == head
    assert candidate.info == reference.info
    assert expected.least_sqnr < sqnr(logits(reference), logits(candidate)) < 60


def test_the_range_of_quantos_four_bits_holds_the_weights(saved: Saved, tmp_path: Path) -> None:
    float_model = prepare(ModelRequest(model=str(saved("llama")))).model
    prepared = quantize(saved("llama"), "quanto:int4")

    with qvtrace.record(prepared.model, tmp_path / "quant.st"):
        logits(prepared)

    with qvtrace.load(tmp_path / "quant.st") as archive:
        assert not list(suspect(parameters_of(archive)))
        (weight,) = (
            one for one in parameters_of(archive).of(LINEAR["llama"]) if one.of == "weight"
        )
    original: Any = float_model.get_submodule(LINEAR["llama"])
    assert weight.dtype == "uint4"
    assert weight.range is not None
    assert weight.range.minimum == pytest.approx(original.weight.min().item(), rel=0.1)
    assert weight.range.maximum == pytest.approx(original.weight.max().item(), rel=0.1)


@pytest.mark.parametrize("scheme", ["w8a8", "fp8-dynamic"])
def test_compressed_tensors_rounds_weights_and_activations_within_the_module(
    scheme: str, saved: Saved
) -> None:
    name = LINEAR["llama"]
    prepared = quantize(saved("llama"), f"compressed-tensors:{scheme}")
    linear: Any = prepared.model.get_submodule(name)
    inputs = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output = linear(inputs)
        plain = nn.functional.linear(inputs, linear.weight)
    assert linear.weight_scale.shape == (linear.out_features, 1)
    assert 20 < sqnr(plain, output) < 50


def test_groups_of_four_bit_weights_are_as_long_as_the_settings_say(saved: Saved) -> None:
    prepared = quantize(saved("llama"), "compressed-tensors:w4a16")

    linear: Any = prepared.model.get_submodule(LINEAR["llama"])
    groups = linear.in_features // prepared.variant.settings["group_size"]
    assert linear.weight_scale.shape == (linear.out_features, groups)


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "compressed-tensors", "quanto"])
def test_the_name_alone_takes_the_default_scheme(quantizer: str, saved: Saved) -> None:
    prepared = quantize(saved("llama"), quantizer)

    assert prepared.variant.quantizer == f"{quantizer}:{QUANTIZERS[quantizer].schemes[0]}"


@pytest.mark.parametrize("scheme", ["bitsandbytes:int8", "quanto:int8", "quanto:w8a8"])
def test_quantizing_twice_gives_the_same_output_bit_for_bit(scheme: str, saved: Saved) -> None:
    one, other = quantize(saved("llama"), scheme), quantize(saved("llama"), scheme)

    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("scheme", ["bitsandbytes:nf4", "compressed-tensors:w8a8", "quanto:w8a8"])
def test_a_recording_compares_with_the_float_one_module_by_module(
    scheme: str, saved: Saved, tmp_path: Path
) -> None:
    reference = record(prepare(ModelRequest(model=str(saved("llama")))), tmp_path / "fp.st")
    candidate = record(quantize(saved("llama"), scheme), tmp_path / "quant.st")

    comparison = qvtrace.diff(reference, candidate)

    assert comparison.comparable.ok
    assert comparison.coverage.modules_compared == comparison.coverage.modules_reference
    row = next(row for row in comparison.rows if row.module == "model.layers.0.mlp.down_proj")
    assert row.metrics.sqnr is not None
    assert 10 < row.metrics.sqnr < 60


CUSTOM = """
import torch
from torch import nn

class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

def build():
    shared = nn.Linear(32, 32)
    return nn.Sequential(shared, Doubling(32, 32), shared), torch.ones(2, 32)
"""


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "quanto"])
def test_a_linear_with_a_forward_of_its_own_is_not_replaced_and_a_shared_one_is_once(
    quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "custom.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)

    prepared = quantize("custom.py:build", quantizer)

    prepared.run()
    model: Any = prepared.model
    assert prepared.variant.quantized == ("0",)
    assert prepared.variant.left_float == ("1",)
    assert prepared.variant.settings["left_float"] == {"a Linear with a forward of its own": 1}
    assert model[0] is model[2]
    assert type(model[0]) is not nn.Linear


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "compressed-tensors", "quanto"])
def test_weights_used_without_a_call_and_fused_experts_stay_float(
    quantizer: str, saved: Saved
) -> None:
    mamba, moe = quantize(saved("mamba"), quantizer), quantize(saved("qwen3_moe"), quantizer)

    mamba.run()
    moe.run()
    assert "backbone.layers.0.mixer.dt_proj" in mamba.variant.left_float
    assert "backbone.layers.0.mixer.in_proj" in mamba.variant.quantized
    assert "model.layers.0.mlp.experts" in moe.variant.left_float
    assert "fused experts stay float, " in moe.warnings[-1]


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "compressed-tensors", "quanto"])
def test_a_quantizer_that_finds_nothing_to_change_is_told_loudly(
    quantizer: str, saved: Saved
) -> None:
    prepared = quantize(saved("gpt2"), quantizer)

    assert prepared.variant.quantized == ()
    assert "CHANGED NOTHING" in prepared.warnings[0]


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "compressed-tensors", "quanto"])
def test_weights_that_are_not_in_memory_cannot_be_quantized(quantizer: str, saved: Saved) -> None:
    with pytest.raises(ModelError, match="weight is not in memory; leave --device-map out"):
        quantize(saved("llama"), quantizer, device_map="disk")


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
@pytest.mark.parametrize(
    ("scheme", "least"), [("uint8", 15), ("int8", 15), ("int16", 45), ("uint4", 1), ("int4", 1)]
)
def test_tico_wraps_the_whole_model_and_calibrates_it_on_the_sample(
    scheme: str, least: float, family: str, saved: Saved
) -> None:
    reference = prepare(ModelRequest(model=str(saved(family)), attn="eager"))

    candidate = quantize(saved(family), f"tico:{scheme}", attn="eager")

    assert type(candidate.model).__name__ == "PTQWrapper"
    assert candidate.info == reference.info
    assert any(name.endswith("up_proj.wrapped") for name in candidate.variant.quantized)
    assert candidate.variant.settings["calibration"]["source"] == "sample"
    assert least < sqnr(logits(reference), logits(candidate)) < 90


@pytest.mark.parametrize("family", ["llama", "qwen3_vl"])
def test_wrappers_with_quantization_off_hardly_change_the_output(
    family: str, saved: Saved, tmp_path: Path
) -> None:
    reference = prepare(ModelRequest(model=str(saved(family)), attn="eager"))
    candidate = quantize(saved(family), "tico", attn="eager", no_quantize=True)
    before = logits(candidate)

    archives = record(reference, tmp_path / "fp.st"), record(candidate, tmp_path / "quant.st")

    assert sqnr(logits(reference), before) > 100
    assert candidate.variant.settings["no_quantize"] is True
    assert candidate.variant.quantized == ()
    assert candidate.warnings == ()
    verdict = qvtrace.diff(*archives).verdict.text
    assert verdict.startswith("tico:uint8 with quantization off: what differs comes from its")


def test_a_model_that_tico_has_no_wrappers_for_is_named(saved: Saved) -> None:
    with pytest.raises(
        ModelError, match=r"tico:uint8: cannot .*BertForSequ.*; TICO has wrappers for Llama and"
    ):
        quantize(saved("bert"), "tico")


def test_tico_takes_one_picture_in_one_place(tmp_path: Path) -> None:
    from qvtrace.models.pictures import crafted_picture

    crafted_picture().save(tmp_path / "one.png")
    twice = (str(tmp_path / "one.png"),) * 2
    with pytest.raises(UsageError, match=r"TICO takes one picture, .*; give one --image"):
        quantize(None, "tico", images=twice)


def test_no_quantize_is_refused_where_there_are_no_wrappers(saved: Saved) -> None:
    with pytest.raises(UsageError, match=r"--no-quantize: torchao:int8-dynamic puts no wrappers"):
        prepare(ModelRequest(variant="quant", no_quantize=True))


REQUIREMENTS = {
    "bitsandbytes": "'bitsandbytes>=0.46'",
    "compressed-tensors": "'compressed-tensors>=0.12'",
    "quanto": "ninja 'optimum-quanto>=0.2.7'",
    "tico": "'tico>=0.3'",
}
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("bitsandbytes", "compressed_tensors", "optimum", "tico"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from qvtrace.cli import app
for quantizer in sys.argv[1:]:
    try:
        app(["record", "--variant", "quant", "--quantizer", quantizer], prog_name="qvtrace")
    except SystemExit as exit:
        assert exit.code == 2
app(["quantizers"])
"""


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", ABSENT, *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert completed.stderr.splitlines() == [
        f"qvtrace: --quantizer {name}: is not installed; pip install {REQUIREMENTS[name]}"
        for name in PACKAGES
    ]
    for name in PACKAGES:
        assert f"no: pip install {REQUIREMENTS[name]} " in completed.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quantizer", PACKAGES)
def test_an_unknown_scheme_lists_what_there_is(quantizer: str) -> None:
    schemes = ", ".join(QUANTIZERS[quantizer].schemes)
    with pytest.raises(UsageError, match=f"{quantizer} has no scheme int3; there are {schemes}"):
        prepare(ModelRequest(variant="quant", quantizer=f"{quantizer}:int3"))


def test_quantizing_and_running_write_nothing_to_the_terminal() -> None:
    schemes = ["bitsandbytes:int8", "compressed-tensors", "quanto:w8a8", "tico:uint8"]
    for scheme in schemes:
        needs(scheme)
    code = (
        "import sys; from qvtrace.models import ModelRequest, prepare\n"
        "for quantizer in sys.argv[1:]:\n"
        "    prepare(ModelRequest(variant='quant', quantizer=quantizer)).run()"
    )

    completed = subprocess.run(
        [sys.executable, "-c", code, *schemes], capture_output=True, text=True, check=False
    )

    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


def test_quanto_does_not_wait_for_who_is_no_longer_compiling(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import get_extension
    from torch.utils import cpp_extension

    extension = get_extension("quanto_cpp")
    monkeypatch.setattr(
        cpp_extension, "JIT_EXTENSION_VERSIONER", type(cpp_extension.JIT_EXTENSION_VERSIONER)()
    )
    monkeypatch.setattr(extension, "_lib", None)
    monkeypatch.setattr(extension, "build_directory", str(tmp_path))
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, 0))

    with pytest.raises(ModelError) as raised:
        quantize(saved("llama"), "quanto:int4")

    said = str(raised.value)
    assert said.startswith("quanto:int4: would wait for another process that compiles what 4-bit")
    assert f"since {tmp_path / 'lock'} is there" in said
    assert said.endswith("delete it if none is at work")


def test_a_model_that_raises_is_not_blamed_on_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear, self.runs = torch.nn.Linear(32, 32), 0\n"
        "    def forward(self, x):\n"
        "        self.runs += 1\n"
        "        if self.runs > 1: raise RuntimeError('not twice')\n"
        "        return self.linear(x)\n"
        "def model(): return Model(), torch.ones(2, 32)\n"
    )
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelError, match=r"own\.py:model: the model raised RuntimeError: not tw"):
        quantize("own.py:model", "quanto:int4")
