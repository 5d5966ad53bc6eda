"""A module that edits what it is given in place is to blame for what others read afterwards."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from test_origins import quantized
from torch import Tensor, nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.comparison.comparison import Comparison
from qvtrace.reports.json import comparison_text

Edit = Callable[[Tensor], object]


class Residual(nn.Module):
    """Convolutions around which their input is added, as it is then."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.act(hidden + self.second(self.act(self.first(hidden))))
        return result


class Images(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Residual() for _ in range(4))
        self.head = nn.Linear(16, 10)

    def forward(self, picture: Tensor) -> Tensor:
        hidden = self.stem(picture)
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = self.head(hidden.mean((2, 3)))
        return result


def images() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    picture = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return Images().eval(), {"picture": picture}


def scale(hidden: Tensor) -> None:
    hidden.mul_(2)


def add(hidden: Tensor) -> None:
    hidden.add_(torch.linspace(-1, 1, hidden.shape[-1]) * hidden.std())


def edit(model: nn.Module, name: str, change: Edit, *, before: bool = False) -> nn.Module:
    """Have a module edit its input in place, after it has computed unless `before`."""
    module = model.get_submodule(name)
    forward = module.forward

    def edited(hidden: Tensor, *inputs: object, **kwargs: object) -> object:
        if before:
            change(hidden)
            return forward(hidden, *inputs, **kwargs)
        output = forward(hidden, *inputs, **kwargs)
        change(hidden)
        return output

    module.forward = edited  # type: ignore[method-assign]
    return model


def edited(
    model: nn.Module, name: str, change: Edit, kind: str = "float", *, before: bool = False
) -> nn.Module:
    """A copy of the model that does so, quantized where that is the kind."""
    changed = copy.deepcopy(model)
    return edit(quantized(changed) if kind == "int8" else changed, name, change, before=before)


def disturb(block: nn.Module) -> None:
    """Add noise to what a block gives, behind all modules in it."""
    forward = block.forward

    def disturbed(hidden: Tensor, *inputs: object, **kwargs: object) -> object:
        random = torch.Generator().manual_seed(3)
        noise = 0.3 * torch.randn(hidden.shape, generator=random)
        return forward(hidden, *inputs, **kwargs) + noise

    block.forward = disturbed  # type: ignore[method-assign]


def recorded(model: nn.Module, given: dict[str, Tensor], file: Path) -> Path:
    with qvtrace.record(model, file, overwrite=True), torch.no_grad():
        model(**given)
    return file


def places(comparison: Comparison) -> list[tuple[str, str]]:
    return [(origin.module, origin.path) for origin in comparison.verdict.origins]


def whose_layers_matter(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Beside a stream that would else be all embedding: a norm takes a factor of that out again."""
    built, given = tiny_models.build(family)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1 and not re.search("embed|shared|wte|wpe", name):
                parameter.mul_(3)
    return built, given


MODELS = {
    "llama": ("llama", "model.layers.0.post_attention_layernorm"),
    "gpt2": ("gpt2", "transformer.h.1.ln_2"),
    "encoder-decoder": ("t5", "decoder.block.0.layer.2.layer_norm"),
    "bert": ("bert", "bert.encoder.layer.1.intermediate"),
    "cnn": (None, "blocks.2.first"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    family, name = MODELS[request.param]
    built, given = images() if family is None else whose_layers_matter(family)
    file = recorded(built, given, tmp_path_factory.mktemp("edits") / "fp.st")
    return built, given, name, file


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("change", [scale, add])
def test_the_module_that_edits_its_input_comes_first(model, tmp_path, kind, change):
    original, given, name, reference = model
    candidate = recorded(edited(original, name, change, kind), given, tmp_path / "quant.st")

    comparison = qvtrace.diff(reference, candidate)

    first = comparison.verdict.origins[0]
    assert (first.module, first.path) == (name, "inputs.0")
    assert first.reason == "edits inputs.0 in place, which the reference does not"
    assert first.noise_out > first.noise_in
    assert comparison.verdict.lines[0].startswith(f"first seen at {name} (inputs ")
    parents = {name.rpartition(".")[0]}
    assert parents.isdisjoint(module for module, path in places(comparison) if path == "output")


@pytest.fixture(scope="module")
def llama():
    return whose_layers_matter("llama")


NORM = "model.layers.1.post_attention_layernorm"


def test_where_the_reference_edits_and_the_candidate_does_not_it_says_so(llama, tmp_path):
    original, given = llama
    reference = recorded(edited(original, NORM, scale), given, tmp_path / "fp.st")
    candidate = recorded(original, given, tmp_path / "quant.st")

    (only,) = qvtrace.diff(reference, candidate).verdict.origins

    assert (only.module, only.path) == (NORM, "inputs.0")
    assert only.reason == "the reference edits inputs.0 in place, the candidate does not"


def test_what_both_edit_is_nobodys_fault(llama, tmp_path):
    original, given = llama
    reference = recorded(edited(original, NORM, scale), given, tmp_path / "fp.st")
    candidate = recorded(edited(original, NORM, scale, "int8"), given, tmp_path / "quant.st")

    assert qvtrace.diff(reference, candidate).verdict.origins == ()


def test_another_edit_on_both_sides_is_a_gap_as_ever(llama, tmp_path):
    original, given = llama
    reference = recorded(edited(original, NORM, scale), given, tmp_path / "fp.st")
    candidate = recorded(edited(original, NORM, add), given, tmp_path / "quant.st")

    found = qvtrace.diff(reference, candidate).verdict.origins

    assert (found[0].module, found[0].path) == ("model.layers.1", "output")
    assert "edits" not in found[0].reason


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_an_edit_that_nobody_reads_is_not_blamed(llama, tmp_path, kind):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    unread = edited(original, "model.layers.1.mlp", scale, kind)

    assert qvtrace.diff(reference, recorded(unread, given, tmp_path / "q.st")).verdict.origins == ()


class Bounded(nn.Module):
    """A block of which nobody can tell what its output is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden + self.inner(hidden * 1))


def test_a_fault_behind_an_edit_that_never_mattered_is_not_laid_at_its_door(tmp_path):
    torch.manual_seed(0)
    original = nn.Sequential(*(Bounded() for _ in range(6))).eval()
    given = {"input": torch.randn(40, 16)}
    reference = recorded(original, given, tmp_path / "fp.st")
    faulty = copy.deepcopy(original)
    for block in faulty:
        edit(block, "inner", scale)
    disturb(faulty[3])

    found = places(qvtrace.diff(reference, recorded(faulty, given, tmp_path / "quant.st")))

    assert found == [("3", "output")]


def test_an_edit_is_not_blamed_for_a_sum_that_has_nothing_of_what_it_edits(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    faulty = edited(original, "model.layers.1.mlp", scale)
    disturb(faulty.get_submodule("model.layers.1"))

    found = places(qvtrace.diff(reference, recorded(faulty, given, tmp_path / "quant.st")))

    assert found == [("model.layers.1", "output")]


def test_of_two_edits_before_a_sum_the_one_that_it_is_made_of_is_blamed(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    both = edit(edited(original, "model.layers.1.mlp", scale), NORM, scale)

    found = places(qvtrace.diff(reference, recorded(both, given, tmp_path / "quant.st")))

    assert found == [(NORM, "inputs.0")]


def test_two_modules_that_edit_are_both_named(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    both = edited(original, "model.layers.0.post_attention_layernorm", add)
    edit(both, "model.norm", lambda hidden: None)
    edit(both, "model.layers.1.input_layernorm", lambda hidden: hidden.mul_(-2))

    found = places(qvtrace.diff(reference, recorded(both, given, tmp_path / "quant.st")))

    assert set(found[:2]) == {
        ("model.layers.0.post_attention_layernorm", "inputs.0"),
        ("model.layers.1.input_layernorm", "inputs.0"),
    }


def test_one_that_edits_before_it_computes_is_told_once(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    candidate = recorded(edited(original, NORM, add, before=True), given, tmp_path / "quant.st")

    (only,) = qvtrace.diff(reference, candidate).verdict.origins

    assert only.module == NORM
    assert "edits inputs.0 in place, which the reference does not" in only.reason


def test_where_it_is_not_known_who_edits_the_gap_is_told(llama, tmp_path):
    original, given = llama
    files = {}
    for name, run in (("fp", original), ("quant", edited(original, NORM, scale))):
        with qvtrace.record(run, tmp_path / f"{name}.st"), torch.inference_mode():
            run(**given)
        files[name] = tmp_path / f"{name}.st"

    (only,) = qvtrace.diff(files["fp"], files["quant"]).verdict.origins

    assert (only.module, only.path) == ("model.layers.1", "output")
    assert "comes in between" in only.reason


def test_an_older_reference_that_does_not_say_it_is_not_taken_for_one_that_edits_nothing(
    llama, tmp_path
):
    original, given = llama
    with qvtrace.record(original, tmp_path / "fp.st"), torch.inference_mode():
        original(**given)
    candidate = recorded(edited(original, NORM, scale), given, tmp_path / "quant.st")

    found = places(qvtrace.diff(tmp_path / "fp.st", candidate))

    assert found == [("model.layers.1", "output")]


def test_an_argument_that_is_given_by_name_is_found_as_well(tmp_path):
    class Taking(nn.Module):
        def forward(self, *, first: Tensor, others: dict[str, list[Tensor]]) -> Tensor:
            return first + others["these"][0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.taking = Taking()

        def forward(self, hidden: Tensor) -> Tensor:
            side = hidden * 1
            for layer in self.layers:
                hidden = layer(hidden)
            hidden = self.taking(first=hidden, others={"these": [side]})
            result: Tensor = self.layers[0](hidden) + side
            return result

    torch.manual_seed(0)
    original, given = Model().eval(), {"hidden": torch.randn(8, 16)}
    reference = recorded(original, given, tmp_path / "fp.st")
    changed = copy.deepcopy(original)
    forward = changed.taking.forward

    def editing(**kwargs: object) -> Tensor:
        output = forward(**kwargs)
        add(kwargs["others"]["these"][0])
        return output

    changed.taking.forward = editing

    found = qvtrace.diff(reference, recorded(changed, given, tmp_path / "q.st")).verdict.origins

    assert found[0].reason.startswith("edits kwargs.others.these.0 in place")


def test_in_flight_the_answer_is_the_same(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    changed = edited(original, NORM, add)
    stored = qvtrace.diff(reference, recorded(changed, given, tmp_path / "quant.st"))

    with qvtrace.diff_in_flight(reference, changed) as flight, torch.no_grad():
        changed(**given)

    assert flight.comparison is not None
    told = [
        json.loads(comparison_text(one, "0"))["verdict"]["origins"]
        for one in (stored, flight.comparison)
    ]
    assert told[0] == told[1]
    assert told[0][0]["path"] == "inputs.0"


def test_a_replay_gives_every_module_what_the_reference_had(llama, tmp_path):
    original, given = llama
    reference = recorded(original, given, tmp_path / "fp.st")
    changed = edited(original, NORM, add)
    qvtrace.replay(changed, reference, tmp_path / "local.st")

    alone = qvtrace.diff(reference, tmp_path / "local.st", path="all")
    beside = qvtrace.diff(
        reference, recorded(changed, given, tmp_path / "q.st"), local=tmp_path / "local.st"
    )

    assert {row.status for row in alone.rows} == {"identical"}
    assert places(beside)[:1] == [(NORM, "inputs.0")]


def test_show_says_what_a_call_edits(llama, tmp_path):
    original, given = llama
    file = recorded(edited(original, NORM, scale), given, tmp_path / "fp.st")

    shown = CliRunner().invoke(app, ["show", str(file), NORM]).output

    assert "edits inputs.0 in place" in shown
    assert "edits" not in CliRunner().invoke(app, ["show", str(file), "lm_head"]).output

    lines = CliRunner().invoke(app, ["show", str(file), NORM, "--json"]).output
    assert json.loads(lines.splitlines()[-1])["edited"] == ["inputs.0"]
