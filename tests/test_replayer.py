"""Modules run one by one on recorded inputs: what differs then is their own error."""

import copy
import re
from pathlib import Path

import pytest
import torch
from recordings import Adding
from test_origins import (
    FAULTS,
    faulty,
    int4_where_int8_was_meant,
    original,
    recorded,
    reference,
    scale_doubled,
)
from torch import Tensor, nn
from typer.testing import CliRunner

import qvtrace
from qvtrace import UsageError, diff, load, record, replay
from qvtrace.cli import app
from qvtrace.errors import ExistingFileError

__all__ = ["original", "reference"]  # fixtures


class Block(nn.Module):
    """Two children, one of which takes something that no archive can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = Taking()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden), token=object())


class Taking(nn.Module):
    def forward(self, hidden: Tensor, token: object) -> Tensor:
        return hidden + 1


class Twice(nn.Module):
    """Calls one child again and again, and edits what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.add = Adding(1.0)

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(3):
            hidden = self.inner(hidden)
            hidden.mul_(0.5)
        return self.add(hidden)


def traced(model: nn.Module, file: Path, inputs: Tensor | None = None) -> Path:
    with qvtrace.record(model, file), torch.no_grad():
        model(torch.arange(16.0).reshape(2, 8) / 16 if inputs is None else inputs)
    return file


def test_the_model_itself_replays_without_any_difference(original, reference, tmp_path):
    report = replay(original, reference, tmp_path / "local.st")

    rows = diff(reference, tmp_path / "local.st").rows
    assert {row.status for row in rows} == {"identical"}
    assert (report.modules, report.skipped) == (report.chosen, {})
    assert len(rows) > 40


def test_every_call_of_a_module_is_replayed_on_its_own_inputs(tmp_path):
    model = Twice()
    fp = traced(model, tmp_path / "fp.st")
    other = copy.deepcopy(model)
    other.inner.weight.data *= 1.01

    replay(other, fp, tmp_path / "local.st")

    with load(fp) as archive, load(tmp_path / "local.st") as local:
        for call in local.manifest.calls:
            twin = next(
                one
                for one in archive.manifest.calls
                if (one.module, one.index) == (call.module, call.index)
            )
            assert (call.inputs, call.kwargs) == (twin.inputs, twin.kwargs)
        assert [(call.module, call.index) for call in local.manifest.calls] == [
            ("inner", 0),
            ("inner", 1),
            ("inner", 2),
            ("add", 0),
        ]
    statuses = {row.module: row.status for row in diff(fp, tmp_path / "local.st").rows}
    assert statuses == {"inner": "ok", "add": "identical"}


def test_a_replay_can_be_compared_verified_and_shown_like_a_recording(
    original, reference, tmp_path
):
    replay(original, reference, tmp_path / "local.st", variant="quant")
    with load(tmp_path / "local.st") as local, load(reference) as archive:
        assert list(local.damaged_tensors()) == []
        assert local.manifest.complete
        assert local.manifest.variant.name == "quant"
        assert local.manifest.inputs.root_calls == archive.manifest.inputs.root_calls
    assert diff(reference, tmp_path / "local.st").comparable.ok


def test_leaves_are_replayed_unless_blocks_are_asked_for(original, reference, tmp_path):
    def modules(name: str, **options: object) -> set[str]:
        replay(original, reference, tmp_path / name, **options)
        with load(tmp_path / name) as local:
            return {call.module for call in local.manifest.calls}

    leaves = modules("leaves.st")
    assert "model.layers.0.mlp.up_proj" in leaves
    assert "model.layers.0.mlp" not in leaves
    assert modules("layers.st", include=["model.layers.?"]) == {
        f"model.layers.{index}" for index in range(4)
    }
    assert modules("deep.st", depth=3) == {
        *(f"model.layers.{index}" for index in range(4)),
        "model.embed_tokens",
        "model.rotary_emb",
        "model.norm",
        "lm_head",
    }


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        self.count = self.count + 1
        return self.norm(hidden)


def test_a_replay_leaves_what_modules_keep_in_buffers_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Counting()).train()
    with torch.no_grad(), record(model, tmp_path / "fp.st"):
        model(torch.randn(16, 8))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    replay(model, tmp_path / "fp.st", tmp_path / "local.st", include=["*"])

    assert before["1.count"] == 1
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_what_cannot_be_replayed_is_counted_with_its_reason(tmp_path):
    model = Block()
    fp = traced(model, tmp_path / "fp.st")

    report = replay(model, fp, tmp_path / "local.st")

    assert (report.modules, report.chosen) == (1, 2)
    assert report.skipped == {"kwargs.token was a object, which was not stored": ("second",)}
    with load(tmp_path / "local.st") as local:
        assert local.manifest.skipped.reasons == report.skipped


def test_a_module_that_raises_or_is_missing_is_counted_and_the_rest_goes_on(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    fp = traced(model, tmp_path / "fp.st")
    other = copy.deepcopy(model)
    other[0] = nn.Linear(4, 8)
    del other[2]

    report = replay(other, fp, tmp_path / "local.st")

    assert report.modules == 1
    reasons = {names: reason for reason, names in report.skipped.items()}
    assert reasons["2",] == "the model has no such module"
    assert reasons["0",].startswith("raised RuntimeError: mat1 and mat2 shapes")


def test_inputs_that_were_not_stored_are_a_reason(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    with qvtrace.record(model, tmp_path / "fp.st", inputs=False):
        model(torch.ones(2, 8))

    report = replay(model, tmp_path / "fp.st", tmp_path / "local.st")

    assert report.skipped == {"their inputs were not stored": ("0",)}


def test_wrapped_modules_are_found_by_the_names_of_their_originals(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def forward(self, hidden: Tensor) -> Tensor:
            return self.wrapped(hidden) + 1

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fp = traced(model, tmp_path / "fp.st")
    wrapped = nn.Sequential(Wrapper(copy.deepcopy(model[0])), copy.deepcopy(model[1]))

    replay(wrapped, fp, tmp_path / "local.st")

    rows = {row.module: row for row in diff(fp, tmp_path / "local.st").rows}
    assert rows["0"].metrics.mean_error == pytest.approx(1.0)
    assert rows["1"].status == "identical"


def test_a_wrapper_is_replayed_and_not_the_original_that_it_keeps(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, original: nn.Module) -> None:
            super().__init__()
            self.module = original
            self.inner = Scaled(original.inner)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden)

    class Scaled(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = copy.deepcopy(wrapped)

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * self.wrapped(hidden)

    class Outer(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def forward(self, hidden: Tensor) -> Tensor:
            return self.wrapped(hidden)

    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden)

    model = Original()
    fp = traced(model, tmp_path / "fp.st")

    replay(Outer(Wrapper(model)), fp, tmp_path / "local.st")

    (row,) = diff(fp, tmp_path / "local.st").rows
    assert row.module == "inner"
    assert row.status == "ok"


@pytest.mark.parametrize(
    ("fault", "where"),
    [pytest.param(f[0], f[1], id=f"{f[0].__name__}-{f[1]}") for f in FAULTS[:9:2]],
)
def test_a_faulty_module_comes_first_by_its_own_error(original, reference, tmp_path, fault, where):
    model = faulty(original, "quantized", (fault, where))
    candidate = recorded(model, tmp_path / "candidate.st")
    replay(model, reference, tmp_path / "local.st", variant="quant")

    comparison = diff(reference, candidate, local=tmp_path / "local.st")

    origin = comparison.verdict.origins[0]
    assert (origin.module, origin.evidence) == (f"model.{where}", "local")
    assert comparison.rows[0].module == f"model.{where}"


def test_rows_are_ranked_by_local_error_unless_another_order_is_asked_for(
    original, reference, tmp_path
):
    model = faulty(original, "quantized")
    candidate = recorded(model, tmp_path / "candidate.st")
    replay(model, reference, tmp_path / "local.st", variant="quant")

    def places(**options):
        rows = diff(reference, candidate, local=tmp_path / "local.st", **options).rows
        return [row.place for row in rows]

    ranked, executed = places(), [row.place for row in diff(reference, candidate).rows]
    assert ranked == places(sort_by="local_noise") != executed
    assert places(top=3) == ranked[:3]
    assert places(sort_by="order") == executed


def test_local_error_is_found_where_the_inherited_one_hides_it(original, reference, tmp_path):
    faults = (
        (scale_doubled, "layers.1.mlp.down_proj"),
        (int4_where_int8_was_meant, "layers.3.self_attn.v_proj"),
    )
    model = faulty(original, "quantized", *faults)
    candidate = recorded(model, tmp_path / "candidate.st")
    replay(model, reference, tmp_path / "local.st", variant="quant")

    verdict = diff(reference, candidate, local=tmp_path / "local.st").verdict

    local = [origin.module for origin in verdict.origins if origin.evidence == "local"]
    assert local == [f"model.{name}" for _, name in faults]
    assert verdict.lines[0].startswith(f"origin at model.{faults[0][1]} (inputs agree, output ")
    told = next(line for line in verdict.lines if line.startswith("these make "))
    assert re.match(r"these make about \d+% of the final error \(-?\d+ dB\): by their local ", told)


def test_local_figures_are_those_of_a_diff_with_the_replay(original, reference, tmp_path):
    model = faulty(original, "quantized")
    candidate = recorded(model, tmp_path / "candidate.st")
    replay(model, reference, tmp_path / "local.st", variant="quant")
    replayed = {row.place: row.metrics for row in diff(reference, tmp_path / "local.st").rows}

    rows = diff(reference, candidate, local=tmp_path / "local.st").rows

    found = [row for row in rows if row.metrics.local_noise is not None]
    assert len(found) == len(replayed)
    for row in found:
        assert row.metrics.local_peir == replayed[row.place].peir
        assert row.metrics.local_noise == replayed[row.place].noise_out
    blocks = [row for row in rows if row.module.endswith(".mlp")]
    assert {row.undefined["local_noise"] for row in blocks} == {"not replayed"}


def test_a_recording_is_no_replay_and_a_replay_of_another_is_doubted(original, reference, tmp_path):
    again = recorded(original, tmp_path / "again.st")
    with pytest.raises(UsageError, match=r"--local .*again.st: is no replay; make one with"):
        diff(reference, again, local=again)
    with pytest.raises(UsageError, match="--sort-by local_noise: is of a replay"):
        diff(reference, again, sort_by="local_noise")


def test_nothing_is_overwritten_unless_asked(original, reference, tmp_path):
    (tmp_path / "there.st").write_text("mine")
    with pytest.raises(ExistingFileError):
        replay(original, reference, tmp_path / "there.st")
    with pytest.raises(UsageError, match="which is replayed"):
        replay(original, reference, reference, overwrite=True)
    with pytest.raises(UsageError, match="--depth 9: no recorded module"):
        replay(original, reference, tmp_path / "deep.st", depth=9)
    assert (tmp_path / "there.st").read_text() == "mine"
    assert not (tmp_path / "deep.st.partial").exists()


def test_a_replay_of_nothing_is_not_done(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke = CliRunner().invoke
    recorded = invoke(app, ["record", "--no-inputs", "--no-kwargs", "-o", "fp.st"])
    assert recorded.exit_code == 0

    result = invoke(app, ["replay", "fp.st", "-o", "local.st"], prog_name="qvtrace")

    assert (result.exit_code, result.stdout) == (3, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("qvtrace: fp.st: no module was replayed: their inputs were not stored")


class Listed(nn.Module):
    """Layers in a list, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.layers[0](hidden)
        return result


def test_a_depth_at_which_nothing_is_called_names_those_that_there_are(tmp_path):
    model, file = Listed(), tmp_path / "fp.st"
    with torch.no_grad(), record(model, file):
        model(torch.randn(2, 8))

    with pytest.raises(UsageError, match=r"--depth 1: .*; there are modules with 0, 2$"):
        replay(model, file, tmp_path / "local.st", depth=1)


def test_the_next_command_after_a_replay_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def replayed(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["replay", "fp.st", *arguments], prog_name="qvtrace")
        assert result.exit_code == 0, result.stderr
        return result.stderr.splitlines()[-1].removeprefix("next").strip()

    invoke = CliRunner().invoke
    assert invoke(app, ["record", "-o", "fp.st"], prog_name="qvtrace").exit_code == 0
    result = invoke(app, ["replay", "fp.st", "-o", "first.st"], prog_name="qvtrace")
    assert (
        "or          qvtrace diff fp.st QUANT.st --local first.st, "
        "with a recording of the quantized model"
    ) in result.stderr.splitlines()
    alone = replayed("-o", "local.st")
    assert alone == "qvtrace diff fp.st local.st --sort-by noise_out"
    assert invoke(app, alone.split()[1:], prog_name="qvtrace").exit_code == 0

    (tmp_path / "quant.st").write_bytes((tmp_path / "fp.st").read_bytes())
    beside = replayed("-o", "again.st")
    assert beside == "qvtrace diff fp.st quant.st --local again.st"
    assert invoke(app, beside.split()[1:], prog_name="qvtrace").exit_code == 0
