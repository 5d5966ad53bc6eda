"""One planted fault after the other, in a float and in a quantized model: each must come first."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from terminals import terminal
from tiny_models import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

from qvtrace import diff, load, record, replay
from qvtrace.cli import app
from qvtrace.comparison.comparison import Comparison

Fault = Callable[[nn.Module, str], None]
TOKENS = 16


def scale_doubled(model: nn.Module, name: str) -> None:
    weight(model, name).mul_(2)


def zero_point_off(model: nn.Module, name: str) -> None:
    """By 8 steps of an 8-bit grid."""
    values = weight(model, name)
    values += 8 * (values.max() - values.min()) / 255


def range_too_small(model: nn.Module, name: str) -> None:
    def saturate(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        limit = 0.3 * output.abs().max()
        return output.clamp(-limit, limit)

    model.get_submodule(name).register_forward_hook(saturate)


def channels_swapped(model: nn.Module, name: str) -> None:
    values = weight(model, name)
    values[[1, 2]] = values[[2, 1]].clone()


def bias_lost(model: nn.Module, name: str) -> None:
    model.get_submodule(name).bias.data.zero_()


def int4_where_int8_was_meant(model: nn.Module, name: str) -> None:
    values = weight(model, name)
    steps = values.abs().amax(1, keepdim=True) / 7
    values.copy_((values / steps).round().clamp(-8, 7) * steps)


def nan_in_one_channel(model: nn.Module, name: str) -> None:
    weight(model, name)[3] = float("nan")


def wrong_epsilon(model: nn.Module, name: str) -> None:
    model.get_submodule(name).variance_epsilon = 0.1


def cast_in_the_middle(model: nn.Module, name: str) -> None:
    instead(model, name, lambda forward, hidden: forward(hidden.half().float() * 1.0))
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda hidden: forward(hidden).to(torch.float8_e4m3fn).float()


def skipped(model: nn.Module, name: str) -> None:
    instead(model, name, lambda forward, hidden, **kwargs: hidden)


def edited_in_place(model: nn.Module, name: str) -> None:
    instead(model, name, lambda forward, hidden: forward(hidden.mul_(1.1)))


def zeros_for_a_mask(model: nn.Module, name: str) -> None:
    with_argument(model, name, "attention_mask", lambda mask: torch.zeros(1, 1, TOKENS, TOKENS))


def integers_for_a_mask(model: nn.Module, name: str) -> None:
    ones = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.int64)
    with_argument(model, name, "attention_mask", lambda mask: ones)


def flags_for_a_mask(model: nn.Module, name: str) -> None:
    with_argument(model, name, "attention_mask", lambda mask: mask == 0)


def another_shape_of_mask(model: nn.Module, name: str) -> None:
    with_argument(model, name, "attention_mask", lambda mask: torch.ones(TOKENS, TOKENS))


def no_mask(model: nn.Module, name: str) -> None:
    with_argument(model, name, "attention_mask", lambda mask: None)


def positions_shifted(model: nn.Module, name: str) -> None:
    with_argument(model, name, "position_ids", lambda positions: positions + 3)


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.data


def instead(model: nn.Module, name: str, forward: Callable[..., Tensor]) -> None:
    """Give the module another forward; it gets the old one first."""
    module = model.get_submodule(name)
    old = module.forward

    def replaced(*inputs: object, **kwargs: object) -> Tensor:
        return forward(old, *inputs, **kwargs)

    module.forward = replaced


def with_argument(model: nn.Module, name: str, argument: str, change: Callable) -> None:
    """Change one argument on its way to the module, as a wrapper around it would."""
    module = model.get_submodule(name)
    original_class = type(module)

    class Called(original_class):
        def __call__(self, *inputs: object, **kwargs: object) -> object:
            kwargs[argument] = change(kwargs[argument])
            return super().__call__(*inputs, **kwargs)

    Called.__name__ = original_class.__name__
    module.__class__ = Called


def quantized(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(
        model,
        Int8DynamicActivationInt8WeightConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    return model


FAULTS: list[tuple[Fault, str, str, str]] = [
    (scale_doubled, "layers.1.mlp.down_proj", "layers.1.mlp.down_proj", "output"),
    (scale_doubled, "layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj", "output"),
    (zero_point_off, "layers.2.mlp.up_proj", "layers.2.mlp.up_proj", "output"),
    (zero_point_off, "layers.0.self_attn.v_proj", "layers.0.self_attn.v_proj", "output"),
    (range_too_small, "layers.2.mlp.act_fn", "layers.2.mlp.act_fn", "output"),
    (channels_swapped, "layers.2.self_attn.o_proj", "layers.2.self_attn.o_proj", "output"),
    (bias_lost, "layers.1.self_attn.v_proj", "layers.1.self_attn.v_proj", "output"),
    (
        int4_where_int8_was_meant,
        "layers.3.mlp.down_proj",
        "layers.3.mlp.down_proj",
        "output",
    ),
    (nan_in_one_channel, "layers.1.mlp.gate_proj", "layers.1.mlp.gate_proj", "output"),
    (wrong_epsilon, "layers.1.input_layernorm", "layers.1.input_layernorm", "output"),
    (cast_in_the_middle, "layers.1.mlp", "layers.1.mlp", "output"),
    (skipped, "layers.2", "layers.2", "output"),
    (edited_in_place, "layers.1.mlp", "layers.1.mlp", "output"),
    *(
        (mask, "layers.1.self_attn", "layers.1.self_attn", "kwargs.attention_mask")
        for mask in (
            zeros_for_a_mask,
            integers_for_a_mask,
            flags_for_a_mask,
            another_shape_of_mask,
            no_mask,
        )
    ),
    (positions_shifted, "rotary_emb", "rotary_emb", "kwargs.position_ids"),
]
SINGLE = [pytest.param(*fault, id=f"{fault[0].__name__}-{fault[1]}") for fault in FAULTS]
KINDS = ["float", "quantized"]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        attention_bias=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter.data, std=0.1)
    return model


@pytest.fixture(scope="module")
def reference(original, tmp_path_factory) -> Path:
    return recorded(original, tmp_path_factory.mktemp("origins") / "fp.st")


def recorded(model: nn.Module, file: Path, tokens: Tensor | None = None) -> Path:
    if tokens is None:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, 256, (1, TOKENS), generator=generator)
    with record(model, file), torch.no_grad():
        model(tokens, use_cache=False)
    return file


def faulty(original: nn.Module, kind: str, *faults: tuple[Fault, str]) -> nn.Module:
    model = copy.deepcopy(original)
    for fault, name in faults:
        fault(model, f"model.{name}")
    return quantized(model) if kind == "quantized" else model


def places(comparison: Comparison) -> list[tuple[str, str]]:
    return [(origin.module, origin.path) for origin in comparison.verdict.origins]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fault", "where", "module", "path"), SINGLE)
def test_a_planted_fault_comes_first(
    original, reference, tmp_path, kind, fault, where, module, path
):
    candidate = recorded(faulty(original, kind, (fault, where)), tmp_path / "candidate.st")

    comparison = diff(reference, candidate)

    assert places(comparison)[:1] == [(f"model.{module}", path)]
    assert f"first seen at model.{module} (" in comparison.verdict.lines[0]


def test_other_token_ids_are_other_values_and_no_other_kind(original, reference, tmp_path):
    tokens = torch.randint(3, 256, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    candidate = recorded(original, tmp_path / "candidate.st", tokens)

    told = diff(reference, candidate).verdict.origins

    assert told[0].path == "inputs.0"
    assert told[0].reason.startswith("inputs.0 holds other values: ")
    assert told[0].reason.endswith(f" of {TOKENS} elements differ")


PAIRS = [
    ((scale_doubled, "layers.0.mlp.up_proj"), (scale_doubled, "layers.2.self_attn.v_proj")),
    ((channels_swapped, "layers.0.mlp.down_proj"), (scale_doubled, "layers.2.mlp.gate_proj")),
    ((scale_doubled, "layers.1.self_attn.o_proj"), (range_too_small, "layers.3.mlp.act_fn")),
    ((zero_point_off, "layers.0.mlp.down_proj"), (scale_doubled, "layers.3.self_attn.o_proj")),
    ((positions_shifted, "rotary_emb"), (skipped, "layers.2")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("faults", PAIRS)
def test_two_planted_faults_are_the_first_two(original, reference, tmp_path, kind, faults):
    candidate = recorded(faulty(original, kind, *faults), tmp_path / "candidate.st")

    found = {module for module, _ in places(diff(reference, candidate))[:2]}

    assert found == {f"model.{name}" for _, name in faults}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "smaller",
    [(wrong_epsilon, "layers.1.input_layernorm"), (zero_point_off, "layers.0.mlp.down_proj")],
)
def test_the_larger_of_two_errors_comes_first_wherever_it_comes_in(
    original, reference, tmp_path, kind, smaller
):
    larger = (scale_doubled, "layers.3.mlp.up_proj")
    candidate = recorded(faulty(original, kind, smaller, larger), tmp_path / "candidate.st")

    found = places(diff(reference, candidate))

    assert found[0] == ("model.layers.3.mlp.up_proj", "output")
    assert (f"model.{smaller[1]}", "output") in found[:3]


def test_nan_comes_before_a_larger_error(original, reference, tmp_path):
    faults = (
        (scale_doubled, "layers.0.self_attn.q_proj"),
        (nan_in_one_channel, "layers.2.mlp.up_proj"),
    )
    candidate = recorded(faulty(original, "float", *faults), tmp_path / "candidate.st")

    found = places(diff(reference, candidate))

    assert found[0] == ("model.layers.2.mlp.up_proj", "output")
    assert ("model.layers.0.self_attn.q_proj", "output") in found


def test_the_model_itself_has_no_origin(original, reference, tmp_path):
    candidate = recorded(original, tmp_path / "again.st")
    verdict = diff(reference, candidate).verdict
    assert (verdict.origins, verdict.lines) == ((), ())


def test_quantization_alone_blames_nobody(original, reference, tmp_path):
    candidate = recorded(faulty(original, "quantized"), tmp_path / "quant.st")
    verdict = diff(reference, candidate).verdict
    assert verdict.origins == ()
    assert verdict.lines[0].startswith("no place adds much more than is usual; ")


def test_that_nothing_is_unusual_in_a_quantized_model_is_said_to_be_no_certificate(
    original, reference, healthy, tmp_path
):
    model = faulty(original, "quantized")
    file = recorded(model, tmp_path / "quant.st")
    local = tmp_path / "local.st"
    replay(model, reference, local)
    hint = "a fault below quantization's own noise shows only with --floor or --local"

    assert hint in diff(reference, file).verdict.lines[0]
    assert hint not in " ".join(diff(reference, file, floor=healthy).verdict.lines)
    assert hint not in " ".join(diff(reference, file, local=local).verdict.lines)


def test_rounding_in_bfloat16_blames_nobody(original, reference, tmp_path):
    candidate = recorded(copy.deepcopy(original).bfloat16(), tmp_path / "bf16.st")
    assert diff(reference, candidate).verdict.origins == ()


def slightly_noisy(model: nn.Module, name: str, share: float = 0.01) -> None:
    def add_noise(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(output.shape, generator=generator)
        return output + share * output.std(-1, keepdim=True) * noise

    model.get_submodule(name).register_forward_hook(add_noise)


@pytest.fixture(scope="module")
def healthy(original, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("healthy") / "int8.st"
    return recorded(faulty(original, "quantized"), file)


@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj", "layers.3.mlp.up_proj"])
def test_noise_as_small_as_that_of_quantization_is_found_above_a_healthy_run(
    original, reference, healthy, tmp_path, name
):
    model = quantized(copy.deepcopy(original))
    slightly_noisy(model, f"model.{name}")
    candidate = recorded(model, tmp_path / "candidate.st")

    verdict = diff(reference, candidate, floor=healthy).verdict

    assert diff(reference, candidate).verdict.origins == ()
    assert verdict.origins[0].module == f"model.{name}"
    assert "dB above the floor, what came in 0 dB" in verdict.lines[0]
    assert verdict.lines[-1].startswith(f"noise level of each place from {healthy}, usually -")


def test_what_is_as_noisy_as_the_floor_is_blamed_for_nothing(
    original, reference, healthy, tmp_path
):
    again = recorded(faulty(original, "quantized"), tmp_path / "again.st")
    verdict = diff(reference, again, floor=healthy).verdict
    assert verdict.origins == ()
    assert verdict.lines[0].startswith("no place adds much more than is usual; noise level of each")


def test_above_a_floor_in_another_dtype_quantization_is_first_seen_where_it_begins(
    original, reference, healthy, tmp_path
):
    floor = recorded(copy.deepcopy(original).bfloat16(), tmp_path / "bf16.st")
    origins = diff(reference, healthy, floor=floor).verdict.origins
    assert origins[0].module.startswith("model.layers.0.self_attn.")
    assert diff(reference, floor, floor=healthy).verdict.origins == ()


def test_a_replay_of_a_healthy_model_is_the_floor_of_other_replays(original, reference, tmp_path):
    model = quantized(copy.deepcopy(original))
    replay(model, reference, tmp_path / "healthy.st", variant="quant")
    name = "model.layers.1.self_attn.v_proj"
    slightly_noisy(model, name)
    replay(model, reference, tmp_path / "local.st", variant="quant")
    candidate = recorded(model, tmp_path / "candidate.st")
    replays = {"local": tmp_path / "local.st", "floor": tmp_path / "healthy.st"}

    origins = diff(reference, candidate, **replays).verdict.origins

    assert [(origin.module, origin.evidence) for origin in origins] == [(name, "local")]


def test_a_replay_is_a_candidate_above_the_replay_of_a_healthy_model(original, reference, tmp_path):
    model = quantized(copy.deepcopy(original))
    healthy, local = tmp_path / "healthy.st", tmp_path / "local.st"
    replay(model, reference, healthy, variant="quant")
    name = "model.layers.1.self_attn.v_proj"
    slightly_noisy(model, name)
    replay(model, reference, local, variant="quant")

    origins = diff(reference, local, floor=healthy).verdict.origins

    assert [(origin.module, origin.evidence) for origin in origins] == [(name, "local")]
    assert diff(reference, healthy, floor=healthy).verdict.origins == ()


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj"]
)
def test_what_was_replayed_is_told_above_a_floor_that_is_no_replay(
    original, reference, healthy, tmp_path, name
):
    model = quantized(copy.deepcopy(original))
    slightly_noisy(model, name)
    candidate, local = recorded(model, tmp_path / "candidate.st"), tmp_path / "local.st"
    replay(model, reference, local, variant="quant")

    verdict = diff(reference, candidate, floor=healthy, local=local).verdict

    assert (verdict.origins[0].module, verdict.origins[0].evidence) == (name, "local")
    assert "dB above the floor, what came in 0 dB" in verdict.lines[0]


def test_behind_a_fault_that_a_floor_shows_a_replay_shows_the_next(
    original, reference, healthy, tmp_path
):
    model = quantized(copy.deepcopy(original))
    first, second = "model.layers.0.mlp.down_proj", "model.layers.2.self_attn.v_proj"
    for name, share in ((first, 0.5), (second, 0.02)):
        slightly_noisy(model, name, share)
    candidate, local = recorded(model, tmp_path / "candidate.st"), tmp_path / "local.st"
    replay(model, reference, local, variant="quant")

    alone, both = (
        diff(reference, candidate, floor=healthy, **replays).verdict.origins
        for replays in ({}, {"local": local})
    )

    assert [origin.module for origin in alone] == [first]
    assert [(origin.module, origin.evidence) for origin in both] == [
        (first, "local"),
        (second, "local"),
    ]


def test_another_order_of_calls_blames_nobody(original, reference, tmp_path):
    model = copy.deepcopy(original)
    for layer in model.model.layers:
        mlp = layer.mlp

        def up_first(hidden: Tensor, mlp: nn.Module = mlp) -> Tensor:
            up = mlp.up_proj(hidden)
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden)) * up)

        mlp.forward = up_first
    candidate = recorded(model, tmp_path / "order.st")
    assert diff(reference, candidate).verdict.origins == ()


def test_a_factor_that_is_taken_out_again_blames_nobody(original, reference, tmp_path):
    model = copy.deepcopy(original)
    for name, factor in (("q_proj", 2.0), ("k_proj", 0.5)):
        module = model.get_submodule(f"model.layers.1.self_attn.{name}")
        module.weight.data *= factor
        module.bias.data *= factor
    candidate = recorded(model, tmp_path / "folded.st")

    comparison = diff(reference, candidate)

    assert comparison.verdict.origins == ()
    assert {row.module for row in comparison.rows if row.is_made_up_for} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    }


def test_channels_scaled_and_scaled_back_blame_nobody(original, reference, tmp_path):
    model = copy.deepcopy(original)
    factors = torch.linspace(0.25, 4, 64)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data *= factors
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).weight.data /= factors
    candidate = recorded(model, tmp_path / "smoothed.st")

    assert diff(reference, candidate).verdict.origins == ()


def test_an_input_that_was_not_stored_is_never_clean(original, tmp_path):
    files = []
    for name, model in (
        ("fp.st", original),
        ("bad.st", faulty(original, "float", (scale_doubled, "layers.1.mlp.down_proj"))),
    ):
        with record(model, tmp_path / name, inputs=False, kwargs=False), torch.no_grad():
            model(torch.arange(3, 19)[None], use_cache=False)
        files.append(tmp_path / name)

    comparison = diff(*files)

    assert comparison.verdict.origins == ()
    row = next(row for row in comparison.rows if row.module == "model.layers.1.mlp.down_proj")
    assert row.metrics.noise_in is None
    assert row.undefined["noise_in"] == row.undefined["added"] == "noise not known"
    assert row.metrics.noise_out == pytest.approx(1.0, rel=1e-3)


def test_the_noise_of_a_call_is_the_median_over_tokens_of_error_power_to_signal_power(
    original, reference, tmp_path
):
    model = faulty(original, "float", (scale_doubled, "layers.1.mlp.down_proj"))
    candidate = recorded(model, tmp_path / "candidate.st")
    rows = {(row.module, row.path): row for row in diff(reference, candidate, path="all").rows}

    name = "model.layers.1.post_attention_layernorm"
    later = "model.layers.2.input_layernorm"
    arrays = []
    for file in (reference, candidate):
        with load(file) as archive:
            arrays.append(
                [
                    archive.array(leaf).astype("float64").reshape(TOKENS, -1)
                    for call in archive.manifest.calls
                    if call.module == later
                    for leaf in (call.tree("inputs").items[0][1], call.tree("output"))
                ]
            )
    noises = [
        ((one - other) ** 2).sum(1) / (one**2).sum(1) for one, other in zip(*arrays, strict=True)
    ]
    noise_in, noise_out = (sorted(noise)[TOKENS // 2] for noise in noises)
    row = rows[later, "output"]
    assert rows[name, "output"].metrics.noise_out == 0
    assert row.metrics.noise_in == pytest.approx(noise_in, rel=1e-5)
    assert row.metrics.noise_out == pytest.approx(noise_out, rel=1e-5)
    assert row.metrics.added == pytest.approx(max(0, noise_out - noise_in), abs=1e-7)
    assert rows[later, "inputs.0"].undefined["gain"] == "input"


class FirstToken(nn.Module):
    """A classifier of the first token, as a vision transformer has it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        self.embed = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.embed(self.before(hidden))[:, 0])


def test_a_token_that_is_noisier_than_most_is_no_noise_that_comes_in_where_it_is_taken(tmp_path):
    torch.manual_seed(0)
    model, hidden = FirstToken(), torch.randn(1, TOKENS, 16)

    def add_noise(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        noise[:, 0] *= 20
        return output + 1e-3 * noise

    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), record(model, tmp_path / name):
            model(hidden)
        model.embed.register_forward_hook(add_noise)

    comparison = diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert [origin.module for origin in comparison.verdict.origins] == ["embed"]


@pytest.mark.parametrize("metric", ["added", "gain"])
def test_rows_sort_by_what_their_calls_add(original, reference, tmp_path, metric):
    model = faulty(original, "quantized", (scale_doubled, "layers.1.mlp.down_proj"))
    candidate = recorded(model, tmp_path / "candidate.st")
    rows = diff(reference, candidate, sort_by=metric, include=("*_proj",)).rows
    values = [
        value
        for row in itertools.dropwhile(lambda row: getattr(row.metrics, metric) is None, rows)
        if (value := getattr(row.metrics, metric)) is not None
    ]
    assert values == sorted(values, reverse=True)
    assert len(values) > 20


def test_the_verdict_opens_with_the_first_place_and_goes_on_with_the_next_two(
    original, reference, tmp_path
):
    faults = [
        (scale_doubled, f"layers.{layer}.{name}")
        for layer, name in enumerate(("mlp.up_proj", "self_attn.v_proj", "mlp.down_proj"))
    ]
    faults.append((scale_doubled, "layers.3.self_attn.o_proj"))
    candidate = recorded(faulty(original, "float", *faults), tmp_path / "candidate.st")

    verdict = diff(reference, candidate).verdict

    first, *others = verdict.lines
    assert len(verdict.lines) <= 6
    assert first.startswith("first seen at model.layers.")
    assert verdict.text.startswith(f"{first}; ")
    assert [line.split(" (")[0] for line in others[:2]] == [
        f"then at {origin.module}" for origin in verdict.origins[1:3]
    ]
    assert others[2] == "then at 1 further place, which JSON lists"
    assert verdict.further == tuple(others)
    assert "\n" not in verdict.text
    result = CliRunner().invoke(app, ["diff", str(reference), str(candidate)])
    shown = result.stdout.splitlines()
    begin = next(number for number, line in enumerate(shown) if line.startswith("verdict"))
    assert shown[begin].removeprefix("verdict").strip() == verdict.text
    assert [line.strip() for line in shown[begin + 1 :]] == others


def test_on_a_terminal_the_origins_stand_first_and_together(original, reference, tmp_path):
    names = "layers.0.mlp.up_proj", "layers.2.self_attn.v_proj", "layers.3.mlp.down_proj"
    model = faulty(original, "float", *((scale_doubled, name) for name in names))
    candidate = recorded(model, tmp_path / "candidate.st")
    verdict = diff(reference, candidate).verdict

    with terminal("diff", str(reference), str(candidate)) as seen:
        assert seen.exit_code() == 0

    lines = seen.shown.partition("\nverdict ")[2].splitlines()
    told = " ".join(" ".join(lines).split())
    assert told == " ".join([*verdict.lines, verdict.around[1]])
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith(" " * 12 + "then at ") for line in lines) == 2
    assert "\n" not in verdict.text
