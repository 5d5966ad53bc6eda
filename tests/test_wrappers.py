"""Quantizers that rename modules, on recordings: toy wrappers like theirs, and torch.ao's own."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.recording.recorder import record
from qvtrace.reports.table import TableOptions, comparison_lines


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.act = nn.ReLU()
        self.down = nn.Linear(32, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.act(self.up(hidden)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(), Mlp()])
        self.head = nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


class Wrapper(nn.Module):
    """As TICO's: it hands on to what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.wrapped = inner

    def forward(self, *args: Any) -> Any:
        return self.wrapped(*args)


class Quantized(nn.Module):
    """The inner one, which holds the float module."""

    def __init__(self, module: nn.Module, fp_name: str | None) -> None:
        super().__init__()
        self.module = module
        self.fp_name = fp_name

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


class Renamed(nn.Module):
    """A wrapper that keeps nothing of the float model's names but in an attribute."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        named = dict(model.named_modules())
        self.parts = nn.ModuleList(
            Quantized(named[name], name) for name in ("layers.0", "layers.1", "head")
        )
        self.fp_name = ""

    def forward(self, hidden: Tensor) -> Tensor:
        first, second, head = self.parts
        hidden = hidden + first(hidden)
        return head(hidden + second(hidden))


def build() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def wrap(module: nn.Module, name: str = "") -> nn.Module:
    """Every module wrapped twice, from the inside out."""
    for child, inner in list(module.named_children()):
        path = f"{name}.{child}" if name else child
        if isinstance(inner, nn.ModuleList):
            for index, item in enumerate(inner):
                inner[index] = wrap(item, f"{path}.{index}")
        else:
            setattr(module, child, wrap(inner, path))
    if isinstance(module, nn.Linear):
        module = Quantized(module, name)
    return Wrapper(module)


@pytest.fixture
def against(tmp_path):
    """Compares the float model with another that is made from it."""

    def run(change: Any, **options: Any) -> Comparison:
        hidden = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
        for name, model in (("fp", build()), ("quant", change(build()))):
            with torch.no_grad(), record(model, tmp_path / f"{name}.st"):
                model(hidden)
        return diff(tmp_path / "fp.st", tmp_path / "quant.st", **options)

    return run


def head_of(comparison: Comparison, *, everything: bool = False) -> str:
    lines = comparison_lines(comparison, TableOptions(everything=everything))
    return "\n".join(line.plain for line in lines)


def test_each_float_module_is_compared_once_however_often_it_is_wrapped(against):
    comparison = against(wrap)

    coverage = comparison.coverage
    assert coverage.modules_reference == coverage.modules_compared == 10
    assert coverage.modules_candidate == 10
    assert len(coverage.wrappers) == 10
    assert {row.matched_by for row in comparison.rows} == {"suffix .wrapped", "exact"}
    assert all(row.metrics.peir == 0 for row in comparison.rows)


def test_wrappers_are_counted_apart_from_modules_that_nothing_belongs_to(against):
    comparison = against(wrap)

    text = head_of(comparison)
    assert "wrappers    10 wrappers and added modules in the candidate" in text
    assert "unmatched" not in text
    assert "wrapped.layers.0.wrapped.up.wrapped" in head_of(comparison, everything=True)


def test_a_wrapper_is_known_by_the_float_name_that_it_carries(against):
    comparison = against(Renamed)

    by_rule = {row.module: row.matched_by for row in comparison.rows}
    assert by_rule == {
        "": "exact",
        "layers.0": "fp_name",
        "layers.1": "fp_name",
        "head": "fp_name",
    }
    assert all(row.status == "identical" for row in comparison.rows)


def test_less_than_half_of_the_modules_compared_is_told(against):
    assert against(Renamed).verdict.text.startswith("ONLY 4 of 10 modules compared")


def test_the_hooks_of_nncf_are_added_modules_and_leave_names_as_they_are(against):
    class Hook(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value

    def hook(model: Model) -> Model:
        # nncf registers its own modules by such names, and calls them.
        hooks = nn.Module()
        model.add_module("__nncf_hooks", hooks)
        inner = nn.ModuleDict({"layers/0/up:0[0]": Hook()})
        hooks.add_module("post_hooks", inner)
        model.head.register_forward_hook(lambda module, args, out: inner["layers/0/up:0[0]"](out))
        return model

    comparison = against(hook)

    assert comparison.coverage.modules_compared == 10
    assert comparison.coverage.modules_candidate == 10
    assert comparison.coverage.wrappers == ("__nncf_hooks.post_hooks.layers/0/up:0[0]",)
    assert {row.matched_by for row in comparison.rows} == {"exact"}


def test_torch_ao_s_dynamic_quantization_is_compared_module_by_module(against):
    def quantize(model: Model) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)

    comparison = against(quantize)

    coverage = comparison.coverage
    assert coverage.modules_reference == coverage.modules_compared == 10
    assert not coverage.only_in_candidate
    assert {row.matched_by for row in comparison.rows} == {"exact"}
    assert 0 < comparison.worst("peir", 1)[0].metrics.peir < 0.1


def test_quanto_s_activations_are_compared_module_by_module(against):
    quanto = pytest.importorskip("optimum.quanto")

    def quantize(model: Model) -> nn.Module:
        quanto.quantize(model, weights=quanto.qint8, activations=quanto.qint8)
        with torch.no_grad(), quanto.Calibration():
            model(torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1)))
        quanto.freeze(model)
        return model

    comparison = against(quantize)

    assert comparison.coverage.modules_compared == 10
    assert not comparison.coverage.not_comparable


def test_compiled_and_parallel_models_are_compared_module_by_module(against):
    comparison = against(lambda model: nn.DataParallel(torch.compile(model, backend="eager")))

    assert comparison.coverage.modules_compared == 10
    assert {row.matched_by for row in comparison.rows} <= {
        "prefix _orig_mod., prefix module.",
        "exact",
    }


def test_copies_of_a_model_are_not_confused_by_an_attribute_of_another_kind(against):
    def name(model: Model) -> Model:
        model = copy.deepcopy(model)
        model.head.fp_name = 7
        return model

    assert against(name).coverage.identical == 10
