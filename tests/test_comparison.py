"""Two recorded archives, compared."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvtrace.archive import Archive
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.rows import Place, Row
from qvtrace.digests import digest_bytes
from qvtrace.errors import DamagedArchiveError, MissingArchiveError, UsageError
from qvtrace.manifest import VariantInfo
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording, record
from qvtrace.reports.head import head_lines

Recorder = Callable[..., Path]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorder:
    """Records one forward of a model to a file of that name."""

    def run(name: str, model: nn.Module, *args: object, kwargs: Any = None, **options: Any) -> Path:
        with torch.no_grad(), record(model.eval(), tmp_path / name, **options):
            model(*args, **(kwargs or {}))
        return tmp_path / name

    return run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            hidden = hidden * mask
        return self.down(torch.relu(self.up(hidden)))


class Raising(nn.Module):
    """Raises what it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise self.error


class Returning(nn.Module):
    """Returns what it is told to."""

    def __init__(self, make: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, hidden: torch.Tensor) -> object:
        return self.make(hidden)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(16, 8))


def rounded(model: nn.Module) -> nn.Module:
    """The model with its weights on a coarse grid."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 32).round() / 32)
    return model


def hidden() -> torch.Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def two(recorded: Recorder) -> tuple[Path, Path]:
    """A network and its coarse copy."""
    model = network()
    return recorded("fp.st", model, hidden()), recorded("quant.st", rounded(model), hidden())


def row_of(comparison: Comparison, module: str, path: str = "output") -> Row:
    (row,) = (row for row in comparison.rows if (row.module, row.path) == (module, path))
    return row


def compare_outputs(
    recorded: Recorder, reference: Any, candidate: Any, **options: Any
) -> Comparison:
    """The comparison of two modules that return these."""
    files = (
        recorded(f"{name}.st", Returning(make), hidden())
        for name, make in (("reference", reference), ("candidate", candidate))
    )
    return diff(*files, **options)


def test_rows_stand_in_order_of_execution_with_numbers_of_the_reference(two):
    comparison = diff(*two)

    assert [row.module for row in comparison.rows] == [
        *("0.up", "0.down", "0", "1.up", "1.down", "1", "2", ""),
    ]
    assert [row.order for row in comparison.rows] == list(range(8))
    assert {row.status for row in comparison.rows} == {"ok"}
    assert comparison.coverage.compared == comparison.coverage.pairs == 8


def test_peir_is_the_peak_error_over_the_interval_of_the_reference(two):
    with Archive.open(two[0]) as reference, Archive.open(two[1]) as candidate:
        call, other = (archive.manifest.calls[0] for archive in (reference, candidate))
        one, two_ = reference.array(call.tree("output")), candidate.array(other.tree("output"))
        expected = abs(one - two_).max() / (one.max() - one.min())

        row = diff(reference, candidate).rows[0]

    assert row.metrics.peir == pytest.approx(expected, rel=1e-6)


def test_a_block_whose_output_is_its_last_child_s_is_folded_into_it(two):
    comparison = diff(*two)

    assert row_of(comparison, "0").same_as == row_of(comparison, "0.down").place
    assert row_of(comparison, "").same_as == row_of(comparison, "2").place
    assert row_of(comparison, "0.down").same_as is None


def test_an_input_that_is_an_earlier_output_is_folded_into_it(two):
    comparison = diff(*two, path="all")

    assert row_of(comparison, "1.up", "inputs.0").same_as == row_of(comparison, "0.down").place


def test_an_archive_is_identical_to_itself_and_none_of_its_tensors_is_read(recorded):
    file = recorded("fp.st", network(), hidden())
    damaged = file.with_name("damaged.st")
    contents = bytearray(file.read_bytes())
    with Archive.open(file) as archive:
        elements = archive.array(archive.manifest.calls[0].tree("output")).tobytes()
    start = contents.index(elements)
    contents[start : start + len(elements)] = b"\xff" * len(elements)
    damaged.write_bytes(contents)

    comparison = diff(file, damaged)

    assert {row.status for row in comparison.rows} == {"identical"}
    assert {row.metrics.peir for row in comparison.rows} == {0.0}
    assert {row.peak for row in comparison.rows} == {None}
    assert comparison.comparable.ok
    assert comparison.comparable.differences == ()
    assert comparison.verdict.text == (
        "no difference in any pair; no NaN introduced; 8 of 8 modules compared"
    )
    assert comparison.verdict.exit_code == 0


def test_an_archive_of_one_s_own_is_left_open(two):
    with Archive.open(two[0]) as reference, Archive.open(two[1]) as candidate:
        first = diff(reference, candidate)

        assert diff(reference, candidate).rows == first.rows


def test_rows_are_sorted_by_a_metric_worst_first(two):
    by_peir = [row.metrics.peir for row in diff(*two, sort_by="peir").rows]
    by_sqnr = [row.metrics.sqnr for row in diff(*two, sort_by="sqnr").rows]

    assert by_peir == sorted(by_peir, reverse=True)
    assert by_sqnr == sorted(by_sqnr)
    assert by_peir[0] > by_peir[-1]


def test_sorting_puts_undefined_first_identical_after_numbers_and_integers_last(recorded):
    comparison = compare_outputs(
        recorded,
        lambda x: {
            "same": x,
            "small": x,
            "int": x.int(),
            "constant": x * 0,
            "large": x,
            "text": "a",
        },
        lambda x: {
            **{"same": x, "small": x * 1.01, "int": x.int() + 1, "constant": x, "large": -x},
            "text": "a",
        },
        sort_by="peir",
    )

    assert [row.path.removeprefix("output.") for row in comparison.rows] == [
        *("constant", "large", "small", "same", "int", "text"),
    ]


def test_sorting_by_name_is_alphabetical(two):
    names = [row.module for row in diff(*two, sort_by="name").rows]

    assert names == sorted(names)


def test_top_keeps_the_worst_and_says_that_the_rest_was_cut(two):
    everything = diff(*two, sort_by="peir")
    cut = diff(*two, sort_by="peir", top=2)

    assert cut.rows == everything.rows[:2]
    assert not cut.complete
    assert everything.complete
    assert cut.coverage == everything.coverage
    assert cut.verdict == everything.verdict


def test_top_without_a_metric_keeps_the_worst_by_peir_in_their_order(two):
    worst = {row.place for row in diff(*two).worst("peir", 3)}

    assert [row.place for row in diff(*two, top=3).rows] == [
        row.place for row in diff(*two).rows if row.place in worst
    ]


def test_top_keeps_what_is_asked_for_by_name(two):
    least = diff(*two, sort_by="peir").rows[-1]

    cut = diff(*two, sort_by="peir", top=1, values=[least.module])

    assert [row.module for row in cut.rows] == [diff(*two).worst("peir", 1)[0].module, least.module]
    assert least.place in cut.elements
    assert len(cut.cut) == len(diff(*two).rows) - 2


def test_the_head_counts_rows_that_top_cut(recorded):
    inner = Block()
    wrapped = nn.Sequential()
    wrapped.module = inner
    reference = recorded("fp.st", inner, torch.ones(2, 16))
    candidate = recorded("quant.st", wrapped, torch.ones(2, 16))

    def matched(**options):
        lines = head_lines(diff(reference, candidate, **options), None, everything=False)
        return [line.plain for line in lines if line.plain.startswith("matched")]

    assert len(matched()) == 1
    assert matched(top=1) == matched()


def test_a_number_is_worse_than_what_only_one_side_has(recorded):
    hidden = torch.rand(4, 16)

    def outputs(error):
        return {"number": hidden + error, "constant": torch.full((4, 16), error), "equal": hidden}

    reference = recorded("fp.st", Returning(lambda _: outputs(0.0)), hidden)
    new = {f"new_{name}": hidden for name in "abc"}
    candidate = recorded("quant.st", Returning(lambda _: {**outputs(0.1), **new}), hidden)

    rows = diff(reference, candidate, sort_by="peir").rows

    assert [row.path.removeprefix("output.") for row in rows] == [
        *("constant", "number", "new_a", "new_b", "new_c", "equal"),
    ]
    assert diff(reference, candidate, sort_by="peir", top=2).rows == rows[:2]


class Overflowing(nn.Module):
    """Gives infinity in its first channel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(hidden)
        return torch.cat([torch.full_like(hidden[:, :1], torch.inf), hidden[:, 1:]], dim=1)


def test_new_infinities_are_told_before_all_else_and_where_they_come_in(recorded):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Identity())
    x = torch.rand(4, 16)
    reference = recorded("fp.st", model, x)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        noisy[0].up.weight.mul_(1.5)
    noisy[2] = Overflowing(noisy[2])
    broken = recorded("broken.st", noisy, x)

    comparison = diff(reference, broken, fail_on=["peir>1e9", "nonfinite"])

    origin = comparison.verdict.origins[0]
    assert (origin.module, origin.reason[:10]) == ("2", "infinities")
    assert comparison.verdict.findings[0] == (
        "infinities introduced, first in 2 (4 elements), in 2 rows"
    )
    assert comparison.verdict.findings[1].startswith("first seen at 2 ")
    assert "no NaN" not in comparison.verdict.text
    assert comparison.verdict.exit_code == 1
    for metric in ("peir", "sqnr", "cosine"):
        assert [row.module for row in comparison.worst(metric, 2)] == ["2", ""]


def test_infinity_where_nothing_else_differs_is_not_called_equal(recorded):
    x = torch.rand(4, 16)
    reference = recorded("fp.st", nn.Identity(), x)

    comparison = diff(reference, recorded("quant.st", Overflowing(nn.Identity()), x))

    assert "no other difference between floating-point values" in comparison.verdict.text
    assert [origin.module for origin in comparison.verdict.origins] == [""]


def test_infinities_on_both_sides_are_counted_and_no_finding(recorded):
    reference = recorded("fp.st", Overflowing(nn.Identity()), torch.rand(4, 16))

    comparison = diff(
        reference,
        recorded("quant.st", Overflowing(nn.Identity()), torch.rand(4, 16)),
        fail_on=["nonfinite"],
    )

    row = comparison.rows[-1]
    assert row.nonfinite is not None
    assert (row.status, row.nonfinite.equal_inf) == ("ok", 4)
    assert comparison.verdict.exit_code == 3  # other inputs
    assert [gate.ok for gate in comparison.verdict.gates] == [True]


def test_choosing_metrics_makes_a_comparison_incomplete(two):
    assert not diff(*two, metrics=("peir",)).complete


def test_worst_lists_rows_whatever_the_order_of_the_comparison(two):
    comparison = diff(*two)

    assert comparison.worst("peir", 2) == list(diff(*two, sort_by="peir").rows[:2])
    with pytest.raises(UsageError, match="nonsense"):
        comparison.worst("nonsense", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"sort_by": "size"}, "^--sort-by 'size': .*order, name, .*peir", id="sort"),
        pytest.param({"path": "elsewhere"}, "^--path 'elsewhere': .*output, inputs", id="path"),
        pytest.param({"metrics": ("psnr",)}, "^--metrics 'psnr': .*cosine", id="metrics"),
        pytest.param({"top": 0}, "^--top 0: ", id="top"),
        pytest.param({"include": ("0.up", "no*")}, "^--include 'no\\*': ", id="include"),
        pytest.param({"exclude": ("1.Up",)}, "^--exclude '1.Up': ", id="exclude"),
        pytest.param({"maps": ("a",)}, "^--map 'a': ", id="map"),
    ],
)
def test_options_that_cannot_be_used_are_named(two, options, message):
    with pytest.raises(UsageError, match=message):
        diff(*two, **options)


def test_a_file_that_is_missing_is_named(two):
    with pytest.raises(MissingArchiveError, match=r"none\.st"):
        diff(two[0], two[0].with_name("none.st"))


def test_patterns_narrow_rows_coverage_and_verdict(two):
    comparison = diff(*two, include=["1.*", "2"], exclude=["*.up"])

    assert [row.module for row in comparison.rows] == ["1.down", "2"]
    assert comparison.coverage.modules_reference == 2
    assert comparison.verdict.text.endswith(
        "2 of 2 modules compared (--include 1.* --include 2 --exclude *.up)"
    )
    assert comparison.complete


def test_one_pattern_may_be_given_as_text(two):
    assert [row.module for row in diff(*two, include="1.*").rows] == ["1.up", "1.down"]


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_what_only_one_side_recorded_is_listed(two, recorded, side):
    less = recorded("less.st", network(), hidden(), exclude=["1", "1.*"])
    files = (two[0], less) if side == "reference" else (less, two[0])

    coverage = diff(*files).coverage

    alone, other = coverage.only_in_reference, coverage.only_in_candidate
    if side == "candidate":
        alone, other = other, alone
    assert [(place.module, place.call, place.path) for place in alone] == [
        ("1.up", 0, "output"),
        ("1.down", 0, "output"),
        ("1", 0, "output"),
    ]
    assert other == ()
    assert coverage.modules_compared == 5


def test_a_call_that_only_one_side_makes_is_listed(tmp_path):
    model = network().eval()
    for name, count in (("three.st", 3), ("two.st", 2)):
        with torch.no_grad(), record(model, tmp_path / name):
            for _ in range(count):
                model(hidden())

    comparison = diff(tmp_path / "three.st", tmp_path / "two.st")

    assert len(comparison.rows) == 16
    assert {place.call for place in comparison.coverage.only_in_reference} == {2}
    assert len(comparison.coverage.only_in_reference) == 8
    assert not comparison.comparable.ok


def test_several_calls_of_a_module_are_several_rows(tmp_path):
    layer = nn.Linear(16, 16).eval()
    for name, model in (("fp.st", layer), ("quant.st", rounded(layer))):
        with torch.no_grad(), record(model, tmp_path / name):
            model(hidden())
            model(hidden() * 3)

    rows = diff(tmp_path / "fp.st", tmp_path / "quant.st").rows

    assert [(row.call, row.order) for row in rows] == [(0, 0), (1, 1)]
    assert rows[0].metrics.max_abs_error < rows[1].metrics.max_abs_error


def test_shapes_that_differ_are_never_broadcast(recorded):
    comparison = compare_outputs(recorded, lambda x: x[:, :1], lambda x: x)

    (row,) = comparison.rows
    assert (row.status, row.shape) == ("shape", ((2, 1, 16), (2, 5, 16)))
    assert row.reason == "[2, 1, 16] against [2, 5, 16]"
    assert set(row.undefined.values()) == {"shapes differ"}
    assert row.metrics.peir is None
    assert comparison.verdict.exit_code == 3


def test_what_one_side_has_more_in_a_tuple_is_a_row_of_its_own(recorded):
    comparison = compare_outputs(recorded, lambda x: (x, x + 1), lambda x: (x,))

    assert [(row.path, row.status, row.reason) for row in comparison.rows] == [
        ("output.0", "identical", None),
        ("output.1", "structure", "only in the reference"),
    ]
    assert comparison.rows[1].shape == ((2, 5, 16), None)
    assert comparison.coverage.not_comparable == 1
    assert "1 pair not comparable, first (root) output.1" in comparison.verdict.text


def test_a_tensor_and_a_tuple_of_it_are_compared_and_noted(recorded):
    (row,) = compare_outputs(recorded, lambda x: x, lambda x: (x + 1,)).rows

    assert (row.path, row.status) == ("output", "ok")
    assert row.reason == "a tensor against a tuple of 1"


def test_a_tensor_against_none_differs_in_structure(recorded):
    (_, row) = compare_outputs(recorded, lambda x: (x, x), lambda x: (x, None)).rows

    assert (row.status, row.reason) == ("structure", "a tensor against None")


def test_integers_are_counted_and_have_no_peir(recorded):
    comparison = compare_outputs(
        recorded,
        lambda x: (x, torch.tensor([1, 2, 3]), torch.tensor([True])),
        lambda x: (x, torch.tensor([1, 5, 3]), torch.tensor([True])),
    )

    row = comparison.rows[1]
    assert (row.status, row.metrics.mismatches, row.metrics.max_abs_error) == ("mismatch", 1, 3)
    assert row.metrics.peir is None
    assert comparison.rows[2].status == "identical"
    assert "differ in 1 row, first in (root) output.1" in comparison.verdict.text


@pytest.mark.parametrize(
    ("reference", "candidate", "status", "error", "reason"),
    [
        pytest.param(3, 3, "exact", 0, None, id="equal"),
        pytest.param(3, 5, "mismatch", 2, "3 against 5", id="integers"),
        pytest.param(1, 1.5, "mismatch", 0.5, "1 against 1.5", id="integer-and-float"),
        pytest.param(10**400, 0.5, "mismatch", None, f"{10**400} against 0.5", id="huge"),
        pytest.param(10**400, 3, "mismatch", None, f"{10**400} against 3", id="huge-integers"),
        pytest.param(float("nan"), float("nan"), "exact", None, None, id="nan-twice"),
        pytest.param(float("inf"), 1.0, "mismatch", None, "inf against 1.0", id="infinity"),
        pytest.param("a", "b", "mismatch", None, "a str against a str", id="texts"),
        pytest.param(None, 3, "mismatch", None, "None against 3", id="none"),
        pytest.param(
            torch.float16,
            torch.float32,
            "mismatch",
            None,
            "torch.float16 against torch.float32",
            id="dtypes",
        ),
    ],
)
def test_plain_values_are_compared_by_equality(
    recorded, reference, candidate, status, error, reason
):
    (_, row) = compare_outputs(recorded, lambda x: (x, reference), lambda x: (x, candidate)).rows

    assert (row.status, row.metrics.max_abs_error, row.reason) == (status, error, reason)
    assert row.metrics.mismatches == (status == "mismatch")
    assert row.undefined["peir"] == "plain value"
    assert row.dtype == (None, None)


def test_what_a_metric_does_not_apply_to_is_none_of_its_worst(recorded):
    comparison = compare_outputs(
        recorded,
        lambda x: (x, x.int(), "a", object()),
        lambda x: (x + 1, x.int() + 1, "b", object()),
    )

    assert [row.path for row in comparison.worst("peir", 9)] == ["output.0"]
    assert "output.1" in [row.path for row in comparison.worst("mismatches", 9)]


def test_an_error_of_float64_whose_square_no_float_holds_is_a_row(recorded):
    reference = torch.zeros(1, 8, dtype=torch.float64)
    reference[0, 0] = 1.0
    (row,) = compare_outputs(recorded, lambda _: reference, lambda _: reference + 1e200).rows

    assert row.metrics.relative_l2 == pytest.approx(8**0.5 * 1e200)
    assert row.metrics.noise_out == pytest.approx(1e308)


def test_objects_that_cannot_be_stored_are_told_by_their_types(recorded):
    (_, same, other) = compare_outputs(
        recorded, lambda x: (x, object(), object()), lambda x: (x, object(), {1, 2})
    ).rows

    assert (same.status, same.reason) == ("opaque", "an object of type object")
    assert other.status == "opaque"
    assert other.reason == "types differ: object against set"
    assert other.undefined["peir"] != same.undefined["peir"]


def test_dtypes_that_differ_are_compared_as_floats(recorded):
    (row,) = compare_outputs(recorded, lambda x: x, lambda x: x.bfloat16()).rows

    assert (row.status, row.dtype) == ("ok", ("float32", "bfloat16"))
    assert 0 < row.metrics.peir < 0.01


def test_zeros_of_another_dtype_are_not_identical(recorded):
    (row,) = compare_outputs(recorded, lambda x: x.int() * 0, lambda x: x * 0).rows

    assert row.status == "ok"
    assert row.metrics.max_abs_error == 0


def test_a_new_nan_is_named_first_with_its_first_module(recorded):
    class Poisoned(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output = super().forward(hidden)
            output[0, 0, :3] = float("nan")
            return output

    model, candidate = network(), network()
    candidate[1].up.__class__ = Poisoned

    comparison = diff(recorded("fp.st", model, hidden()), recorded("nan.st", candidate, hidden()))

    row = row_of(comparison, "1.up")
    assert row.status == "nonfinite"
    assert row.nonfinite.new_nan == 3
    assert row.type == ("Linear", "Poisoned")
    assert comparison.verdict.text.startswith(
        "NaN introduced, first in 1.up (3 elements), in 5 rows; "
    )
    assert "no NaN" not in comparison.verdict.text


def test_the_verdict_names_the_worst_module_in_three_digits(two):
    comparison = diff(*two)
    (worst, *_) = comparison.worst("peir", 1)

    assert re.search(
        rf"; worst: {re.escape(worst.module)}, PEIR 0\.0\d\d\d?; no NaN introduced; "
        r"first difference: 0\.up; 8 of 8 modules compared$",
        comparison.verdict.text,
    )
    assert f"{worst.metrics.peir:.3g}" in comparison.verdict.text


def test_names_that_share_nothing_are_nothing_comparable(recorded):
    one = recorded("one.st", nn.Sequential(nn.Linear(16, 8)), hidden(), include=["0"])
    other = recorded("two.st", network(), hidden(), include=["1.up"])

    comparison = diff(one, other)

    assert comparison.verdict.exit_code == 3
    assert (
        "nothing was comparable: no module of one side is on the other" in comparison.verdict.text
    )
    assert len(comparison.coverage.only_in_reference) == 1


def test_comparing_less_than_half_of_the_modules_is_told_first(two, recorded):
    less = recorded("less.st", network(), hidden(), include=["0.up", "2"])

    assert diff(two[0], less).verdict.text.startswith("ONLY 2 of 8 modules compared")


def test_a_wrapped_model_is_compared_module_by_module(two, recorded):
    parallel = recorded("parallel.st", nn.DataParallel(network()), hidden())

    comparison = diff(two[0], parallel)

    assert comparison.coverage.modules_compared == 8
    assert comparison.coverage.wrappers == ("module",)
    assert comparison.comparable.ok
    assert row_of(comparison, "0.up").matched_by == "prefix module."
    assert row_of(comparison, "").type == ("Sequential", "DataParallel")


def test_names_are_mapped_when_comparing_and_idle_maps_are_told_of(recorded):
    layer = nn.Linear(16, 16)
    one = recorded("one.st", nn.Sequential(layer), hidden())
    named = nn.Sequential()
    named.add_module("linear", layer)

    comparison = diff(one, recorded("named.st", named, hidden()), maps=[r"linear=0", "x=y"])

    assert row_of(comparison, "0").matched_by == "map linear=0"
    assert comparison.candidate.warnings == ("--map 'x=y' changed no name",)


def test_an_input_by_position_and_one_by_name_are_one_input(recorded):
    block = Block()
    mask = torch.ones(16)
    by_position = recorded("position.st", block, hidden(), mask)
    by_name = recorded("name.st", block, hidden(), kwargs={"mask": mask})

    comparison = diff(by_position, by_name, path="inputs")

    row = row_of(comparison, "", "inputs.1")
    assert (row.status, row.reason) == ("identical", "inputs.1 against kwargs.mask")
    assert comparison.comparable.ok
    assert comparison.coverage.only_in_candidate == ()


def test_inputs_that_one_side_did_not_store_are_listed_and_no_structure(two, recorded):
    bare = recorded("bare.st", network(), hidden(), inputs=False)

    comparison = diff(two[0], bare, path="inputs")

    assert comparison.rows == ()
    assert len(comparison.coverage.only_in_reference) == 8
    assert comparison.verdict.exit_code == 3


def test_a_mask_that_differs_shows_in_kwargs_only(recorded):
    block = Block()
    files = [
        recorded(f"{index}.st", block, hidden(), kwargs={"mask": mask})
        for index, mask in enumerate((torch.ones(16), torch.ones(16, dtype=torch.int64)))
    ]

    assert {row.status for row in diff(*files).rows} == {"identical"}
    (row,) = diff(*files, path="kwargs").rows
    assert row.dtype == ("float32", "int64")


def test_other_inputs_make_two_traces_incomparable_and_are_named(two, recorded):
    other = recorded("other.st", network(), hidden() + 1)

    comparison = diff(two[0], other)

    assert not comparison.comparable.ok
    assert comparison.comparable.differences[0] == "inputs differ in call 0 of (root): inputs.0"
    assert "not comparable: inputs differ" in comparison.verdict.text
    assert comparison.verdict.exit_code == 0


def test_other_float_weights_make_two_traces_incomparable(recorded):
    model = network()
    one = recorded("one.st", model, hidden(), variant="fp")
    other = recorded("other.st", rounded(model), hidden(), variant="fp")

    comparable = diff(one, other).comparable

    assert not comparable.ok
    assert "float weights differ" in comparable.differences[0]


def test_what_one_side_does_not_know_is_named_and_does_not_decide(recorded):
    model = network()
    one = recorded("one.st", model, hidden(), variant="fp")
    other = recorded("other.st", rounded(model), hidden(), variant="quant")

    comparable = diff(one, other).comparable

    assert comparable.ok
    assert comparable.differences == ("float weights not compared: unknown in the candidate",)


def test_another_class_makes_two_traces_incomparable(recorded):
    one = recorded("one.st", nn.Sequential(nn.Linear(16, 8)), hidden())
    other = recorded("other.st", nn.Linear(16, 8), hidden())

    assert diff(one, other).comparable.differences == (
        "model classes differ: Sequential in the reference, Linear in the candidate",
    )


def test_another_dtype_and_training_mode_are_named_and_do_not_decide(recorded, tmp_path):
    model = network()
    one = recorded("one.st", model, hidden())
    with torch.no_grad(), record(model.double().train(), tmp_path / "other.st"):
        model(hidden().double())

    differences = diff(one, tmp_path / "other.st").comparable.differences

    assert "dtype float32 in the reference, float64 in the candidate" in differences
    assert any("training mode in the candidate: dropout" in text for text in differences)


def test_an_incomplete_archive_is_compared_with_a_warning(two, tmp_path):
    class Failing(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of luck")

    model = network().eval()
    model[1].up.__class__ = Failing
    with pytest.raises(RuntimeError), torch.no_grad(), record(model, tmp_path / "cut.st"):
        model(hidden())

    comparison = diff(two[0], tmp_path / "cut.st.partial")

    assert not comparison.candidate.complete
    assert "out of luck" in comparison.candidate.warnings[0]
    assert "the candidate is incomplete (RuntimeError: out of luck)" in comparison.verdict.text
    assert {row.module for row in comparison.rows} == {"0.up", "0.down", "0"}
    assert "1.up" in {place.module for place in comparison.coverage.only_in_reference}


def test_a_quantizer_that_changed_nothing_is_loud(two, tmp_path):
    options = RecordOptions(variant=VariantInfo("quant", "torchao:int8-dynamic"))
    model = network().eval()
    with torch.no_grad(), Recording(model, tmp_path / "same.st", options):
        model(hidden())

    verdict = diff(two[0], tmp_path / "same.st").verdict

    assert "the quantizer torchao:int8-dynamic changed NO module" in verdict.text


def damage(file: Path, before: str, after: str) -> Path:
    """The archive with other text of equal length in its manifest, and digests to match."""
    with Archive.open(file) as archive:
        manifest = archive.manifest_bytes()
    changed = manifest.replace(before.encode(), after.encode())
    assert len(changed) == len(manifest)
    assert changed != manifest
    contents = file.read_bytes().replace(manifest, changed)
    contents = contents.replace(digest_bytes(manifest).encode(), digest_bytes(changed).encode())
    file.write_bytes(contents)
    return file


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param('"type":"tensor"', '"type":"tensar"', id="unknown-node"),
        pytest.param('"dtype":"float32"', '"dtype":"float99"', id="unknown-dtype"),
        pytest.param('"shape":[2,5,32]', '"shape":[9,5,32]', id="wrong-shape"),
    ],
)
def test_a_tree_that_no_writer_writes_is_damage_in_that_file(two, before, after):
    damaged = damage(two[1], before, after)

    with pytest.raises(DamagedArchiveError, match=r"quant\.st"):
        diff(two[0], damaged)


def test_every_row_says_why_a_metric_is_undefined(recorded):
    comparison = compare_outputs(
        recorded,
        lambda x: (x, x, x.int(), 3, object(), x[0], x),
        lambda x: (x, x * 2, x.int() + 1, 4, object(), x, None),
    )

    for row in comparison.rows:
        metrics = {name: getattr(row.metrics, name) for name in row.metrics.__dataclass_fields__}
        assert {name for name, value in metrics.items() if value is None} == set(row.undefined)
        json.dumps(metrics, allow_nan=False)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128], ids=str)
def test_complex_numbers_are_compared_as_pairs_of_reals(recorded, dtype):
    comparison = compare_outputs(
        recorded,
        lambda x: torch.tensor([[1 + 2j, 3 - 1j]]).to(dtype),
        lambda x: torch.tensor([[1 + 2j, 3 - 1.5j]]).to(dtype),
    )

    (row,) = comparison.rows
    assert (row.status, row.shape) == ("ok", ((1, 2), (1, 2)))
    assert row.metrics.max_abs_error == 0.5
    assert row.metrics.peir == pytest.approx(0.5 / 4)
    assert row.peak.index == (0, 1)
    assert (row.peak.reference, row.peak.candidate) == (-1.0, -1.5)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_numbers_of_two_dtypes_are_compared(recorded):
    comparison = compare_outputs(
        recorded,
        lambda x: torch.full((2,), 1 + 2j, dtype=torch.complex32),
        lambda x: torch.full((2,), 1 + 2.5j, dtype=torch.complex64),
    )

    (row,) = comparison.rows
    assert (row.status, row.dtype) == ("ok", ("complex32", "complex64"))
    assert row.metrics.max_abs_error == 0.5


class Trying(nn.Module):
    """Tries a way that may fail, and takes another one then."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.risky = Raising(error) if error is not None else nn.Identity()
        self.safe = nn.Identity()

    def forward(self, hidden):
        try:
            self.risky(hidden)
        except Exception:
            return self.safe(hidden)
        return self.safe(hidden)


SECRET = "cannot read 'my prompt'"


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_module_that_raised_on_one_side_only_is_said_to_have(recorded, side):
    files = [
        recorded("fp.st", Trying(None), hidden()),
        recorded("quant.st", Trying(ValueError(SECRET)), hidden()),
    ]

    comparison = diff(*(files if side == "candidate" else files[::-1]))

    coverage = comparison.coverage
    raised = f"1 call without an output in the {side} only, first risky (raised ValueError)"
    assert raised in comparison.verdict.text
    listed = coverage.only_in_reference if side == "candidate" else coverage.only_in_candidate
    assert listed == (Place("risky", 0, "output"),)
    (warning,) = getattr(comparison, side).warnings
    assert warning == "1 call raised or did not return, first risky#0 (raised ValueError)"
    assert SECRET not in repr((comparison, comparison.rows))


def test_a_module_that_raised_on_both_sides_is_counted_and_named(recorded):
    files = [recorded(name, Trying(ValueError(SECRET)), hidden()) for name in ("fp.st", "q.st")]

    comparison = diff(*files)

    row = row_of(comparison, "risky")
    assert (row.status, row.reason) == ("opaque", "raised ValueError on both sides")
    assert comparison.coverage.not_comparable == 1
    raised = "1 call without an output on both sides, first risky (raised ValueError)"
    assert f"{raised}; 2 of 3 modules compared" in comparison.verdict.text
    assert len(comparison.reference.warnings) == len(comparison.candidate.warnings) == 1


def test_what_was_raised_on_both_sides_may_differ(recorded):
    files = [
        recorded("fp.st", Trying(KeyError(1)), hidden()),
        recorded("quant.st", Trying(ValueError(SECRET)), hidden()),
    ]

    row = row_of(diff(*files), "risky")

    reason = "raised KeyError in the reference, raised ValueError in the candidate"
    assert (row.status, row.reason) == ("structure", reason)


def test_a_mask_that_only_the_candidate_has_is_no_worst_place(recorded):
    def masked(x):
        x = x.clone()
        x[0, 1, 2] = torch.finfo(x.dtype).min
        return x

    comparison = compare_outputs(
        recorded,
        lambda x: (x, x),
        lambda x: (masked(x), x * 1.01),
    )

    masking, plain = comparison.rows
    assert masking.status == "nonfinite"
    assert masking.nonfinite.sentinel_mismatches == 1
    assert masking.peaks_at_mask
    assert not plain.peaks_at_mask
    assert f"worst: (root) output.1, PEIR {plain.metrics.peir:.3g}" in comparison.verdict.text
    assert "masks differ, first in (root) output.0, in 1 row" in comparison.verdict.text


def test_elements_of_lists_of_numbers_are_not_shown(recorded):
    class Counting(nn.Module):
        def forward(self, hidden, ids, size=None):
            return hidden

    files = [
        recorded(f"{name}.st", Counting(), hidden(), kwargs={"ids": ids, "size": 3 + ids[0][0]})
        for name, ids in (("fp", [[70431, 5]]), ("quant", [[80944, 5]]))
    ]

    comparison = diff(*files, path="all")

    row, size = row_of(comparison, "", "kwargs.ids.0.0"), row_of(comparison, "", "kwargs.size")
    assert (row.status, row.reason, row.peak) == ("mismatch", "an element differs", None)
    assert row.metrics.max_abs_error == 10513
    assert (size.reason, size.peak.candidate) == ("70434 against 80947", 80947)


def test_the_same_weights_and_inputs_in_another_dtype_are_told_as_such(recorded):
    model = network()
    reference = recorded("fp32.st", model, hidden(), variant="fp")
    candidate = recorded("bf16.st", model.bfloat16(), hidden().bfloat16(), variant="fp")

    comparison = diff(reference, candidate)

    assert not comparison.comparable.ok
    inputs, weights = comparison.comparable.differences[:2]
    assert inputs == (
        "inputs differ in call 0 of (root): "
        "inputs.0 (the same numbers but for rounding, float32 against bfloat16)"
    )
    assert weights.startswith("float weights differ: digest ")
    assert weights.endswith(
        " (as they must, float32 against bfloat16; whether they are the same but for rounding is "
        "not known)"
    )
    assert comparison.coverage.compared == 8


def test_other_inputs_in_another_dtype_are_not_told_to_be_the_same(recorded):
    model = network()
    reference = recorded("fp32.st", model, hidden())
    candidate = recorded("bf16.st", model.bfloat16(), (hidden() + 1).bfloat16())

    (inputs, *_) = diff(reference, candidate).comparable.differences

    assert inputs == "inputs differ in call 0 of (root): inputs.0 (float32 against bfloat16)"


def test_elements_are_kept_of_the_rows_that_are_asked_for(two: tuple[Path, Path]) -> None:
    comparison = diff(*two, values=["0.*"], values_limit=None)

    with Archive.open(two[0]) as reference, Archive.open(two[1]) as candidate:
        sides = [
            archive.array(call.tree("output"))  # type: ignore[arg-type]
            for archive in (reference, candidate)
            for call in archive.manifest.calls
            if call.module == "0.up"
        ]
    assert {place.module for place in comparison.elements} == {"0.up", "0.down"}
    elements = comparison.elements[row_of(comparison, "0.up").place]
    assert elements.values == (sides[1].astype(float) - sides[0].astype(float)).tolist()
    assert diff(*two).elements == {}


def test_the_largest_element_of_the_difference_is_the_largest_error(
    two: tuple[Path, Path],
) -> None:
    comparison = diff(*two, values="*", values_limit=None)

    for row in comparison.rows:
        found = torch.tensor(comparison.elements[row.place].values, dtype=torch.float64)
        assert found.abs().max().item() == row.metrics.max_abs_error


def test_elements_of_another_layout_are_told_in_the_reference_s(recorded: Recorder) -> None:
    reference = recorded("fp.st", Returning(lambda x: x), hidden())
    candidate = recorded("quant.st", Returning(lambda x: x.transpose(0, 1) + 0.5), hidden())

    comparison = diff(reference, candidate, values=["(root)"], values_limit=None)

    (row,) = comparison.rows
    found = torch.tensor(comparison.elements[row.place].values)
    assert row.layout == "permute(1, 0, 2)"
    assert found.shape == (2, 5, 16)
    assert torch.allclose(found, torch.tensor(0.5), atol=1e-6)


def test_rows_that_are_not_compared_have_no_elements(recorded: Recorder) -> None:
    reference = recorded("fp.st", Returning(lambda x: (x, 3)), hidden())
    candidate = recorded("quant.st", Returning(lambda x: (x[:1], 4)), hidden())

    comparison = diff(reference, candidate, values=["(root)"])

    assert [row.status for row in comparison.rows] == ["shape", "mismatch"]
    assert comparison.elements == {}


def test_a_pattern_of_values_that_fits_no_module_is_refused(two: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="--values 'blocks': matches none of 8 modules"):
        diff(*two, values=["blocks"])
