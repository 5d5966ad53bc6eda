"""A residual stream that loses its means before it is rotated, as QuaRot and SliceGPT do it where
norms are LayerNorms: these do not see it."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_origins import quantized, recorded
from test_rotations import in_stream, orthogonal
from tiny_models import transformers
from torch import Tensor, nn

from qvtrace import diff
from qvtrace.metrics.rotations import Rotation, best_turned, find_rotation

CHANNELS = 48


class Normalization(nn.Module):
    """To a mean square of 1: all that is left of a LayerNorm."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=CHANNELS,
        n_layer=3,
        n_head=4,
        vocab_size=256,
        n_positions=128,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("c_proj.bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tokens() -> Tensor:
    return torch.randint(3, 256, (1, 128), generator=torch.Generator().manual_seed(1))


def rotated(original: nn.Module, rotation: Tensor) -> nn.Module:
    """The same function: norms are folded into what they feed, and what is written to the stream
    has its mean taken out and is turned."""
    model = copy.deepcopy(original)
    body = model.transformer
    without_means = (torch.eye(CHANNELS).double() - 1 / CHANNELS) @ rotation
    for layer in body.h:
        fold(layer, "ln_1", layer.attn.c_attn, rotation)
        fold(layer, "ln_2", layer.mlp.c_fc, rotation)
        for writer in (layer.attn.c_proj, layer.mlp.c_proj):
            turn(writer.weight, without_means)
            turn(writer.bias, without_means)
    turn(body.wte.weight, without_means)
    turn(body.wpe.weight, without_means)
    norm, weight = body.ln_f, model.lm_head.weight.data
    head = nn.Linear(CHANNELS, len(weight))
    head.bias.data = weight @ norm.bias.data
    head.weight.data = weight * norm.weight.data
    turn(head.weight, rotation)
    model.lm_head, body.ln_f = head, Normalization()
    return model


def fold(layer: nn.Module, name: str, reader: nn.Module, rotation: Tensor) -> None:
    norm = getattr(layer, name)
    reader.bias.data += norm.bias.data @ reader.weight.data
    folded = norm.weight.data[:, None] * reader.weight.data
    reader.weight.data = (rotation.T @ folded.double()).float()
    setattr(layer, name, Normalization())


def turn(weight: Tensor, rotation: Tensor) -> None:
    weight.data = (weight.data.double() @ rotation).float()


@pytest.fixture(scope="module")
def reference(original, tmp_path_factory):
    return recorded(original, tmp_path_factory.mktemp("centered") / "fp.st", tokens())


def test_a_model_that_is_centered_and_rotated_is_equal_after_that(original, reference, tmp_path):
    model = rotated(original, orthogonal(CHANNELS))
    comparison = diff(reference, recorded(model, tmp_path / "rotated.st", tokens()))
    norms = [row for row in comparison.rows if "ln_" in row.module]
    assert comparison.verdict.origins == ()
    assert comparison.verdict.text.startswith("equal after transform: ")
    assert "a rotation of 48 channels, without the vectors' means (found)" in (
        comparison.verdict.text
    )
    assert {"transformer.wte", "transformer.h.2.mlp.c_proj"} <= in_stream(comparison)
    assert len(norms) == 7
    assert all(row.residual_sqnr > 100 for row in norms)


def test_a_centered_stream_whose_rotation_is_declared_is_compared_so(original, reference, tmp_path):
    model = rotated(original, orthogonal(CHANNELS))
    save_file({"R1": orthogonal(CHANNELS).float().contiguous()}, tmp_path / "R.safetensors")

    comparison = diff(
        reference,
        recorded(model, tmp_path / "rotated.st", tokens()),
        transform=tmp_path / "R.safetensors",
    )

    assert comparison.verdict.origins == ()
    assert ", without the vectors' means (declared)" in comparison.verdict.text


def test_a_centered_and_quantized_stream_is_blamed_for_nothing(original, reference, tmp_path):
    model = quantized(rotated(original, orthogonal(CHANNELS)))
    comparison = diff(reference, recorded(model, tmp_path / "quantized.st", tokens()))
    assert comparison.verdict.origins == ()
    assert ", without the vectors' means (found)" in comparison.verdict.text


def bias_lost(module: nn.Module) -> None:
    module.bias.data.zero_()


def channels_swapped(module: nn.Module) -> None:
    module.weight.data[:, [1, 2]] = module.weight.data[:, [2, 1]]


def doubled(module: nn.Module) -> None:
    module.weight.data *= 2


@pytest.mark.parametrize("fault", [bias_lost, channels_swapped, doubled])
@pytest.mark.parametrize(
    "name", ["h.1.attn.c_proj", "h.1.mlp.c_proj", "h.2.attn.c_attn", "h.2.mlp.c_fc"]
)
def test_a_fault_in_a_centered_and_rotated_model_comes_first(
    original, reference, tmp_path, fault, name
):
    model = rotated(original, orthogonal(CHANNELS))
    fault(model.get_submodule(f"transformer.{name}"))
    verdict = diff(reference, recorded(model, tmp_path / "faulty.st", tokens())).verdict
    assert verdict.origins[0].module == f"transformer.{name}"


def test_a_norm_bias_that_is_not_folded_is_the_fault_of_what_should_have_it(
    original, reference, tmp_path
):
    forgotten = copy.deepcopy(original)
    forgotten.transformer.h[1].ln_2.bias.data.zero_()
    model = rotated(forgotten, orthogonal(CHANNELS))
    verdict = diff(reference, recorded(model, tmp_path / "faulty.st", tokens())).verdict
    assert verdict.origins[0].module == "transformer.h.1.mlp.c_fc"


def test_a_norm_that_errs_in_a_centered_and_rotated_model_comes_first(
    original, reference, tmp_path
):
    model = rotated(original, orthogonal(CHANNELS))
    norm = model.transformer.h[1].ln_2
    norm.register_forward_hook(lambda module, args, given: given.roll(1, -1))
    verdict = diff(reference, recorded(model, tmp_path / "faulty.st", tokens())).verdict
    assert verdict.origins[0].module == "transformer.h.1.ln_2"


def vectors(mean: float) -> tuple[list[np.ndarray], np.ndarray]:
    generator = np.random.default_rng(0)
    layers = list(generator.normal(size=(4, 60, 12)) + mean * generator.normal(size=(4, 60, 1)))
    return layers, orthogonal(12).numpy()


def test_a_rotation_of_vectors_that_lost_their_means_is_found_to_rounding():
    layers, matrix = vectors(0.5)
    found = find_rotation(
        [(layer, (layer - layer.mean(axis=1, keepdims=True)) @ matrix) for layer in layers]
    )
    assert isinstance(found, Rotation)
    assert found.is_centered
    assert found.noise < 1e-9


def test_means_that_were_turned_as_well_stay():
    layers, matrix = vectors(0.5)
    noise = 0.1 * np.random.default_rng(1).normal(size=(4, 60, 12))
    arrays = [(layer, layer @ matrix + own) for layer, own in zip(layers, noise, strict=True)]
    found = find_rotation(arrays)
    assert isinstance(found, Rotation)
    assert not found.is_centered
    assert not best_turned(Rotation(matrix), arrays).is_centered
