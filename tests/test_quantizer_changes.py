"""What is said of quantizers that do not say themselves what they changed."""

import warnings
from pathlib import Path

import pytest
from model_fixtures import change_config, save
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.models import ModelRequest, PreparedModel, prepare

FUNCTIONS = """
import copy
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(16, 16), nn.Identity())

    def forward(self, x):
        return self.rest(self.first(x))


def network():
    return Net(), torch.linspace(-1, 1, 32).reshape(2, 16)


def rounded(x):
    return (x * 4).round() / 4


class Rounding(nn.Module):
    def forward(self, x):
        return rounded(x)


class RoundingLinear(nn.Linear):
    def forward(self, x):
        return rounded(super().forward(x))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


class RoundingWrapper(Wrapper):
    def forward(self, x):
        return self.inner(rounded(x))


class RoundingWeight(Wrapper):
    def forward(self, x):
        weight = {"weight": rounded(self.inner.weight)}
        return torch.func.functional_call(self.inner, weight, (x,))


class InPlace(Wrapper):
    def forward(self, x):
        x = x.clone()
        return self.inner(x.copy_(rounded(x)))


class Counting(Wrapper):
    def __init__(self, inner):
        super().__init__(inner)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.inner(x)


def wrapping(wrapper, copied=False):
    def wrap(model):
        model = copy.deepcopy(model) if copied else model
        model.first, model.rest[1] = wrapper(model.first), wrapper(model.rest[1])
        return model
    return wrap


wrap = wrapping(Wrapper)
wrap_a_copy = wrapping(Wrapper, copied=True)
wrap_and_round = wrapping(RoundingWrapper)
wrap_and_round_weights = wrapping(RoundingWeight)
wrap_and_round_in_place = wrapping(InPlace)
wrap_and_count = wrapping(Counting)


def wrap_two_ways(model):
    model.first, model.rest[1] = Wrapper(model.first), RoundingWrapper(model.rest[1])
    return model


def wrap_the_root(model):
    return Wrapper(model)


def compile(model):
    return torch.compile(model, backend="eager")


def compile_in_place(model):
    model.compile(backend="eager")
    return model


def hook(model):
    model.first.register_forward_hook(lambda module, args, output: rounded(output))
    return model


def hook_inputs(model):
    model.first.register_forward_pre_hook(lambda module, args: (rounded(args[0]),))
    return model


def hook_everything(model):
    hook = lambda module, args, output: rounded(output)
    model.handle = torch.nn.modules.module.register_module_forward_hook(hook)
    return model


def parametrize(model):
    nn.utils.parametrize.register_parametrization(model.first, "weight", Rounding())
    return model


def replace_forward(model):
    forward = model.first.forward
    model.first.forward = lambda x: rounded(forward(x))
    return model


def replace_class(model):
    model.first.__class__ = RoundingLinear
    return model


def patch_class(model):
    forward = Net.forward
    Net.forward = lambda self, x: rounded(forward(self, x))
    return model


def remove(model):
    del model.rest[2]
    return model


def append(model):
    model.rest.append(Rounding())
    return model


def wrap_everything(model):
    # As TICO does: modules of its own in all places, under names with `wrapped` in them.
    class Wrapping(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.wrapped = inner

        def forward(self, x):
            return self.wrapped(x)

    class Quantizing(nn.Module):
        def __init__(self, linear, fold):
            super().__init__()
            self.module = linear
            linear.weight.data *= fold

        def forward(self, x):
            return nn.functional.linear(x, rounded(self.module.weight), self.module.bias)

    class Whole(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.first = Wrapping(Quantizing(model.first, 1.0))
            model.rest[1] = Wrapping(Quantizing(model.rest[1], 0.5))
            self.rest = Wrapping(model.rest)

        def forward(self, x):
            return self.rest(self.first(x))

    return Wrapping(Whole(model))


def hold_other_tensors(model):
    buffer = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    model.first.register_buffer("quantized", buffer)
    model.rest[1] = Wrapper(model.rest[1])
    model.rest[1].register_buffer("sparse", torch.eye(3).to_sparse())
    return model


def set_strange_attributes(model):
    class Silent:
        def __repr__(self):
            raise RuntimeError("no words")

    model.rest[0].strange = {"a": Silent(), Silent(): [1]}
    model.rest[0].strange["itself"] = model.rest[0].strange
    return model


def script(model):
    return torch.jit.trace(model.eval(), torch.ones(2, 16))


def set_attribute(model):
    model.rest[0].levels = [1, 2]
    return model


def keep(model):
    return model


def copy_it(model):
    return copy.deepcopy(model)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return "own.py"


def quantize(functions: str, name: str) -> PreparedModel:
    return prepare(
        ModelRequest(f"{functions}:network", variant="quant", quantizer=f"{functions}:{name}")
    )


@pytest.mark.parametrize("name", ["keep", "copy_it", "compile_in_place"])
def test_that_nothing_changed_is_said_where_it_is_known(name: str, functions: str) -> None:
    prepared = quantize(functions, name)

    assert prepared.variant.quantized == ()
    assert f"own.py:{name} CHANGED NOTHING, the model is still float" in prepared.warnings[0]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("hook", ("first",)),
        ("hook_inputs", ("first",)),
        ("parametrize", ("first",)),
        ("replace_forward", ("first",)),
        ("replace_class", ("first",)),
        ("patch_class", ("",)),
        ("wrap_and_round", ("first", "rest.1")),
        ("wrap_and_round_weights", ("first", "rest.1")),
        ("wrap_and_round_in_place", ("first", "rest.1")),
    ],
)
def test_a_module_that_computes_otherwise_is_counted_once_whatever_was_done_to_it(
    name: str, changed: tuple[str, ...], functions: str
) -> None:
    prepared = quantize(functions, name)

    assert prepared.variant.quantized == changed
    assert not prepared.warnings


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("remove", "1 module removed (rest.2)"),
        ("append", "1 module added (rest.3)"),
        ("set_attribute", "1 module with attributes that differ (rest.0)"),
        ("set_strange_attributes", "1 module with attributes that differ (rest.0)"),
        ("hook_everything", "hooks on all modules of the process"),
        ("wrap", "2 modules wrapped without computing anything else (first, rest.1)"),
        ("wrap_a_copy", "2 modules wrapped without computing anything else (first, rest.1)"),
        ("wrap_and_count", "2 modules wrapped without computing anything else (first, rest.1)"),
        ("wrap_the_root", "1 module wrapped without computing anything else ((root))"),
        ("compile", "1 module wrapped without computing anything else ((root))"),
    ],
)
def test_what_is_known_is_said_where_no_module_is_known_to_be_quantized(
    name: str, said: str, functions: str
) -> None:
    prepared = quantize(functions, name)
    getattr(prepared.model, "handle", _Nothing()).remove()

    assert prepared.variant.quantized == ()
    assert said in prepared.warnings[0]
    assert "CHANGED NOTHING" not in prepared.warnings[0]


class _Nothing:
    def remove(self) -> None:
        pass


def test_of_wrappers_those_are_quantized_that_compute_something(functions: str) -> None:
    variant = quantize(functions, "wrap_two_ways").variant

    assert variant.quantized == ("rest.1",)
    assert variant.left_float == ("first.inner",)
    assert variant.settings["otherwise"] == [
        "1 module wrapped without computing anything else (first)"
    ]


def test_modules_in_wrappers_are_found_by_their_float_names(functions: str) -> None:
    variant = quantize(functions, "wrap_everything").variant

    assert variant.quantized == ("", "wrapped.first", "wrapped.rest.wrapped.1")
    assert variant.left_float == ()


def test_tensors_that_are_no_plain_bytes_are_no_trouble(functions: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantize(functions, "hold_other_tensors")

    assert prepared.variant.quantized == ("first",)
    assert prepared.variant.left_float == ("rest.1.inner",)


def test_a_script_is_a_model_of_other_classes(functions: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = quantize(functions, "script")

    assert set(prepared.variant.quantized) == {"", "first", "rest", "rest.0", "rest.1", "rest.2"}


def test_looking_at_wrappers_leaves_them_as_they_were(functions: str) -> None:
    wrapper = quantize(functions, "wrap_and_count").model.get_submodule("first")

    assert (wrapper.calls, wrapper.seen.item()) == (0, 0)
    assert not wrapper._forward_hooks
    assert not wrapper._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("keep", "the quantizer own.py:keep changed NO module"),
        ("append", "the quantizer own.py:append quantized NO module that is known (1 module added"),
    ],
)
def test_the_verdict_says_no_more_than_is_known(name: str, said: str, functions: str) -> None:
    record = ["record", "--model", "own.py:network", "--force"]
    quantizer = ["--variant", "quant", "--quantizer", f"own.py:{name}"]
    for words in ([*record, "-o", "fp.st"], [*record, *quantizer, "-o", "quant.st"]):
        assert CliRunner().invoke(app, words, prog_name="qvtrace").exit_code == 0

    assert said in qvtrace.diff("fp.st", "quant.st").verdict.text


def test_a_checkpoint_whose_modules_are_of_another_librarys_class_is_quantized(
    tmp_path: Path,
) -> None:
    pytest.importorskip("optimum.quanto")
    directory = save("llama", tmp_path / "llama")
    change_config(directory, quantization_config={"quant_method": "quanto", "weights": "int8"})

    variant = prepare(ModelRequest(str(directory), variant="quant")).variant

    assert "model.layers.0.mlp.up_proj" in variant.quantized
    assert variant.left_float == ("lm_head",)
