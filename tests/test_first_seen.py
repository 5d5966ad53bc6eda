"""Where a fault is first seen in models that are not all layers of one kind."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import build
from torch import Tensor, nn

from qvtrace import diff, record, replay
from qvtrace.comparison.comparison import Comparison


@pytest.fixture
def against(tmp_path: Path):
    """Compares a model with a changed copy of itself."""

    def run(model: nn.Module, changed: nn.Module, *inputs: Tensor) -> Comparison:
        files = tmp_path / "fp.st", tmp_path / "quant.st"
        for each, file in zip((model, changed), files, strict=True):
            with torch.no_grad(), record(each.eval(), file):
                each(*inputs)
        return diff(*files)

    return run


def places(comparison: Comparison) -> list[tuple[str, str]]:
    return [(origin.module, origin.path) for origin in comparison.verdict.origins]


def changed(model: nn.Module, name: str, change) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model.get_submodule(name).weight)
    return model


def round_to_4_bits(weight: Tensor) -> None:
    step = weight.abs().amax() / 7
    weight.copy_((weight / step).round() * step)


def swap_channels(weight: Tensor) -> None:
    weight[[1, 2]] = weight[[2, 1]].clone()


def test_the_first_of_a_chain_is_named_though_all_others_are_as_noisy(against):
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))
    for layer in chain:
        nn.init.normal_(layer[0].weight, std=0.3)  # so that noise does not fade

    comparison = against(chain, changed(chain, "0.0", round_to_4_bits), torch.randn(24, 32))

    assert places(comparison) == [("0.0", "output")]


def test_what_may_be_quantization_alone_comes_behind_what_is_larger(against):
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)))
    rounded = copy.deepcopy(chain)
    with torch.no_grad():
        for layer in rounded:
            step = layer[0].weight.abs().amax() / 127
            layer[0].weight.copy_((layer[0].weight / step).round() * step)

    comparison = against(chain, changed(rounded, "3.0", swap_channels), torch.randn(24, 32))

    assert places(comparison)[0] == ("3.0", "output")


@pytest.mark.parametrize(("tokens", "is_named"), [(1, False), (24, True)])
def test_one_call_of_one_token_has_to_be_noisier_than_one_of_many(against, tokens, is_named):
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    noisy = copy.deepcopy(chain)
    with torch.no_grad():
        for number, (layer, other) in enumerate(zip(chain, noisy, strict=True)):
            nn.init.orthogonal_(layer.weight)
            noise = torch.randn(64, 64) / 8
            other.weight.copy_(layer.weight + noise * (0.2 if number == 6 else 0.03))

    comparison = against(chain, noisy, torch.randn(tokens, 64))

    assert (("6", "output") in places(comparison)) is is_named


def test_a_fault_in_the_first_layer_is_named_though_all_of_its_kind_inherit_it(against):
    torch.manual_seed(0)
    chain = nn.Sequential(
        *(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))) for _ in range(6))
    )
    for layer in itertools.chain(*chain):
        nn.init.normal_(layer.weight, std=0.125)  # so that noise does not fade
    rounded = copy.deepcopy(chain)
    with torch.no_grad():
        for layer in itertools.chain(*rounded):
            step = layer.weight.abs().amax() / 127
            layer.weight.copy_((layer.weight / step).round() * step)

    comparison = against(chain, changed(rounded, "0.3", swap_channels), torch.randn(24, 64))

    assert places(comparison)[0] == ("0.3", "output")


def test_a_few_channels_of_an_image_that_differ_are_seen_where_they_begin_to(against):
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4))
    )
    faulty = changed(convolutions, "2.0", swap_channels)

    comparison = against(convolutions, faulty, torch.randn(1, 8, 12, 12))

    assert places(comparison) == [("2.0", "output")]


class Expansion(nn.Module):
    """The order of the channels between the two is of no matter to what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


def test_channels_in_another_order_that_is_undone_blame_nobody(against):
    torch.manual_seed(0)
    model = nn.Sequential(*(Expansion() for _ in range(3)))
    turned = copy.deepcopy(model)
    order = torch.randperm(64)
    with torch.no_grad():
        for weight in (turned[1].up.weight, turned[1].up.bias):
            weight.copy_(weight[order])
        turned[1].down.weight.copy_(turned[1].down.weight[:, order])

    comparison = against(model, turned, torch.randn(24, 16))

    assert max(row.metrics.peir for row in comparison.rows if row.metrics.peir) > 0.1
    assert places(comparison) == []


class Telling(Expansion):
    """Gives what is between the two as well, as attention gives its weights."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        between = torch.relu(self.up(hidden))
        return self.down(between), between


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = Telling()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.expand(hidden)[0]


def test_what_is_undone_blames_nobody_though_the_call_around_it_gives_it_too(against):
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(3)))
    turned = copy.deepcopy(model)
    expand, order = turned[1].expand, torch.randperm(64)
    with torch.no_grad():
        for weight in (expand.up.weight, expand.up.bias):
            weight.copy_(weight[order])
        expand.down.weight.copy_(expand.down.weight[:, order])

    comparison = against(model, turned, torch.randn(24, 16))

    assert "output.1" in {row.path for row in comparison.rows if (row.metrics.peir or 0) > 0.1}
    assert places(comparison) == []


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(self.norm(hidden))


def test_an_offset_that_only_the_last_norm_takes_out_is_told_where_it_comes_in(against):
    torch.manual_seed(0)
    model = nn.Sequential(Normed(), Normed(), Normed(), nn.LayerNorm(16))
    shifted = copy.deepcopy(model)
    shifted[1].linear.bias.data += 1

    comparison = against(model, shifted, torch.randn(24, 16))

    assert places(comparison) == [("1.linear", "output")]


class Choosing(nn.Module):
    """Gives the largest channel of each token, so that small errors do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        self.norm = nn.LayerNorm(16, eps=0.0)
        self.choose = Largest()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.choose(self.norm(self.layers(hidden)))


class Largest(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.argmax(-1)


def test_choices_that_are_the_same_do_not_undo_the_noise_before_them(against):
    torch.manual_seed(0)
    model = Choosing()

    def add_little(weight: Tensor) -> None:
        weight += 1e-4 * torch.randn(weight.shape)

    comparison = against(model, changed(model, "layers.1", add_little), torch.randn(24, 16))

    assert all(row.status == "identical" for row in comparison.rows if row.module == "")
    assert places(comparison) == [("layers.1", "output")]


def test_a_factor_is_made_up_for_where_the_same_choices_are_made_of_what_has_it(against):
    torch.manual_seed(0)
    model = Choosing()

    def double(weight: Tensor) -> None:
        weight *= 2

    comparison = against(model, changed(model, "norm", double), torch.randn(24, 16))

    assert next(row for row in comparison.rows if row.module == "norm").is_made_up_for
    assert places(comparison) == []


def quantized(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    return model


def test_of_two_modules_of_a_class_the_one_with_more_noise_of_its_own_is_the_origin(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32))
    rounded = changed(model, "0", round_to_4_bits)
    hidden = torch.randn(24, 32)
    for each, name in ((model, "fp.st"), (rounded, "quant.st")):
        with torch.no_grad(), record(each, tmp_path / name):
            each(hidden)
    replay(rounded, tmp_path / "fp.st", tmp_path / "local.st")

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st", local=tmp_path / "local.st")

    assert places(comparison) == [("0", "output")]
    assert comparison.verdict.origins[0].evidence == "local"


def test_a_router_that_chooses_otherwise_since_its_numbers_are_noisy_is_no_fault(against):
    model, inputs = build("qwen3_moe")
    ids = torch.cat([inputs["input_ids"] + shift for shift in range(3)], dim=1)

    comparison = against(model, quantized(model), ids)

    assert any(row.status == "mismatch" for row in comparison.rows)
    assert places(comparison) == []


@pytest.mark.parametrize("stored", [(False, False), (True, False), (False, True)])
def test_where_no_inputs_were_stored_nothing_is_told_of_where_error_comes_in(tmp_path, stored):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    hidden = torch.randn(8, 16)
    files = tmp_path / "fp.st", tmp_path / "quant.st"
    models = chain, changed(chain, "1", round_to_4_bits)
    for model, file, inputs in zip(models, files, stored, strict=True):
        with torch.no_grad(), record(model, file, inputs=inputs):
            model(hidden)

    verdict = diff(*files).verdict

    assert not verdict.origins
    assert verdict.lines == (
        "where error comes in is not known: of no call it is, what it was given",
    )


class TwiceDropped(nn.Module):
    """Calls one module at two places, of which the second is the noisier one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.dropout = nn.Dropout()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.first(hidden))
        return hidden + self.dropout(self.second(hidden))


def test_a_run_that_is_its_own_floor_blames_nobody_where_a_module_is_called_twice(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(TwiceDropped() for _ in range(3))).eval()
    rounded = changed(changed(model, "1.first", round_to_4_bits), "1.second", swap_channels)
    files = tmp_path / "fp.st", tmp_path / "quant.st"
    for each, file in zip((model, rounded), files, strict=True):
        with torch.no_grad(), record(each, file):
            each(torch.linspace(-1, 1, 24 * 32).reshape(24, 32))

    comparison = diff(*files, floor=files[1])

    assert places(comparison) == []


class Residual(nn.Module):
    """Adds to a stream what an MLP makes of it, normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Stream(nn.Module):
    """Runs one block after another, with a factor before the third."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.factor = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden * self.factor if index == 2 else hidden)
        return hidden


def test_a_factor_on_a_stream_is_seen_where_it_comes_in_though_norms_take_it_out(against):
    torch.manual_seed(0)
    stream = Stream(*[Residual()] * 4)
    scaled = copy.deepcopy(stream)
    scaled.factor = 1.3

    comparison = against(stream, scaled, torch.randn(24, 32))

    assert places(comparison)[0] == ("", "output")
    assert "input of blocks.0" in comparison.verdict.lines[0]


def test_the_noise_of_a_norm_with_another_epsilon_is_that_of_its_whole_error(against, tmp_path):
    torch.manual_seed(0)
    stream = Stream(*(Residual() for _ in range(4)))
    flat = copy.deepcopy(stream)
    flat.blocks[1].norm.eps = 100.0

    comparison = against(stream, flat, torch.randn(24, 32))

    names = (tmp_path / name for name in ("fp.st", "quant.st"))
    one, other = (load_file(file)["blocks.1.norm#0/output"].double() for file in names)
    noise = ((one - other) ** 2).sum(-1) / (one**2).sum(-1)
    row = next(row for row in comparison.rows if row.module == "blocks.1.norm")
    assert row.metrics.noise_out == pytest.approx(float(noise.median()), rel=0.05)
    assert places(comparison)[0] == ("blocks.1.norm", "output")


class Gated(nn.Module):
    """What it has of each channel within is multiplied by two of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(nn.functional.silu(self.gate(states)) * self.up(states))


def smoothed(layers: nn.Sequential, *spreads: float) -> nn.Sequential:
    """The same function: each channel of what `down` is given, over a factor of its own."""
    layers = copy.deepcopy(layers)
    with torch.no_grad():
        for layer, spread in zip(layers, spreads, strict=True):
            factors = torch.exp(torch.randn(48) * spread)
            layer.up.weight.mul_(factors[:, None])
            layer.down.weight.div_(factors)
    return layers


def rounded_to(bits: int, layers: nn.Sequential) -> nn.Sequential:
    layers = copy.deepcopy(layers)
    with torch.no_grad():
        for layer in layers.modules():
            if isinstance(layer, nn.Linear):
                step = layer.weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                layer.weight.copy_((layer.weight / step).round() * step)
    return layers


@pytest.fixture
def gated() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Gated() for _ in range(4)))


def test_factors_that_one_token_hides_and_the_next_weights_take_out_blame_nobody(against, gated):
    states = torch.randn(24, 32)
    states[0] *= 4  # what is multiplied of it hides all other tokens, as an attention sink does

    comparison = against(gated, smoothed(rounded_to(8, gated), 0, 0, 0.7, 0), states)

    assert {row.module for row in comparison.rows if row.is_made_up_for} == {"2.up"}
    assert places(comparison) == []


def test_a_fault_behind_factors_that_one_token_hides_is_named_alone(against, gated):
    states = torch.randn(24, 32)
    states[0] *= 4
    faulty = changed(rounded_to(8, gated), "3.gate", swap_channels)

    comparison = against(gated, smoothed(faulty, 0, 0, 0.7, 0), states)

    assert places(comparison) == [("3.gate", "output")]


def test_factors_that_quantization_nearly_hides_are_told_by_those_of_other_layers(against, gated):
    rounded = rounded_to(6, smoothed(gated, 1, 1, 0.08, 1))

    comparison = against(gated, rounded, torch.randn(24, 32))

    scaled = {row.module for row in comparison.rows if row.is_made_up_for}
    assert scaled == {f"{layer}.up" for layer in range(4)}


class Cancelling(nn.Module):
    """What it gives is little beside what it is made of, so that it is noisier."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.less = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.less.weight.data = self.more.weight.data + 0.003 * torch.randn(32, 32)

    def forward(self, states: Tensor) -> Tensor:
        return self.more(states) - self.less(states)


def test_factors_are_judged_by_what_takes_them_out_not_by_all_that_this_is_part_of(against):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), Cancelling())
    folded = copy.deepcopy(model)
    with torch.no_grad():
        factors = torch.exp(torch.randn(32) * 0.5)
        folded[1].weight.mul_(factors)
        folded[1].bias.mul_(factors)
        for linear in (folded[2].more, folded[2].less):
            linear.weight.div_(factors)

    comparison = against(model, rounded_to(8, folded), torch.randn(24, 32))

    assert {row.module for row in comparison.rows if row.is_made_up_for} == {"1"}
    assert "1" not in dict(places(comparison))


class Louder(nn.Module):
    """A module whose output is too large for the last of its tokens."""

    def __init__(self, module: nn.Module, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight = module.weight

    def forward(self, states: Tensor) -> Tensor:
        output = states @ self.weight.T
        output[-self.tokens :] *= 1.5
        return output


@pytest.mark.parametrize("tokens", [4, 15])
def test_an_error_of_few_tokens_is_named_where_quantization_hides_it_from_most(
    against, gated, tokens
):
    faulty = rounded_to(8, gated)
    faulty[2].up = Louder(faulty[2].up, tokens)

    comparison = against(gated, faulty, torch.randn(40, 32))

    assert places(comparison)[0] == ("2.up", "output")
    origin = comparison.verdict.origins[0]
    assert origin.reason.startswith("in few tokens, its output differs by ")
    row = next(row for row in comparison.rows if row.module == "2.up")
    assert origin.noise_out == row.metrics.noise_out  # of most tokens all the same


def test_noise_of_all_tokens_that_comes_of_few_is_told_behind_these(against):
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(4))
    )
    for layer in convolutions:
        nn.init.normal_(layer[0].weight, std=0.12)  # so that noise does not fade
    rounded = copy.deepcopy(convolutions)
    with torch.no_grad():
        for layer in rounded:
            step = layer[0].weight.abs().amax() / 127
            layer[0].weight.copy_((layer[0].weight / step).round() * step)

    comparison = against(
        convolutions, changed(rounded, "1.0", swap_channels), torch.randn(2, 16, 12, 12)
    )

    assert places(comparison)[0] == ("1.0", "output")


def test_weights_that_are_rounded_in_all_layers_do_not_blame_the_first(against):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), *(nn.Linear(32, 32) for _ in range(4)))
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()

    comparison = against(model, rounded, torch.arange(48))

    assert places(comparison) == []


def test_a_gap_of_the_first_layer_is_held_against_those_before_the_same_module(against):
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=256, **sizes))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.dim() > 1 and "shared" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)  # so that every branch matters

    comparison = against(encoder, rounded_to(6, encoder), torch.randint(256, (1, 40)))

    names = {row.module for row in comparison.rows}
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias" in names  # nowhere else
    assert places(comparison) == []


class Stepwise(nn.Module):
    """Takes one token after the other, as the steps of a generation do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: Tensor) -> Tensor:
        return torch.cat([self.model(token[None]) for token in states])


def test_of_single_tokens_that_quantization_makes_noisy_none_blames_a_module(against):
    torch.manual_seed(0)
    model = Stepwise(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6))))

    comparison = against(model, rounded_to(6, model), torch.randn(60, 8))

    assert places(comparison) == []


def test_a_module_that_errs_in_each_call_of_one_token_is_named(against):
    torch.manual_seed(0)
    model = Stepwise(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(6))))
    faulty = changed(rounded_to(6, model), "model.3", swap_channels)

    comparison = against(model, faulty, torch.randn(60, 8))

    assert places(comparison)[0] == ("model.3", "output")


def test_what_makes_little_noise_much_comes_behind_what_made_it(against):
    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)))
    with torch.no_grad():
        chain[2][0].weight[:, 0] *= 6
    faulty = changed(chain, "1.0", lambda weight: weight[0].mul_(1.5))

    comparison = against(chain, faulty, torch.randn(24, 32))

    assert places(comparison)[0] == ("1.0", "output")


class Dimming(nn.Module):
    """Lets little through of what most of its inputs are, if told so."""

    def __init__(self, most: Tensor | None = None) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(32), nn.Linear(32, 32, bias=False)
        if most is not None:
            with torch.no_grad():
                self.linear.weight -= torch.outer(self.linear.weight @ most, most)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(self.norm(hidden))


def make_noisy(module: nn.Module, share: float) -> None:
    """Add noise of this share of each token's size to what a module gives."""

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        return output + share * noise * output.square().mean(-1, keepdim=True).sqrt()

    module.register_forward_hook(add)


def test_what_amplifies_noise_of_a_place_that_is_told_comes_behind_that(against):
    torch.manual_seed(0)
    most = nn.functional.normalize(torch.randn(32), dim=0)
    stream = nn.Sequential(*(Dimming(most if layer == 3 else None) for layer in range(6)))
    tokens = 30 * most * torch.randn(24, 1).sign() + 0.5 * torch.randn(24, 32)
    faulty = copy.deepcopy(stream)
    for layer in faulty:
        with torch.no_grad():
            round_to_8_bits(layer.linear.weight)
    make_noisy(faulty[0], 0.08)
    make_noisy(faulty[3].norm, 0.3)

    told = [module for module, _ in places(against(stream, faulty, tokens))]

    assert told.index("3.norm") < told.index("3.linear")


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(32, 32) for _ in range(3))
        self.scale = 8.0

    def forward(self, hidden: Tensor) -> Tensor:
        weights = (self.scale * self.query(hidden) @ hidden.T / 32**0.5).softmax(-1)
        return self.out(torch.sin(0.1 * (weights @ self.value(hidden))))


class NormedBehind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.norm = Mixing(), nn.LayerNorm(32)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.mixing(hidden))


@pytest.mark.parametrize(("times", "told"), [(4, [("1.mixing", "output")]), (1, [])])
def test_an_early_gap_is_told_where_it_amplifies_far_more_than_others_of_its_kind(
    against, times, told
):
    torch.manual_seed(0)
    layers = nn.Sequential(*(NormedBehind() for _ in range(5)))
    with torch.no_grad():
        for layer in layers:
            layer.mixing.query.weight *= 2
    steeper = copy.deepcopy(layers)
    steeper[1].mixing.scale *= times
    for module in [*steeper.modules()]:
        if type(module) is nn.Linear:
            module.__class__ = RoundedLinear

    tokens = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    comparison = against(layers, steeper, tokens)

    assert places(comparison) == told


class Sandwich(nn.Module):
    """One layer, others of another class that are not quantized, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.between = nn.GRU(32, 32)
        self.last = nn.LayerNorm(32)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.last(self.between(self.first(hidden))[0])


class RoundedLinear(nn.Linear):
    """Weights by channel and inputs by token, both in eight bits."""

    def forward(self, hidden: Tensor) -> Tensor:
        weight, hidden = (
            (part / (steps := part.abs().amax(-1, keepdim=True) / 127)).round() * steps
            for part in (self.weight, hidden)
        )
        return nn.functional.linear(hidden, weight, self.bias)


def round_to_8_bits(weight: Tensor) -> None:
    step = weight.abs().amax(-1, keepdim=True) / 127
    weight.copy_((weight / step).round() * step)


def replaced(model: nn.Module, name: str) -> nn.Module:
    model = copy.deepcopy(model)
    model.get_submodule(name).__class__ = RoundedLinear
    return model


@pytest.mark.parametrize(
    "by_hand", [replaced, lambda model, name: changed(model, name, round_to_8_bits)]
)
def test_a_lone_first_layer_that_errs_no_more_than_eight_bits_do_is_not_blamed(against, by_hand):
    torch.manual_seed(0)
    model = Sandwich()
    comparison = against(model, by_hand(model, "first"), torch.randn(24, 32))

    (row,) = (row for row in comparison.rows if row.module == "first")
    assert row.metrics.noise_out > 1e-6
    assert places(comparison) == []


@pytest.mark.parametrize("fault", [round_to_4_bits, swap_channels, lambda weight: weight.mul_(1.1)])
@pytest.mark.parametrize(
    "by_hand", [replaced, lambda model, name: changed(model, name, round_to_8_bits)]
)
def test_a_fault_in_a_lone_first_layer_is_told_whether_it_is_quantized_by_hand_or_not(
    against, by_hand, fault
):
    torch.manual_seed(0)
    model = Sandwich()
    faulty = changed(by_hand(model, "first"), "first", fault)

    assert places(against(model, faulty, torch.randn(24, 32)))[0] == ("first", "output")


class Shown(nn.Module):
    """Some numbers of a stream that is far from zero in each token, of which the weights may show
    no more than what tokens differ by."""

    def __init__(self, numbers: int, *, hides: bool) -> None:
        super().__init__()
        self.dense, self.shown = nn.Linear(64, 64), nn.Linear(64, numbers, bias=False)
        self.far = nn.Parameter(torch.zeros(64))
        with torch.no_grad():
            self.far[0] = 13.0
            self.shown.weight[:, 0] = 0.0 if hides else 0.15

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shown(self.dense(hidden) + self.far)


class SideBySide(nn.ModuleList):
    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [module(hidden) for module in self]


@pytest.mark.parametrize(("numbers", "told"), [(3, []), (64, [("2.shown", "output")])])
def test_few_numbers_may_show_more_of_what_came_in_than_many_before_they_are_blamed(
    against, numbers, told
):
    torch.manual_seed(0)
    model = SideBySide(Shown(numbers, hides=number == 2) for number in range(5))
    rounded = copy.deepcopy(model)
    for block in rounded:
        block.dense.register_forward_hook(
            lambda module, inputs, output: output + 0.01 * torch.randn(output.shape)
        )

    assert places(against(model, rounded, torch.randn(48, 64))) == told
