"""Faults in no leaf of a quantized model, told beside a replay of its leaves or of its blocks."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qvtrace import diff, diff_in_flight, record, replay
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.origins import Origin
from qvtrace.metrics.additions import Parts, parts_of

TOKENS, CHANNELS = 24, 32
BLOCKS = 5


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.scale, self.steep = 2.0, 0.1

    def forward(self, hidden: Tensor) -> Tensor:
        weights = (self.scale * self.query(hidden) @ hidden.T / CHANNELS**0.5).softmax(-1)
        return self.out(torch.sin(self.steep * (weights @ self.value(hidden))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(CHANNELS, 2 * CHANNELS) for _ in range(2))
        self.act, self.down = nn.SiLU(), nn.Linear(2 * CHANNELS, CHANNELS)
        self.let_through = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.let_through * self.act(self.gate(hidden)) * self.up(hidden))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixing = nn.LayerNorm(CHANNELS), Mixing()
        self.second, self.gated = nn.LayerNorm(CHANNELS), Gated()
        self.kept = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.kept * hidden + self.mixing(self.first(hidden))
        return hidden + self.gated(self.second(hidden))


class Rounded(nn.Linear):
    """Weights by channel and inputs by token, both in eight bits."""

    def forward(self, hidden: Tensor) -> Tensor:
        weight, hidden = (
            (part / (steps := part.abs().amax(-1, keepdim=True) / 127)).round() * steps
            for part in (self.weight, hidden)
        )
        return functional.linear(hidden, weight, self.bias)


class RoundedByTensor(nn.Linear):
    """Weights by channel and all inputs together, both in eight bits."""

    def forward(self, hidden: Tensor) -> Tensor:
        steps = hidden.abs().max() / 127
        weights = self.weight.abs().amax(-1, keepdim=True) / 127
        return functional.linear(
            (hidden / steps).round() * steps, (self.weight / weights).round() * weights, self.bias
        )


def quantized(model: nn.Module, rounded: type[nn.Linear] = Rounded) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = rounded
    return model


def with_outlier(model: nn.Module) -> nn.Module:
    """The same function, where one channel of what a module is given is far larger than others."""
    model = copy.deepcopy(model)
    gated = model.get_submodule("3.gated")
    with torch.no_grad():
        gated.up.weight[5] *= 100.0
        gated.up.bias[5] *= 100.0
        gated.down.weight[:, 5] /= 100.0
    return model


def noisy(model: nn.Module, name: str, share: float) -> None:
    """Add noise of this share of each token's size to what a module gives."""

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        return output + share * noise * output.square().mean(-1, keepdim=True).sqrt()

    model.get_submodule(name).register_forward_hook(add)


def change(name: str, attribute: str, value: float) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(name), attribute, value)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS))).eval()


@pytest.fixture(scope="module")
def reference(original, tmp_path_factory) -> Path:
    return recorded(original, tmp_path_factory.mktemp("local_origins") / "fp.st")


def recorded(model: nn.Module, file: Path) -> Path:
    with record(model, file), torch.no_grad():
        model(sample())
    return file


def sample() -> Tensor:
    return torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(1))


def beside_replay(
    model: nn.Module, reference: Path, folder: Path, include: Sequence[str] = ()
) -> Comparison:
    folder.mkdir(exist_ok=True)
    candidate = recorded(model, folder / "quant.st")
    replay(model, reference, folder / "local.st", variant="quant", include=include)
    return diff(reference, candidate, local=folder / "local.st")


def first(comparison: Comparison) -> Origin:
    return comparison.verdict.origins[0]


@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("name", ["2", "3.mixing", "1.gated"])
def test_noise_on_what_a_block_gives_is_its_own_and_no_leafs(
    original, reference, tmp_path, name, share
):
    model = quantized(original)
    noisy(model, name, share)

    origin = first(beside_replay(model, reference, tmp_path))

    assert (origin.module, origin.path, origin.evidence) == (name, "output", "in-out")
    assert origin.added == pytest.approx(share**2, rel=0.3)


@pytest.mark.parametrize(
    ("fault", "module", "told"),
    [
        pytest.param(
            change("2", "kept", 0.9), "2", "beside inputs.0 and the output of mixing", id="residual"
        ),
        pytest.param(
            change("3.gated", "let_through", 1.1),
            "3.gated",
            "beside the output of act times the output of up",
            id="gate",
        ),
    ],
)
def test_what_is_added_up_or_multiplied_otherwise_is_told_with_its_parts(
    original, reference, tmp_path, fault, module, told
):
    model = quantized(original)
    fault(model)

    comparison = beside_replay(model, reference, tmp_path)

    assert first(comparison).module == module
    assert told in comparison.verdict.lines[0]


@pytest.mark.parametrize("rounded", [Rounded, RoundedByTensor], ids=["by_token", "by_tensor"])
def test_what_rounding_makes_of_an_outlier_in_the_inputs_is_no_fault_beside_one(
    original, tmp_path, rounded
):
    sensitive = with_outlier(original)
    reference = recorded(sensitive, tmp_path / "fp.st")
    healthy, faulty = (quantized(sensitive, rounded) for _ in range(2))
    noisy(faulty, "1.mixing.value", 0.1)

    none, first_one = (
        beside_replay(model, reference, tmp_path / name)
        for name, model in (("healthy", healthy), ("faulty", faulty))
    )

    rows = {row.module: row.metrics.local_noise for row in none.rows if row.path == "output"}
    assert rows["3.gated.down"] > 10 * rows["2.gated.down"]
    assert none.verdict.origins == ()
    assert [origin.module for origin in first_one.verdict.origins] == ["1.mixing.value"]


def test_modules_that_err_by_themselves_are_told_by_their_local_noise(
    original, reference, tmp_path
):
    model = quantized(original)
    for name, share in (("0.gated.gate", 0.1), ("3.mixing.out", 0.3), ("4.gated.down", 0.2)):
        noisy(model, name, share)

    origins = beside_replay(model, reference, tmp_path).verdict.origins

    assert [one.module for one in origins] == ["3.mixing.out", "4.gated.down", "0.gated.gate"]
    assert sorted((one.noise_out for one in origins), reverse=True) == [
        one.noise_out for one in origins
    ]


def fold_up(block: Block, factors: Tensor) -> None:
    block.gated.up.weight *= factors[:, None]
    block.gated.up.bias *= factors
    block.gated.down.weight /= factors


def fold_norm(block: Block, factors: Tensor) -> None:
    block.second.weight *= factors
    block.second.bias *= factors
    block.gated.gate.weight /= factors
    block.gated.up.weight /= factors


@pytest.mark.parametrize(
    ("fold", "factors"),
    [
        (fold_up, torch.full((2 * CHANNELS,), 2.0)),
        (fold_up, torch.linspace(0.5, 2.0, 2 * CHANNELS)),
        (fold_norm, torch.linspace(0.5, 2.0, CHANNELS)),
    ],
    ids=["one_factor", "by_channel", "of_a_norm_by_channel"],
)
def test_modules_that_are_folded_are_judged_as_they_are_given_what_is_folded(
    original, reference, tmp_path, fold, factors
):
    folded = copy.deepcopy(original)
    with torch.no_grad():
        fold(folded[2], factors)
    faulty = copy.deepcopy(folded)
    with torch.no_grad():
        faulty[3].mixing.out.weight.mul_(2)

    equal = beside_replay(quantized(folded), reference, tmp_path / "folded")
    different = beside_replay(quantized(faulty), reference, tmp_path / "faulty")

    assert equal.verdict.origins == ()
    assert [origin.module for origin in different.verdict.origins] == ["3.mixing.out"]
    scaled = [row for row in equal.rows if row.is_made_up_for]
    assert scaled
    assert all(row.metrics.local_noise < 1e-3 and row.metrics.local_peir < 0.05 for row in scaled)


def test_two_channels_that_are_swapped_are_named_though_most_tokens_hardly_show_it(
    original, tmp_path
):
    closed = copy.deepcopy(original)
    with torch.no_grad():
        closed[1].gated.gate.bias[[3, 8]] = -1.0
    reference = recorded(closed, tmp_path / "fp.st")
    model = quantized(closed)
    with torch.no_grad():
        model[1].gated.gate.weight[[3, 8]] = model[1].gated.gate.weight[[8, 3]].clone()

    origins = beside_replay(model, reference, tmp_path).verdict.origins

    assert [(origin.module, origin.evidence) for origin in origins] == [("1.gated.gate", "local")]


class Downsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.down = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.LayerNorm(CHANNELS))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden).relu()) + self.down(hidden)


def test_modules_of_a_sequential_are_held_against_those_of_their_class(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Downsampling(), Downsampling())
    reference = recorded(model, tmp_path / "fp.st")

    assert beside_replay(quantized(model), reference, tmp_path).verdict.origins == ()


class Placed(nn.Module):
    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.positions = nn.Embedding(2 * TOKENS, CHANNELS)
        self.block, self.shift = Block(), shift

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(TOKENS) + self.shift
        return self.block(hidden + self.positions(places))


def test_what_a_module_is_given_wrongly_is_told_beside_a_replay_that_gave_it_the_right(tmp_path):
    torch.manual_seed(0)
    model = Placed()
    reference = recorded(model, tmp_path / "fp.st")
    shifted = quantized(model)
    shifted.shift = 5

    comparison = beside_replay(shifted, reference, tmp_path)

    origin = first(comparison)
    assert (origin.module, origin.path, origin.evidence) == ("positions", "inputs.0", "in-out")
    assert not any("of the final error" in line for line in comparison.verdict.lines)


def test_errors_of_leaves_that_add_up_are_no_blocks_fault(original, reference, tmp_path):
    comparison = beside_replay(quantized(original), reference, tmp_path, include=["*"])

    assert [origin.module for origin in comparison.verdict.origins] == []


def test_a_leaf_that_errs_comes_before_the_blocks_that_it_is_in(original, reference, tmp_path):
    model = quantized(original)
    noisy(model, "2.gated.down", 0.3)

    origins = beside_replay(model, reference, tmp_path, include=["*"]).verdict.origins

    assert [(origin.module, origin.evidence) for origin in origins] == [("2.gated.down", "local")]


@pytest.mark.parametrize(
    ("fault", "module"),
    [
        pytest.param(lambda model: noisy(model, "2.gated", 0.3), "2.gated", id="noise"),
        pytest.param(change("1.mixing", "scale", 8.0), "1.mixing", id="softmax"),
    ],
)
@pytest.mark.parametrize("blocks", [["?.gated", "?.mixing"], ["*"]], ids=["blocks", "all"])
def test_a_block_that_was_replayed_errs_by_itself(
    original, reference, tmp_path, blocks, fault, module
):
    model = quantized(original)
    fault(model)

    origin = first(beside_replay(model, reference, tmp_path, include=blocks))

    assert (origin.module, origin.evidence, origin.noise_in) == (module, "local", 0.0)


def test_what_a_replayed_block_makes_of_noise_that_it_was_given_is_no_fault_within(
    original, tmp_path
):
    sensitive = copy.deepcopy(original)
    for block in range(BLOCKS):
        change(f"{block}.mixing", "steep", 12.0)(sensitive)
    reference = recorded(sensitive, tmp_path / "fp.st")
    model = quantized(sensitive)
    noisy(model, "3", 0.2)

    leaves, blocks = (
        beside_replay(model, reference, tmp_path / name, include).verdict.origins
        for name, include in (("leaves", []), ("blocks", ["?.gated", "?.mixing"]))
    )

    assert [origin.module for origin in leaves] == ["3", "4.mixing"]
    assert [origin.module for origin in blocks] == ["3"]


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_what_amplifies_the_noise_of_quantization_in_all_layers_is_no_fault(tmp_path, share):
    torch.manual_seed(0)
    sensitive = nn.Sequential(*(Block() for _ in range(8))).eval()
    for block in sensitive:
        block.mixing.steep = 8.0
    model = quantized(sensitive)
    noisy(model, "1", share)  # less than quantization itself makes

    files = recorded(sensitive, tmp_path / "fp.st"), recorded(model, tmp_path / "quant.st")

    assert diff(*files).verdict.origins == ()


def test_a_call_that_is_an_origin_itself_is_not_said_to_agree(original, reference, tmp_path):
    healthy = recorded(quantized(original), tmp_path / "healthy.st")
    model = quantized(original)
    noisy(model, "2.gated.down", 0.02)
    noisy(model, "2", 0.5)

    verdict = diff(reference, recorded(model, tmp_path / "quant.st"), floor=healthy).verdict

    reasons = {origin.module: origin.reason for origin in verdict.origins}
    assert "2.gated.down" in reasons
    assert reasons["2"].startswith("comes in between the inputs, ..., second, gated and the output")
    assert any(" at 2 (inputs differ by " in line for line in verdict.lines)


def test_in_flight_what_comes_in_between_is_unknown_and_said_to_be(original, reference, tmp_path):
    model = quantized(original)
    replay(model, reference, tmp_path / "local.st", variant="quant")
    with diff_in_flight(reference, model, local=tmp_path / "local.st") as flight, torch.no_grad():
        model(sample())

    assert any("what comes in between" in text for text in flight.comparison.candidate.warnings)


def test_an_array_is_the_sum_or_the_product_of_few_others_to_rounding():
    values = np.random.default_rng(0).normal(size=(5, 40, 16)).astype(np.float32)
    others = list(values)

    assert parts_of(values[1], others) == Parts("sum", (1,))
    assert parts_of(values[0] + values[3], others) == Parts("sum", (0, 3))
    assert parts_of(values[0] + values[2] + values[4], others) == Parts("sum", (0, 2, 4))
    assert parts_of(values[1] * values[2], others) == Parts("product", (1, 2))
    assert parts_of(values[0] + 1.001 * values[3], others) is None
    assert parts_of(np.zeros_like(values[0]), others) is None


def test_noise_that_comes_in_between_calls_has_a_share_of_the_final_error(
    original, reference, tmp_path
):
    model = quantized(original)
    noisy(model, "2", 0.5)

    lines = beside_replay(model, reference, tmp_path).verdict.lines

    assert re.match(r"these make about (99|100)% of the final error", lines[1])
