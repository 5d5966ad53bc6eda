"""A mixture of experts that are modules of their own, which see other tokens on the two sides."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from recordings import only, tensors_of
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.recording.recorder import record
from qvtrace.reports.json import comparison_text

WIDTH = 16


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


class Mixture(nn.Module):
    """Each token goes to the two experts that its router likes best."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count)
        self.add_module(name, nn.ModuleList(Expert() for _ in range(count)))
        self.name = name

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, WIDTH)
        chosen = self.router(tokens).topk(2, dim=-1).indices
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(getattr(self, self.name)):
            (places,) = torch.where((chosen == index).any(dim=-1))
            out.index_add_(0, places, expert(tokens[places]))
        return out.reshape(hidden.shape)


class Model(nn.Module):
    def __init__(self, name: str, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixture = Mixture(name, count)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mixture(self.norm(hidden))


Change = Callable[[Model], object]


def move_a_little(model: Model) -> None:
    """So that a few tokens are routed otherwise."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.mixture.router.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def swap_two(model: Model) -> None:
    """As many tokens for each, but not the same."""
    model.mixture.router.weight.copy_(model.mixture.router.weight.flip(0))
    model.mixture.router.bias.copy_(model.mixture.router.bias.flip(0))


def round_weights(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.copy_((parameter * 64).round() / 64)


@pytest.fixture
def against(tmp_path):
    def run(
        change: Change, *, name: str = "experts", inputs: bool = True, tokens: int = 20, **options
    ) -> Comparison:
        torch.manual_seed(0)
        model = Model(name, 4).eval()
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
        hidden = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
        for file, each in (("fp.st", model), ("quant.st", changed)):
            with torch.no_grad(), record(each, tmp_path / file, inputs=inputs):
                each(hidden)
        return diff(tmp_path / "fp.st", tmp_path / "quant.st", **options)

    return run


def routed(comparison: Comparison) -> dict[str, str | None]:
    return {row.module: row.reason for row in comparison.rows if row.status == "routing"}


def test_experts_that_see_other_tokens_say_how_many_they_share(against):
    comparison = against(move_a_little)

    found = routed(comparison)
    assert found
    assert not any(row.status == "shape" for row in comparison.rows)
    for module, reason in found.items():
        expert = ".".join(module.split(".")[:3])
        assert reason == found[expert]
        assert reason is not None
        alike, _, tokens, *_ = reason.split(" ")
        assert 0 < int(alike) < int(tokens) <= 20
    assert comparison.coverage.not_comparable == len(found)
    first = next(iter(found))
    assert (
        f"experts saw other tokens in {len(found)} pairs, first {first}: {found[first]}"
        in comparison.verdict.text
    )


def test_the_share_is_that_of_the_router_s_choices(against, tmp_path):
    comparison = against(move_a_little)
    choices = []
    for file in ("fp.st", "quant.st"):
        with Archive.open(tmp_path / file) as archive:
            logits = only(tensors_of(archive, "mixture.router"))
            choices.append(logits.topk(2, dim=-1).indices)
    for index in range(4):
        one, other = (set(torch.where((each == index).any(-1))[0].tolist()) for each in choices)
        reason = routed(comparison).get(f"mixture.experts.{index}")
        if one == other:
            assert reason is None
        else:
            assert reason is not None
            assert reason.startswith(f"{len(one & other)} of {len(one | other)} tokens")


def test_experts_that_see_the_same_tokens_are_compared(against):
    comparison = against(round_weights)

    assert not routed(comparison)
    assert comparison.coverage.modules_compared == comparison.coverage.modules_reference == 16


def test_as_many_tokens_are_not_the_same_tokens(against):
    comparison = against(swap_two)

    assert set(routed(comparison)) >= {f"mixture.experts.{index}" for index in range(4)}


def test_experts_are_known_by_what_they_are_given_whatever_their_name(against):
    found = routed(against(move_a_little, name="ffns"))

    assert any(module.startswith("mixture.ffns.") for module in found)
    assert all(reason is not None and "routed alike" in reason for reason in found.values())


def test_without_stored_inputs_the_share_is_unknown_and_said_to_be(against):
    found = routed(against(move_a_little, inputs=False))

    assert found
    assert all(reason is not None and "cannot be told" in reason for reason in found.values())


def test_an_expert_s_inputs_are_routed_too(against):
    comparison = against(move_a_little, path="inputs")

    assert routed(comparison)
    assert not any(row.status == "shape" for row in comparison.rows)


def test_longer_sequences_are_no_routing(tmp_path):
    model = Expert().eval()
    for file, length in (("fp.st", 12), ("quant.st", 13)):
        with torch.no_grad(), record(model, tmp_path / file):
            model(torch.randn(1, length, WIDTH))

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert {row.status for row in comparison.rows} == {"shape"}


def test_routing_is_a_status_in_json(against):
    rows = json.loads(comparison_text(against(move_a_little), "1"))["rows"]

    found = [row for row in rows if row["status"] == "routing"]
    assert found
    assert all(row["undefined"]["peir"] == "routing differs" for row in found)
    assert all(row["metrics"]["peir"] is None for row in found)
