"""Heads of attention in projections, which have no axis of them: noted when a model is recorded,
and named where one of them has the error."""

import json
from collections import OrderedDict

import numpy as np
import pytest
import tiny_models
import torch
from small_archives import edit_manifest
from torch import nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.archive import Archive
from qvtrace.cli import app
from qvtrace.errors import ArchiveError
from qvtrace.metrics.details import compare_in_detail
from qvtrace.metrics.spreads import Axes, spread
from qvtrace.reports.html.data import page_data

WIDTH = 16  # channels of a head

# Of each family: a projection of queries (None: one with keys and values, in no order that is
# told), one of values, how many heads these have, and that of the heads' outputs.
ATTENTIONS = {
    "llama": ("model.layers.0.self_attn", "q_proj", "v_proj", 2, "o_proj"),
    "bert": ("bert.encoder.layer.0.attention", "self.query", "self.value", 4, "output.dense"),
    "t5": ("encoder.block.0.layer.0.SelfAttention", "q", "v", 4, "o"),
    "vit": ("vit.layers.0.attention", "q_proj", "v_proj", 4, "o_proj"),
    "whisper": ("model.encoder.layers.0.self_attn", "q_proj", "v_proj", 4, "out_proj"),
}
HEADS = 4  # of queries


def record(model, inputs, file, **options):
    with torch.no_grad(), qvtrace.record(model, file, **options):
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return file


def head_widths(file):
    with Archive.open(file) as archive:
        entries = archive.manifest.modules
    return {entry.name: entry.head_widths for entry in entries if entry.head_widths}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Archives of a family before and after some rows of a module's weight were changed, once."""
    folder = tmp_path_factory.mktemp("heads")

    def files(family, name, rows, transposed=False):
        pair = folder / f"{family}.st", folder / f"{family}.{name}.{rows.start}.st"
        model, inputs = tiny_models.build(family)
        if not pair[0].exists():
            record(model, inputs, pair[0])
        if not pair[1].exists():
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                (weight.T if transposed else weight)[rows] *= 1.5
            record(model, inputs, pair[1])
        return pair

    return files


def of_head(head):
    return slice(head * WIDTH, (head + 1) * WIDTH)


def run(*arguments):
    result = CliRunner().invoke(app, ["diff", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def explained(files, pattern):
    return {
        found["path"]: found
        for found in json.loads(run(*files, "--explain", pattern, "--format", "json"))[
            "explanations"
        ]
    }


def profiles(files, name, **options):
    """What the page draws of a module's row: by axis, the count and the shares."""
    page = page_data(qvtrace.diff(*files, details=True, **options), everything=True)
    rows = page["rows"]
    (row,) = (index for index, text in enumerate(rows["name"]) if text.startswith(name))
    found = page["details"][rows["details"][row]][3]
    return {axis: (count, shares) for axis, count, shares in found["profiles"]}, found["texts"]


@pytest.mark.parametrize("family", ATTENTIONS)
def test_a_head_of_queries_with_the_error_is_named(planted, family):
    attention, query, *_ = ATTENTIONS[family]
    name = f"{attention}.{query}"
    files = planted(family, name, of_head(3))

    heads = explained(files, name)["output"]["heads"]

    assert (heads["count"], heads["carrying"]) == (HEADS, 1)
    assert [part["index"] for part in heads["worst"]] == [[3]]
    assert heads["worst"][0]["share"] == pytest.approx(1.0)
    assert "by head: 1 of 4 heads carries 90 % of the error; worst head 3 (100 %" in run(
        *files, "--explain", name
    )


@pytest.mark.parametrize("family", ATTENTIONS)
def test_the_page_shows_the_head_with_the_error(planted, family):
    attention, query, *_ = ATTENTIONS[family]
    name = f"{attention}.{query}"

    drawn, texts = profiles(planted(family, name, of_head(3)), name)

    assert drawn["head"] == (HEADS, [0, 0, 0, 1000])
    assert list(drawn) == ["token", "head", "channel"]
    assert any("worst head 3" in text for text in texts)


@pytest.mark.parametrize("family", ATTENTIONS)
def test_the_input_of_the_projection_of_outputs_tells_the_heads_of_the_values(planted, family):
    attention, _, value, heads, output = ATTENTIONS[family]
    files = planted(family, f"{attention}.{value}", of_head(1))

    by_value = explained(files, f"{attention}.{value}")["output"]["heads"]
    given = explained(files, f"{attention}.{output}")

    assert by_value["count"] == heads
    assert [part["index"] for part in by_value["worst"]] == [[1]]
    shared = HEADS // heads  # heads of queries that have one of values together
    wrong = {head for head in range(HEADS) if head // shared == 1}
    assert given["inputs.0"]["heads"]["count"] == HEADS
    assert {part["index"][0] for part in given["inputs.0"]["heads"]["worst"]} == wrong
    assert given["output"]["heads"] is None


def test_inputs_on_the_page_have_heads_too(planted):
    attention, _, value, _, output = ATTENTIONS["bert"]
    files = planted("bert", f"{attention}.{value}", of_head(1))

    drawn, _ = profiles(files, f"{attention}.{output} inputs.0", path="inputs")

    assert drawn["head"] == (HEADS, [0, 1000, 0, 0])


def test_of_queries_keys_and_values_in_one_only_the_outputs_heads_are_known(planted):
    values = slice(2 * 64 + WIDTH, 2 * 64 + 2 * WIDTH)
    name = "transformer.h.0.attn"
    files = planted("gpt2", f"{name}.c_attn", values, transposed=True)

    assert explained(files, f"{name}.c_attn")["output"]["heads"] is None
    given = explained(files, f"{name}.c_proj")["inputs.0"]["heads"]
    assert (given["count"], [part["index"] for part in given["worst"]]) == (HEADS, [[1]])


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5", "vit"])
def test_nothing_but_projections_of_attention_has_heads(tmp_path, family):
    model, inputs = tiny_models.build(family)

    known = head_widths(record(model, inputs, tmp_path / "fp.st"))

    assert known
    assert {width for widths in known.values() for width in widths.values()} == {WIDTH}
    assert all(
        {"attention", "self_attn", "attn", "SelfAttention", "EncDecAttention"} & {*name.split(".")}
        for name in known
    )


def test_both_towers_of_a_vision_language_model_say_their_own_heads(tmp_path):
    model, inputs = tiny_models.build("qwen3_vl")

    known = head_widths(record(model, inputs, tmp_path / "fp.st"))

    assert known["model.visual.blocks.0.attn.proj"] == {"inputs": 16}
    assert "model.visual.blocks.0.attn.qkv" not in known
    assert known["model.language_model.layers.1.self_attn.k_proj"] == {"output": 32}


class Attention(nn.Module):
    """Says whatever it is told to say of its heads, and has queries of 32 channels."""

    def __init__(self, names=("q_proj", "o_proj"), **said):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(32, 32))
        vars(self).update(said)

    def forward(self, hidden):
        for child in self.children():
            hidden = child(hidden)
        return hidden


class Raising:
    @property
    def head_dim(self):
        raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("said", "width"),
    [
        ({"num_heads": 4}, 8),
        ({"num_heads": 4, "head_dim": 8}, 8),
        ({"n_heads": 2, "head_dim": 8}, None),  # of half a query: the other is a gate
        ({"num_heads": 3}, None),
        ({"num_heads": 4, "num_attention_heads": 8}, None),
        ({"num_heads": 4, "qk_head_dim": 8, "v_head_dim": 8}, 8),
        ({"num_heads": 4, "head_dim": "8"}, 8),  # which is no number
        ({"num_heads": True}, None),
        ({"head_dim": 8}, None),  # of how many nobody says
        ({}, None),
        ({"num_heads": 4, "config": Raising()}, 8),
    ],
)
def test_heads_are_known_only_where_all_that_is_said_of_them_agrees(tmp_path, said, width):
    model = nn.Sequential(Attention(**said)).eval()

    known = head_widths(record(model, torch.randn(1, 5, 32), tmp_path / "fp.st"))

    expected = (
        {} if width is None else {"0.q_proj": {"output": width}, "0.o_proj": {"inputs": width}}
    )
    assert known == expected


def test_names_alone_are_no_attention(tmp_path):
    model = Attention(("dense", "out_proj", "c_proj"), num_heads=4).eval()

    assert head_widths(record(model, torch.randn(1, 5, 32), tmp_path / "fp.st")) == {}


class Output(nn.Module):
    """The projection of the heads' outputs, as BERT has it beside its attention."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(32, 32)

    def forward(self, hidden):
        return self.dense(hidden)


def beside(attention):
    return nn.Sequential(OrderedDict(attention=attention, output=Output())).eval()


def test_a_projection_beside_attention_has_its_heads(tmp_path):
    model = beside(Attention(("query",), num_heads=4))

    known = head_widths(record(model, torch.randn(1, 5, 32), tmp_path / "fp.st"))

    assert known == {"attention.query": {"output": 8}, "output.dense": {"inputs": 8}}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scripted", ["attention", "all"])
def test_scripted_modules_and_what_is_no_module_tell_no_heads(tmp_path, scripted):
    inputs = torch.randn(1, 5, 32)
    model = beside(nn.Sequential(OrderedDict(query=nn.Linear(32, 32))))
    if scripted == "all":
        model = torch.jit.trace(model, inputs)
    else:
        model.attention = torch.jit.trace(model.attention, inputs)
        model.output._modules["query"] = 5
        model.output.num_heads = 4

    assert head_widths(record(model, inputs, tmp_path / "fp.st")) == {}


def test_tokens_of_a_sample_have_heads_too(tmp_path):
    model, inputs = Attention(num_heads=4).eval(), torch.randn(1, 40, 32)
    reference = record(model, inputs, tmp_path / "fp.st", sample_tokens=5)
    with torch.no_grad():
        model.q_proj.weight[8:16] *= 1.5
    files = reference, record(model, inputs, tmp_path / "quant.st", sample_tokens=5)

    heads = explained(files, "q_proj")["output"]["heads"]

    assert [part["index"] for part in heads["worst"]] == [[1]]
    drawn, _ = profiles(files, "q_proj")
    assert drawn["head"] == (4, [0, 1000, 0, 0])


def test_in_flight_the_page_has_heads_as_well(tmp_path):
    model, inputs = Attention(num_heads=4).eval(), torch.randn(1, 12, 32)
    reference = record(model, inputs, tmp_path / "fp.st")
    with torch.no_grad():
        model.q_proj.weight[8:16] *= 1.5

    with qvtrace.diff_in_flight(reference, model, details=True) as flight, torch.no_grad():
        model(inputs)

    row = next(row for row in flight.comparison.rows if row.module == "q_proj")
    assert [part.index for part in row.details.spread.heads.worst] == [(1,)]


def test_an_archive_that_does_not_know_heads_is_compared_without_them(planted, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    files = planted("llama", name, of_head(3))
    old = tmp_path / "old.st"
    old.write_bytes(files[0].read_bytes())

    def forget(manifest):
        for module in manifest["modules"]:
            module.pop("head_widths", None)

    edit_manifest(old, forget)

    assert explained((old, files[1]), name)["output"]["heads"] is None
    assert explained((files[0], old), name)["output"]["heads"] is not None


@pytest.mark.parametrize("widths", [{"output": 0}, {"output": -1}, {"output": "16"}, [16]])
def test_widths_that_are_none_are_refused(planted, tmp_path, widths):
    file = tmp_path / "odd.st"
    file.write_bytes(planted("llama", "lm_head", of_head(0))[0].read_bytes())

    def spoil(manifest):
        manifest["modules"][5]["head_widths"] = widths

    edit_manifest(file, spoil)

    with pytest.raises(ArchiveError):
        Archive.open(file)


def test_a_width_that_does_not_fit_the_tensor_tells_no_heads(planted, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    files = planted("llama", name, of_head(3))
    odd = tmp_path / "odd.st"
    odd.write_bytes(files[0].read_bytes())

    def widen(manifest):
        for module in manifest["modules"]:
            module["head_widths"] = {"output": 17}

    edit_manifest(odd, widen)

    assert explained((odd, files[1]), name)["output"]["heads"] is None


def test_heads_of_pairs_looked_at_together_are_sums_of_their_channels():
    generator = np.random.default_rng(0)
    pairs = []
    for number in range(6):
        reference, error = generator.standard_normal((2, 3, 9, 24)).astype(np.float32)
        error[..., 8 * (number % 3) :] *= 3
        axes = Axes(of_a_head=8 if number % 2 else None)
        pairs.append((reference, reference + np.float32(0.1) * error, axes, None))
    pairs[1][1][0, 0, 9] = np.nan

    found = [details.spread for _, details in compare_in_detail(pairs)]

    for (reference, candidate, axes, _), some in zip(pairs, found, strict=True):
        assert some == spread(reference, candidate, axes)
        if axes.of_a_head is None:
            assert some.heads is None
            continue
        squares = np.square(np.float64(candidate) - reference).reshape(-1, 3, 8)
        shares = np.nansum(squares, axis=(0, 2)) / np.nansum(squares)
        assert some.heads.profile == pytest.approx(shares.tolist())
    first = found[1].heads.worst[0]
    assert (first.index, first.nonfinite) == ((1,), 1)


def test_heads_that_are_an_axis_are_on_the_page_too(planted):
    attention = "model.layers.0.self_attn"
    files = planted("qwen3", f"{attention}.q_norm", slice(0, 4))
    planted_head = planted("qwen3", f"{attention}.q_proj", of_head(3))
    name = f"{attention}.q_norm"

    drawn, _ = profiles(files, name)

    count, shares = drawn["head"]
    assert (count, sum(shares)) == (HEADS, pytest.approx(1000, abs=HEADS))
    assert min(shares) > 100  # all heads have that norm
    given, _ = profiles(planted_head, f"{name} inputs.0", path="inputs")
    assert given["head"] == (HEADS, [0, 0, 0, 1000])


def with_a_bad_head(shape, axis, head):
    generator = np.random.default_rng(0)
    reference, error = generator.standard_normal((2, *shape)).astype(np.float32)
    candidate = reference.copy()
    np.moveaxis(candidate, axis, 0)[head] += np.moveaxis(error, axis, 0)[head]
    return reference, candidate


@pytest.mark.parametrize(("shape", "axis"), [((1, 512, 16, 128), 2), ((1, 16, 512, 128), 1)])
def test_details_of_a_large_tensor_are_of_all_heads(shape, axis):
    pair = with_a_bad_head(shape, axis, 3)

    ((_, details),) = compare_in_detail([(*pair, Axes(heads=axis), None)])

    assert details.spread.heads.count == 16
    assert [part.index for part in details.spread.heads.worst] == [(3,)]
    assert details.spread.heads.worst[0].nsr == pytest.approx(1.0, rel=0.01)
    assert {part.index[axis] for part in details.spread.tokens.worst} == {3}
