"""A replay of a generation: Caches are built again as each call found them."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_lines import run
from model_fixtures import Saved

from qvtrace.archive import Archive


def compared(*words: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run("diff", *words, "--format", "json").stdout)["rows"]
    return rows


BLOCKS = ("--include", "model.layers.*", "--include", "model", "--include", "lm_head")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_replayed_on_itself_gives_the_same_bits_at_every_step(
    folder: Path, saved: Saved, family: str
) -> None:
    run("record", "-m", str(saved(family)), "--generate", "3", "--caches", "-o", "fp.st")

    run("replay", "fp.st", "--variant", "fp", *BLOCKS, "-o", "local.st")

    rows = compared(
        "fp.st", "local.st", "--include", "*.self_attn", "--include", "model.layers.[01]"
    )
    assert {row["step"] for row in rows} == {0, 1, 2}
    assert {row["status"] for row in rows} <= {"identical", "opaque"}
    assert {row["module"] for row in rows if row["status"] == "identical"} == {
        f"model.layers.{number}{part}" for number in (0, 1) for part in ("", ".self_attn")
    }
    given = compared("fp.st", "local.st", "--path", "kwargs", "--include", "*.self_attn")
    tensors = [row for row in given if row["path"].endswith(".keys")]
    assert tensors
    assert {row["status"] for row in tensors} == {"identical"}


def test_what_a_quantized_block_adds_is_told_at_every_step(folder: Path, saved: Saved) -> None:
    run("record", "-m", str(saved("llama")), "--generate", "3", "--caches", "-o", "fp.st")

    run("replay", "fp.st", "--include", "*.self_attn", "-o", "local.st")

    rows = compared("fp.st", "local.st", "--include", "*.self_attn")
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["step"] for row in measured} == {0, 1, 2}
    assert all(0 < row["metrics"]["noise_out"] < 0.05 for row in measured)


@pytest.mark.parametrize(
    ("family", "caches", "reason"),
    [
        ("llama", (), "whose tensors were not stored: record with --caches"),
        ("gemma3", ("--caches",), "a sliding DynamicCache, which cannot be built again"),
    ],
)
def test_a_cache_that_cannot_be_built_is_counted_with_its_reason(
    folder: Path, saved: Saved, family: str, caches: tuple[str, ...], reason: str
) -> None:
    run("record", "-m", str(saved(family)), "--generate", "2", *caches, "-o", "fp.st")

    result = run("replay", "fp.st", "--variant", "fp", *BLOCKS, "-o", "local.st")

    assert reason in " ".join(result.stderr.split())
    with Archive.open("local.st") as archive:
        replayed = {call.module for call in archive.manifest.calls}
    assert {"lm_head", "model.layers.0.mlp"} <= replayed
    assert replayed.isdisjoint({"model", "model.layers.0", "model.layers.0.self_attn"})
