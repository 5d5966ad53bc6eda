"""The inputs that bring error into a call are named by their path: other values, another dtype."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qvtrace import diff, record
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.origins import Origin

WIDTH = 32
Change = Callable[[object], object]


class Attention(nn.Module):
    """Mixes tokens of a memory, moved by two factors as rotary embeddings do it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden, memory=None, factors=None, mask=None):
        memory = hidden if memory is None else memory
        query, key = self.query(hidden), self.key(memory)
        if factors is not None:
            query, key = query * factors[0], key * factors[1]
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        scores = scores if mask is None else scores + mask
        return self.out(scores.softmax(-1) @ self.value(memory))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend, self.cross = Attention(), Attention()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, memory, factors, mask):
        hidden = hidden + self.attend(hidden, factors=factors, mask=mask)
        hidden = hidden + self.cross(hidden, memory=memory)
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode = nn.Embedding(64, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, count = self.embed(ids), ids.shape[1]
        memory = self.encode(hidden.flip(1))
        places = torch.arange(count)[:, None] * torch.linspace(0.1, 1, WIDTH)
        factors = tuple((each + 2).to(hidden.dtype) for each in (places.cos(), places.sin()))
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.full((count, count), lowest, dtype=hidden.dtype).triu(1)
        for block in self.blocks:
            hidden = block(hidden, memory=memory, factors=factors, mask=mask)
        return self.head(hidden)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def reference(decoder, tmp_path_factory) -> Path:
    return recorded(decoder, tmp_path_factory.mktemp("causes") / "fp.st")


@pytest.fixture
def against(reference, tmp_path):
    def run(candidate: nn.Module) -> Comparison:
        return diff(reference, recorded(candidate, tmp_path / "candidate.st"))

    return run


def recorded(model: nn.Module, file: Path) -> Path:
    with torch.no_grad(), record(model, file):
        model(torch.arange(24)[None] * 7 % 64)
    return file


def called_with(model: nn.Module, name: str, around: Callable[..., object]) -> nn.Module:
    """A copy of the model in which a module is called through a wrapper, which gets the call."""
    model = copy.deepcopy(model)
    module = model.get_submodule(name)
    original_class = type(module)

    class Called(original_class):
        def __call__(self, *inputs: object, **kwargs: object) -> object:
            return around(super().__call__, *inputs, **kwargs)

    Called.__name__ = original_class.__name__
    module.__class__ = Called
    return model


def with_argument(model: nn.Module, name: str, argument: str, change: Change) -> nn.Module:
    def around(call: Callable[..., object], *inputs: object, **kwargs: object) -> object:
        return call(*inputs, **kwargs | {argument: change(kwargs[argument])})

    return called_with(model, name, around)


def int8_weights(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            step = module.weight.data.abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.data / step).round() * step
    return model


def noisy(tensor: Tensor) -> Tensor:
    return tensor + 0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


def first(comparison: Comparison) -> Origin:
    return comparison.verdict.origins[0]


OTHER_VALUES = [
    pytest.param(
        "attend", "factors", lambda both: (noisy(both[0]), both[1]), "factors.0", id="one"
    ),
    pytest.param(
        "attend", "factors", lambda both: (both[0], noisy(both[1])), "factors.1", id="two"
    ),
    pytest.param("cross", "memory", noisy, "memory", id="memory"),
    pytest.param(
        "attend", "mask", lambda mask: mask + torch.linspace(-3, 0, 24), "mask", id="mask"
    ),
]


@pytest.mark.parametrize("quantize", [lambda model: model, int8_weights], ids=["float", "int8"])
@pytest.mark.parametrize(("name", "argument", "change", "path"), OTHER_VALUES)
def test_an_argument_that_alone_holds_other_values_is_named_by_its_path(
    decoder, against, quantize, name, argument, change, path
):
    name = f"blocks.2.{name}"
    candidate = with_argument(quantize(decoder), name, argument, change)

    comparison = against(candidate)

    origin = first(comparison)
    assert (origin.module, origin.path) == (name, f"kwargs.{path}")
    assert f"kwargs.{path} holds other values" in origin.reason
    assert comparison.verdict.lines[0].startswith(f"first seen at {name} (")
    assert not any(other.path != "output" for other in comparison.verdict.origins[1:])


def test_an_argument_that_is_wrong_for_a_whole_block_is_named_there(decoder, against):
    candidate = with_argument(
        decoder, "blocks.1", "factors", lambda both: tuple(factor.roll(1, 0) for factor in both)
    )

    origin = first(against(candidate))

    assert (origin.module, origin.path) == ("blocks.1", "kwargs.factors.0")
    assert origin.reason.startswith("kwargs.factors.0 and kwargs.factors.1 hold other values (-")
    assert origin.reason.endswith("dB), nothing else that comes in does")
    assert origin.noise_in == 0
    assert origin.noise_out > 0


def test_a_mask_of_zeros_is_held_against_nothing_and_told_by_its_largest_value(decoder, against):
    candidate = with_argument(
        decoder, "blocks.0.attend", "mask", lambda mask: mask - 2 * torch.eye(24)
    )

    origin = first(against(candidate))

    assert origin.reason == (
        "kwargs.mask holds other values: up to 2 where the reference's are zero"
    )


def test_zeros_that_a_call_gave_are_no_cause_where_the_candidate_gives_other_numbers(tmp_path):
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter, self.join = nn.Linear(16, 16, bias=False), nn.Bilinear(16, 16, 16)
            nn.init.zeros_(self.adapter.weight)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.join(hidden, self.adapter(hidden))

    torch.manual_seed(0)
    model = Added()
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), record(model, tmp_path / name):
            model(torch.randn(12, 16, generator=torch.Generator().manual_seed(1)))
        nn.init.normal_(model.adapter.weight)

    origins = diff(tmp_path / "fp.st", tmp_path / "quant.st").verdict.origins

    assert "inputs.1" not in [origin.path for origin in origins]


def test_nan_that_one_argument_brings_is_named_by_its_path(decoder, against):
    def with_nan(memory: Tensor) -> Tensor:
        return memory.index_fill(-1, torch.tensor([3]), torch.nan)

    comparison = against(with_argument(decoder, "blocks.1.cross", "memory", with_nan))

    origin = first(comparison)
    assert (origin.module, origin.path) == ("blocks.1.cross", "kwargs.memory")
    assert comparison.verdict.lines[0] == (
        "first seen at blocks.1.cross (inputs agree, NaN in the output): "
        "kwargs.memory holds NaN, nothing else that comes in does"
    )


def test_what_a_call_works_on_is_a_gap_that_says_which_input_it_is(decoder, against):
    def around(call: Callable[..., object], hidden: Tensor, **kwargs: object) -> object:
        return call(noisy(hidden), **kwargs)

    origin = first(against(called_with(decoder, "blocks.1.cross", around)))

    assert (origin.module, origin.path) == ("blocks.1", "output")
    assert (
        origin.reason.startswith("comes in between ")
        and "and the input of cross (inputs.0)" in origin.reason
    )


def in_dtype(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(in_dtype(each, dtype) for each in value)
    return value


def cast_around(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """The module runs in another dtype, its inputs and its output are cast by whoever calls it."""

    def around(call: Callable[..., object], *inputs: object, **kwargs: object) -> object:
        kwargs = {key: in_dtype(value, dtype) for key, value in kwargs.items()}
        return in_dtype(call(*in_dtype(inputs, dtype), **kwargs), torch.float32)

    model = called_with(model, name, around)
    model.get_submodule(name).to(dtype)
    return model


def cast_within(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """As `cast_around`, by the module itself, which leaves its output as it is."""
    model = copy.deepcopy(model)
    module = model.get_submodule(name).to(dtype)
    forward = module.forward

    def casting(*inputs: object, **kwargs: object) -> object:
        kwargs = {key: in_dtype(value, dtype) for key, value in kwargs.items()}
        return forward(*in_dtype(inputs, dtype), **kwargs)

    module.forward = casting
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["blocks.1.up", "blocks.1.cross", "blocks.2"])
def test_an_input_that_is_cast_on_its_way_is_named_with_both_dtypes(decoder, against, name, dtype):
    comparison = against(cast_around(decoder, name, dtype))

    assert [(origin.module, origin.path) for origin in comparison.verdict.origins] == [
        (name, "inputs.0")
    ]
    both = f"{str(dtype).removeprefix('torch.')} against float32 in the reference"
    assert f"in kind: {both}" in comparison.verdict.lines[0]
    assert both in comparison.verdict.text


def test_a_module_whose_output_is_of_another_dtype_says_so(decoder, against):
    origin = first(against(cast_within(decoder, "blocks.1.down", torch.bfloat16)))

    assert (origin.module, origin.path) == ("blocks.1.down", "output")
    assert origin.reason.endswith(", its output is bfloat16 against float32 in the reference")


def test_a_module_that_casts_for_all_that_it_calls_is_the_place_itself(decoder, against):
    comparison = against(cast_within(decoder, "blocks.1.cross", torch.bfloat16))

    assert [(origin.module, origin.path) for origin in comparison.verdict.origins] == [
        ("blocks.1.cross", "output")
    ]
    assert first(comparison).reason.endswith(
        "and the input of query, it is bfloat16 against float32 in the reference"
    )


def autocast(model: nn.Module, names: Iterable[str]) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        module = model.get_submodule(name)
        forward = module.forward

        def casting(*inputs: object, forward=forward, **kwargs: object) -> object:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(*inputs, **kwargs)

        module.forward = casting
    return model


def test_a_region_under_autocast_is_one_reason(decoder, against):
    comparison = against(autocast(decoder, ["blocks.1.cross"]))

    assert [origin.module for origin in comparison.verdict.origins] == ["blocks.1.cross.query"]
    assert first(comparison).reason.endswith(
        "is bfloat16 against float32 in the reference, as those of 2 calls after it are"
    )


@pytest.mark.parametrize(
    "whole",
    [lambda model: copy.deepcopy(model).bfloat16(), lambda model: autocast(model, [""])],
    ids=["weights", "autocast"],
)
def test_a_whole_model_in_another_dtype_is_blamed_nowhere(decoder, against, whole):
    assert against(whole(decoder)).verdict.origins == ()


def test_a_fault_in_a_model_that_is_all_of_another_dtype_is_not_the_dtypes(decoder, against):
    candidate = copy.deepcopy(decoder).bfloat16()
    weight = candidate.blocks[2].up.weight.data
    weight.copy_(weight.flip(0))

    origin = first(against(candidate))

    assert origin.module == "blocks.2.up"
    assert "bfloat16" not in origin.reason


def test_the_first_of_a_kind_is_not_held_against_the_noise_that_it_gave_the_others(
    decoder, tmp_path
):
    model = copy.deepcopy(decoder)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 3  # so that noise does not fade
    candidate = int8_weights(model)
    weight = candidate.blocks[0].attend.value.weight.data
    weight.copy_(weight.flip(0))

    comparison = diff(
        recorded(model, tmp_path / "fp.st"), recorded(candidate, tmp_path / "int8.st")
    )

    origin = first(comparison)
    assert (origin.module, origin.path) == ("blocks.0.attend.value", "output")
