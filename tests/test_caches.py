"""Caches in a generation: each step stores what it added, and the whole can be had again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from command_lines import run
from model_fixtures import Saved
from recordings import Returning, calls_of, container, tree_of
from small_archives import edit_manifest
from torch import Tensor
from transformers import DynamicCache

import qvtrace
from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.models.chatter import quiet
from qvtrace.trees import Added, TensorLeaf, from_json, tensor_leaves, to_json

KEYS = "output.layers.0.keys"


def states(*positions: float) -> Tensor:
    """Keys or values [1, 2, positions, 4], each position filled with a number."""
    return torch.tensor(positions).reshape(1, 1, -1, 1).expand(1, 2, -1, 4).contiguous()


def grow(cache: DynamicCache, *positions: float) -> None:
    cache.update(states(*positions), states(*positions) + 10, 0)


class Steps:
    """Records what a module is given, step by step."""

    def __init__(self, file: Path) -> None:
        self.model = Returning()
        self.recording = qvtrace.record(self.model, file, caches=True)

    def __enter__(self) -> "Steps":
        self.recording.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.recording.__exit__(*error)

    def look(self, cache: object) -> None:
        """A call that is given the cache, at the end of a step."""
        self.model(cache)
        self.recording.next_step()


def keys_at(archive: Archive, index: int) -> TensorLeaf:
    tree = tree_of(archive, "", "output", index)
    return dict(tensor_leaves(tree, "output"))[KEYS]


def elements_at(archive: Archive, index: int) -> list[float]:
    """The number of each position of the whole keys."""
    whole = qvtrace.cached_tensor(archive, calls_of(archive, "")[index], KEYS)
    assert whole.shape[:2] == (1, 2)
    return [float(number) for number in whole[0, 0, :, 0]]


def test_a_step_stores_what_it_added_and_the_whole_is_put_together_again(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        for positions in ([1, 2, 3], [4], [5, 6]):
            grow(cache, *positions)
            steps.look(cache)

    with Archive.open(file) as archive:
        leaves = [keys_at(archive, index) for index in range(3)]
        assert [leaf.added for leaf in leaves] == [None, Added(2, 3), Added(2, 4)]
        assert [leaf.shape[2] for leaf in leaves] == [3, 1, 2]
        assert [elements_at(archive, index) for index in range(3)] == [
            [1, 2, 3],
            [1, 2, 3, 4],
            [1, 2, 3, 4, 5, 6],
        ]


def test_an_earlier_part_that_changed_in_place_is_noticed_and_stored_whole(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        for positions in ([1, 2], [3], [4]):
            grow(cache, *positions)
            if positions == [3]:
                cache.layers[0].keys[0, 0, 0, 0] = 7  # type: ignore[index]
            steps.look(cache)

    with Archive.open(file) as archive:
        leaves = [keys_at(archive, index) for index in range(3)]
        assert [leaf.added for leaf in leaves] == [None, None, Added(2, 3)]
        assert elements_at(archive, 1) == [7, 2, 3]
        assert elements_at(archive, 2) == [7, 2, 3, 4]


def test_what_a_step_did_not_change_is_stored_as_nothing(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        grow(cache, 1, 2)
        for _ in range(3):
            steps.look(cache)

    with Archive.open(file) as archive:
        leaves = [keys_at(archive, index) for index in range(3)]
        assert [leaf.shape for leaf in leaves] == [(1, 2, 2, 4), (1, 2, 0, 4), (1, 2, 0, 4)]
        assert elements_at(archive, 2) == [1, 2]


def test_calls_within_one_step_all_tell_what_the_step_added(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        grow(cache, 1)
        steps.look(cache)
        for number in (2, 3):
            grow(cache, number)
            steps.model(cache)

    with Archive.open(file) as archive:
        leaves = [keys_at(archive, index) for index in range(3)]
        assert [leaf.shape[2] for leaf in leaves] == [1, 1, 2]
        assert [elements_at(archive, index) for index in (1, 2)] == [[1, 2], [1, 2, 3]]


def test_two_caches_and_two_samples_do_not_mix(file: Path) -> None:
    with Steps(file) as steps:
        one, other = DynamicCache(), DynamicCache()
        for number in (1, 2):
            grow(one, number)
            grow(other, number + 4)
            steps.model(one)
            steps.look(other)
        del one, other
        steps.recording.sample, steps.recording.step = 1, 0
        cache = DynamicCache()
        grow(cache, 9)
        steps.look(cache)

    with Archive.open(file) as archive:
        elements = [elements_at(archive, index) for index in range(5)]
        assert elements == [[1], [5], [1, 2], [5, 6], [9]]
        numbers = [container(tree_of(archive, "", "output", i)).number for i in range(5)]
        assert numbers == [0, 1, 0, 1, 2]


def test_steps_that_were_left_out_are_named(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        for number in (1, 2):
            grow(cache, number)
            steps.look(cache)
    edit_manifest(file, lambda manifest: manifest["calls"].pop(0))

    with (
        Archive.open(file) as archive,
        pytest.raises(DamagedArchiveError, match=r"first 1 positions .* in no step before 1"),
    ):
        elements_at(archive, 0)


def test_pieces_that_do_not_fit_together_are_damage(file: Path) -> None:
    with Steps(file) as steps:
        cache = DynamicCache()
        for number in (1, 2):
            grow(cache, number)
            steps.look(cache)

    def turn(manifest: Any) -> None:
        text = json.dumps(manifest["calls"][1])
        text = text.replace('"added": {"axis": 2', '"added": {"axis": 0')
        text = text.replace('"shape": [1, 2, 1, 4]', '"shape": [2, 1, 1, 4]')
        manifest["calls"][1] = json.loads(text)

    edit_manifest(file, turn)
    with Archive.open(file) as archive, pytest.raises(DamagedArchiveError):
        elements_at(archive, 1)


def test_a_place_without_a_cache_is_named(file: Path) -> None:
    with Steps(file) as steps:
        steps.look(torch.ones(1))

    with Archive.open(file) as archive, pytest.raises(UsageError, match=r"no tensor of a Cache"):
        elements_at(archive, 0)


def tensors_in(cache: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    for name in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, name):
            yield from tensors_in(getattr(cache, name), f"{path}.{name}")
    for index, layer in enumerate(() if hasattr(cache, "self_attention_cache") else cache.layers):
        for name, value in vars(layer).items():
            for key, tensor in value.items() if isinstance(value, dict) else [(None, value)]:
                if isinstance(tensor, Tensor):
                    inner = "" if key is None else f".[{key}]"
                    yield f"{path}.layers.{index}.{name}{inner}", tensor


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "whisper", "qwen3_moe", "mamba"])
def test_the_cache_of_each_family_comes_back_as_it_was_at_the_end(
    family: str, tmp_path: Path
) -> None:
    model: Any
    model, inputs = tiny_models.build(family)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :1]
    from transformers import GenerationMixin

    with quiet(), qvtrace.record(model, tmp_path / "fp.st", caches=True) as recording:
        generated = GenerationMixin.generate(
            model,
            **inputs,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            logits_processor=[qvtrace.TokenSteps(recording)],
        )

    name = "past_key_values" if family != "mamba" else "cache_params"
    with Archive.open(tmp_path / "fp.st") as archive:
        last = calls_of(archive, "")[-1]
        assert last.step == 11
        expected = list(tensors_in(generated.past_key_values, f"output.{name}"))
        assert len(expected) >= 4
        for path, value in expected:
            whole = qvtrace.cached_tensor(archive, last, path)
            assert np.array_equal(whole, value.numpy()), path


def test_a_generation_with_caches_grows_with_its_steps_and_not_with_their_square(
    saved: Saved, folder: Path
) -> None:
    stored = {}
    for steps in (4, 8, 16):
        for options in ([], ["--caches"]):
            file = f"{steps}{len(options)}.st"
            model = ("-m", str(saved("llama")), "--generate", str(steps))
            run("record", *model, *options, "-o", file)
            with Archive.open(file) as archive:
                shapes = [entry.shape for entry in archive.manifest.tensors]
                stored[steps, len(options)] = sum(int(np.prod(shape)) for shape in shapes)

    added = {steps: stored[steps, 1] - stored[steps, 0] for steps in (4, 8, 16)}
    assert added[16] - added[8] <= 2 * (added[8] - added[4])


def test_caches_of_two_variants_are_compared_by_what_each_step_added(
    saved: Saved, folder: Path
) -> None:
    run("record", "-m", str(saved("llama")), "--generate", "3", "--caches", "-o", "fp.st")
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")

    comparison = qvtrace.diff("fp.st", "quant.st", path="all")
    assert comparison.coverage.not_comparable == 0
    keys = [
        row
        for row in comparison.rows
        if row.module == "model.layers.1.self_attn" and row.path.endswith("layers.0.keys")
    ]
    assert [(row.step, row.shape[0]) for row in keys] == [
        (0, (1, 2, 16, 16)),
        (1, (1, 2, 1, 16)),
        (2, (1, 2, 1, 16)),
    ]
    assert all(row.status == "ok" for row in keys)


def test_a_whole_tensor_against_an_added_part_says_so(tmp_path: Path) -> None:
    for name, changes in {"fp.st": False, "quant.st": True}.items():
        with Steps(tmp_path / name) as steps:
            cache = DynamicCache()
            for number in (1, 2):
                grow(cache, number)
                if changes:
                    cache.layers[0].keys.mul_(2)  # type: ignore[union-attr]
                steps.look(cache)

    comparison = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st")
    (row,) = (row for row in comparison.rows if row.path == KEYS and row.step == 1)
    assert row.status == "shape"
    assert row.reason is not None
    assert "what a step added after the first 1 in the reference, whole in the" in row.reason


def test_show_says_what_a_step_added(saved: Saved, folder: Path) -> None:
    run("record", "-m", str(saved("llama")), "--generate", "2", "--caches", "-o", "fp.st")

    text = run("show", "fp.st", "model", "--stats").stdout
    assert "past_key_values.layers.0.keys  what the step added after the first 16" in text
    line = json.loads(run("show", "fp.st", "model", "--json").stdout.splitlines()[1])
    keys = line["output"]["past_key_values"]["layers"][0]["keys"]
    assert keys["shape"] == [1, 2, 1, 16]
    assert keys["added"] == {"axis": 2, "after": 16}


@pytest.mark.parametrize(
    "added",
    [7, {}, {"axis": 2, "after": -1}, {"axis": 4, "after": 1}, {"axis": True, "after": 1}],
    ids=["number", "empty", "negative", "axis", "bool"],
)
def test_an_added_part_that_no_writer_writes_is_damage(added: object) -> None:
    tree = to_json(TensorLeaf("float32", (1, 2, 1, 4), "0" * 32, added=Added(2, 3)))
    assert from_json(tree) == TensorLeaf("float32", (1, 2, 1, 4), "0" * 32, added=Added(2, 3))

    with pytest.raises(ValueError, match=r"added|grew|count"):
        from_json({**tree, "added": added})
