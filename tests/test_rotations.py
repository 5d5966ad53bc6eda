"""A residual stream that is rotated, as QuaRot and SpinQuant do it: equal after the rotation."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_origins import (
    Fault,
    channels_swapped,
    int4_where_int8_was_meant,
    quantized,
    recorded,
    scale_doubled,
    slightly_noisy,
)
from tiny_models import build, transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from qvtrace import diff, diff_in_flight, load_result, record
from qvtrace.cli import app
from qvtrace.comparison.comparison import Comparison
from qvtrace.errors import UsageError
from qvtrace.metrics.inner_rotations import (
    InnerRotation,
    hadamard,
    head_rotations,
    taken_rotations,
)
from qvtrace.metrics.rotations import Rotation, TooFewTokens, find_rotation, is_turned
from qvtrace.reports.json import comparison_text

CHANNELS = 32
TOKENS = 128


def orthogonal(channels: int = CHANNELS, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(channels, channels, generator=generator).double())[0]


def rotated(original: nn.Module, rotation: Tensor) -> nn.Module:
    """The same function: norms are folded into what they feed, then the stream is turned."""
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            turn(reader.weight, rotation)
        for reader in (mlp.gate_proj, mlp.up_proj):
            turn(reader.weight, rotation)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.data = (rotation.T @ writer.weight.data.double()).float()
    fold(model.model.norm, model.lm_head)
    turn(model.lm_head.weight, rotation)
    turn(model.model.embed_tokens.weight, rotation)
    return model


def fold(norm: nn.Module, *readers: nn.Module) -> None:
    for reader in readers:
        reader.weight.data *= norm.weight.data
    norm.weight.data = torch.ones_like(norm.weight)


def turn(weight: Tensor, rotation: Tensor) -> None:
    weight.data = (weight.data.double() @ rotation).float()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=CHANNELS,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter.data, 0.4, 3.0)
        else:
            parameter.data *= 2  # so that layers say something beside the embedding
    return model


@pytest.fixture(scope="module")
def outspoken(original) -> nn.Module:
    """Each of its layers says much beside what came before."""
    model = copy.deepcopy(original)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "embed" not in name:
            parameter.data *= 2
    return model


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rotations")
    recorded(original, folder / "fp.st", tokens())
    recorded(rotated(original, orthogonal()), folder / "rotated.st", tokens())
    recorded(original, folder / "fp_short.st", tokens(2))
    recorded(rotated(original, orthogonal()), folder / "rotated_short.st", tokens(2))
    save_file({"R1": orthogonal().float().contiguous()}, folder / "rotation.safetensors")
    return folder


def tokens(count: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 256, (1, count), generator=generator)


def candidate(original: nn.Module, file: Path, *faults: tuple[Fault, str]) -> Path:
    model = rotated(original, orthogonal())
    for fault, name in faults:
        fault(model, f"model.{name}")
    return recorded(model, file, tokens())


def in_stream(comparison: Comparison) -> set[str]:
    return {row.module for row in comparison.rows if row.transform == "rotation"}


def test_a_rotated_model_is_equal_after_the_rotation_and_nothing_is_blamed(folder):
    comparison = diff(folder / "fp.st", folder / "rotated.st")

    assert comparison.verdict.origins == ()
    # The embedding, the last norm and the model itself; of a layer two norms, attention (its
    # output projection as well), the MLP (its own as well) and the layer.
    assert len(in_stream(comparison)) == 3 + 4 * 7
    assert "equal after transform: 31 rows equal after a rotation of 32 channels (found)" in (
        comparison.verdict.text
    )
    turned = [row for row in comparison.rows if row.transform]
    assert all(row.is_made_up_for and row.metrics.peir > 0.05 for row in turned)
    assert all(row.residual_sqnr > 90 and row.residual_peir < 1e-4 for row in turned)


def test_a_norm_whose_weight_was_folded_is_scaled_after_the_rotation(folder):
    rows = diff(folder / "fp.st", folder / "rotated.st", include=["*norm", "*.layers.?"]).rows

    norms = [row for row in rows if row.module.endswith("norm")]
    assert len(norms) == 9
    assert all(row.transform == "rotation" and row.scale_factor is not None for row in norms)
    assert all(row.is_made_up_for for row in norms)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (scale_doubled, "layers.1.mlp.down_proj"),
        (scale_doubled, "layers.0.self_attn.q_proj"),
        (channels_swapped, "layers.2.self_attn.o_proj"),
        (channels_swapped, "layers.1.self_attn.v_proj"),
        (channels_swapped, "layers.3.mlp.down_proj"),
        (int4_where_int8_was_meant, "layers.3.mlp.up_proj"),
        (slightly_noisy, "layers.2.self_attn.v_proj"),
        (slightly_noisy, "layers.1.mlp.down_proj"),
    ],
)
def test_a_fault_in_a_rotated_model_comes_first(original, folder, tmp_path, fault, name):
    file = candidate(original, tmp_path / "faulty.st", (fault, name))

    verdict = diff(folder / "fp.st", file).verdict

    assert verdict.origins[0].module == f"model.{name}"
    assert "equal after transform" not in verdict.text


def test_a_norm_with_a_wrong_weight_in_a_rotated_model_comes_first(original, folder, tmp_path):
    file = candidate(
        original,
        tmp_path / "faulty.st",
        (
            lambda model, name: model.get_submodule(name).weight.data.mul_(torch.arange(1, 33) / 9),
            "layers.2.post_attention_layernorm",
        ),
    )
    origins = diff(folder / "fp.st", file).verdict.origins
    assert origins[0].module == "model.layers.2.post_attention_layernorm"


def test_a_rotated_and_quantized_model_is_compared_after_the_rotation(original, folder, tmp_path):
    model = quantized(rotated(original, orthogonal()))
    file = recorded(model, tmp_path / "quant.st", tokens())

    verdict = diff(folder / "fp.st", file).verdict

    assert verdict.origins == ()
    assert "31 rows compared after a rotation of 32 channels (found)" in verdict.text
    assert "equal after transform" not in verdict.text


def sylvester(channels: int) -> Tensor:
    return torch.from_numpy(hadamard(np.eye(channels)))


def one_for_all(heads: int, layer: int) -> Tensor:
    return orthogonal(8, seed=layer).expand(heads, 8, 8)


def one_for_each(heads: int, layer: int) -> Tensor:
    return torch.stack([orthogonal(8, seed=10 * layer + head) for head in range(heads)])


def a_hadamard_matrix(heads: int, layer: int) -> Tensor:
    return sylvester(8).expand(heads, 8, 8)


Values: TypeAlias = Callable[[int, int], Tensor]


def with_turned_values(original: nn.Module, values: Values = one_for_all) -> nn.Module:
    """The same function: the values of each head are turned, and turned back by what takes them."""
    model = copy.deepcopy(original)
    for number, layer in enumerate(model.model.layers):
        value, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        rotations = values(len(value) // 8, number)
        heads = rotations.mT @ value.data.double().reshape(-1, 8, CHANNELS)
        value.data = heads.reshape(value.shape).float()
        each = rotations.repeat_interleave(CHANNELS // len(value), 0)
        turned = torch.einsum("chd,hde->che", output.data.double().reshape(CHANNELS, -1, 8), each)
        output.data = turned.reshape(output.shape).float()
    return model


def with_online_transform(original: nn.Module, rotation: Tensor) -> nn.Module:
    """The same function: what the last projection of each MLP takes is turned as it runs."""
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        mlp = layer.mlp
        turn(mlp.down_proj.weight, rotation)
        mlp.forward = partial(turned_mlp, mlp, rotation.float())
    return model


def turned_mlp(mlp: nn.Module, rotation: Tensor, hidden: Tensor) -> Tensor:
    return mlp.down_proj((mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)) @ rotation)


def within_layers(comparison: Comparison) -> set[str]:
    return {row.module for row in comparison.rows if row.transform == "rotation within the layer"}


def with_one_value_head(original: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        type(original.config)(**{**original.config.to_dict(), "num_key_value_heads": 1})
    ).eval()


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
@pytest.mark.parametrize("stream", [lambda model, _: model, rotated], ids=["", "stream too"])
@pytest.mark.parametrize("values", [one_for_all, one_for_each, a_hadamard_matrix])
def test_values_that_are_turned_in_each_head_are_made_up_for(
    original, folder, tmp_path, values, stream, quantize
):
    model = quantize(stream(with_turned_values(original, values), orthogonal()))
    file = recorded(model, tmp_path / "turned.st", tokens())

    comparison = diff(folder / "fp.st", file)

    assert comparison.verdict.origins == ()
    turned = within_layers(comparison) | in_stream(comparison)
    assert {f"model.layers.{number}.self_attn.v_proj" for number in range(4)} <= turned
    assert ("equal after transform: " in comparison.verdict.text) == (quantize is not quantized)


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
def test_the_values_of_one_head_are_made_up_for(original, tmp_path, quantize):
    model = with_one_value_head(original)
    files = (
        recorded(model, tmp_path / "fp.st", tokens()),
        recorded(quantize(with_turned_values(model)), tmp_path / "turned.st", tokens()),
    )

    comparison = diff(*files)

    assert comparison.verdict.origins == ()
    assert len(within_layers(comparison)) == 4


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
@pytest.mark.parametrize(
    "fault",
    [channels_swapped, scale_doubled, int4_where_int8_was_meant],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("values", [one_for_all, one_for_each])
def test_a_fault_in_turned_values_comes_first(original, folder, tmp_path, values, fault, quantize):
    model = with_turned_values(original, values)
    fault(model, "model.layers.1.self_attn.v_proj")
    file = recorded(quantize(model), tmp_path / "faulty.st", tokens())

    verdict = diff(folder / "fp.st", file).verdict

    assert verdict.origins[0].module == "model.layers.1.self_attn.v_proj"
    assert "equal after transform" not in verdict.text


@pytest.mark.parametrize("fault", [slightly_noisy, int4_where_int8_was_meant])
def test_a_fault_in_what_takes_turned_values_comes_first(original, folder, tmp_path, fault):
    model = with_turned_values(original)
    fault(model, "model.layers.1.self_attn.o_proj")
    file = recorded(model, tmp_path / "faulty.st", tokens())
    origins = diff(folder / "fp.st", file).verdict.origins
    assert origins[0].module == "model.layers.1.self_attn.o_proj"


def test_channels_of_values_swapped_in_a_whole_model_are_no_rotation(original, folder, tmp_path):
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        value = layer.self_attn.v_proj.weight
        value.data = value.data.flip(0)
    file = recorded(model, tmp_path / "faulty.st", tokens())

    comparison = diff(folder / "fp.st", file)

    assert within_layers(comparison) == set()
    assert comparison.verdict.origins[0].module == "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
@pytest.mark.parametrize(
    "rotation", [sylvester(64), orthogonal(64)], ids=["hadamard", "orthogonal"]
)
def test_what_is_turned_as_the_model_runs_is_made_up_for(
    original, folder, tmp_path, rotation, quantize
):
    model = quantize(with_online_transform(original, rotation))
    file = recorded(model, tmp_path / "turned.st", tokens())

    comparison = diff(folder / "fp.st", file, path="all")

    assert comparison.verdict.origins == ()
    given = [row for row in comparison.rows if row.path == "inputs.0" and row.transform]
    assert {row.module for row in given} == {f"model.layers.{n}.mlp.down_proj" for n in range(4)}
    assert ("equal after transform: " in comparison.verdict.text) == (quantize is not quantized)


def test_all_rotations_at_once_are_made_up_for(original, folder, tmp_path):
    model = rotated(with_turned_values(original), orthogonal())
    model = with_online_transform(model, sylvester(64))
    comparison = diff(folder / "fp.st", recorded(model, tmp_path / "turned.st", tokens()))
    assert comparison.verdict.origins == ()
    assert (
        "equal after transform: 31 rows equal after a rotation of 32 channels (found), 4 rows"
        in (comparison.verdict.text)
    )


def test_of_few_tokens_all_heads_together_tell_a_rotation(original, tmp_path):
    """Of fewer than a head has channels."""
    files = (
        recorded(original, tmp_path / "fp.st", tokens(6)),
        recorded(with_turned_values(original), tmp_path / "turned.st", tokens(6)),
    )

    comparison = diff(*files)

    assert len(within_layers(comparison)) == 4
    assert "equal after transform" in comparison.verdict.text


def test_values_of_few_tokens_take_a_rotation_that_is_declared(original, tmp_path):
    model = with_turned_values(original)
    names = [f"model.layers.{number}.self_attn.R2" for number in range(4)]
    rotations = {name: orthogonal(8, seed=n).contiguous() for n, name in enumerate(names)}
    save_file(rotations, tmp_path / "R.safetensors")
    files = (
        recorded(original, tmp_path / "fp.st", tokens(4)),
        recorded(model, tmp_path / "turned.st", tokens(4)),
    )

    found, declared = diff(*files), diff(*files, transform=tmp_path / "R.safetensors")

    assert within_layers(found) == set()
    assert len(within_layers(declared)) == 4
    assert "equal after transform" in declared.verdict.text


def test_a_declared_rotation_of_heads_of_another_size_serves_none(original, folder, tmp_path):
    model = with_turned_values(original)
    names = [f"model.layers.{number}.self_attn.R2" for number in range(4)]
    save_file({name: torch.eye(12) for name in names}, tmp_path / "R.safetensors")
    file = recorded(model, tmp_path / "turned.st", tokens())
    comparison = diff(folder / "fp.st", file, transform=tmp_path / "R.safetensors")
    assert len(within_layers(comparison)) == 4  # found all the same


@pytest.mark.parametrize(
    ("name", "matrix", "said"),
    [
        ("model.layers.0.attention.R2", torch.eye(8), "is of no module of the reference"),
        ("model.layers.0.self_attn.R2", torch.ones(0, 8, 8), "has no heads"),
    ],
)
def test_a_rotation_of_heads_that_are_not_there_is_refused(folder, tmp_path, name, matrix, said):
    save_file({name: matrix}, tmp_path / "R.safetensors")
    files = folder / "fp.st", folder / "fp.st"
    with pytest.raises(UsageError, match=rf"^--transform .*R\.safetensors: {name} {said}"):
        diff(*files, transform=tmp_path / "R.safetensors")


def test_a_smoothed_model_is_equal_after_transform(original, folder, tmp_path):
    model = copy.deepcopy(original)
    factors = torch.linspace(0.25, 4, CHANNELS)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data *= factors
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data /= factors
    file = recorded(model, tmp_path / "smoothed.st", tokens())

    verdict = diff(folder / "fp.st", file).verdict

    assert verdict.origins == ()
    assert verdict.text.startswith("equal after transform: 4 rows equal up to a factor; ")


def test_a_model_that_is_smoothed_and_quantized_is_blamed_for_neither(original, folder, tmp_path):
    model = copy.deepcopy(original)
    factors = torch.exp(torch.randn(CHANNELS, generator=torch.Generator().manual_seed(2)) / 2)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data *= factors
        for name in ("gate_proj", "up_proj"):
            getattr(layer.mlp, name).weight.data /= factors
    file = recorded(quantized(model), tmp_path / "smoothed.st", tokens())

    verdict = diff(folder / "fp.st", file).verdict

    assert verdict.origins == ()
    assert "4 rows equal up to a factor" in verdict.text


def test_another_model_is_no_rotated_one(original, folder, tmp_path):
    model = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data[torch.randperm(len(parameter), generator=generator)]
    comparison = diff(folder / "fp.st", recorded(model, tmp_path / "other.st", tokens()))
    assert in_stream(comparison) == set()
    assert "rotation" not in comparison.verdict.text


def skipped(model: nn.Module, name: str) -> None:
    model.get_submodule(name).forward = lambda hidden, **kwargs: hidden


def channels_rolled(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(lambda *call: call[-1].roll(1, -1))


@pytest.mark.parametrize("fault", [skipped, channels_rolled])
@pytest.mark.parametrize("layer", ["model.layers.0", "model.layers.1", "model.layers.2"])
@pytest.mark.parametrize("quantize", [lambda model: model, quantized], ids=["float", "int8"])
def test_a_layer_whose_output_some_matrix_turns_is_no_rotation(
    outspoken, tmp_path, fault, layer, quantize
):
    ids = tokens(240).reshape(4, 60)
    faulty = quantize(copy.deepcopy(outspoken))
    fault(faulty, layer)
    files = (
        recorded(outspoken, tmp_path / "fp.st", ids),
        recorded(faulty, tmp_path / "faulty.st", ids),
    )

    comparison = diff(*files)

    assert in_stream(comparison) == set()
    assert "rotat" not in comparison.verdict.text
    assert comparison.verdict.origins[0].module == layer


class Mixer(nn.Module):
    """A stream of patches: in each layer tokens are mixed, then channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, CHANNELS)
        self.layers = nn.ModuleList(MixerLayer() for _ in range(4))
        self.norm = nn.LayerNorm(CHANNELS)
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.embed(patches)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden).mean(1))


class MixerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.tokens = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.channels = nn.Sequential(nn.Linear(CHANNELS, 128), nn.GELU(), nn.Linear(128, CHANNELS))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.tokens(self.first_norm(hidden).mT).mT
        return hidden + self.channels(self.second_norm(hidden))


@pytest.mark.parametrize("inputs", [True, False], ids=["with inputs", "without inputs"])
@pytest.mark.parametrize("place", ["embed", "layers.0"])
def test_channels_rolled_before_all_layers_that_tell_are_a_fault(tmp_path, inputs, place):
    torch.manual_seed(0)
    model, patches = Mixer().eval(), torch.randn(4, 24, 12)
    for name in ("fp", "faulty"):
        with record(model, tmp_path / f"{name}.st", inputs=inputs), torch.no_grad():
            model(patches)
        channels_rolled(model, place)

    comparison = diff(tmp_path / "fp.st", tmp_path / "faulty.st")

    assert in_stream(comparison) == set()
    assert "rotat" not in comparison.verdict.text
    if inputs:
        assert [origin.module for origin in comparison.verdict.origins] == [place]
    else:
        assert f"first difference: {place}" in comparison.verdict.text


def test_a_rotation_that_later_weights_undo_needs_no_inputs_to_be_told(original, tmp_path):
    for name, model in (("fp", original), ("rotated", rotated(original, orthogonal()))):
        with record(model, tmp_path / f"{name}.st", inputs=False), torch.no_grad():
            model(tokens(), use_cache=False)
    verdict = diff(tmp_path / "fp.st", tmp_path / "rotated.st").verdict
    assert "equal after transform" in verdict.text
    assert verdict.origins == ()


def test_a_rotated_and_quantized_model_is_known_by_few_tokens(original, tmp_path):
    model = quantized(rotated(original, orthogonal()))
    files = (
        recorded(original, tmp_path / "fp.st", tokens(12)),
        recorded(model, tmp_path / "quant.st", tokens(12)),
    )

    verdict = diff(*files).verdict

    assert verdict.origins == ()
    assert "31 rows compared after a rotation of 32 channels (found)" in verdict.text


def test_of_too_few_tokens_a_rotation_is_not_found_but_declared(folder):
    files = folder / "fp_short.st", folder / "rotated_short.st"
    found = diff(*files)
    declared = diff(*files, transform=folder / "rotation.safetensors")

    assert in_stream(found) == set()
    assert (
        "vectors of 32 channels look rotated: too few tokens to find a rotation ("
        in found.verdict.text
    )
    assert "of 32), give it with --transform" in found.verdict.text
    assert len(in_stream(declared)) == 31
    assert declared.verdict.origins == ()
    assert "after a rotation of 32 channels (declared)" in declared.verdict.text


def test_a_rotation_is_declared_either_way_round_and_in_any_float_dtype(folder, tmp_path):
    for number, tensor in enumerate((orthogonal().T, orthogonal().bfloat16(), orthogonal())):
        file = tmp_path / f"{number}.safetensors"
        save_file({"rotation": tensor.contiguous()}, file)
        comparison = diff(folder / "fp.st", folder / "rotated.st", transform=file)
        assert len(in_stream(comparison)) == 31


def test_in_flight_a_rotation_is_declared(original, folder):
    model = rotated(original, orthogonal())
    options = {"transform": folder / "rotation.safetensors"}
    with diff_in_flight(folder / "fp.st", model, **options) as flight, torch.no_grad():
        model(tokens(), use_cache=False)
    assert len(in_stream(flight.comparison)) == 31
    assert "equal after transform" in flight.comparison.verdict.text


def test_a_rotation_that_is_declared_in_vain_is_told(folder):
    comparison = diff(folder / "fp.st", folder / "fp.st", transform=folder / "rotation.safetensors")
    assert "a rotation of 32 channels that was declared explains no row" in comparison.verdict.text


def write(tensors: dict[str, Tensor]) -> Callable[[Path], object]:
    return lambda file: save_file(tensors, file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "cannot be read: No such file or directory; check the path"),
        (lambda file: file.mkdir(), "cannot be read: "),
        (lambda file: file.write_bytes(b"no tensors"), "is no whole safetensors file ("),
        (write({}), "holds no tensor; store the rotation in it"),
        (
            write({"q": torch.zeros(32, 16)}),
            "q has the shape [32, 16]; a rotation is square: [channels, channels]",
        ),
        (write({"q": torch.ones(32)}), "q has the shape [32]; a rotation is square"),
        (
            write({"q": torch.ones(32, 32)}),
            "q is no rotation: M^T M differs from 1 by 32; give an orthogonal matrix",
        ),
        (write({"q": torch.full((32, 32), float("nan"))}), "q is no rotation: "),
        (
            write({"q": torch.eye(32, dtype=torch.int64)}),
            "q has the dtype I64; store it as float32",
        ),
        (write({"q": torch.eye(4)}), "q turns 4 channels; give one of 8 or more"),
        (
            write({"a": torch.eye(32), "b": torch.eye(32)}),
            "holds several rotations of 32 channels; keep that of the residual stream",
        ),
    ],
)
def test_a_file_that_is_no_rotation_is_refused_in_one_line(folder, tmp_path, make, message):
    file = tmp_path / "bad.safetensors"
    make(file)
    archives = str(folder / "fp.st"), str(folder / "rotated.st")

    with pytest.raises(UsageError) as raised:
        diff(*archives, transform=file)

    assert f"--transform {file}: {message}" in str(raised.value)
    result = CliRunner().invoke(app, ["diff", *archives, "--transform", str(file)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"qvtrace: --transform {file}: {message}")
    assert result.stderr.count("\n") == 1


def test_a_row_tells_its_transform_in_every_format(folder):
    files = [str(folder / "fp.st"), str(folder / "rotated.st")]

    table = CliRunner().invoke(app, ["diff", *files]).stdout
    csv = CliRunner().invoke(app, ["diff", *files, "--format", "csv"]).stdout

    assert "after a rotation: PEIR " in table
    assert "transform" in csv.splitlines()[0].split(",")
    assert sum(",rotation," in line for line in csv.splitlines()) == 31


def test_a_gate_that_a_rotated_row_fails_says_so(folder):
    gate = "peir>0.05 @ model.embed_tokens"
    verdict = diff(folder / "fp.st", folder / "rotated.st", fail_on=[gate]).verdict
    assert verdict.exit_code == 1
    assert "a rotation, which leaves an SQNR of 1" in verdict.text


def test_a_result_with_a_rotation_is_read_back(folder, tmp_path):
    comparison = diff(folder / "fp.st", folder / "rotated.st")
    file = tmp_path / "result.json"
    file.write_text(comparison_text(comparison, "1"))

    rows = {row["module"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["model.embed_tokens"]["transform"] == "rotation"
    assert rows["model.layers.0.self_attn.q_proj"]["transform"] is None
    assert in_stream(load_result(file)) == in_stream(comparison)


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 12))


@pytest.fixture
def matrix() -> np.ndarray:
    return orthogonal(12).numpy()


def test_a_rotation_is_found_to_rounding_and_verified_on_others(vectors, matrix):
    found = find_rotation([(vectors, vectors @ matrix)])
    assert isinstance(found, Rotation)
    assert (found.tokens, found.held_out) == (40, 10)
    assert np.abs(found.matrix - matrix).max() < 1e-9


def test_vectors_of_many_short_arrays_are_pooled(vectors, matrix):
    arrays = [(vector[None], vector[None] @ matrix) for vector in vectors]
    found = find_rotation(arrays)
    assert is_turned(arrays)
    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-9


def test_a_large_vector_counts_as_much_as_any_other(vectors, matrix):
    sizes = np.where(np.arange(50) == 3, 1e4, 1.0)[:, None]
    noise = np.random.default_rng(1).normal(size=vectors.shape)
    noisy = sizes * (vectors @ matrix + 0.05 * noise * (sizes > 1))
    found = find_rotation([(sizes * vectors, noisy)])
    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 0.05


def test_arrays_behind_a_fault_hardly_move_the_rotation(vectors, matrix):
    noise = np.random.default_rng(1).normal(size=vectors.shape)
    found = find_rotation(
        [(vectors, vectors @ matrix), (vectors[::-1], (vectors @ matrix + 0.1 * noise)[::-1])]
    )
    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-6


@pytest.mark.parametrize("stream_noise", [0.0, 1e-6, 0.05])
def test_arrays_with_rotations_of_their_own_do_not_move_that_of_the_others(matrix, stream_noise):
    """As what projections take of heads that are turned, in layers whose stream is turned too."""
    generator = np.random.default_rng(0)
    layers = generator.normal(size=(15, 50, 12))
    turned = layers @ matrix + stream_noise * generator.normal(size=layers.shape)
    for number in range(1, 15, 4):
        turned[number] = layers[number] @ orthogonal(12, seed=number).numpy()

    found = find_rotation(list(zip(layers, turned, strict=True)))

    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-9 + stream_noise / 2


def test_fewer_tokens_than_channels_tell_no_rotation(vectors, matrix):
    few = vectors[:10]
    assert find_rotation([(few, few @ matrix)]) == TooFewTokens(12, 8)


def test_unlike_vectors_have_no_rotation(vectors):
    others = np.random.default_rng(1).normal(size=vectors.shape)
    assert find_rotation([(vectors, others)]) is None
    assert not is_turned([(vectors, others)])


def test_a_matrix_that_leaves_much_of_what_is_held_out_is_no_rotation(vectors, matrix):
    others = np.random.default_rng(1).normal(size=vectors.shape)
    assert isinstance(find_rotation([(vectors, vectors @ matrix + 0.2 * others)]), Rotation)
    assert find_rotation([(vectors, vectors @ matrix + 0.4 * others)]) is None


def test_tokens_held_out_may_have_directions_of_their_own():
    matrix = orthogonal(48).numpy()
    layer = np.random.default_rng(0).normal(size=(55, 48))  # 44 of them are not held out
    found = find_rotation([(layer, layer @ matrix), (2 * layer, 2 * layer @ matrix)])
    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-9


def test_a_rotation_that_is_known_in_some_directions_only_takes_more_tokens():
    matrix = orthogonal(48).numpy()
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(30, 48))
    layers = [embeddings + 0.02 * generator.normal(size=(30, 48)) for _ in range(6)]
    noise = [0.1 * generator.normal(size=(30, 48)) for _ in layers]
    turned = [layer @ matrix + own for layer, own in zip(layers, noise, strict=True)]
    others = [generator.normal(size=(30, 48)) for _ in layers]

    few = find_rotation(list(zip(layers, turned, strict=True)))

    assert isinstance(few, TooFewTokens)
    assert 0 < few.tokens < few.channels == 48
    assert find_rotation(list(zip(layers, others, strict=True))) is None


def test_the_first_array_alone_tells_a_rotation_that_all_others_have_a_fault_behind(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(36, 32))
    matrix = orthogonal(32).numpy()
    noise = np.random.default_rng(1).normal(size=(12, 36, 32))
    arrays = [(vectors, vectors @ matrix), *((vectors + n, (vectors + n) @ matrix) for n in noise)]
    shift = 0.5 * np.random.default_rng(2).normal(size=32)
    faulty = [arrays[0], *((one, other + shift) for one, other in arrays[1:])]

    found = find_rotation(faulty)

    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-9


def test_heads_that_are_mixed_of_one_are_turned_alike(vectors):
    blocks = torch.stack([orthogonal(12, seed=1), orthogonal(12, seed=2)]).numpy()
    values = np.concatenate([vectors, vectors[::-1]], axis=1)
    mixed = np.concatenate([vectors, 2 * vectors, vectors[::-1], vectors[::-1]], axis=1)
    rotation = InnerRotation(blocks.swapaxes(1, 2), 24)
    wide = rotation.for_channels(48)

    (found, *_) = head_rotations([(values, rotation.back(values))], [(mixed, wide.back(mixed))])

    assert found.size == 12
    assert not found.is_sure
    assert np.abs(found.blocks - blocks).max() < 1e-9


def test_few_tokens_tell_a_hadamard_matrix_times_a_small_one():
    vectors = np.random.default_rng(0).normal(size=(10, 96))
    small = orthogonal(3).numpy()
    turned = vectors @ np.kron(small, sylvester(32).numpy())

    (found,) = taken_rotations([(vectors, turned)])

    assert found.is_hadamard
    _, back = found.sides(vectors, turned)
    assert np.abs(back.read(0, 960).reshape(10, 96) - vectors).max() < 1e-9


def test_vectors_that_nothing_turns_have_no_inner_rotation(vectors):
    others = np.random.default_rng(1).normal(size=vectors.shape)
    assert head_rotations([(vectors, others)], [(vectors, others)]) == []
    assert taken_rotations([(vectors, others)]) == []


def test_folded_norms_behind_noise_are_scaled_and_not_blamed(original, tmp_path):
    small = copy.deepcopy(original)
    for layer in small.model.layers:
        layer.input_layernorm.weight.data /= 8
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data *= 8
    noisy = rotated(small, orthogonal())
    slightly_noisy(noisy, "model.layers.0.mlp", 1.0)
    files = (
        recorded(small, tmp_path / "fp.st", tokens()),
        recorded(noisy, tmp_path / "noisy.st", tokens()),
    )

    comparison = diff(*files)

    assert len(in_stream(comparison)) == 31
    blamed = {origin.module for origin in comparison.verdict.origins}
    assert not [name for name in blamed if name.endswith("input_layernorm")]


def test_repeated_vectors_count_once(vectors, matrix):
    repeated = np.repeat(vectors[:10], 5, axis=0)
    assert find_rotation([(repeated, repeated @ matrix)]) == TooFewTokens(12, 8)


def test_zeros_and_what_is_not_finite_have_no_say(vectors, matrix):
    turned = vectors @ matrix
    vectors[3], turned[4] = 0, np.inf
    turned[5] = np.nan
    found = find_rotation([(vectors, turned)])
    assert isinstance(found, Rotation)
    assert np.abs(found.matrix - matrix).max() < 1e-9


def test_turned_vectors_are_read_back_in_any_range(vectors, matrix):
    _, back = Rotation(matrix).sides(vectors, vectors @ matrix)
    assert back.shape == vectors.shape
    for start, stop in ((0, 600), (0, 1), (5, 31), (12, 24), (599, 600)):
        assert np.allclose(back.read(start, stop), vectors.reshape(-1)[start:stop])


def test_few_vectors_of_which_nothing_that_agrees_was_made_are_no_rotated_stream(tmp_path):
    model, inputs = build("t5", 2)
    for file in ("fp.st", "quant.st"):
        with torch.no_grad():
            with record(model, tmp_path / file):
                model(**inputs)
            model.lm_head.weight[:2] = model.lm_head.weight[[1, 0]].clone()

    verdict = diff(tmp_path / "fp.st", tmp_path / "quant.st").verdict

    assert verdict.origins[0].module == "decoder.embed_tokens"
    assert "after a rotation" not in verdict.text
