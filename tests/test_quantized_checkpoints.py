"""Checkpoints that come quantized, and GGUF files: recognized, loaded, described."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import write_llama
from model_fixtures import Saved, change_config, prepare_like, record, save
from prepared_models import logits, sqnr
from typer.testing import CliRunner

import qvtrace
from qvtrace.archive import Archive
from qvtrace.cli import app
from qvtrace.cli.model_flags import ModelFlags, Variant
from qvtrace.cli.record import next_command
from qvtrace.errors import ModelError, UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.models.chatter import quiet
from qvtrace.qparams.findings import parameters_of

UP = "model.layers.0.mlp.up_proj"


def quantize(model: Path, quantizer: str | None = None, **request: Any) -> PreparedModel:
    return prepare(ModelRequest(model=str(model), variant="quant", quantizer=quantizer, **request))


def run(*words: object) -> str:
    """What a command prints, in one line."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def compress(prepared: PreparedModel, directory: Path) -> Path:
    """Write a model as llm-compressor does."""
    from compressed_tensors.compressors import ModelCompressor

    model: Any = prepared.model
    with quiet():
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(directory)
    return directory


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "fp8-dynamic"])
def test_a_compressed_tensors_checkpoint_computes_what_the_quantizer_did_in_memory(
    scheme: str, saved: Saved, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    in_memory = quantize(saved("llama"), f"compressed-tensors:{scheme}")
    expected = logits(in_memory)
    directory = compress(in_memory, tmp_path / scheme)

    candidate = quantize(directory)

    weights = dict(candidate.model.get_submodule(UP).named_parameters())
    assert "weight_packed" in weights or not weights["weight"].dtype.itemsize > 1
    assert candidate.variant.quantizer == "checkpoint:compressed-tensors"
    assert set(candidate.variant.quantized) == set(in_memory.variant.quantized)
    assert candidate.variant.left_float == ("lm_head",)
    assert torch.equal(logits(candidate), expected)


def test_loading_and_running_a_compressed_checkpoint_writes_nothing_to_the_terminal(
    saved: Saved, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    in_memory = quantize(saved("llama"), "compressed-tensors:w4a16")
    directory = compress(in_memory, tmp_path / "w4a16")
    code = (
        "import sys; from qvtrace.models import ModelRequest, prepare; "
        "prepare(ModelRequest(model=sys.argv[1], variant='quant')).run()"
    )

    completed = subprocess.run(
        [sys.executable, "-c", code, directory], capture_output=True, text=True, check=False
    )

    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("settings", "weight"),
    [({"load_in_8bit": True}, torch.int8), ({"load_in_4bit": True}, torch.uint8)],
    ids=["int8", "4 bit"],
)
def test_a_bitsandbytes_checkpoint_needs_no_quantizer(
    settings: dict[str, Any], weight: torch.dtype, saved: Saved, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    reference = prepare(ModelRequest(model=str(saved("llama"))))
    with quiet():
        options = transformers.BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            saved("llama"), quantization_config=options
        )
        model.save_pretrained(tmp_path / "quantized")

    candidate = quantize(tmp_path / "quantized")

    parameter: Any = candidate.model.get_submodule(UP).weight
    assert parameter.dtype == weight
    assert candidate.variant.quantizer == "checkpoint:bitsandbytes"
    assert UP in candidate.variant.quantized
    assert candidate.info.config_digest == reference.info.config_digest
    assert 8 < sqnr(logits(reference), logits(candidate)) < 60


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_whose_package_is_missing_says_what_to_install(
    method: str, saved: Saved, tmp_path: Path
) -> None:
    if _found("gptqmodel"):
        pytest.skip("gptqmodel is here")
    directory = shutil.copytree(saved("llama"), tmp_path / method)
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    change_config(directory, quantization_config=settings)

    with pytest.raises(ModelError, match=rf"is quantized by {method}, .*; pip install gptqmodel"):
        quantize(directory)


def test_the_reference_of_a_quantized_checkpoint_is_its_original() -> None:
    file, model = Path("quant.st"), ModelFlags(model="checkpoint")

    command = next_command(file, Variant.QUANT, model, "checkpoint:gptq")

    assert command == "qvtrace record --variant fp --like quant.st --model ORIGINAL"


FLOAT8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LINEAR8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
LYING = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "its weights are floats",
    ),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "its weights are floats",
    ),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": LINEAR8}},
        },
        "42 parts of quantized weights are not in it",
    ),
}


@pytest.mark.parametrize("method", LYING)
def test_weights_that_are_not_what_config_json_says_are_the_checkpoints_fault(
    method: str, tmp_path: Path
) -> None:
    settings, what = LYING[method]
    name = settings["quant_method"]
    pytest.importorskip(name.replace("-", "_"))
    directory = save("llama", tmp_path / "lying")
    change_config(directory, quantization_config=settings)

    with pytest.raises(ModelError) as raised:
        quantize(directory)

    said = f"lying: config.json says that it is quantized by {name}, but {what}"
    assert said in str(raised.value)
    assert "take quantization_config out of config.json" in str(raised.value)


@pytest.mark.parametrize("settings", ["int8", [1], {}, {"bits": 4}], ids=str)
def test_settings_without_a_method_are_named(settings: object, tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "llama")
    change_config(directory, quantization_config=settings)

    with pytest.raises(ModelError, match=r"config\.json: its quantization_config names no quant_"):
        quantize(directory)


def test_a_quantized_checkpoint_that_raises_is_looked_at_before_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save("llama", tmp_path / "llama")
    change_config(directory, quantization_config={"quant_method": "magic"})
    prepared = quantize(directory)
    monkeypatch.setattr(prepared.model, "forward", None)

    with pytest.raises(
        ModelError, match="; check that its weights are quantized by magic, as conf"
    ):
        prepared.run()


def test_that_transformers_dequantized_the_weights_is_told(tmp_path: Path) -> None:
    directory = save("llama", tmp_path / "llama")
    change_config(directory, quantization_config=FLOAT8)

    prepared = quantize(directory)

    assert "quantized no module that is known: transformers dequ" in prepared.warnings[-1]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file whose Linear weights have 8 bits."""
    pytest.importorskip("gguf")
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_is_a_quantized_variant_of_its_original(
    gguf: Path, saved: Saved, tmp_path: Path
) -> None:
    reference = record(prepare(ModelRequest(model=str(saved("llama")))), tmp_path / "fp.st")
    candidate = prepare_like(reference, model=str(gguf), variant="quant")

    comparison = qvtrace.diff(reference, record(candidate, tmp_path / "quant.st"))

    assert candidate.variant.quantizer == "checkpoint:gguf"
    assert candidate.variant.settings["types"] == {"Q8_0": 15, "F32": 6}
    assert {UP, "lm_head"} < set(candidate.variant.quantized)
    assert candidate.variant.left_float == ("model.embed_tokens",)
    assert comparison.comparable.ok
    rows = {row.module: row for row in comparison.rows}
    embedding, logits = rows["model.embed_tokens"], rows["lm_head"]
    assert embedding.status == "identical"
    assert logits.metrics.sqnr is not None
    assert 30 < logits.metrics.sqnr < 60


def test_a_directory_with_a_gguf_file_is_that_file(gguf: Path) -> None:
    assert quantize(gguf.parent).info.name == str(gguf)


def test_several_gguf_files_in_a_directory_are_not_guessed_between(
    gguf: Path, tmp_path: Path
) -> None:
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(gguf, tmp_path / name)

    with pytest.raises(UsageError, match=r"several GGUF files \(one.gguf, two.gguf\); name one"):
        quantize(tmp_path)


def test_dequantized_weights_can_stand_for_a_float_model_and_it_is_said(gguf: Path) -> None:
    reference = prepare(ModelRequest(model=str(gguf)))
    candidate = quantize(gguf, "torchao")

    for prepared in (reference, candidate):
        assert "holds quantized weights (Q8_0, F32), which are dequantized" in prepared.warnings[0]
    assert candidate.variant.quantizer == "torchao:int8-dynamic"
    assert candidate.info == reference.info
    assert candidate.info.weights_digest is not None


def test_a_gguf_file_of_floats_is_a_float_model(saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = write_llama(tmp_path / "float.gguf", "F32")

    prepared = prepare(ModelRequest(model=str(file)))

    original = prepare(ModelRequest(model=str(saved("llama"))))
    assert prepared.warnings == ()
    assert torch.equal(logits(prepared), logits(original))


def test_the_types_of_a_gguf_files_weights_are_told_by_module_and_in_the_head(
    gguf: Path, saved: Saved, tmp_path: Path
) -> None:
    reference = record(prepare(ModelRequest(model=str(saved("llama")))), tmp_path / "fp.st")
    candidate = record(
        prepare_like(reference, model=str(gguf), variant="quant"), tmp_path / "quant.st"
    )

    with Archive.open(candidate) as archive:
        (weight,) = parameters_of(archive).of(UP)
        assert parameters_of(archive).of("model.embed_tokens") == []
    assert (weight.of, weight.class_name, weight.scale) == ("weight", "Q8_0", None)
    assert weight.described == "int8 symmetric per group of 32"
    shown, compared = run("show", candidate), run("diff", reference, candidate, "--values", UP)
    assert "quantized weight Q8_0 int8 symmetric per group of 32" in shown
    assert "weight Q8_0 int8 symmetric per group of 32" in compared
    assert all("Q8_0 (15), F32 (6)" in text for text in (shown, compared))


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (0, "is cut short: it ends after 0 bytes, before what it says that it holds; get the"),
        (3, "is cut short: it ends after 3 bytes"),
        (10, "is cut short: it ends after 10 bytes"),
        (100, "is cut short: it ends after 100 bytes"),
        (2000, "is cut short: it ends after 2000 bytes"),
        (-10, "is cut short: it ends after [0-9]+ bytes"),
    ],
)
def test_a_gguf_file_that_is_cut_short_is_named_with_the_cause(
    length: int, match: str, gguf: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf.read_bytes()[:length])

    with pytest.raises(ModelError, match=f"damaged.gguf: {match}"):
        quantize(damaged)


def test_a_file_that_only_has_the_name_of_a_gguf_file_is_told(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "zip.gguf").write_bytes(b"PK" + gguf.read_bytes()[2:])

    with pytest.raises(ModelError, match=r"zip\.gguf: is no GGUF file; get the file again"):
        quantize(tmp_path / "zip.gguf")
    with pytest.raises(UsageError, match=r"none\.gguf: there is no such file; check the path"):
        quantize(tmp_path / "none.gguf")


def test_a_gguf_file_without_the_package_names_it(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    code = (
        "import sys; sys.modules['gguf'] = None; from qvtrace.cli import main; "
        "sys.argv[1:] = ['record', '--model', 'tiny.gguf']; main()"
    )

    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )

    assert completed.returncode == 2
    assert completed.stderr == (
        "qvtrace: --model tiny.gguf: is a GGUF file, which needs gguf; pip install 'gguf>=0.10'\n"
    )


def _found(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None
