"""Inputs that have no noise: objects that were not stored, caches, integers of other values."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

from qvtrace import diff, record
from qvtrace.comparison.comparison import Comparison


@pytest.fixture
def against(tmp_path: Path):
    """Compares a model with a changed copy of itself."""

    def run(model: nn.Module, change: Callable[[nn.Module], None], **options) -> Comparison:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
        files = tmp_path / "fp.st", tmp_path / "quant.st"
        tokens = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        for each, file in zip((model, changed), files, strict=True):
            with torch.no_grad(), record(each.eval(), file):
                each(tokens)
        return diff(*files, **options)

    return run


def places(comparison: Comparison) -> list[tuple[str, str]]:
    return [(origin.module, origin.path) for origin in comparison.verdict.origins]


class State:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Wrapping(nn.Module):
    def forward(self, hidden: Tensor) -> State:
        return State(hidden)


class Unwrapping(nn.Module):
    def forward(self, state: State) -> Tensor:
        return state.hidden * 2


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.wrap, self.unwrap = nn.Linear(32, 32), Wrapping(), Unwrapping()
        self.after, self.kept = nn.Linear(32, 32), 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        state = self.wrap(self.before(hidden))
        state.hidden = state.hidden * self.kept
        return self.after(self.unwrap(state))


def test_an_object_that_was_not_stored_is_not_taken_for_one_that_agrees(against):
    def lose_some(model: nn.Module) -> None:
        model.kept = 0.5

    comparison = against(Stateful(), lose_some)

    row = next(row for row in comparison.rows if row.module == "unwrap")
    assert row.metrics.noise_in is None
    assert row.undefined["noise_in"] == "noise not known"
    assert "unwrap" not in {module for module, _ in places(comparison)}


def test_a_cache_of_earlier_steps_that_was_not_stored_is_not_known_to_agree(tmp_path):
    model, _ = build("llama")
    tokens = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(0))
    files = tmp_path / "fp.st", tmp_path / "quant.st"
    for file in files:
        with torch.no_grad(), record(model, file):
            cache = model(input_ids=tokens, use_cache=True).past_key_values
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)

    rows = diff(*files, path="all").rows

    outputs = {row.call: row for row in rows if row.module.endswith("0.self_attn.o_proj")}
    attention = {
        row.call: row
        for row in rows
        if row.module.endswith("0.self_attn") and row.path == "output.0"
    }
    assert [attention[call].metrics.noise_in for call in (0, 1)] == [0.0, None]
    assert outputs[1].metrics.noise_in == 0.0
    caches = [row for row in rows if row.path.endswith("past_key_values") and row.call == 1]
    assert caches
    assert {row.reason for row in caches} == {"by class and length, its tensors were not stored"}


class ToIntegers(nn.Module):
    zero_point = 0

    def forward(self, hidden: Tensor) -> Tensor:
        return ((hidden * 40).round() + self.zero_point).clamp(-127, 127).to(torch.int8)


class FromIntegers(nn.Module):
    def forward(self, integers: Tensor) -> Tensor:
        return integers.float() / 40


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.quantize, self.dequantize = ToIntegers(), FromIntegers()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.out(self.dequantize(self.quantize(self.linear(hidden))))


def move_zero_point(model: nn.Module) -> None:
    model[2].quantize.zero_point = 8


def shift_linear(model: nn.Module) -> None:
    model[2].linear.bias += 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "module"), [(move_zero_point, "2.quantize"), (shift_linear, "2.linear")]
)
def test_a_fault_before_integers_or_in_them_is_named_where_it_is(against, change, module):
    torch.manual_seed(0)
    comparison = against(nn.Sequential(*(Rounding() for _ in range(4))), change)

    assert places(comparison)[0] == (module, "output")


def test_integers_that_differ_are_a_reason_in_words_and_have_no_noise(against):
    torch.manual_seed(0)
    comparison = against(nn.Sequential(*(Rounding() for _ in range(4))), move_zero_point)

    origin = comparison.verdict.origins[0]
    assert (
        origin.reason == "output holds other values: 576 of 576 elements differ, of the same inputs"
    )
    assert (origin.noise_in, origin.noise_out) == (0.0, None)


class Placing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = nn.Embedding(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        return hidden + self.linear(hidden + self.positions(position_ids))


class Shifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Placing() for _ in range(4))
        self.shift = 0

    def forward(self, hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1])
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, position_ids=places + (self.shift if number == 2 else 0))
        return hidden


def test_position_ids_that_differ_are_told_where_they_are_handed_in(against):
    def shift(model: nn.Module) -> None:
        model.shift = 3

    comparison = against(Shifting(), shift)

    assert places(comparison) == [("layers.2", "kwargs.position_ids")]
    assert "inputs agree" not in comparison.verdict.lines[0]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Linear(32, 32), nn.Linear(32, 32)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in "1234"))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(self.words(hidden) + self.kinds(hidden))


def test_two_first_modules_that_err_alike_are_not_usual_for_each_other(against):
    def randomize(model: nn.Module) -> None:
        for module in (model.words, model.kinds):
            module.weight.normal_(generator=torch.Generator().manual_seed(1), std=0.3)

    torch.manual_seed(0)
    comparison = against(Embedded(), randomize)

    assert {module for module, _ in places(comparison)[:2]} == {"words", "kinds"}


def test_what_came_in_is_not_known_where_what_came_before_was_left_out(against):
    def double(model: nn.Module) -> None:
        model[0].weight *= 2

    torch.manual_seed(0)
    comparison = against(
        nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), double, include=["3"]
    )

    origin = comparison.verdict.origins[0]
    assert (origin.module, origin.path, origin.noise_in) == ("3", "inputs.0", None)


def test_what_is_not_finite_has_no_noise_as_an_origin(against):
    def spoil(model: nn.Module) -> None:
        model[1].bias[3] = float("nan")

    torch.manual_seed(0)
    comparison = against(nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))), spoil)

    origin = comparison.verdict.origins[0]
    assert (origin.module, origin.noise_out, origin.added) == ("1", None, None)


class Repeating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.often, self.once = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = hidden.unbind(0)
        return torch.stack([self.often(part) for part in parts]) + self.once(hidden)


def test_further_calls_of_a_module_come_behind_other_modules(against):
    def randomize(model: nn.Module) -> None:
        model.often.weight *= 3
        model.once.weight *= 1.5

    torch.manual_seed(0)
    comparison = against(Repeating(), randomize)

    assert [module for module, _ in places(comparison)] == ["often", "once", "often"]


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)
        self.dtype = torch.float32

    def forward(self, hidden: Tensor) -> Tensor:
        return self.last(self.act(self.first(hidden).to(self.dtype)).float())


def test_a_cast_in_a_model_of_few_modules_is_told_though_all_that_follows_is_as_noisy(against):
    def cast(model: nn.Module) -> None:
        model.dtype = torch.bfloat16

    torch.manual_seed(0)
    comparison = against(Casting(), cast)

    assert places(comparison) == [("act", "inputs.0")]
    assert "bfloat16 against float32" in comparison.verdict.lines[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.value, self.out = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm(hidden)
        mixed = (8 * (normed + positions) @ normed.mT).softmax(-1) @ self.value(normed)
        return hidden + 0.1 * self.out(mixed) * (torch.arange(36) < 30)[:, None]


class AttendingLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attending() for _ in range(4))
        self.shift = 0.0

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.repeat(1, 4, 1) + torch.linspace(0, 1, 36)[:, None]
        positions = torch.linspace(-0.5, 0.5, 36 * 32).reshape(36, 32)
        for number, layer in enumerate(self.layers):
            given = positions.clone()
            if number == 1:
                given[18:] += self.shift * torch.linspace(-1, 1, 32)
            hidden = layer(hidden, given)
        return hidden


def test_other_positions_of_fewer_than_half_of_the_tokens_come_before_what_they_do_later(against):
    def shift(model: nn.Module) -> None:
        model.shift = 0.5

    torch.manual_seed(0)
    comparison = against(AttendingLayers(), shift)

    assert places(comparison)[0] == ("layers.1", "inputs.1")
