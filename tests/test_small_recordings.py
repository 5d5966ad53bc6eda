"""Archives that hold a part of each tensor: samples of vectors, or statistics alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import Adding, Mlp, Raising, calls_of, seeded, tree_of
from small_archives import edit_manifest
from torch import Tensor, nn
from typer.testing import CliRunner

from qvtrace.archive import Archive, recover
from qvtrace.cached import cached_tensor
from qvtrace.cli import app
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.results import load_result
from qvtrace.comparison.rows import Row
from qvtrace.comparison.verdict import Verdict
from qvtrace.errors import DamagedArchiveError, RecordingError, UsageError
from qvtrace.judging.judge import judge
from qvtrace.merging import merge
from qvtrace.metrics.comparing import compare
from qvtrace.recording.budget import parse_size
from qvtrace.recording.recorder import record
from qvtrace.replayer import replay
from qvtrace.reports.json import comparison_text
from qvtrace.reports.table import TableOptions, comparison_lines
from qvtrace.sampling import sampled_places
from qvtrace.trees import OpaqueLeaf, TensorLeaf

TOKENS = 24  # in two sequences
PLACES = sampled_places(TOKENS, 6)


class Model(nn.Module):
    """A layer, what it is normed by, and a sum: more vectors than a small sample has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.mean = Mean()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(self.layer(hidden))
        return hidden + self.mean(hidden)


class Mean(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean((0, 1))


class Complex(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.complex(hidden, -hidden)


class Spoilt(nn.Module):
    """Adds a number to chosen tokens."""

    def __init__(self, added: dict[int, float]) -> None:
        super().__init__()
        self.added = added

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for token, number in self.added.items():
            hidden.view(-1, hidden.shape[-1])[token] += number
        return hidden


def hidden(size: int = 8) -> Tensor:
    return torch.randn(2, TOKENS // 2, size, generator=torch.manual_seed(1))


def archive_of(model: nn.Module, file: Path, *inputs: Tensor, **options: Any) -> Archive:
    with record(model, file, overwrite=True, **options), torch.no_grad():
        model(*(inputs or (hidden(),)))
    return Archive.open(file)


def output_of(archive: Archive, module: str) -> TensorLeaf:
    leaf = tree_of(archive, module)
    assert isinstance(leaf, TensorLeaf)
    return leaf


def noisy() -> Model:
    model = Model()
    with torch.no_grad():
        model.layer.weight.add_(0.01 * torch.randn(16, 8, generator=torch.manual_seed(2)))
    return model


Sides = Callable[..., tuple[Archive, Archive]]


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    """Two recordings that differ, of which each has its own options."""

    def record_both(one: dict[str, Any], other: dict[str, Any] | None = None) -> tuple[Any, Any]:
        reference = archive_of(Model(), tmp_path / "reference.st", **one)
        return reference, archive_of(
            noisy(), tmp_path / "candidate.st", **(one if other is None else other)
        )

    return record_both


def row_of(comparison: Comparison, module: str) -> Row:
    (row,) = (row for row in comparison.rows if row.module == module)
    return row


def text_of(comparison: Comparison) -> str:
    return "\n".join(line.plain for line in comparison_lines(comparison, TableOptions()))


def test_a_sample_has_the_vectors_of_the_whole_at_the_places_of_its_rule(tmp_path: Path) -> None:
    whole = archive_of(Model(), tmp_path / "whole.st")
    small = archive_of(Model(), tmp_path / "small.st", sample_tokens=6)

    for module in ("layer", "norm", ""):
        leaf = output_of(small, module)
        vectors = whole.array(output_of(whole, module)).reshape(TOKENS, 16)
        assert leaf == output_of(whole, module)  # shape and digest are of the whole
        assert np.array_equal(small.array(leaf), vectors[PLACES])
        places = small.places(leaf)
        assert places is not None
        assert places.tolist() == PLACES.tolist()


def test_what_has_no_more_vectors_and_what_the_model_is_given_is_whole(tmp_path: Path) -> None:
    small = archive_of(Model(), tmp_path / "small.st", sample_tokens=6)
    (root,) = small.manifest.inputs.root_calls
    (_, given), *_ = small.input_trees(root)[0].items  # type: ignore[union-attr]

    assert small.portion(output_of(small, "mean")) is None
    assert small.portion(given) is None
    assert np.array_equal(small.array(given), hidden().numpy())


def test_a_sample_is_smaller_and_every_digest_in_it_can_be_checked(tmp_path: Path) -> None:
    whole = archive_of(Model(), tmp_path / "whole.st", hidden().repeat(1, 100, 1))
    small = archive_of(Model(), tmp_path / "small.st", hidden().repeat(1, 100, 1), sample_tokens=6)

    assert small.size < whole.size / 3
    assert list(small.damaged_tensors()) == []


def test_a_tensor_stored_in_another_form_is_sampled_too(tmp_path: Path) -> None:
    given = hidden().double()
    whole = archive_of(Complex(), tmp_path / "whole.st", given)
    small = archive_of(Complex(), tmp_path / "small.st", given, sample_tokens=6)
    leaf = output_of(small, "")

    assert leaf.dtype == "complex128"
    vectors = whole.array(leaf).reshape(TOKENS, 8)
    assert np.array_equal(small.array(leaf), vectors[PLACES])


def test_every_metric_is_that_of_the_sampled_vectors(sides: Sides, tmp_path: Path) -> None:
    row = row_of(diff(*sides({"sample_tokens": 6})), "layer")
    whole = sides({})
    arrays = [archive.array(output_of(archive, "layer")).reshape(TOKENS, 16) for archive in whole]
    expected = compare(arrays[0][PLACES], arrays[1][PLACES])

    assert row.sampled == (6, TOKENS)
    assert row.metrics.peir == expected.metrics.peir
    assert row.metrics.token_sqnr_p5 == expected.metrics.token_sqnr_p5
    assert expected.peak is not None
    sequence, token, channel = row.peak.index if row.peak else ()
    assert (sequence * 12 + token, channel) == (
        PLACES[expected.peak.index[0]],
        expected.peak.index[1],
    )
    assert expected.worst_token is not None
    assert row.worst_token == divmod(int(PLACES[expected.worst_token[0]]), 12)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"sample_tokens": 6}, {"sample_tokens": 10}), ({}, {"sample_tokens": 6})],
    ids=["two samples", "whole and sample"],
)
def test_archives_of_which_one_holds_more_are_compared_where_both_hold_something(
    sides: Sides, one: dict[str, Any], other: dict[str, Any]
) -> None:
    alike = row_of(diff(*sides({"sample_tokens": 6})), "layer")
    row = row_of(diff(*sides(one, other)), "layer")

    assert row == alike


def test_equal_tensors_are_identical_whatever_is_stored_of_them(tmp_path: Path) -> None:
    shares: list[dict[str, Any]] = [
        {},
        {"sample_tokens": 6},
        {"sample_tokens": 7},
        {"stats_only": True},
    ]
    archives = [
        archive_of(Model(), tmp_path / f"{number}.st", **share)
        for number, share in enumerate(shares)
    ]

    for one in archives:
        for other in archives:
            comparison = diff(one, other)
            assert {row.status for row in comparison.rows} == {"identical"}
            assert comparison.portions == ()


def test_a_difference_outside_of_the_sample_leaves_a_row_that_is_not_identical(
    tmp_path: Path,
) -> None:
    outside = next(place for place in range(TOKENS) if place not in PLACES)
    reference = archive_of(Spoilt({}), tmp_path / "reference.st", sample_tokens=6)
    candidate = archive_of(Spoilt({outside: 1.0}), tmp_path / "candidate.st", sample_tokens=6)
    row = row_of(diff(reference, candidate), "")

    verdict = diff(reference, candidate).verdict.text

    assert (row.status, row.metrics.max_abs_error, row.sampled) == ("ok", 0.0, (6, TOKENS))
    assert "no difference between floating-point values in what was sampled" in verdict


def test_what_is_equal_where_sampled_is_never_called_identical(tmp_path: Path) -> None:
    outside = next(place for place in range(TOKENS) if place not in PLACES)
    reference = archive_of(Spoilt({}), tmp_path / "reference.st", sample_tokens=6)
    candidate = archive_of(Spoilt({outside: 1.0}), tmp_path / "candidate.st", sample_tokens=6)
    comparison = diff(reference, candidate, fail_on=("peir>0.1", "sqnr<20"), sort_by="sqnr")
    row = row_of(comparison, "")

    assert row.undefined["sqnr"] == row.undefined["token_sqnr_min"] == "equal where sampled"
    assert "identical" not in row.undefined.values()
    assert "not in the whole: its digests differ" in (row.reason or "")
    assert "identical" not in text_of(comparison).replace("0 identical", "")
    said = "held in 1 row (1 row equal in what was sampled only)"
    assert comparison.verdict.exit_code == 0
    assert comparison.verdict.text.count(said) == 2
    again = judge(comparison, baseline=comparison, max_regression="sqnr 1dB")
    assert said in again.verdict.text


def test_samples_that_are_equal_where_sampled_are_pooled_as_such(tmp_path: Path) -> None:
    outside = next(place for place in range(TOKENS) if place not in PLACES)
    archives = []
    for name, added in (("reference", {}), ("candidate", {outside: 1.0})):
        model = Spoilt(added)
        with record(model, tmp_path / f"{name}.st", sample_tokens=6) as recording:
            model(hidden())
            recording.next_sample()
            model(hidden() + 1)
        archives.append(tmp_path / f"{name}.st")
    comparison = diff(*archives, fail_on=("worst(sqnr)<20",))
    row = row_of(comparison, "")

    assert row.samples is not None
    assert row.undefined["sqnr"] == "equal where sampled"
    assert comparison.verdict.exit_code == 0
    assert "(1 row equal in what was sampled only)" in comparison.verdict.text


def test_a_nan_outside_of_the_sample_is_told_all_the_same(tmp_path: Path) -> None:
    outside = next(place for place in range(TOKENS) if place not in PLACES)
    reference = archive_of(Spoilt({}), tmp_path / "reference.st", sample_tokens=6)
    spoilt = Spoilt({outside: float("nan")})
    candidate = archive_of(spoilt, tmp_path / "candidate.st", sample_tokens=6)
    comparison = diff(reference, candidate, fail_on=("nonfinite",))
    row = row_of(comparison, "")

    assert row.status == "nonfinite"
    assert row.nonfinite is not None
    assert row.nonfinite.new_nan == 8
    assert comparison.verdict.exit_code == 1


def test_samples_of_another_shape_are_compared_vector_by_vector(tmp_path: Path) -> None:
    reference = archive_of(Adding(1.0), tmp_path / "reference.st", sample_tokens=6)
    flat = hidden().reshape(TOKENS, 8)
    candidate = archive_of(Adding(1.5), tmp_path / "candidate.st", flat, sample_tokens=6)
    row = row_of(diff(reference, candidate), "")

    assert row.status == "ok"
    assert row.layout == "reshape(2, 12, 8)"
    assert row.metrics.max_abs_error == pytest.approx(0.5)


def test_samples_of_unequal_numbers_of_vectors_have_other_shapes(tmp_path: Path) -> None:
    reference = archive_of(Adding(1.0), tmp_path / "reference.st", sample_tokens=6)
    candidate = archive_of(
        Adding(1.0), tmp_path / "candidate.st", hidden()[:, :-1], sample_tokens=6
    )

    assert row_of(diff(reference, candidate), "").status == "shape"


def test_reports_say_what_was_sampled(sides: Sides, tmp_path: Path) -> None:
    comparison = diff(*sides({"sample_tokens": 6}))
    report = json.loads(comparison_text(comparison, "1"))
    result = tmp_path / "result.json"
    result.write_text(comparison_text(comparison, "1"))

    assert "sampled: 6 of 24 tokens in 3 of 4 pairs" in text_of(comparison)
    assert {tuple(row.get("sampled", ())) for row in report["rows"]} == {(6, 24), ()}
    loaded = load_result(result)
    assert [row.sampled for row in loaded.rows] == [row.sampled for row in comparison.rows]
    assert list(loaded.portions) == report["portions"] == list(comparison.portions)


def test_a_sample_without_the_first_or_last_vector_is_refused(file: Path) -> None:
    with pytest.raises(UsageError, match="the first and the last are always stored"):
        record(Model(), file, sample_tokens=1)
    with pytest.raises(UsageError, match="stores no token"):
        record(Model(), file, sample_tokens=8, stats_only=True)


def test_a_sample_that_ended_early_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "broken.st"
    model = nn.Sequential(Model(), Raising(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        archive_of(model, file, sample_tokens=6)

    with Archive.open(tmp_path / "broken.st.partial") as partial:
        assert partial.array(output_of(partial, "0.layer")).shape == (6, 16)


def test_statistics_alone_are_those_of_the_whole_and_hold_no_element(tmp_path: Path) -> None:
    whole = archive_of(Model(), tmp_path / "whole.st")
    small = archive_of(Model(), tmp_path / "small.st", stats_only=True)
    leaf = output_of(small, "layer")
    portion = small.portion(leaf)

    assert portion is not None
    assert portion.statistics is not None
    assert portion.statistics["max"] == float(whole.array(leaf).max())
    assert not small.has_elements(leaf)
    assert "elements" not in small.manifest.contains
    stored = {entry.shape for entry in small.manifest.tensors}
    assert stored == {(2, 12, 8)}  # what the model is given


def test_without_elements_no_metric_is_to_be_had_and_none_is_made_up(sides: Sides) -> None:
    comparison = diff(*sides({"stats_only": True}))
    row = row_of(comparison, "layer")

    assert row.status == "opaque"
    assert set(row.undefined.values()) == {"statistics only", "floating point"}
    assert row.metrics.peir is None
    assert "mean " in (row.reason or "")
    assert comparison.coverage.not_comparable == 4
    assert "statistics only: 4 of 4 pairs differ" in text_of(comparison)
    assert "peir" in comparison.portions[0]
    assert "4 pairs without elements, how far apart is not known" in comparison.verdict.text
    assert "none of which can be compared, no elements were stored" in comparison.verdict.text


def test_a_verdict_does_not_call_equal_what_it_cannot_know(tmp_path: Path) -> None:
    shared = Spoilt({})
    reference = archive_of(
        nn.Sequential(shared, Spoilt({3: 1.0})), tmp_path / "reference.st", stats_only=True
    )
    candidate = archive_of(
        nn.Sequential(shared, Spoilt({3: 2.0})), tmp_path / "candidate.st", stats_only=True
    )
    comparison = diff(reference, candidate)

    assert [row.status for row in comparison.rows] == ["identical", "opaque", "opaque"]
    assert "no difference" not in comparison.verdict.text
    assert "ONLY 1 of 3 modules compared: of the others no elements" in comparison.verdict.text


@pytest.mark.parametrize("gate", ["peir>1000", "sqnr<-1000", "max_abs_error>1e30"])
def test_no_gate_holds_on_a_metric_that_is_not_to_be_had(sides: Sides, gate: str) -> None:
    comparison = diff(*sides({"stats_only": True}), fail_on=(gate,))
    (result,) = comparison.verdict.gates

    assert not result.ok
    assert result.failed == 4
    assert "statistics only" in (result.worst.reason if result.worst else "")  # type: ignore[operator]
    assert comparison.verdict.exit_code != 0


def test_a_result_without_elements_is_judged_again_as_strictly(
    sides: Sides, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    result.write_text(comparison_text(diff(*sides({"stats_only": True})), "1"))

    assert judge(load_result(result), fail_on=("peir>1000",)).verdict.exit_code != 0


def test_a_regression_gate_counts_what_is_not_to_be_had_and_holds_on_nothing_else(
    tmp_path: Path,
) -> None:
    def compared(**options: Any) -> Comparison:
        models = [nn.Sequential(nn.Identity(), Spoilt(added)) for added in ({}, {0: 1.0})]
        return diff(
            archive_of(models[0], tmp_path / "reference.st", **options),
            archive_of(models[1], tmp_path / "candidate.st", **options),
        )

    def judged(now: Comparison, earlier: Comparison) -> Verdict:
        return judge(now, baseline=earlier, max_regression="peir 1.2x").verdict

    small, whole = compared(stats_only=True), compared()
    for now in (small, whole):
        text = "held in 1 row (2 rows not judged: no figures to be had)"
        assert text in judged(now, small).text
    assert judged(small, whole).gates[0].failed == 2
    assert judged(whole, whole).gates[0].rows == 3


def test_structure_and_absent_nan_are_known_without_elements(sides: Sides) -> None:
    comparison = diff(*sides({"stats_only": True}), fail_on=("structure", "nonfinite"))

    assert [result.ok for result in comparison.verdict.gates] == [True, True]


def test_new_nan_are_told_by_their_counts(tmp_path: Path) -> None:
    reference = archive_of(Spoilt({}), tmp_path / "reference.st", stats_only=True)
    candidate = archive_of(Spoilt({3: float("nan")}), tmp_path / "candidate.st", stats_only=True)
    row = row_of(diff(reference, candidate), "")

    assert row.status == "nonfinite"
    assert row.nonfinite is not None
    assert row.nonfinite.new_nan == 8


def test_samples_without_elements_are_pooled_by_what_is_known(tmp_path: Path) -> None:
    nan = float("nan")
    files = [tmp_path / "reference.st", tmp_path / "candidate.st"]
    for file, added in zip(files, ({}, {3: nan}), strict=True):
        model = Spoilt({})
        with record(model, file, stats_only=True) as recording, torch.no_grad():
            model(hidden())
            recording.next_sample()
            model.added = added
            model(hidden() + 1.0)
    row = row_of(diff(*files), "")

    assert row.status == "nonfinite"
    assert row.metrics.peir is None
    assert row.samples is not None


def test_nan_that_may_have_moved_are_no_proof_of_none(tmp_path: Path) -> None:
    nan = float("nan")
    reference = archive_of(Spoilt({3: nan}), tmp_path / "reference.st", stats_only=True)
    candidate = archive_of(Spoilt({4: nan}), tmp_path / "candidate.st", stats_only=True)
    comparison = diff(reference, candidate, fail_on=("nonfinite",))
    (result,) = comparison.verdict.gates

    assert row_of(comparison, "").status == "opaque"
    assert not result.ok
    assert "cannot be told" in result.failures[0].reason  # type: ignore[operator]


def test_integers_of_unequal_digest_are_unequal(tmp_path: Path) -> None:
    reference = archive_of(Adding(1), tmp_path / "reference.st", torch.arange(8), stats_only=True)
    candidate = archive_of(Adding(2), tmp_path / "candidate.st", torch.arange(8), stats_only=True)
    row = row_of(diff(reference, candidate), "")

    assert row.status == "mismatch"
    assert row.undefined["mismatches"] == "statistics only"


def test_noise_is_not_known_where_what_came_in_has_no_elements(sides: Sides) -> None:
    reference, candidate = sides({}, {"stats_only": True})
    row = row_of(diff(reference, candidate), "norm")

    assert row.metrics.noise_in is None


def test_the_statistics_of_a_small_archive_are_shown(tmp_path: Path) -> None:
    archive_of(Model(), tmp_path / "stats.st", stats_only=True)
    archive_of(Model(), tmp_path / "sample.st", sample_tokens=6)
    shown = [
        CliRunner().invoke(app, ["show", str(tmp_path / name), "--stats", "--values", "layer"])
        for name in ("stats.st", "sample.st")
    ]

    assert [result.exit_code for result in shown] == [0, 0]
    assert "statistics only  mean" in shown[0].stdout
    assert "no elements" in shown[0].stdout
    assert "sampled: 6 of 24 tokens  mean" in shown[1].stdout


def test_a_call_in_json_says_how_much_of_a_tensor_its_elements_are(tmp_path: Path) -> None:
    archive_of(Model(), tmp_path / "sample.st", sample_tokens=6)
    arguments = ["show", str(tmp_path / "sample.st"), "layer", "--json", "--values", "layer"]
    (line,) = CliRunner().invoke(app, arguments).stdout.splitlines()
    output = json.loads(line)["output"]

    assert (output["sampled"], output["shape"]) == ([6, 24], [2, 12, 16])
    assert len(output["values"]) == 6


def test_a_killed_recording_of_samples_is_recovered_without_what_is_lost(tmp_path: Path) -> None:
    file, partial = tmp_path / "small.st", tmp_path / "small.st.partial"
    recording = record(Model(), file, sample_tokens=6)
    recording.__enter__()
    with torch.no_grad():
        recording._model(hidden())
    left = {name.name: name.read_bytes() for name in tmp_path.iterdir()}
    recording.__exit__(None, None, None)
    for name, content in left.items():
        (tmp_path / name).write_bytes(content)
    partial.write_bytes(left[partial.name][:-8])  # of the last tensor

    assert recover(partial).lost == 1
    with Archive.open(partial) as archive:
        assert archive.array(output_of(archive, "layer")).shape == (6, 16)
        assert isinstance(tree_of(archive, ""), OpaqueLeaf)
        assert {entry.stored for entry in archive.manifest.portions} <= {
            entry.digest for entry in archive.manifest.tensors
        }


def test_a_budget_is_kept_and_every_module_has_its_share(tmp_path: Path) -> None:
    given = hidden().repeat(1, 50, 1)
    file = tmp_path / "small.st"
    model = Model()
    whole = archive_of(model, tmp_path / "whole.st", given)
    budget = whole.size * 2 // 3
    small = archive_of(model, file, given, max_bytes=budget, rehearse=lambda: model(given))

    assert budget * 0.8 < file.stat().st_size <= budget
    assert [call.module for call in small.manifest.calls] == [
        call.module for call in whole.manifest.calls
    ]
    held = [small.array(output_of(small, module)).shape for module in ("layer", "norm", "")]
    assert len(set(held)) == 1
    assert held[0][0] > 2


def test_a_budget_with_room_for_everything_leaves_everything_whole(tmp_path: Path) -> None:
    model = Model()
    small = archive_of(
        model, tmp_path / "small.st", max_bytes="1MB", rehearse=lambda: model(hidden())
    )

    assert small.manifest.portions == ()


def test_of_a_budget_and_a_sample_the_smaller_wins(tmp_path: Path) -> None:
    model = Model()
    small = archive_of(
        model,
        tmp_path / "small.st",
        max_bytes="1MB",
        sample_tokens=4,
        rehearse=lambda: model(hidden()),
    )

    assert small.manifest.settings["sampling"]["tokens"] == 4


def test_a_budget_that_nothing_fits_names_the_least(tmp_path: Path) -> None:
    model = Model()
    for size in (1000, "1.5 KB"):
        with pytest.raises(UsageError, match=rf"{size}: .* take \d+ bytes; give as much"):
            archive_of(model, tmp_path / "a.st", max_bytes=size, rehearse=lambda: model(hidden()))

    assert list(tmp_path.iterdir()) == []


def test_the_least_that_is_named_is_enough(tmp_path: Path) -> None:
    model, file = Model(), tmp_path / "small.st"
    with pytest.raises(UsageError) as refused:
        archive_of(model, file, max_bytes=1000, rehearse=lambda: model(hidden()))
    least = int(str(refused.value).split(" take ")[1].split()[0]) + 100  # for other seconds
    archive_of(model, file, max_bytes=least, rehearse=lambda: model(hidden()))

    assert file.stat().st_size <= least


def test_a_budget_needs_a_first_forward(file: Path) -> None:
    with pytest.raises(UsageError, match="rehearse"), record(Model(), file, max_bytes=10**6):
        pass


def test_a_model_that_did_more_than_when_it_was_counted_is_told(tmp_path: Path) -> None:
    model = Model()
    longer = hidden().repeat(1, 100, 1)
    with pytest.raises(RecordingError, match="more than in the forward that counted"):
        archive_of(
            model,
            tmp_path / "small.st",
            longer,
            max_bytes=40_000,
            rehearse=lambda: model(hidden()),
        )


@pytest.mark.parametrize(
    ("text", "size"),
    [("200MB", 200_000_000), ("1.5GiB", 3 << 29), ("64k", 64_000), ("12", 12), ("3 KiB", 3072)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "1e6", "nan", "5 apples"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_a_replay_leaves_out_modules_of_whose_inputs_only_a_part_is_there(tmp_path: Path) -> None:
    archive_of(Model(), tmp_path / "small.st", sample_tokens=6)
    report = replay(noisy(), tmp_path / "small.st", tmp_path / "local.st")

    assert report.skipped == {"inputs.0 was not stored whole (sampled)": ("norm", "mean")}
    assert report.modules == 1  # its inputs are the model's own


def test_a_replay_can_be_small_as_well(tmp_path: Path) -> None:
    archive_of(Model(), tmp_path / "fp.st")
    replay(noisy(), tmp_path / "fp.st", tmp_path / "local.st", sample_tokens=6)
    row = row_of(diff(tmp_path / "fp.st", tmp_path / "local.st"), "layer")

    assert row.sampled == (6, TOKENS)


def test_a_replay_keeps_a_budget_too(tmp_path: Path) -> None:
    given = hidden().repeat(1, 50, 1)
    archive_of(Model(), tmp_path / "fp.st", given)
    whole = replay(noisy(), tmp_path / "fp.st", tmp_path / "whole.st")
    budget = whole.size * 3 // 4
    report = replay(noisy(), tmp_path / "fp.st", tmp_path / "local.st", max_bytes=budget)

    assert budget * 0.8 < report.size <= budget
    assert (report.calls, report.modules) == (whole.calls, whole.modules)


def test_the_command_line_takes_the_sampling_of_the_archive_that_it_follows(
    tmp_path: Path,
) -> None:
    fp, quant = str(tmp_path / "fp.st"), str(tmp_path / "quant.st")
    only = ["--include", "*.mlp*"]
    runner = CliRunner()
    first = runner.invoke(app, ["record", "--sample-tokens", "5", "-o", fp, *only])
    second = runner.invoke(app, ["record", "--like", fp, "-o", quant])

    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    with Archive.open(fp) as one, Archive.open(quant) as other:
        assert one.manifest.portions == other.manifest.portions != ()
        assert one.manifest.settings["sampling"] == other.manifest.settings["sampling"]


def test_a_dry_run_foretells_the_size_of_a_small_archive(tmp_path: Path) -> None:
    arguments = ["record", "--sample-tokens", "5", "-o", str(tmp_path / "fp.st")]
    runner = CliRunner()
    dry = runner.invoke(app, [*arguments, "--dry-run"])
    wet = runner.invoke(app, arguments)

    assert (dry.exit_code, wet.exit_code) == (0, 0)
    size = wet.output.split("fp.st ")[1].split(",")[0]
    assert size in dry.output


def test_parts_of_a_cache_are_not_put_together(tmp_path: Path) -> None:
    arguments = ["--generate", "2", "--caches", "--sample-tokens", "4", "--include", "lm_head"]
    file = tmp_path / "fp.st"
    result = CliRunner().invoke(
        app, ["record", *arguments, "--include", "model.language_model.layers.1", "-o", str(file)]
    )
    assert result.exit_code == 0, result.stderr

    with Archive.open(file) as archive:
        call = calls_of(archive, "model.language_model.layers.1")[0]
        with pytest.raises(UsageError, match=r"was not stored whole \(sampled\)"):
            cached_tensor(archive, call, "kwargs.past_key_values.layers.0.keys")


def test_ranks_of_which_parts_are_missing_are_not_joined(tmp_path: Path) -> None:
    archive_of(Model(), tmp_path / "fp.rank0-of-1.st", sample_tokens=6)

    with pytest.raises(UsageError, match="parts cannot be joined"):
        merge([tmp_path / "fp.rank0-of-1.st"])


FORGED = {
    "more vectors than there are": {"vectors": 10**12},
    "vectors of a huge tensor": {"shape": [2**50, 2**50, 16]},
    "one dimension": {"shape": [384]},
    "no vector": {"vectors": 0},
    "contents that are not there": {"stored": "0" * 32},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_sample_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "small.st"
    leaf = output_of(archive_of(Model(), file, sample_tokens=6), "layer")
    leaf = TensorLeaf(leaf.dtype, tuple(change.get("shape", leaf.shape)), leaf.digest)

    def forge(manifest: Any) -> None:
        for entry in manifest["portions"]:
            entry.update(change)

    with Archive.open(edit_manifest(file, forge)) as archive:
        for read in (archive.array, archive.places):
            with pytest.raises(DamagedArchiveError):
                read(leaf)


@pytest.mark.parametrize(
    "change",
    [{"portion": "half"}, {"stored": None}, {"vectors": -1}, {"shape": "all"}, {"digest": 5}],
    ids=str,
)
def test_a_portion_that_no_writer_writes_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "small.st"
    archive_of(Model(), file, sample_tokens=6).close()
    edit_manifest(file, lambda manifest: manifest["portions"][0].update(change))

    with pytest.raises(DamagedArchiveError):
        Archive.open(file)


@pytest.mark.parametrize(
    "statistics",
    [{"mean": "x"}, {"nan": -1}, {"zeros": 10**9}, {"max": [1]}],
    ids=str,
)
def test_statistics_that_no_writer_writes_are_damage(
    tmp_path: Path, statistics: dict[str, Any]
) -> None:
    whole = archive_of(noisy(), tmp_path / "whole.st")
    file = tmp_path / "small.st"
    archive_of(Model(), file, stats_only=True).close()

    def forge(manifest: Any) -> None:
        for entry in manifest["portions"]:
            entry["statistics"].update(statistics)

    with pytest.raises(DamagedArchiveError):
        diff(whole, edit_manifest(file, forge))


def test_mlp_in_place_is_sampled_as_it_was(tmp_path: Path) -> None:
    model = seeded(Mlp)
    given = torch.randn(30, 4, generator=torch.manual_seed(3))
    whole = archive_of(model, tmp_path / "whole.st", given)
    small = archive_of(model, tmp_path / "small.st", given, sample_tokens=6)
    places = sampled_places(30, 6)

    leaf = output_of(small, "up")  # which the next module overwrites
    assert np.array_equal(small.array(leaf), whole.array(leaf)[places])
