"""Where in the tensors of a module its error is: by token, by channel and by head."""

import html
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.errors import UsageError
from qvtrace.metrics.blocks import BLOCK
from qvtrace.metrics.details import compare_in_detail
from qvtrace.metrics.spreads import BINS, SMALL, WORST, Axes, spread

LOUD = 11  # the channel of the input that stands out
OFF = 5  # the channel of the output that is wrong


class Projected(nn.Module):
    """A linear module whose input has one channel that is many times the others."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(32, 32)
        self.down_proj = nn.Linear(32, 24)

    def forward(self, hidden):
        return self.down_proj(self.scale(hidden))


def record(model, file, *inputs, **options):
    with torch.no_grad(), qvtrace.record(model, file, **options):
        model(*inputs)
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    torch.manual_seed(0)
    model, inputs = Projected().eval(), torch.randn(1, 40, 32)
    with torch.no_grad():
        model.scale.weight[LOUD] *= 43
        model.scale.bias[LOUD] *= 43
    reference = record(model, folder / "fp.st", inputs)
    with torch.no_grad():
        model.down_proj.weight[OFF] *= 1.5
    return reference, record(model, folder / "quant.st", inputs)


def explained(files, pattern="down_proj", **options):
    comparison = qvtrace.diff(*files, explain=pattern, **options)
    return {found.place.path: found.spread for found in comparison.explanations}


def spread_in_detail(reference, candidate, axis=-1, kept=None):
    ((_, details),) = compare_in_detail([(reference, candidate, Axes(axis), kept)])
    return details.spread


def assert_alike(found, expected):
    for axis in ("tokens", "channels"):
        one, other = getattr(found, axis), getattr(expected, axis)
        assert [part.index for part in one.worst] == [part.index for part in other.worst]
        for part, like in zip(one.worst, other.worst, strict=True):
            assert (part.share, part.nsr) == pytest.approx((like.share, like.nsr))
        assert (one.count, one.carrying) == (other.count, other.carrying)
        assert one.profile == pytest.approx(other.profile)
    assert [outlier.channel for outlier in found.outliers] == [
        outlier.channel for outlier in expected.outliers
    ]
    for outlier, like in zip(found.outliers, expected.outliers, strict=True):
        assert (outlier.times_peak, outlier.times_rms) == pytest.approx(
            (like.times_peak, like.times_rms)
        )
    assert (found.left_out, found.padding) == (expected.left_out, expected.padding)


def run(*arguments):
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def arrays(shape=(2, 10, 16), seed=0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=shape).astype(np.float32) for _ in range(2))


def test_the_channel_with_the_error_is_named_with_its_share(files):
    channels = explained(files)["output"].channels

    assert channels.worst[0].index == (OFF,)
    assert channels.worst[0].share == pytest.approx(1.0)
    assert channels.worst[0].nsr == pytest.approx(0.25, rel=0.2)  # but for the bias
    assert (channels.carrying, channels.count, channels.is_concentrated) == (1, 24, True)


def test_an_outlier_channel_of_the_input_is_named_though_the_input_agrees(files):
    found = explained(files)["inputs.0"]

    assert found.is_exact
    assert [outlier.channel for outlier in found.outliers] == [LOUD]
    assert 20 < found.outliers[0].times < 90


def test_the_table_says_it_in_words_at_eighty_columns(files):
    result = run(*files, "--explain", "*proj")

    assert result.exit_code == 0
    assert f"channel {LOUD} of down_proj's input: " in result.stdout
    assert "times the median channel" in result.stdout
    assert "1 of 24 channels carries 90 % of the error" in result.stdout


def test_json_has_explanations_only_where_they_are_asked_for(files):
    assert "explanations" not in json.loads(run(*files, "--format", "json").stdout)
    report = json.loads(run(*files, "--format", "json", "--explain", "down_proj").stdout)

    given, gives = report["explanations"]
    assert (given["path"], gives["path"]) == ("inputs.0", "output")
    assert gives["channels"]["worst"][0]["index"] == [OFF]
    assert given["outliers"][0]["channel"] == LOUD


def test_markdown_and_the_page_show_explanations_of_inputs_too(files):
    pytest.importorskip("jinja2")
    words = f"channel {LOUD} of down_proj's input: "
    for told in ("markdown", "html"):
        assert words.replace("'", "&#39;") not in run(*files, "--format", told).stdout
        result = run(*files, "--format", told, "--explain", "*proj")

        assert result.exit_code == 0
        text = html.unescape(result.stdout).replace("\\_", "_")
        assert words in text
        assert "1 of 24 channels carries 90 % of the error" in text
        assert "Where the error is" in text


@pytest.mark.parametrize("told", ["csv", "junit"])
def test_a_format_without_a_place_for_explanations_refuses_them_in_a_line(files, tmp_path, told):
    file = tmp_path / "report"
    result = run(*files, "--format", told, "--explain", "down_proj", "-o", file)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"qvtrace: --explain: --format {told} has no place for it; ")
    assert result.stderr.count("\n") == 1
    assert not file.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--group-by", "kind"], *(["--format", told] for told in ("csv", "markdown", "junit"))],
    ids=" ".join,
)
def test_elements_without_a_place_in_the_report_are_refused_in_a_line(files, arguments):
    result = run(*files, "--values", "down_proj", *arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("qvtrace: --values: ")
    assert result.stderr.count("\n") == 1


def test_json_has_elements_beside_groups(files):
    words = ["--values", "down_proj", "--group-by", "kind", "--format", "json"]
    report = json.loads(run(*files, *words).stdout)

    assert report["groups"]
    assert any(row.get("difference") for row in report["rows"])


def test_a_result_with_explanations_is_judged_like_any_other(files, tmp_path):
    file = tmp_path / "result.json"
    run(*files, "--format", "json", "--explain", "down_proj", "-o", file)

    words = ["gate", str(file), "--fail-on", "peir>9"]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_inputs_are_left_out_where_the_path_is_another(files):
    assert list(explained(files, path="kwargs")) == []
    assert list(explained(files, path="inputs")) == ["inputs.0"]


def test_a_pattern_that_fits_nothing_is_refused(files):
    result = run(*files, "--explain", "up_proj")

    assert result.exit_code == 2
    assert result.stderr.startswith("qvtrace: --explain 'up_proj': matches none of")


def test_in_flight_nothing_is_explained(files):
    with pytest.raises(UsageError, match="--explain: looks at tensors twice"):
        qvtrace.diff_in_flight(files[0], Projected(), explain="down_proj")


def test_tokens_of_a_sample_stand_at_their_places_in_the_whole(files, tmp_path):
    torch.manual_seed(0)
    model, inputs = Projected().eval(), torch.randn(1, 40, 32)
    reference = record(model, tmp_path / "fp.st", inputs, sample_tokens=5)
    inputs = inputs.clone()
    inputs[0, 39] += 1
    candidate = record(model, tmp_path / "quant.st", inputs, sample_tokens=5)

    tokens = explained((reference, candidate))["output"].tokens

    assert tokens.count == 5
    assert explained((reference, candidate))["output"].sampled == (5, 40)
    assert tokens.worst[0].index == (0, 39)
    assert len(tokens.worst) == 1


def test_without_elements_it_is_said_why_nothing_is_told(tmp_path):
    model, inputs = Projected().eval(), torch.randn(1, 40, 32)
    files = [
        record(model, tmp_path / name, inputs * factor, stats_only=True)
        for name, factor in (("fp.st", 1), ("quant.st", 2))
    ]

    result = run(*files, "--explain", "down_proj")

    assert "not to be had: statistics only" in result.stdout


def test_channels_of_a_convolution_are_its_second_axis(tmp_path):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Conv2d(3, 9, 3)).eval(), torch.randn(2, 3, 8, 8)
    reference = record(model, tmp_path / "fp.st", inputs)
    with torch.no_grad():
        model[0].weight[OFF] += 1
    candidate = record(model, tmp_path / "quant.st", inputs)

    found = explained((reference, candidate), "0")["output"]

    assert (found.channels.count, found.tokens.count) == (9, 2 * 6 * 6)
    assert [part.index for part in found.channels.worst] == [(OFF,)]


class Heads(nn.Module):
    """Splits what it is given into heads, as attention does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, hidden):
        return self.norm(hidden.reshape(1, 12, 4, 16).transpose(1, 2))


def test_heads_are_told_apart_where_the_number_of_tokens_is_known(tmp_path):
    torch.manual_seed(0)
    model, inputs = Heads().eval(), torch.randn(1, 12, 64)
    reference = record(model, tmp_path / "fp.st", inputs)
    inputs = inputs.clone()
    inputs[..., 32:48] *= torch.randn(16)
    candidate = record(model, tmp_path / "quant.st", inputs)

    heads = explained((reference, candidate), "norm")["output"].heads

    assert heads.count == 4
    assert [part.index for part in heads.worst] == [(2,)]
    assert (
        "by head: 1 of 4 heads carries 90 %"
        in run(reference, candidate, "--explain", "norm").stdout
    )


def test_sums_are_those_of_a_float64_computation():
    reference, candidate = arrays()
    found = spread(reference, candidate)

    error = (reference.astype(np.float64) - candidate) ** 2
    by_channel = error.sum(axis=(0, 1)) / error.sum()
    assert len(found.channels.worst) == WORST
    for part in found.channels.worst:
        assert part.share == pytest.approx(by_channel[part.index[0]])
    worst = np.unravel_index(error.sum(axis=2).argmax(), (2, 10))
    assert found.tokens.worst[0].index == tuple(worst)
    assert found.channels.profile == pytest.approx(by_channel.tolist())
    ordered = np.sort(by_channel)[::-1].cumsum()
    assert found.channels.carrying == int((ordered < 0.9).sum()) + 1


@pytest.mark.parametrize("shape", [(3, BLOCK + 5), (BLOCK // 8 + 3, 16)], ids=["long", "many"])
def test_what_is_larger_than_a_block_is_summed_as_a_whole(shape):
    reference = np.ones(shape, dtype=np.float32)
    candidate = reference.copy()
    candidate[2, -1] += 1

    found = spread(reference, candidate)

    assert [part.index for part in found.tokens.worst] == [(2,)]
    assert [part.index for part in found.channels.worst] == [(shape[-1] - 1,)]
    assert len(found.channels.profile) == min(BINS, shape[-1])


def test_a_channel_that_is_not_finite_on_one_side_comes_first():
    reference, candidate = arrays()
    candidate[..., 3] = np.nan
    candidate[..., 7] += 100

    found = spread(reference, candidate)

    assert found.channels.worst[0].index == (3,)
    assert (found.channels.worst[0].nonfinite, found.left_out) == (20, 20)
    assert found.channels.worst[1].index == (7,)


def test_masks_and_infinities_of_both_sides_are_left_out():
    reference, candidate = arrays()
    reference[0, 0, 0] = np.finfo(np.float32).min
    candidate[0, 0, 0] = -1
    for side in (reference, candidate):
        side[0, 1, 1] = -np.inf

    found = spread(reference, candidate)

    assert found.left_out == 2
    assert all(part.nonfinite == 0 for part in found.channels.worst)


def test_a_reference_of_zeros_has_an_error_and_no_ratio():
    zeros = np.zeros((4, 8), dtype=np.float32)

    found = spread(zeros, zeros + 1)

    assert {part.nsr for part in found.channels.worst} == {None}
    assert found.outliers == ()


def one_bad_element(shape, dtype=np.float32):
    """In one token of one channel all of an error that is worth a word, and one outlier channel."""
    generator = np.random.default_rng(0)
    reference = generator.standard_normal(shape)
    reference[..., 77] *= 40
    candidate = reference + 1e-3 * generator.standard_normal(shape)
    candidate[0, 1003, 17] += 50
    return reference.astype(dtype), candidate.astype(dtype)


def test_details_name_the_worst_token_and_channel_of_all_tokens():
    found = spread_in_detail(*one_bad_element((1, 1500, 128)))

    assert found.tokens.worst[0].index == (0, 1003)
    assert (found.tokens.carrying, found.tokens.count) == (1, 1500)
    assert found.channels.worst[0].index == (17,)
    assert (found.channels.carrying, found.channels.count) == (1, 128)
    assert found.sampled is None


def test_the_page_says_of_a_large_tensor_what_explain_says(tmp_path):
    pytest.importorskip("jinja2")
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(128, 128)).eval(), torch.randn(1, 1500, 128)
    reference = record(model, tmp_path / "fp.st", inputs)
    inputs[0, 1003, 17] += 50
    candidate = record(model, tmp_path / "quant.st", inputs)

    ((row, explained_row),) = zip(
        qvtrace.diff(reference, candidate, details=True).rows[-1:],
        qvtrace.diff(reference, candidate, explain="0").explanations[-1:],
        strict=True,
    )

    assert_alike(row.details.spread, explained_row.spread)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "float64", ml_dtypes.bfloat16, "complex64"]
)
@pytest.mark.parametrize(
    "shape", [(3, 300, 128), (2, 40, 1000), (1, 3, BLOCK + 7), (50, 600, 3)], ids=str
)
def test_details_have_the_sums_of_all_elements(shape, dtype, axis):
    generator = np.random.default_rng(0)
    reference, error = generator.standard_normal((2, *shape)).astype(dtype)
    reference[..., 1] *= np.array(30, dtype)
    candidate = reference + error * np.array(0.1, dtype)

    assert_alike(
        spread_in_detail(reference, candidate, axis), spread(reference, candidate, Axes(axis))
    )
    reference[0, 1, 2] = np.nan
    candidate[0, 2] = np.inf
    assert_alike(
        spread_in_detail(reference, candidate, axis), spread(reference, candidate, Axes(axis))
    )


@pytest.mark.parametrize("tokens", [40, 4000])
def test_only_tokens_that_are_kept_count(tokens):
    generator = np.random.default_rng(0)
    reference, error = generator.standard_normal((2, 2, tokens, 64)).astype(np.float32)
    error[1, 5:] *= 100
    kept = np.ones((2, tokens), dtype=bool)
    kept[1, 5:] = False
    candidate = reference + error

    found = spread_in_detail(reference, candidate, kept=kept.reshape(-1))

    assert_alike(found, spread(reference, candidate, kept=kept.reshape(-1)))
    assert (found.tokens.count, found.padding) == (tokens + 5, tokens - 5)
    assert {part.index[0] for part in found.tokens.worst if part.index[1] >= 5} == {0}
    flat = np.flatnonzero(kept)
    squares = np.square(np.float64(candidate) - reference).reshape(-1, 64)[flat]
    worst = np.unravel_index(flat[squares.sum(axis=1).argmax()], (2, tokens))
    assert found.tokens.worst[0].index == tuple(worst)
    by_channel = squares.sum(axis=0)
    assert found.channels.worst[0].share == pytest.approx(by_channel.max() / by_channel.sum())


def test_errors_too_small_to_be_squared_in_float32_are_still_placed():
    reference = np.ones((1500, 128), dtype=np.float32) * np.float32(1e-10)
    candidate = reference.copy()
    candidate[1003, 17] += np.float32(1e-16)

    found = spread_in_detail(reference, candidate)

    assert found.channels.worst[0].index == (17,)
    assert_alike(found, spread(reference, candidate))


def test_a_small_tensor_has_the_sums_that_it_has_alone():
    reference = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)

    found = spread_in_detail(reference, reference + np.float32(0.1))

    assert reference.size < SMALL
    assert found == spread(reference, reference + np.float32(0.1))


class Padded(nn.Module):
    """Embeds ids, and is told by a mask which of them are padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.out = nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        return self.out(self.embed(input_ids))


def test_padding_is_left_out_of_explanations_and_details_as_it_is_of_rows(tmp_path):
    torch.manual_seed(0)
    model = Padded().eval()
    ids, mask = torch.arange(32).reshape(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[1, 6:] = 0
    reference = record(model, tmp_path / "fp.st", ids, mask)
    with torch.no_grad():
        model.embed.weight += 0.01 * torch.randn(50, 16)
        model.embed.weight[22:32] += 5  # of padding
    candidate = record(model, tmp_path / "quant.st", ids, mask)

    comparison = qvtrace.diff(reference, candidate, explain="out", details=True)

    (row,) = (row for row in comparison.rows if row.module == "out")
    (given, gives) = (found.spread for found in comparison.explanations if found.spread.tokens)
    assert row.padding_tokens == 10
    for found in (given, gives, row.details.spread):
        assert (found.padding, found.tokens.count) == (10, 22)
        assert not [part for part in found.tokens.worst if part.index >= (1, 6)]
    told = run(reference, candidate, "--explain", "out").stdout
    assert told.count("    10 tokens of padding left out\n") == 2


def test_pairs_of_one_shape_have_the_spreads_that_each_has_alone():
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(20):
        reference, error = generator.standard_normal((2, 64, 256)).astype(np.float32)
        error[number] *= 100
        pairs.append((reference, reference + np.float32(0.01) * error, Axes(), None))
    pairs[3][1][5, 7] = np.nan
    pairs[4][0][5, 9] = np.finfo(np.float32).min
    pairs.insert(6, (np.float16(pairs[0][0]), pairs[0][1], Axes(), None))

    together = [details for _, details in compare_in_detail(pairs)]

    alone = [compare_in_detail([pair])[0][1] for pair in pairs]
    for found, expected in zip(together, alone, strict=True):
        assert found.histograms == expected.histograms
        assert_alike(found.spread, expected.spread)


def test_integers_and_empty_tensors_have_no_spread():
    assert spread(np.ones((2, 8), dtype=np.int64), np.ones((2, 8), dtype=np.int64)) is None
    assert spread(np.ones((0, 8)), np.ones((0, 8))) is None
    assert spread(np.float32(1.0) * np.ones(()), np.ones(())) is None


def test_complex_numbers_count_by_their_magnitude():
    reference = np.full((4, 8), 3 + 4j, dtype=np.complex64)

    found = spread(reference, reference * np.float32(2))

    assert found.channels.worst[0].nsr == pytest.approx(1.0)


def test_each_sample_is_explained_where_their_rows_are_pooled(tmp_path):
    torch.manual_seed(0)
    model = Projected().eval()
    samples = [torch.randn(1, 12, 32) for _ in range(2)]
    files = []
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(model, tmp_path / name) as recording:
            for sample in samples:
                model(sample)
                recording.next_sample()
        files.append(tmp_path / name)
        with torch.no_grad():
            model.down_proj.weight[OFF] *= 1.5

    comparison = qvtrace.diff(*files, explain="down_proj")

    outputs = [found for found in comparison.explanations if found.place.path == "output"]
    assert len(outputs) == 2
    assert {found.spread.channels.worst[0].index for found in outputs} == {(OFF,)}


def test_details_tell_the_channels_of_a_convolution_and_the_places_of_a_sample(tmp_path):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Conv2d(3, 9, 3)).eval(), torch.randn(2, 3, 8, 8)
    for tokens in (None, 5):
        files = tmp_path / f"fp{tokens}.st", tmp_path / f"quant{tokens}.st"
        for file, factor in zip(files, (1, 2), strict=True):
            record(model, file, inputs * factor, sample_tokens=tokens)

    whole = qvtrace.diff(tmp_path / "fpNone.st", tmp_path / "quantNone.st", details=True)
    sampled = qvtrace.diff(tmp_path / "fp5.st", tmp_path / "quant5.st", details=True)

    assert whole.rows[0].details.spread.channels.count == 9
    assert sampled.rows[0].details.spread.channels.count == 6  # the last axis: vectors are stored
    assert {len(part.index) for part in sampled.rows[0].details.spread.tokens.worst} == {3}
