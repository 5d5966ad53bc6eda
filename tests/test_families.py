"""Families of models from the command line: recorded float and quantized, and compared."""

from pathlib import Path
from typing import Any

import pytest
from command_lines import run
from model_fixtures import VISION_TRANSFORMER, Saved
from tiny_models import FAMILIES

import qvtrace
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.rows import Row

SENSIBLE = 5.0  # dB: what int8 leaves of an output is far more signal than noise


def record_both(*model: str, again: tuple[str, ...] = ()) -> Any:
    """Record `fp.st` and, like it, `quant.st`; what the latter said."""
    run("record", "--model", *model, "-o", "fp.st")
    quant = ("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")
    return run(*quant, *again)


def outputs(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.module == ""]


def assert_all_compared(comparison: Comparison) -> None:
    coverage = comparison.coverage
    assert comparison.comparable.ok
    assert coverage.modules_compared == coverage.modules_reference == coverage.modules_candidate
    assert coverage.compared == coverage.pairs > 0
    assert not coverage.only_in_reference
    assert not coverage.only_in_candidate


def assert_sensible(rows: list[Row]) -> None:
    """Quantized, and yet the same output."""
    measured = [row.metrics.sqnr for row in rows if row.status == "ok"]
    assert measured
    assert all(sqnr is not None and sqnr > SENSIBLE for sqnr in measured)


@pytest.mark.parametrize("origin", [[], ["--from-config"]], ids=["weights", "config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_recorded_quantized_and_compared_whole(
    family: str, origin: list[str], saved: Saved, folder: Path
) -> None:
    record_both(str(saved(family)), *origin)

    comparison = qvtrace.diff("fp.st", "quant.st")
    assert_all_compared(comparison)
    if family == "gpt2":  # its matrices are Conv1D, which torchao does not know
        assert "changed NO module" in comparison.verdict.text
        assert {row.status for row in comparison.rows} == {"identical"}
    else:
        assert_sensible(outputs(comparison))


def test_a_vision_transformer_of_the_users_is_recorded_quantized_and_compared_whole(
    folder: Path,
) -> None:
    (folder / "vit.py").write_text(VISION_TRANSFORMER)
    model = ("vit.py:vision_transformer",)

    quant = record_both(*model, again=("--model", *model))

    comparison = qvtrace.diff("fp.st", "quant.st")
    assert_all_compared(comparison)
    assert_sensible(outputs(comparison))
    assert "blocks.layers.*.self_attn.out_proj (2)" in quant.stderr  # its weight is used directly


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_fused_experts_that_stay_float_are_told_in_record_show_and_verdict(
    family: str, saved: Saved, folder: Path
) -> None:
    quant = record_both(str(saved(family)))

    assert "fused experts stay float, 46% of the weights" in quant.stderr
    assert "model.layers.*.mlp.experts (2)" in run("show", "quant.st").stdout
    text = qvtrace.diff("fp.st", "quant.st").verdict.text
    assert "fused experts stayed float, 46% of the weights" in text


def test_weights_that_are_used_directly_and_modules_that_never_fire_are_named(
    saved: Saved, folder: Path
) -> None:
    recorded = run("record", "--model", str(saved("mamba")), "-o", "fp.st").stderr
    shown = run("show", "fp.st").stdout

    for text in (" ".join(recorded.split()), " ".join(shown.split())):
        assert "2 modules, never called: backbone.layers.*.mixer.act (2)" in text
        assert (
            "4 modules, never called, with weights of its own: used directly, or not at all: "
            "backbone.layers.*.mixer.conv1d (2), backbone.layers.*.mixer.dt_proj (2)"
        ) in text


def test_show_names_every_module_that_never_fired(folder: Path) -> None:
    (folder / "spare.py").write_text(
        "import torch\n"
        "def build():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "    for name in 'abcdefghij':\n"
        "        model[0].add_module(name, torch.nn.Dropout())\n"
        "    return model, torch.ones(1, 2)\n"
    )

    recorded = run("record", "--model", "spare.py:build", "-o", "fp.st").stderr

    assert "and 6 more" in recorded
    for name in "abcdefghij":
        assert f"0.{name}" in run("show", "fp.st").stdout


def test_an_image_is_crafted_with_as_many_tokens_as_the_model_makes_of_it(
    saved: Saved, folder: Path
) -> None:
    run("record", "--model", str(saved("gemma3_image")), "-o", "fp.st")

    with qvtrace.load("fp.st") as archive:
        called = {call.module for call in archive.manifest.calls}
        (root,) = archive.manifest.inputs.root_calls
    assert "model.vision_tower.embeddings.patch_embedding" in called
    assert dict(root.kwargs["items"])["input_ids"]["shape"] == [1, 20]
