"""Files of the ranks of one run -> one archive, and what is not to be merged."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import (
    TwoLayers,
    record_distributed_tensors,
    record_while_the_other_waits,
    record_with_plan,
    run_ranks,
)
from small_archives import edit_manifest
from test_qparams import FakeQuantized
from tiny_models import build
from torch import nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.archive import Archive
from qvtrace.cli import app
from qvtrace.errors import DamagedArchiveError, ExistingFileError, UsageError
from qvtrace.manifest import ModuleEntry
from qvtrace.recording.recorder import record
from qvtrace.trees import Container, TensorLeaf

HIDDEN = torch.linspace(-1, 1, 16).reshape(2, 8)


def ranks_of(file: Path, count: int = 2) -> list[Path]:
    return [file.with_name(f"{file.stem}.rank{n}-of-{count}.st") for n in range(count)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recordings of a tiny Llama, by one process and by two."""
    folder = tmp_path_factory.mktemp("plan")
    model, inputs = build("llama")
    model.save_pretrained(folder / "model")
    torch.save(inputs, folder / "inputs.pt")
    model.set_attn_implementation("eager")
    with record(model, folder / "alone.st", weights=True), torch.no_grad():
        model(**inputs, use_cache=False)
    run_ranks(record_with_plan, folder)
    qvtrace.merge(ranks_of(folder / "parallel.st"))
    return folder


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recordings of two layers that torch has spread over two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    model = TwoLayers()
    with record(model, folder / "alone.st", weights=True), torch.no_grad():
        model(HIDDEN)
    run_ranks(record_distributed_tensors, folder)
    return folder


def test_the_parts_of_a_plan_come_together_as_placed(planned: Path) -> None:
    comparison = qvtrace.diff(planned / "alone.st", planned / "parallel.st", path="all")

    apart = [row for row in comparison.rows if row.status == "structure"]
    assert {row.path for row in apart} == {"output.1"}  # attention maps: no plan tells of heads
    for row in comparison.rows:
        if row.path.startswith("weights"):
            assert row.status == "identical"
        elif row.metrics.peir is not None:
            assert row.metrics.peir < 1e-5, row.module
    shapes = {row.module: row.shape for row in comparison.rows if row.path == "output"}
    assert {reference == candidate for reference, candidate in shapes.values()} == {True}
    assert "model.layers.0.mlp.act_fn" in shapes


def test_every_rank_says_what_it_holds(planned: Path) -> None:
    with Archive.open(planned / "parallel.rank1-of-2.st") as archive:
        modules = {entry.name: entry for entry in archive.manifest.modules}
        environment = archive.manifest.environment

    assert (environment["rank"], environment["world_size"]) == (1, 2)
    assert modules["model.layers.0.self_attn.o_proj"].placement == {
        "weights": {"weight": {"of": ["Shard(1)"], "mesh": [2], "shape": [64, 64]}},
        "style": "rowwise",
    }
    assert modules["model.norm"].placement is None


def test_a_merged_archive_is_whole_and_says_where_it_comes_from(planned: Path) -> None:
    with Archive.open(planned / "parallel.st") as archive:
        manifest = archive.manifest
        assert list(archive.damaged_tensors()) == []

    assert manifest.complete
    assert manifest.settings["merged"] == ["parallel.rank0-of-2.st", "parallel.rank1-of-2.st"]
    assert "rank" not in manifest.environment
    assert all(entry.placement is None for entry in manifest.modules)
    assert any("kept apart by rank" in warning for warning in manifest.skipped.warnings)
    assert (planned / "parallel.manifest.json").exists()


@pytest.mark.parametrize("name", ["placed.st", "local.st"])
def test_distributed_tensors_and_local_parts_of_them_are_joined(
    name: str, distributed: Path
) -> None:
    output = distributed / f"merged.{name}"

    merged = qvtrace.merge(ranks_of(distributed / name), output, overwrite=True)

    assert merged.counts.apart == 0
    comparison = qvtrace.diff(distributed / "alone.st", output, path="all")
    assert {row.status for row in comparison.rows} <= {"ok", "identical", "exact"}
    assert all((row.metrics.max_abs_error or 0) < 1e-6 for row in comparison.rows)
    assert {row.module for row in comparison.rows} == {"", "up", "act", "down"}


def test_a_part_is_recorded_with_its_placement(distributed: Path) -> None:
    with Archive.open(ranks_of(distributed / "placed.st")[1]) as archive:
        call = next(call for call in archive.manifest.calls if call.module == "up")
        leaf = call.tree("output")

    assert isinstance(leaf, TensorLeaf)
    assert leaf.shape == (2, 6)
    assert leaf.original is not None
    assert leaf.original.class_name == "DTensor"
    assert leaf.original.placement is not None
    assert leaf.original.placement.of == ("Shard(1)",)
    assert leaf.original.placement.shape == (2, 12)


def test_no_hook_waits_for_another_process(tmp_path: Path) -> None:
    run_ranks(record_while_the_other_waits, tmp_path, seconds=60)

    with Archive.open(tmp_path / "alone.rank0-of-2.st") as archive:
        outputs = [call.tree("output") for call in archive.manifest.calls]
        placements = [leaf.original.placement.of for leaf in outputs]  # type: ignore[union-attr]
    assert placements == [("Shard(0)",), ("Partial(sum)",)]


class Parts(nn.Module):
    """Gives what it was made with."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden: torch.Tensor) -> object:
        return self.value


def record_ranks(
    folder: Path, *models: nn.Module, hidden: Any = HIDDEN, **options: Any
) -> list[Path]:
    """A file of each model, as the process of that rank would have written it."""
    files = ranks_of(folder / "fp.st", len(models))
    for rank, (model, file) in enumerate(zip(models, files, strict=True)):
        with record(model, file, overwrite=True, **options), torch.no_grad():
            model(hidden)
        place = {"rank": rank, "world_size": len(models)}
        edit_manifest(file, lambda json, place=place: json["environment"].update(place))
    return files


def place(file: Path, module: str, **placement: Any) -> None:
    """Say what a rank holds of a module's weight."""

    def edit(json: Any) -> None:
        (entry,) = (entry for entry in json["modules"] if entry["name"] == module)
        entry["placement"] = placement

    edit_manifest(file, edit)


def output_of(file: Path, module: str = "") -> Any:
    with Archive.open(file) as archive:
        tree = next(c for c in archive.manifest.calls if c.module == module).tree("output")
        return archive.array(tree).copy() if isinstance(tree, TensorLeaf) else tree


def test_what_differs_without_a_placement_is_kept_apart_and_said(tmp_path: Path) -> None:
    files = record_ranks(tmp_path, Parts((torch.zeros(2), 1)), Parts((torch.ones(2), 2)))

    merged = qvtrace.merge(files)

    assert merged.file == tmp_path / "fp.st"
    assert (merged.counts.joined, merged.counts.apart) == (0, 2)
    tree = output_of(merged.file)
    (_, tensors), (_, numbers) = tree.items
    assert isinstance(tensors, Container)
    assert tensors.class_name == "ranks"
    assert [name for name, _ in tensors.items] == ["rank0", "rank1"]
    assert [leaf.value for _, leaf in numbers.items] == [1, 2]
    assert merged.warnings == (
        "2 places kept apart by rank, since nothing says how they belong together: "
        "#0/output.0, #0/output.1",
    )


def test_what_all_ranks_edit_in_place_is_edited_in_the_whole(tmp_path: Path) -> None:
    class Editing(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.number = number

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mul_(self.number) if self.number else hidden

    told = []
    for numbers in ((2, 2), (2, 0), (0, 0)):
        files = record_ranks(tmp_path, *map(Editing, numbers), hidden=HIDDEN.clone())
        with Archive.open(qvtrace.merge(files, overwrite=True).file) as archive:
            told.append(archive.manifest.calls[0].edited)

    assert told == [("inputs.0",), None, ()]


def test_uneven_parts_are_joined_if_they_add_up(tmp_path: Path) -> None:
    files = record_ranks(tmp_path, Parts(torch.zeros(2, 3)), Parts(torch.ones(2, 2)))
    weight = {"of": ["Shard(0)"], "mesh": [2], "shape": [5, 8]}
    for file in files:
        place(file, "", weights={"weight": weight})

    merged = qvtrace.merge(files)

    assert output_of(merged.file).tolist() == [[0, 0, 0, 1, 1]] * 2


def test_equal_parts_are_parts_all_the_same(tmp_path: Path) -> None:
    """A sharded output of zeros is equal on every rank, and half of the whole."""
    files = record_ranks(tmp_path, Parts(torch.zeros(2, 3)), Parts(torch.zeros(2, 3)))
    for file in files:
        place(file, "", weights={"weight": {"of": ["Shard(0)"], "mesh": [2], "shape": [6, 8]}})

    assert output_of(qvtrace.merge(files).file).shape == (2, 6)


def test_an_output_that_was_gathered_is_kept_once(tmp_path: Path) -> None:
    files = record_ranks(tmp_path, Parts(torch.ones(2, 6)), Parts(torch.ones(2, 6)))
    for file in files:
        place(file, "", weights={"weight": {"of": ["Shard(0)"], "mesh": [2], "shape": [6, 8]}})

    assert output_of(qvtrace.merge(files).file).shape == (2, 6)


@pytest.mark.parametrize("style", ["colwise", "rowwise", "colwise_gather_output"])
def test_a_plan_tells_of_layers_whose_weights_do_not(style: str, tmp_path: Path) -> None:
    files = record_ranks(tmp_path, Parts(torch.zeros(2, 3)), Parts(torch.ones(2, 3)))
    for file in files:
        place(file, "", style=style)

    merged = qvtrace.merge(files)

    joined = isinstance(output_of(merged.file), np.ndarray)
    assert joined == (style == "colwise")


def test_quantization_parameters_that_all_ranks_have_are_kept(tmp_path: Path) -> None:
    models = [nn.Sequential(FakeQuantized(0.01, 128), FakeQuantized(s, 0)) for s in (0.1, 0.2)]

    merged = qvtrace.merge(record_ranks(tmp_path, *models))

    with Archive.open(merged.file) as archive:
        kept = {entry.name: entry.quantization for entry in archive.manifest.modules}
        assert kept["0"] is not None
        assert kept["1"] is None
        assert list(archive.damaged_tensors()) == []
    assert any("differ from rank to rank" in warning for warning in merged.warnings)


def test_modules_that_only_one_rank_has_are_kept(tmp_path: Path) -> None:
    """As the stages of a pipeline are."""
    first, second = nn.Sequential(nn.Identity()), nn.Sequential()
    second.add_module("1", nn.Identity())

    merged = qvtrace.merge(record_ranks(tmp_path, first, second))

    with Archive.open(merged.file) as archive:
        assert [call.module for call in archive.manifest.calls] == ["0", "", "1"]
        assert {entry.name for entry in archive.manifest.modules} == {"", "0", "1"}


def test_an_incomplete_rank_makes_the_whole_incomplete(tmp_path: Path) -> None:
    files = record_ranks(tmp_path, nn.Identity(), nn.Identity())
    edit_manifest(files[1], lambda json: json.update(complete=False, error="OSError: full"))

    merged = qvtrace.merge(files)

    assert merged.file == tmp_path / "fp.st.partial"
    with Archive.open(merged.file) as archive:
        assert archive.manifest.error == "OSError: full"


@pytest.fixture(name="pair")
def two_files(tmp_path: Path) -> list[Path]:
    """The files of two ranks that saw the same."""
    return record_ranks(tmp_path, nn.Identity(), nn.Identity())


def trouble(*arguments: object) -> str:
    """What the command says on standard error, in one line."""
    result = CliRunner().invoke(app, ["merge", *map(str, arguments)])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    return result.stderr


def test_the_command_says_what_it_wrote(pair: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["merge", *map(str, pair[::-1])])

    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tmp_path / 'fp.st'}: ")
    assert "1 call of 2 ranks; 0 tensors joined, 3 alike on every rank, 0 kept apart" in (
        result.stdout
    )
    assert result.stderr == f"next        qvtrace show {tmp_path / 'fp.st'}\n"


def test_a_rank_that_is_missing_is_named(pair: list[Path]) -> None:
    assert trouble(pair[1]) == (
        f"qvtrace: {pair[1]}: rank 0 of 2 is missing; name the files of all ranks\n"
    )


def test_a_rank_that_is_there_twice_is_named(pair: list[Path], tmp_path: Path) -> None:
    again = shutil.copy(pair[0], tmp_path / "again.st")

    assert f"{again}: has rank 0, as {pair[0]} has" in trouble(*pair, again)


def test_files_of_runs_of_other_sizes_are_named(pair: list[Path]) -> None:
    edit_manifest(pair[1], lambda json: json["environment"].update(world_size=3))

    assert "is of a run of 3 processes" in trouble(*pair)


def test_files_of_other_runs_are_named(pair: list[Path]) -> None:
    edit_manifest(pair[1], lambda json: json["variant"].update(name="quant"))

    assert "is of another run" in trouble(*pair)
    assert "variant quant against None" in trouble(*pair)


def test_a_file_of_a_process_alone_is_named(pair: list[Path], tmp_path: Path) -> None:
    with record(nn.Identity(), tmp_path / "alone.st") as recording:
        recording._model(HIDDEN)

    assert "was recorded by one process alone" in trouble(tmp_path / "alone.st", *pair)


def test_nothing_is_overwritten_unasked(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "fp.st").write_text("mine")

    with pytest.raises(ExistingFileError, match=r"fp\.st"):
        qvtrace.merge(pair)
    with pytest.raises(UsageError, match="which is merged"):
        qvtrace.merge(pair, pair[0], overwrite=True)

    assert (tmp_path / "fp.st").read_text() == "mine"
    assert qvtrace.merge(pair, overwrite=True).file.stat().st_size > 1000


def test_a_name_without_a_rank_needs_an_output(pair: list[Path], tmp_path: Path) -> None:
    renamed = pair[0].rename(tmp_path / "first.st")

    assert "say with --output what to write" in trouble(pair[1], renamed)
    assert qvtrace.merge([renamed, pair[1]], tmp_path / "whole.st").calls == 1


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda json: json["calls"][0].update(output={"type": 1}), id="output"),
        pytest.param(
            lambda json: json["modules"][0].update(quantization={"scale": 1}), id="quantization"
        ),
        pytest.param(
            lambda json: json["modules"][0].update(placement={"weights": {"weight": {"of": 3}}}),
            id="placement",
        ),
        pytest.param(lambda json: json["calls"][0]["output"].update(digest="0" * 32), id="digest"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_left(
    edit: Any, pair: list[Path], tmp_path: Path
) -> None:
    for file in pair:
        edit_manifest(file, edit)

    with pytest.raises(DamagedArchiveError, match=r"rank0-of-2\.st"):
        qvtrace.merge(pair)

    assert not list(tmp_path.glob("fp.st*"))


def test_merging_does_without_torch(pair: list[Path]) -> None:
    code = "import sys, qvtrace; qvtrace.merge(sys.argv[1:]); print('torch' in sys.modules)"

    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, pair)], capture_output=True, text=True, check=True
    )

    assert result.stdout == "False\n"


def test_a_merged_archive_reads_as_any_other(pair: list[Path]) -> None:
    merged = qvtrace.merge(pair)

    with qvtrace.load(pair[0]) as archive:
        modules = archive.manifest.modules
    assert modules == (ModuleEntry("", "Identity", None, calls=1),)
    assert qvtrace.diff(pair[0], merged.file).rows[0].status == "identical"
    assert CliRunner().invoke(app, ["verify", str(merged.file)]).exit_code == 0
