"""How much of the final error the places of a replay make, held against what each makes alone."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qvtrace import diff, record, replay
from qvtrace.comparison.comparison import Comparison

CHANNELS = 32


class Branch(nn.Module):
    """What a block adds to its stream, `size` times as large as it would be."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU()
        self.down = nn.Linear(2 * CHANNELS, CHANNELS)
        self.down.weight.data *= size
        self.down.bias.data *= size

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.act(self.up(hidden)))


class Block(nn.Module):
    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.norm, self.norm_after = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.first, self.second = Branch(first), Branch(second)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.first(self.norm(hidden))
        return hidden + self.second(self.norm_after(hidden))


class Gated(nn.Module):
    """Lets next to nothing of one of its two projections through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.value(hidden) + 0.001 * self.gate(hidden)


class Streaming(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.last, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.last(hidden))


def uneven() -> nn.Module:
    return Streaming(*(Block(0.2, 2.0) for _ in range(6)))


def gated() -> nn.Module:
    return Streaming(*(Gated() for _ in range(6)))


def noisy(model: nn.Module, name: str, size: float) -> None:
    weight = model.get_submodule(name).weight.data
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weight += size * weight.std() * torch.randn(weight.shape, generator=generator)


def compared(make: Callable[[], nn.Module], faults: dict[str, float], folder: Path) -> Comparison:
    model, inputs = made(make)
    with torch.no_grad(), record(model, folder / "reference.st"):
        model(inputs)
    for name, size in faults.items():
        noisy(model, name, size)
    with torch.no_grad(), record(model, folder / "candidate.st"):
        model(inputs)
    replay(model, folder / "reference.st", folder / "local.st", variant="noisy")
    return diff(folder / "reference.st", folder / "candidate.st", local=folder / "local.st")


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().eval(), torch.randn(2, 24, CHANNELS)


def final_noise(make: Callable[[], nn.Module], faults: dict[str, float]) -> float:
    model, inputs = made(make)
    with torch.no_grad():
        reference = model(inputs)
        for name, size in faults.items():
            noisy(model, name, size)
        error = model(inputs) - reference
    return (error.square().sum(-1) / reference.square().sum(-1)).median().item()


def told_share(comparison: Comparison) -> int:
    lines = " ".join(comparison.verdict.lines)
    found = re.search(r"these make about (\d+)% of the final error", lines)
    assert found is not None, lines
    return int(found[1])


def test_noise_of_what_is_small_in_its_stream_is_little_of_the_final_error(tmp_path):
    # The three that have most local noise add little to the stream, the fourth much.
    small = {"blocks.0.first.down": 0.6, "blocks.3.first.down": 0.6, "blocks.4.first.up": 0.6}
    large = {"blocks.2.second.down": 0.3}

    comparison = compared(uneven, small | large, tmp_path)

    told = [origin.module for origin in comparison.verdict.origins]
    assert set(told[:3]) == set(small)
    assert told[3:] == list(large)
    whole = final_noise(uneven, small | large)
    truth = final_noise(uneven, small) / whole
    assert truth < 0.2 < 0.7 < final_noise(uneven, large) / whole
    assert told_share(comparison) == pytest.approx(100 * truth, abs=5)


def test_all_places_together_never_make_more_than_the_final_error(tmp_path):
    comparison = compared(uneven, {"blocks.0.second.up": 0.5, "head": 0.1}, tmp_path)

    assert told_share(comparison) == 100


def test_no_more_noise_comes_on_than_both_archives_show_further_on(tmp_path):
    # Of the three that have most local noise next to nothing is let through.
    shut = {f"blocks.{number}.gate": 0.9 for number in range(3)}

    comparison = compared(gated, shut | {"blocks.3.value": 0.2}, tmp_path)

    assert {origin.module for origin in comparison.verdict.origins[:3]} == set(shut)
    assert told_share(comparison) <= 2
