"""Constants that an array is another's multiple by, and outputs that are equal up to them."""

import copy
import json

import numpy as np
import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qvtrace.comparison.answer import answer
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.origins import Origins
from qvtrace.comparison.row_names import RowNames
from qvtrace.metrics.comparing import compare
from qvtrace.metrics.factors import ChannelFactors, factor_text, find_factor, fits
from qvtrace.metrics.scaling import find_scaling
from qvtrace.metrics.sharing import is_summand
from qvtrace.recording.recorder import record
from qvtrace.reports.json import comparison_text
from qvtrace.reports.table import TableOptions, comparison_lines

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.standard_normal((2, 42, 96)).astype(np.float32)


def noise(size: float, shape: tuple[int, ...] = TOKENS.shape) -> np.ndarray:
    return (size * RANDOM.standard_normal(shape)).astype(np.float32)


def a_third() -> np.ndarray:
    factors = np.ones(96, np.float32)
    factors[32:64] = 0.25
    return factors


def scattered(size: float = 1.0) -> np.ndarray:
    return np.exp(size * RANDOM.standard_normal(96)).astype(np.float32)


@pytest.mark.parametrize("rest", [0.0, 0.01])
def test_one_factor_is_a_number(rest):
    factor = find_factor(TOKENS, 0.25 * TOKENS + noise(rest))
    assert factor == pytest.approx(0.25, rel=1e-3)


def test_a_changed_sign_is_a_factor():
    assert find_factor(TOKENS, -TOKENS) == pytest.approx(-1.0)


@pytest.mark.parametrize("rest", [0.0, 0.03])
def test_a_block_of_channels_has_one_factor(rest):
    factor = find_factor(TOKENS, TOKENS * a_third() + noise(rest))

    assert isinstance(factor, ChannelFactors)
    ((start, stop, value),) = factor.ranges()
    assert (start, stop) == (32, 64)
    assert value == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("rest", [0.0, 0.03])
def test_every_channel_can_have_a_factor_of_its_own(rest):
    factors = scattered()

    factor = find_factor(TOKENS, TOKENS * factors + noise(rest))

    assert isinstance(factor, ChannelFactors)
    assert factor.values == pytest.approx(factors, rel=0.05, abs=0.02)


@pytest.mark.parametrize("rest", [0.0, 0.03])
def test_channels_whose_factor_is_1_but_for_noise_have_none(rest):
    factors = np.ones(96, np.float32)
    factors[7], factors[50] = 3, 1.5

    factor = find_factor(TOKENS, TOKENS * factors + noise(rest))

    assert isinstance(factor, ChannelFactors)
    assert [(start, stop) for start, stop, _ in factor.ranges()] == [(7, 8), (50, 51)]


@pytest.mark.parametrize(
    "candidate",
    [
        pytest.param(TOKENS + noise(0.03), id="noise"),
        pytest.param(TOKENS + noise(2.0), id="much-noise"),
        pytest.param(1.01 * TOKENS + noise(0.01), id="a-factor-below-the-noise"),
        pytest.param(TOKENS + np.float32(2), id="an-offset"),
        pytest.param(TOKENS[:, ::-1].copy(), id="other-tokens"),
        pytest.param(TOKENS[..., ::-1].copy(), id="other-channels"),
        pytest.param(TOKENS * 0, id="zeros"),
        pytest.param(TOKENS * RANDOM.random((2, 42, 1)).astype(np.float32), id="by-token"),
        pytest.param(np.full_like(TOKENS, 1e30), id="huge"),
        pytest.param(np.full(TOKENS.shape, 1e160), id="beyond-squares"),
    ],
)
def test_what_is_no_factor_is_not_taken_for_one(candidate):
    assert find_factor(TOKENS, candidate) is None


def test_a_shift_of_channels_that_hardly_vary_is_not_taken_for_their_factors():
    steady = 0.01 * TOKENS + RANDOM.standard_normal(96).astype(np.float32)
    assert find_factor(steady, steady + noise(0.2, (96,))) is None


def test_a_channel_of_one_token_proves_nothing():
    one = TOKENS[:1, :1]

    assert find_factor(one, one * scattered()) is None
    assert find_factor(one, one * np.float32(0.25)) == pytest.approx(0.25)
    assert find_factor(one[..., :8], one[..., :8] * np.float32(0.25)) is None


def test_an_error_that_one_token_has_is_no_factor_of_each_channel():
    """An attention sink is so large that its error is nearly all of the error there is."""
    reference = TOKENS[:1, :8].copy()
    reference[0, 0] *= 100
    candidate = reference + noise(0.2, reference.shape)
    candidate[0, 0] += 20 * noise(1.0, (96,))
    assert find_factor(reference, candidate) is None


def test_an_error_that_one_element_has_is_no_factor_of_all():
    reference = TOKENS[:1, :8].copy()
    reference[0, 0, 7] = 1000
    candidate = reference + noise(0.2, reference.shape)
    candidate[0, 0, 7] = 940
    assert find_factor(reference, candidate) is None


def test_an_error_that_one_token_has_is_no_factor_of_all_tokens():
    reference = TOKENS[:1, :7].copy()
    reference[0, 0] *= 8
    candidate = reference + noise(0.15, reference.shape)
    candidate[0, 0] *= np.float32(0.75)
    scaled = np.float32(0.75) * (reference + noise(0.15, reference.shape))

    assert find_scaling(reference, candidate, compare(reference, candidate)) is None
    found = find_scaling(reference, scaled, compare(reference, scaled))
    assert found is not None
    assert found.factor == pytest.approx(0.75, rel=0.05)


def test_factors_known_from_elsewhere_are_held_against_one_token():
    one, factors = TOKENS[:1, :1], scattered().astype(np.float64)

    assert fits(one, one * factors.astype(np.float32), ChannelFactors(factors))
    assert not fits(one, one * scattered(), ChannelFactors(factors))
    assert not fits(one[..., :48], one[..., :48] * 2, ChannelFactors(factors))


def test_masks_and_infinities_have_no_say_in_a_factor():
    reference = TOKENS.copy()
    reference[0, 3], reference[1, 5, 7] = np.finfo(np.float32).min, np.inf
    candidate = reference * np.float32(0.5)
    candidate[0, 3] = np.finfo(np.float32).min

    assert find_factor(reference, candidate) == pytest.approx(0.5)


def test_rounded_weights_leave_blocks_whole():
    weights = RANDOM.standard_normal((128, 96))
    given = RANDOM.standard_normal((84, 128)) + 1

    factor = find_factor(given @ weights, given @ (np.round(weights * a_third() * 20) / 20))

    assert isinstance(factor, ChannelFactors)
    assert [(start, stop) for start, stop, _ in factor.ranges()] == [(32, 64)]


def test_long_arrays_are_read_in_parts(monkeypatch):
    whole = find_factor(TOKENS, TOKENS * a_third())
    monkeypatch.setattr("qvtrace.metrics.factors._BLOCK", 200)
    in_parts = find_factor(TOKENS, TOKENS * a_third())

    assert isinstance(whole, ChannelFactors)
    assert isinstance(in_parts, ChannelFactors)
    assert in_parts.values == pytest.approx(whole.values)


def test_factors_are_told_in_words():
    assert factor_text(0.17677) == "0.177"
    assert factor_text(ChannelFactors(a_third())) == "0.25 in channels 32 to 63"
    few = np.ones(8)
    few[2] = 4
    assert factor_text(ChannelFactors(few)) == "4 in channel 2"
    assert factor_text(ChannelFactors(np.arange(1.0, 9.0))) == "2 to 8 in 7 channels"


class Attention(nn.Module):
    """Of one head; a queries' scale may be folded into the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.scale = 0.25

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        weights = torch.softmax(self.scale * query @ key.transpose(-1, -2), dim=-1)
        return self.proj(weights @ value)


class Block(nn.Module):
    """A norm before attention, around which the hidden states are added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = Attention()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.attention(self.norm(hidden))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def changed(model: nn.Module, change) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model)
    return model


def scale_keys(model: nn.Module) -> None:
    model[0].attention.qkv.weight[16:32] *= 0.3
    model[0].attention.qkv.bias[16:32] *= 0.3


def fold_keys(model: nn.Module) -> None:
    scale_keys(model)
    model[0].attention.scale /= 0.3


def scale_norm(model: nn.Module) -> None:
    factors = torch.linspace(0.5, 3, 16)
    model[1].norm.weight *= factors
    model[1].norm.bias *= factors


def fold_norm(model: nn.Module) -> None:
    scale_norm(model)
    model[1].attention.qkv.weight /= torch.linspace(0.5, 3, 16)


@pytest.fixture
def against(tmp_path):
    """Compares the network with a change of it."""

    def run(change, *, tokens: int = 24, **options) -> Comparison:
        hidden = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(1))
        for name, model in (("fp", network()), ("quant", changed(network(), change))):
            with torch.no_grad(), record(model.eval(), tmp_path / f"{name}.st", overwrite=True):
                model(hidden)
                model(hidden[:, :1])
        return diff(tmp_path / "fp.st", tmp_path / "quant.st", **options)

    return run


def row_of(comparison: Comparison, module: str, path: str = "output", call: int = 0):
    (row,) = (
        row for row in comparison.rows if (row.module, row.path, row.call) == (module, path, call)
    )
    return row


def test_a_block_that_is_taken_out_again_is_equal_up_to_a_factor(against):
    comparison = against(fold_keys)

    row = row_of(comparison, "0.attention.qkv")
    assert row.metrics.peir > 0.1
    assert [(start, stop) for start, stop, _ in row.scale_factor.ranges()] == [(16, 32)]
    assert row.residual_peir < 1e-6
    assert row.residual_sqnr > 110
    assert row.reason == "equal up to a factor: 0.attention agrees"
    assert "fault" not in comparison.verdict.text
    assert "2 rows equal up to a factor" in comparison.verdict.text
    assert "0.attention.qkv" not in comparison.verdict.text


def test_a_factor_that_stays_in_is_the_fault(against):
    comparison = against(scale_keys)

    row = row_of(comparison, "0.attention.qkv")
    assert row.reason == "the factor is the fault: 0.attention differs too"
    assert (
        "first seen at 0.attention.qkv#0 (inputs agree, output -8 dB): "
        "its output is the reference times 0.3 in channels 16 to 31" in (comparison.verdict.text)
    )


def test_factors_by_channel_are_judged_by_the_block_around(against):
    assert row_of(against(fold_norm), "1.norm").reason == "equal up to a factor: 1 agrees"
    assert row_of(against(scale_norm), "1.norm").reason == "the factor is the fault: 1 differs too"


def test_a_call_of_one_token_has_the_factors_of_the_module_s_other_calls(against):
    row = row_of(against(fold_norm), "1.norm", call=1)

    assert row.shape[0] == (1, 1, 16)
    assert row.residual_sqnr > 110
    assert row.is_made_up_for


def test_an_input_is_judged_by_the_module_that_takes_it(against):
    comparison = against(fold_norm, path="all")

    assert row_of(comparison, "1.attention.qkv", "inputs.0").reason == (
        "equal up to a factor: 1.attention.qkv agrees"
    )
    assert all(row.is_made_up_for for row in comparison.rows if row.metrics.peir > 0.05)


@pytest.mark.parametrize("options", [{"path": "inputs"}, {"include": ["1.norm"]}])
def test_what_is_around_is_looked_at_even_where_it_has_no_rows(against, options):
    scaled = [row for row in against(fold_norm, **options).rows if row.scale_factor is not None]

    assert scaled
    assert all(row.is_made_up_for for row in scaled)


def test_where_everything_is_equal_up_to_factors_the_verdict_says_so(against):
    text = against(fold_norm, include=["1.norm"]).verdict.text

    assert text.startswith(
        "equal after transform: 2 rows equal up to a factor; "
        "no difference between floating-point values beyond factors; no NaN"
    )


def test_an_output_that_nothing_is_around_has_its_factor_for_a_fault(against):
    def scale_everything(model: nn.Module) -> None:
        model[1].register_forward_hook(lambda module, args, output: 3 * output)

    comparison = against(scale_everything)

    assert row_of(comparison, "").reason == "the factor is the fault: no module around it agrees"
    verdict = comparison.verdict
    assert verdict.origins[0].reason.endswith("its output is the reference times 3")
    assert "a factor is the fault" not in verdict.text  # which would be a second answer


class Residual(nn.Module):
    """What a module adds to a stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))


def test_a_factor_that_a_stream_hands_on_is_the_fault_that_it_was(tmp_path):
    """Behind it, the blocks add to the stream what is not scaled, as noise would be."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(64) for _ in range(3)), nn.LayerNorm(64), nn.Linear(64, 50))
    hidden = torch.randn(1, 40, 64)
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), record(model, tmp_path / name):
            model(hidden)
        model[1].register_forward_hook(lambda module, args, output: 1.05 * output)

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert row_of(comparison, "2").scale_factor == pytest.approx(1.05, abs=0.01)
    for module in ("1", "2"):
        assert row_of(comparison, module).reason.startswith("the factor is the fault: ")
    assert [origin.module for origin in comparison.verdict.origins] == ["1"]


def test_an_output_that_is_lost_is_no_multiple_of_the_reference(against):
    def lose_a_projection(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        model[0].attention.proj.weight.copy_(1e-20 * torch.randn(16, 16, generator=generator))
        model[0].attention.proj.bias.zero_()

    assert row_of(against(lose_a_projection), "0.attention.proj").scale_factor is None


def round_to_16_bits(model: nn.Module) -> None:
    """The keys but little, the values more, so that what is around is noisier than the keys are."""
    fold_keys(model)
    weight = model[0].attention.qkv.weight
    for rows, steps in ((slice(16, 32), 2**15), (slice(32, 48), 2**9)):
        weight[rows] = (weight[rows] * steps).round() / steps


def test_a_fold_is_made_up_for_where_what_is_around_is_noisier_but_not_by_the_factor(against):
    row = row_of(against(round_to_16_bits), "0.attention.qkv")

    assert row.reason == "equal up to a factor: 0.attention agrees"


def test_a_row_equal_up_to_a_factor_is_the_last_that_anyone_has_to_look_at(against):
    comparison = against(fold_norm, sort_by="peir", top=3)

    assert not any(row.is_made_up_for for row in comparison.rows)
    everything = against(fold_norm, sort_by="peir")
    assert everything.rows[0].is_made_up_for
    assert not any(row.is_made_up_for for row in everything.worst("peir", 5))


def test_factors_are_in_json_as_a_number_or_by_ranges_of_channels(against):
    rows = json.loads(comparison_text(against(fold_keys), "1"))["rows"]
    factor = next(row["scale_factor"] for row in rows if row["module"] == "0.attention.qkv")
    assert factor["channels"] == [[16, 32]]
    assert factor["factors"] == pytest.approx([0.3])

    def double_values(model: nn.Module) -> None:
        model[0].attention.proj.weight *= 2
        model[0].attention.proj.bias *= 2

    rows = json.loads(comparison_text(against(double_values), "1"))["rows"]
    factor = next(row["scale_factor"] for row in rows if row["module"] == "0.attention.proj")
    assert factor == pytest.approx(2.0)


def test_of_many_factors_json_lists_those_farthest_from_1(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(200), nn.Linear(200, 8))
    hidden = torch.randn(1, 16, 200)
    factors = torch.linspace(0.5, 1.9, 200)
    folded = changed(model, lambda copied: copied[0].weight.mul_(factors))
    for name, each in (("a.st", model), ("b.st", folded)):
        with torch.no_grad(), record(each, tmp_path / name):
            each(hidden)

    comparison = diff(tmp_path / "a.st", tmp_path / "b.st")
    (row,) = (
        row for row in json.loads(comparison_text(comparison, "1"))["rows"] if row["module"] == "0"
    )

    listed = row["scale_factor"]
    assert len(listed["channels"]) == len(listed["factors"]) == 64
    assert listed["not_listed"] == 136
    assert listed["smallest"] == pytest.approx(0.5, abs=0.01)
    assert listed["largest"] == pytest.approx(1.9, abs=0.01)
    assert [0, 1] in listed["channels"]
    assert comparison.rows[0].scale_factor.values == pytest.approx(factors.numpy(), rel=1e-4)


def test_a_table_says_under_a_row_what_it_is_times_and_what_is_left(against):
    lines = [line.plain.strip() for line in comparison_lines(against(fold_keys), TableOptions())]

    (place,) = (n for n, line in enumerate(lines) if "0.attention.qkv#0 " in line)
    assert "#" not in lines[place].split("qkv#0")[1]
    assert lines[place + 1] == "the reference times 0.3 in channels 16 to 31"
    assert lines[place + 2].startswith("without the factor: PEIR ")
    assert lines[place + 3] == "equal up to a factor: 0.attention agrees"


def fold_llama(model: nn.Module) -> None:
    """As SmoothQuant and AWQ do: by channel, and exactly."""
    generator = torch.Generator().manual_seed(1)

    def factors(count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=generator))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale_columns(
            layer.input_layernorm, factors(64), attention.q_proj, attention.k_proj, attention.v_proj
        )
        scale_columns(layer.post_attention_layernorm, factors(64), mlp.gate_proj, mlp.up_proj)
        inner = factors(128)
        mlp.up_proj.weight *= inner[:, None]
        mlp.down_proj.weight /= inner
        values = factors(32)
        attention.v_proj.weight *= values[:, None]
        attention.o_proj.weight /= values.reshape(2, 1, 16).expand(2, 2, 16).reshape(64)


def scale_columns(norm: nn.Module, factors: Tensor, *linears: nn.Module) -> None:
    norm.weight *= factors
    for linear in linears:
        linear.weight /= factors


def round_linears(model: nn.Module) -> None:
    """To eight bits by output channel."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            step = module.weight.abs().amax(1, keepdim=True) / 127
            module.weight.copy_((module.weight / step).round() * step)


@pytest.fixture
def llama_against(tmp_path):
    def run(*changes, prepare=None) -> Comparison:
        model, inputs = build("llama")
        model = changed(model, prepare) if prepare else model
        for name in ("fp", "quant"):
            with torch.no_grad(), record(model, tmp_path / f"{name}.st"):
                model(**inputs, use_cache=False)
            for change in changes if name == "fp" else ():
                model = changed(model, change)
        return diff(tmp_path / "fp.st", tmp_path / "quant.st", path="all")

    return run


def test_no_row_of_an_exactly_equivalent_model_with_folds_reads_as_a_fault(llama_against):
    comparison = llama_against(fold_llama)

    large = [row for row in comparison.rows if (row.metrics.peir or 0) > 0.05]
    assert len(large) > 20
    assert all(row.is_made_up_for and row.residual_peir < 1e-5 for row in large)
    others = [row for row in comparison.rows if not row.is_made_up_for]
    assert max(row.metrics.peir or 0 for row in others) < 1e-5
    assert "fault" not in comparison.verdict.text
    assert f"{len(large)} rows equal up to a factor" in comparison.verdict.text


def test_folds_of_rounded_weights_are_told_from_their_noise(llama_against):
    comparison = llama_against(fold_mildly, round_linears)

    large = [row for row in comparison.rows if (row.metrics.peir or 0) > 0.1]
    assert large
    assert all(row.is_made_up_for and row.residual_peir < 0.05 for row in large)
    assert "fault" not in comparison.verdict.text


def sharpen(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight *= 2


def fold_queries(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight /= 2


def round_to_5_bits(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            step = module.weight.abs().amax(1, keepdim=True) / 15
            module.weight.copy_((module.weight / step).round() * step)


def test_factors_that_noise_hides_in_one_layer_are_made_up_for_as_those_of_others_are(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, initializer_range=0.1, **sizes, **heads)
    model = changed(LlamaForCausalLM(config).eval(), sharpen)
    folded = changed(changed(model, fold_queries), round_to_5_bits)
    tokens = torch.randint(0, 128, (1, 40), generator=torch.Generator().manual_seed(1))
    for each, name in ((model, "fp.st"), (folded, "quant.st")):
        with torch.no_grad(), record(each, tmp_path / name):
            each(input_ids=tokens, use_cache=False)

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert comparison.verdict.origins == ()
    scaled = [row for row in comparison.rows if row.scale_factor is not None]
    assert len(scaled) == 8
    assert all(row.is_made_up_for for row in scaled)


def test_a_factor_near_1_of_a_norm_is_not_taken_out_by_itself(llama_against):
    def enlarge_epsilon(model: nn.Module) -> None:
        model.model.layers[1].post_attention_layernorm.variance_epsilon = 0.05

    comparison = llama_against(enlarge_epsilon, prepare=give_each_branch_weight)

    row = row_of(comparison, "model.layers.1.post_attention_layernorm")
    assert 0.8 < row.scale_factor < 0.99
    assert not row.is_made_up_for


def give_each_branch_weight(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            generator = torch.Generator().manual_seed(len(name))
            size = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def fold_mildly(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        factors = torch.exp(0.3 * torch.randn(64, generator=generator))
        attention = layer.self_attn
        scale_columns(
            layer.input_layernorm, factors, attention.q_proj, attention.k_proj, attention.v_proj
        )


def test_rounded_weights_alone_are_no_factor(llama_against):
    assert not any(row.scale_factor for row in llama_against(round_linears).rows)


def errors_of(error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return TOKENS, TOKENS + error


def test_an_error_is_found_in_a_sum_whatever_else_is_added():
    error = noise(1.0)

    assert is_summand(errors_of(error), errors_of(error))
    assert is_summand(errors_of(error), errors_of(error + noise(1.0)))
    assert not is_summand(errors_of(error), errors_of(noise(1.0)))
    assert not is_summand(errors_of(error), errors_of(noise(100.0)))
    assert not is_summand(errors_of(error), errors_of(0.01 * error))
    assert not is_summand(errors_of(0 * error), errors_of(error))


def give_the_stream_most(model: nn.Module) -> None:
    """Of what the blocks give to the second one, whose own part is then small beside it."""
    model.model.layers[0].mlp.down_proj.weight.mul_(3000)


def double_a_projection(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight.mul_(2)


def test_a_factor_in_a_large_residual_stream_is_a_fault(llama_against):
    comparison = llama_against(double_a_projection, prepare=give_the_stream_most)

    row = row_of(comparison, "model.layers.1.mlp.down_proj")
    assert row.scale_factor == pytest.approx(2)
    assert row.reason == "the factor is the fault: model.layers.1 differs too"


def test_noise_of_a_large_residual_stream_is_not_taken_for_a_fold_beside_it(llama_against):
    comparison = llama_against(fold_mildly, round_linears, prepare=give_the_stream_most)

    scaled = [row for row in comparison.rows if row.scale_factor is not None]
    assert scaled
    assert all(row.is_made_up_for for row in scaled)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("bert", "bert.encoder.layer.1.attention.output.LayerNorm"),
        ("bert", "bert.encoder.layer.0.intermediate.dense"),
        ("gemma3", "model.layers.1.mlp.gate_proj"),
        ("vit", "vit.embeddings.patch_embeddings.projection"),
        ("qwen3_vl", "model.visual.merger.linear_fc1"),
    ],
)
def test_a_factor_that_is_bent_on_its_way_is_named_where_it_comes_in(tmp_path, model, name):
    original, inputs = build(model)
    doubled = changed(original, lambda copy: copy.get_submodule(name).weight.mul_(2))
    for each, file in ((original, "fp.st"), (doubled, "quant.st")):
        with torch.no_grad(), record(each, tmp_path / file):
            each(**inputs)

    verdict = diff(tmp_path / "fp.st", tmp_path / "quant.st").verdict

    assert verdict.origins[0].module == name


def test_where_a_factor_is_the_fault_nothing_is_said_to_be_clear():
    lines = answer(Origins(level="usual noise"), RowNames([]), None, is_clear=False)

    assert lines == ("usual noise",)


def test_what_is_equal_after_a_factor_is_blamed_on_nobody(tmp_path):
    torch.manual_seed(0)
    layers = nn.Linear(64, 64), nn.RMSNorm(64, eps=1e-5), nn.Linear(64, 64)
    model = nn.Sequential(nn.Sequential(*layers))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0][0].weight.mul_(2)
        scaled[0][0].bias.mul_(2)
    files = tmp_path / "fp.st", tmp_path / "scaled.st"
    for each, file in zip((model, scaled), files, strict=True):
        with torch.no_grad(), record(each, file):
            each(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))

    verdict = diff(*files).verdict

    assert verdict.text.startswith("equal after transform: 1 row equal up to a factor; ")
    assert verdict.origins == ()
    assert not any("first seen" in line or "no place" in line for line in verdict.lines)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 3, padding=1))


def equalize(model: nn.Sequential) -> None:
    """Across layers: what one convolution's channels are scaled by, the next one's weights undo."""
    for first, second, size in ((model[0], model[2], 3.0), (model[2], model[4], 0.4)):
        factors = torch.linspace(1.0, size, 8)
        first.weight *= factors[:, None, None, None]
        first.bias *= factors
        second.weight /= factors[:, None, None]


def test_channels_of_images_are_equal_up_to_a_factor(tmp_path):
    model = convolutions()
    equalized = changed(model, equalize)
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for each, name in ((model, "fp.st"), (equalized, "quant.st")):
        with torch.no_grad(), record(each, tmp_path / name):
            each(images)

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert comparison.verdict.text.startswith("equal after transform: 4 rows equal up to a factor")
    assert comparison.verdict.origins == ()
    assert row_of(comparison, "0").scale_factor.values == pytest.approx(np.linspace(1, 3, 8))
