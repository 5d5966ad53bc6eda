"""Modules of torch.ao that stand for a layer and what follows it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qvtrace
from qvtrace.archive import Archive
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.rows import Row

Change = Callable[[nn.Module], nn.Module]


class Network(nn.Module):
    """A convolution with its normalization, and one ReLU that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.up = nn.Linear(4, 8)
        self.act = nn.ReLU()
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.norm(self.conv(x)))
        hidden = self.relu(hidden - x)
        return self.down(self.act(self.up(hidden.mean((2, 3)))))


INPUT = torch.linspace(-1, 1, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)


def network() -> nn.Module:
    torch.manual_seed(0)
    built = Network()
    built.norm.running_mean.normal_()
    built.norm.running_var.uniform_(0.5, 2.0)
    return built.eval()


def prepared(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    observing = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (INPUT,))
    observing(INPUT)
    return observing


def converted(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_fx

    return quantize_fx.convert_fx(prepared(model))


def folded(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import fuse_modules

    return fuse_modules(model, [["conv", "norm"]])


@pytest.fixture(autouse=True)
def without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def compare(tmp_path: Path) -> Callable[[Change], Comparison]:
    """The float network held against what becomes of it."""

    def run(change: Change) -> Comparison:
        model = network()
        for name, each in (("fp", model), ("quant", change(copy.deepcopy(model)))):
            with torch.no_grad(), qvtrace.record(each, tmp_path / f"{name}.st", variant=name):
                each(INPUT.clone())
        return qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st")

    return run


def rows(comparison: Comparison) -> dict[tuple[str, int], Row]:
    return {(row.module, row.call): row for row in comparison.rows}


def sqnr(row: Row) -> float:
    """As good as any where nothing differs."""
    return 200.0 if row.status == "identical" else row.metrics.sqnr or 0.0


@pytest.mark.parametrize(("change", "least"), [(prepared, 100.0), (converted, 25.0)])
def test_a_fused_module_is_compared_with_the_output_of_the_last_that_it_stands_for(
    change: Change, least: float, compare: Callable[[Change], Comparison]
) -> None:
    comparison = compare(change)

    found = rows(comparison)
    assert all(sqnr(row) > least for row in comparison.rows)
    assert found["conv", 0].matched_by == "exact, fused with ReLU"
    assert found["up", 0].type == ("Linear", "LinearReLU")
    assert comparison.coverage.only_in_candidate == () or change is prepared
    assert {"norm", "act"} <= set(comparison.coverage.wrappers)


def test_calls_of_a_shared_activation_that_are_left_belong_together(
    compare: Callable[[Change], Comparison],
) -> None:
    def without_the_first(model: nn.Module) -> nn.Module:
        from torch.ao.nn.intrinsic import ConvReLU2d

        class Fused(Network):
            def forward(self, x: Tensor) -> Tensor:
                hidden = self.relu(self.conv(x) - x)
                return self.down(self.act(self.up(hidden.mean((2, 3)))))

        model = folded(model)
        model.conv = ConvReLU2d(model.conv, nn.ReLU())
        del model.norm
        model.__class__ = Fused
        return model

    comparison = compare(without_the_first)

    found = rows(comparison)
    assert ("relu", 0) not in found
    assert all(sqnr(row) > 100 for row in comparison.rows)
    assert found["relu", 1].matched_by == "exact"


def test_a_normalization_folded_into_a_layer_is_compared_with_it_and_in_its_old_place(
    compare: Callable[[Change], Comparison],
) -> None:
    comparison = compare(folded)

    found = rows(comparison)
    assert all(sqnr(row) > 100 for row in comparison.rows)
    assert found["conv", 0].matched_by == "exact, fused with BatchNorm2d"
    assert found["norm", 0].type == ("BatchNorm2d", "Identity")


def test_a_normalization_that_was_not_recorded_is_not_taken_for_folded(tmp_path: Path) -> None:
    model = network()
    for name, exclude in (("fp", ()), ("quant", ("norm",))):
        with torch.no_grad(), qvtrace.record(model, tmp_path / f"{name}.st", exclude=exclude):
            model(INPUT.clone())

    comparison = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st")

    assert rows(comparison)["conv", 0].status == "identical"
    assert {row.matched_by for row in comparison.rows} == {"exact"}


def test_in_flight_fused_modules_are_compared_as_in_a_diff(
    tmp_path: Path, compare: Callable[[Change], Comparison]
) -> None:
    stored = compare(converted)

    candidate = converted(network())
    with torch.no_grad(), qvtrace.diff_in_flight(tmp_path / "fp.st", candidate) as flight:
        candidate(INPUT.clone())

    passed = flight.comparison
    assert passed is not None
    assert [(row.module, row.metrics.sqnr) for row in passed.rows] == [
        (row.module, row.metrics.sqnr) for row in stored.rows
    ]


def test_observers_between_the_steps_of_a_graph_say_nothing_of_the_models_output(
    tmp_path: Path, compare: Callable[[Change], Comparison]
) -> None:
    compare(prepared)

    from qvtrace.qparams.findings import parameters_of

    with Archive.open(tmp_path / "quant.st") as archive:
        parameters = parameters_of(archive)
    assert parameters.of("") == []
    assert [found.of for found in parameters.of("activation_post_process_0")] == ["output"]


def test_the_weights_of_a_fused_module_of_torch_are_told(
    tmp_path: Path, compare: Callable[[Change], Comparison]
) -> None:
    compare(converted)

    from qvtrace.qparams.findings import parameters_of

    with Archive.open(tmp_path / "quant.st") as archive:
        weight, output = parameters_of(archive).of("up")
    assert (weight.of, weight.dtype, weight.granularity) == ("weight", "int8", "channel")
    assert (output.of, output.dtype) == ("output", "uint8")
