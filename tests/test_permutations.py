"""Channels and heads that are permuted within a layer, and put back by weights that take them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from test_origins import quantized, recorded
from tiny_models import transformers
from torch import Tensor, nn

from qvtrace import diff
from qvtrace.comparison.comparison import Comparison
from qvtrace.metrics.permutations import find_permutation, permuted_heads

CHANNELS, HIDDEN, HEAD = 32, 64, 8
LAYERS = 2
TOKENS = 96

Change: TypeAlias = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=CHANNELS,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.15,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(1))


def compared(
    original: nn.Module, folder: Path, *changes: Change, quantize=lambda model: model, count=TOKENS
) -> Comparison:
    model = copy.deepcopy(original)
    for change in changes:
        change(model)
    return diff(
        recorded(original, folder / "fp.st", tokens(count)),
        recorded(quantize(model), folder / "permuted.st", tokens(count)),
    )


def channels_permuted(model: nn.Module) -> None:
    for seed, layer in enumerate(model.model.layers):
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(seed))
        for giver in (layer.mlp.gate_proj, layer.mlp.up_proj):
            giver.weight.data = giver.weight.data[order].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order].clone()


def signs_changed(model: nn.Module) -> None:
    for seed, layer in enumerate(model.model.layers):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (HIDDEN,), generator=generator) * 2 - 1
        layer.mlp.up_proj.weight.data *= signs[:, None]
        layer.mlp.down_proj.weight.data *= signs


def heads_permuted(model: nn.Module) -> None:
    queries, keys = (
        torch.tensor(heads).repeat_interleave(HEAD) * HEAD + torch.arange(HEAD).repeat(len(heads))
        for heads in ([3, 2, 0, 1], [1, 0])
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data = attention.q_proj.weight.data[queries].clone()
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, queries].clone()
        for giver in (attention.k_proj, attention.v_proj):
            giver.weight.data = giver.weight.data[keys].clone()


def rows_swapped(module: str) -> Change:
    def swap(model: nn.Module) -> None:
        weight = model.get_submodule(module).weight.data
        largest = weight.norm(dim=1).argsort()[-2:]
        weight[largest] = weight[largest.flip(0)].clone()

    return swap


def doubled(module: str) -> Change:
    def double(model: nn.Module) -> None:
        model.get_submodule(module).weight.data *= 2

    return double


def permuted(comparison: Comparison) -> set[str]:
    transform = "permutation within the layer"
    return {f"{row.module} {row.path}" for row in comparison.rows if row.transform == transform}


CHANGES = [(channels_permuted,), (channels_permuted, signs_changed), (heads_permuted,)]
CHANGES.append((channels_permuted, signs_changed, heads_permuted))


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
@pytest.mark.parametrize("changes", CHANGES)
def test_what_is_permuted_and_put_back_is_made_up_for(original, tmp_path, changes, quantize):
    comparison = compared(original, tmp_path, *changes, quantize=quantize)

    assert comparison.verdict.origins == ()
    is_float = quantize is not quantized
    assert ("equal after transform: " in comparison.verdict.text) == is_float
    assert "after permutations within layers (found)" in comparison.verdict.text
    expected = set()
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        if channels_permuted in changes:
            expected |= {f"{layer}.mlp.{name} output" for name in ("gate_proj", "act_fn")}
            expected.add(f"{layer}.mlp.up_proj output")
        if heads_permuted in changes:
            expected |= {f"{layer}.self_attn.{name}_proj output" for name in "qkv"}
            expected.add(f"{layer}.self_attn output.1")
    assert permuted(comparison) == expected


def test_few_tokens_tell_a_permutation(original, tmp_path):
    comparison = compared(original, tmp_path, channels_permuted, heads_permuted, count=8)

    assert comparison.verdict.origins == ()
    assert "equal after transform: " in comparison.verdict.text


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
@pytest.mark.parametrize("fault", [doubled, rows_swapped], ids=lambda one: one.__name__)
@pytest.mark.parametrize("module", ["mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj"])
def test_a_fault_beside_a_permutation_is_still_named(original, tmp_path, fault, module, quantize):
    faulty = f"model.layers.1.{module}"

    comparison = compared(
        original, tmp_path, fault(faulty), channels_permuted, heads_permuted, quantize=quantize
    )

    assert comparison.verdict.origins[0].module == faulty
    assert "equal after transform" not in comparison.verdict.text


@pytest.mark.parametrize("change", [channels_permuted, heads_permuted])
def test_a_permutation_that_nothing_undoes_is_a_fault(original, tmp_path, change):
    def undo_no_more(model: nn.Module) -> None:
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            its = original.get_submodule(f"model.layers.1.{name}")
            model.get_submodule(f"model.layers.1.{name}").load_state_dict(its.state_dict())

    comparison = compared(original, tmp_path, change, undo_no_more)

    kind = "mlp" if change is channels_permuted else "self_attn"
    assert comparison.verdict.origins[0].module.startswith(f"model.layers.1.{kind}")
    assert {name.split(".")[2] for name in permuted(comparison)} == {"0"}


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 32))


def test_a_permutation_with_signs_is_read_back_in_any_range(vectors):
    generator = np.random.default_rng(1)
    order, signs = generator.permutation(32), generator.choice([-1.0, 1.0], 32)
    candidate = vectors[:, order] * signs

    found = find_permutation([(vectors, candidate)])

    assert found is not None
    _, back = found.sides(vectors, candidate)
    for start, stop in ((0, 640), (0, 1), (5, 70), (639, 640)):
        assert np.allclose(back.read(start, stop), vectors.reshape(-1)[start:stop])


def test_a_channel_that_is_not_where_its_head_is_is_in_a_wrong_place(vectors):
    heads = vectors.reshape(20, 4, 8)[:, [2, 3, 1, 0]].reshape(20, 32)
    swapped = heads.copy()
    swapped[:, [3, 12]] = heads[:, [12, 3]]

    found = find_permutation([(vectors, swapped)])

    assert found is not None
    _, back = found.sides(vectors, swapped)
    wrong = (back.read(0, 640).reshape(20, 32) != vectors).any(axis=0)
    assert wrong.sum() == 2


def test_a_head_that_is_lost_in_noise_takes_the_place_that_is_left(vectors):
    generator = np.random.default_rng(3)
    vectors[:, 8:16] *= 1e-3
    noisy = vectors + 1e-3 * generator.standard_normal(vectors.shape)
    order = np.arange(32).reshape(4, 8)[[2, 3, 1, 0]].reshape(-1)

    found = find_permutation([(vectors, noisy[:, order])])

    assert found is not None
    assert np.array_equal(order[found.order], np.arange(32))


def test_vectors_that_have_nothing_to_do_with_each_other_are_not_permuted(vectors):
    others = np.random.default_rng(2).standard_normal(vectors.shape)
    assert find_permutation([(vectors, others)]) is None
    assert find_permutation([(vectors, vectors)]) is None
    assert find_permutation([(vectors[:4], vectors[:4, ::-1])]) is None  # too few tokens


def test_channels_that_are_zero_are_matched_to_what_is_left(vectors):
    vectors[:, 4:9] = 0
    found = find_permutation([(vectors, vectors[:, ::-1].copy())])
    assert found is not None
    assert sorted(found.order) == list(range(32))


def test_heads_of_attention_weights_are_put_back():
    weights = np.random.default_rng(0).random((2, 4, 6, 6))
    candidate = weights[:, [1, 3, 0, 2]].copy()

    found = permuted_heads((weights, candidate))

    assert found is not None
    _, back = found.sides(weights, candidate)
    assert np.array_equal(back.read(7, 200), weights.reshape(-1)[7:200])
