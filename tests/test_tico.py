"""TICO's wrappers around Qwen3-VL, and its own arithmetic on the same tensors."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recordings import calls_of

from qvtrace.archive import Archive
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.rows import Row
from qvtrace.models.embedded import embedded_config, embedded_sample
from qvtrace.models.request import ModelRequest
from qvtrace.recording.recorder import record
from qvtrace.trees import TensorLeaf, tensor_leaves

quantization = pytest.importorskip("tico.quantization")
transformers = pytest.importorskip("transformers")
if not hasattr(
    pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl"),
    "Qwen3VLModelOutputWithPast",
):
    pytest.skip("TICO's Qwen3-VL needs transformers up to 5.22", allow_module_level=True)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float model, its wrappers with fake quantization off, and the quantized model."""
    from tico.quantization.config.ptq import PTQConfig

    folder = tmp_path_factory.mktemp("tico")
    files = {name: folder / f"{name}.st" for name in ("fp", "wrapped", "uint8")}
    torch.manual_seed(42)
    model = transformers.Qwen3VLForConditionalGeneration._from_config(
        embedded_config(), attn_implementation="eager"
    ).eval()
    inputs = embedded_sample(model, ModelRequest()).kwargs
    run(model, inputs, files["fp"])
    vision = {
        "grid_thw": tuple(inputs["image_grid_thw"][0].tolist()),
        "visual_start_idx": inputs["input_ids"][0].tolist().index(model.config.image_token_id),
        "spatial_merge_size": model.config.vision_config.spatial_merge_size,
    }
    config = PTQConfig(model_args={"vision": vision})
    prepared = quantization.prepare(copy.deepcopy(model), config, inplace=True)
    run(prepared, inputs, files["wrapped"])
    run(quantization.convert(prepared, inplace=True), inputs, files["uint8"])
    return files


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor], file: Path) -> None:
    with torch.no_grad(), record(model, file):
        model(**inputs, use_cache=False)


def rows_of(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.rows if row.status in ("ok", "identical")]


def test_wrappers_with_quantization_off_agree_module_by_module(archives):
    comparison = diff(archives["fp"], archives["wrapped"])

    coverage = comparison.coverage
    assert coverage.modules_reference == 77
    assert coverage.modules_compared >= 74
    assert len(coverage.wrappers) == 74
    explained = [row for row in comparison.rows if row.is_made_up_for]
    assert {row.module.rpartition(".")[2] for row in explained} == {"qkv", "k_norm"}
    assert len(explained) == 4
    rest = [
        row.residual_peir if row.is_made_up_for else row.metrics.peir for row in rows_of(comparison)
    ]
    assert max(peir or 0 for peir in rest) < 1e-5
    assert "fault" not in comparison.verdict.text


def test_norms_in_another_layout_and_keys_with_a_folded_scale_are_named(archives):
    rows = {row.module: row for row in diff(archives["fp"], archives["wrapped"]).rows}

    layer = rows["model.language_model.layers.0.self_attn.k_norm"]
    assert layer.layout == "permute(0, 2, 1, 3)"
    assert layer.scale_factor == pytest.approx(1 / math.sqrt(32))
    assert rows["model.visual.patch_embed.proj"].layout == "reshape(280, 64, 1, 1, 1)"
    ((start, stop, value),) = rows["model.visual.blocks.0.attn.qkv"].scale_factor.ranges()
    assert (start, stop, value) == (64, 128, pytest.approx(0.25))


def test_quantized_folds_are_told_from_noise(archives):
    comparison = diff(archives["fp"], archives["uint8"])

    scaled = [row for row in comparison.rows if row.scale_factor is not None]
    assert {row.module.rpartition(".")[2] for row in scaled} == {"qkv", "k_norm"}
    assert all(row.is_made_up_for for row in scaled)


def pairs(files: dict[str, Path], name: str) -> Iterator[tuple[Row, torch.Tensor, torch.Tensor]]:
    """Compared rows with their tensors, the candidate's in the reference's layout."""
    with Archive.open(files["fp"]) as reference, Archive.open(files[name]) as candidate:
        for row in rows_of(diff(reference, candidate)):
            if row.metrics.peir is not None and row.metrics.sqnr is not None:
                yield row, *tensors(reference, candidate, row)


def tensors(reference: Archive, candidate: Archive, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    found = [leaf_of(reference, row.module, row.path)]
    names = {call.module for call in candidate.manifest.calls}
    plain = {
        ".".join(part for part in n.split(".") if part != "wrapped"): n
        for n in sorted(names, key=len, reverse=True)
    }
    found.append(leaf_of(candidate, plain[row.module], row.path))
    one, other = (
        torch.from_numpy(archive.array(leaf).copy())
        for archive, leaf in zip((reference, candidate), found, strict=True)
    )
    return one, other if row.layout is None else eval(f"other.{row.layout}", {"other": other})


def leaf_of(archive: Archive, module: str, path: str) -> TensorLeaf:
    tree = calls_of(archive, module)[0].tree("output")
    assert tree is not None
    leaves = dict(tensor_leaves(tree, "output"))
    return leaves[path] if path in leaves else next(iter(leaves.values()))


@pytest.mark.parametrize("name", ["wrapped", "uint8"])
def test_numbers_are_those_of_tico_on_the_same_tensors(archives, name):
    from tico.quantization.wrapq.utils.introspection import compare_outputs

    count = 0
    for row, reference, candidate in pairs(archives, name):
        theirs = compare_outputs(reference, candidate)
        ours = row.metrics
        count += 1
        assert (ours.mean_abs_error, ours.min_abs_error, ours.max_abs_error) == pytest.approx(
            (theirs.mean, theirs.min, theirs.max), rel=1e-5
        ), row.module
        assert (ours.stddev_abs_error, ours.peir) == pytest.approx(
            (theirs.stddev, theirs.peir), rel=1e-5
        ), row.module
    assert count > 70
