"""Rows rolled up by block and by kind of module."""

import csv
import json
import math
from importlib.util import find_spec
from io import StringIO

import pytest
import tiny_models
import torch
from command_lines import invoke
from torch import nn

import qvtrace
from qvtrace.comparison.options import DiffOptions
from qvtrace.errors import UsageError

LAYERS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of four layers, and one that is off in the third and, by far more, in its head."""
    folder = tmp_path_factory.mktemp("grouping")
    torch.manual_seed(0)
    config = tiny_models.transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = tiny_models.transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12).reshape(1, 12)
    written = folder / "fp.st", folder / "quant.st"
    for file in written:
        with torch.no_grad(), qvtrace.record(model, file):
            model(input_ids=ids, use_cache=False)
            model(input_ids=ids + 1, use_cache=False)
        for name, size in (("model.layers.2.mlp.up_proj", 0.02), ("lm_head", 0.2)):
            weight = model.get_submodule(name).weight.data
            weight += size * weight.std() * torch.randn_like(weight)
    return written


def grouped(files, by, **options):
    return qvtrace.diff(*files, group_by=by, **options)


def named(comparison):
    return {group.name: group for group in comparison.groups}


def test_blocks_are_the_numbered_layers_and_what_is_in_none(files):
    comparison = grouped(files, "block")

    names = [group.name for group in comparison.groups]
    assert names == [
        *("model.embed_tokens", "model.rotary_emb"),
        *(f"model.layers.{number}" for number in range(LAYERS)),
        *("model.norm", "model", "lm_head", "(root)"),
    ]
    assert sum(group.rows for group in comparison.groups) == len(comparison.rows)


def test_kinds_are_names_with_their_layers_collapsed(files):
    comparison = grouped(files, "kind")

    groups = named(comparison)
    assert "model.layers.(0-3).mlp.down_proj" in groups
    assert "model.layers.(0-3)" in groups
    assert "lm_head" in groups
    of_mlp = groups["model.layers.(0-3).mlp.up_proj"]
    assert (of_mlp.modules, of_mlp.rows) == (LAYERS, 2 * LAYERS)
    assert sum(group.rows for group in comparison.groups) == len(comparison.rows)


def test_layers_that_are_not_all_there_are_listed(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8)] * 1) for _ in range(6))

        def forward(self, hidden):
            for number in (0, 2, 3, 5):
                hidden = self.layers[number][0](hidden)
            return hidden

    with torch.no_grad(), qvtrace.record(model := Experts(), tmp_path / "fp.st"):
        model(torch.ones(2, 8))

    groups = named(grouped((tmp_path / "fp.st", tmp_path / "fp.st"), "kind"))

    assert set(groups) == {"(root)", "layers.(0,2-3,5).0"}


def test_the_largest_and_the_pooled_are_those_of_all_rows_together(files):
    group = named(grouped(files, "block"))["model.layers.2"]

    rows = [row for row in qvtrace.diff(*files).rows if row.module.startswith("model.layers.2")]
    worst = max(rows, key=lambda row: row.metrics.peir)
    assert group.metrics.peir == worst.metrics.peir
    assert group.worst == worst.place
    assert group.metrics.max_abs_error == max(row.metrics.max_abs_error for row in rows)
    with qvtrace.load(files[0]) as fp, qvtrace.load(files[1]) as quant:
        differing = [row for row in rows if row.status != "identical"]
        sides = [[tensor(archive, row) for row in differing] for archive in (fp, quant)]
    reference, candidate = (torch.cat(side) for side in sides)
    error = candidate - reference
    assert 0 < len(differing) < len(rows)
    assert group.metrics.sqnr == pytest.approx(
        10 * math.log10(reference.square().sum() / error.square().sum()), rel=1e-5
    )
    assert group.metrics.relative_l2 == pytest.approx(
        float(error.norm() / reference.norm()), rel=1e-5
    )
    assert group.metrics.cosine == pytest.approx(
        float(torch.dot(reference, candidate) / reference.norm() / candidate.norm()), rel=1e-6
    )
    equal = sum(math.prod(row.shape[0]) for row in rows if row.status == "identical")
    count = error.numel() + equal
    assert group.metrics.mean_abs_error == pytest.approx(float(error.abs().sum() / count), rel=1e-5)
    assert group.metrics.token_sqnr_p50 is None
    assert group.undefined["token_sqnr_p50"] == "percentiles cannot be pooled"


def tensor(archive, row):
    """The elements of a row, in float64."""
    for call in archive.manifest.calls:
        if (call.module, call.index) == (row.module, row.call):
            node = call.tree("output")
            for component in row.path.split(".")[1:]:
                node = dict(node.items)[component]
            return torch.from_numpy(archive.array(node).copy()).double().reshape(-1)
    raise LookupError(row.place)


def test_added_noise_is_summed_over_the_innermost_modules(files):
    groups = named(grouped(files, "block"))

    rows = [row for row in qvtrace.diff(*files).rows if row.module.startswith("model.layers.2.")]
    inner = [row for row in rows if not row.module.endswith((".mlp", ".self_attn"))]
    assert groups["model.layers.2"].metrics.added == pytest.approx(
        sum(row.metrics.added for row in inner)
    )
    assert groups["model.layers.2"].metrics.noise_out == max(
        row.metrics.noise_out for row in rows if row.metrics.noise_out is not None
    )


def test_local_noise_is_summed_too(files, tmp_path):
    model, inputs = tiny_models.build("llama")
    with torch.no_grad(), qvtrace.record(model, tmp_path / "fp.st"):
        model(**inputs)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 1.1
    with torch.no_grad(), qvtrace.record(model, tmp_path / "quant.st"):
        model(**inputs)
    qvtrace.replay(model, tmp_path / "fp.st", tmp_path / "local.st")
    archives = tmp_path / "fp.st", tmp_path / "quant.st"

    groups = named(grouped(archives, "kind", local=tmp_path / "local.st", sort_by="local_noise"))

    first = next(iter(groups.values()))
    assert first.name == "model.layers.(0-1).mlp.up_proj"
    assert first.metrics.local_noise == pytest.approx(2 * 0.1**2, rel=1e-4)


def test_groups_are_sorted_and_cut_as_rows_are(files):
    by_peir = [group.name for group in grouped(files, "block", sort_by="peir").groups]
    by_name = [group.name for group in grouped(files, "block", sort_by="name").groups]
    two = grouped(files, "block", top=2)
    by_sqnr = grouped(files, "block", sort_by="sqnr", top=3)

    assert set(by_peir[:2]) == {"lm_head", "(root)"}
    assert by_name == sorted(by_name)
    assert [group.name for group in two.groups] == ["lm_head", "(root)"]
    assert len(two.rows) == len(qvtrace.diff(*files).rows)
    assert two.complete
    values = [group.metrics.sqnr for group in by_sqnr.groups]
    assert values == sorted(values)


def test_identical_groups_are_the_best_and_say_why_they_have_no_number(files):
    groups = grouped(files, "block", sort_by="sqnr").groups

    best = [group for group in groups if group.metrics.sqnr is None]
    assert [group.name for group in groups[-len(best) :]] == [group.name for group in best]
    assert {group.undefined["sqnr"] for group in best} == {"identical"}
    assert "model.layers.0" in {group.name for group in best}
    assert all(group.worst is None and group.metrics.peir == 0 for group in best)


def test_an_undefined_peir_is_no_good_one(tmp_path):
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.value = value

        def forward(self, hidden):
            self.layers[0](hidden)
            return self.layers[1](hidden) * 0 + self.value

    torch.manual_seed(0)
    model = Constant(1.0)
    for file in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(model, tmp_path / file):
            model(torch.randn(2, 8))
        model.value = 2.0

    groups = grouped((tmp_path / "fp.st", tmp_path / "quant.st"), "block", sort_by="peir").groups

    assert groups[0].name == "(root)"
    assert groups[0].metrics.peir is None
    assert groups[0].undefined["peir"] == "constant reference"


def test_a_factor_that_is_made_up_for_makes_no_group_the_worst(tmp_path):
    class Folded(nn.Module):
        def __init__(self, factor):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
            self.layers[1].weight.data *= factor
            self.layers[1].bias.data *= factor
            self.layers[2].weight.data /= factor

        def forward(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 16, 32, generator=generator)
    for file, factor in (("fp.st", 1.0), ("quant.st", 3.0)):
        with torch.no_grad(), qvtrace.record(model := Folded(factor), tmp_path / file):
            model(hidden)

    groups = grouped((tmp_path / "fp.st", tmp_path / "quant.st"), "block", sort_by="peir").groups

    assert groups[-1].name == "layers.1"
    assert (groups[-1].made_up_for, groups[-1].worst) == (1, None)
    assert groups[-1].metrics.peir is None
    assert groups[-1].undefined["peir"] == "equal up to a factor"


def test_gates_are_judged_by_rows_whatever_is_rolled_up(files):
    gates = ["peir>0.01", "kl>1"]

    rolled = grouped(files, "block", top=1, fail_on=gates).verdict

    assert rolled == qvtrace.diff(*files, fail_on=gates).verdict
    assert rolled.exit_code == 1


def test_the_table_has_groups_in_place_of_rows(files):
    shown = invoke("diff", *files, "--group-by", "block", "--top", 3).stdout

    lines = [line.split() for line in shown.splitlines()]
    assert next(line for line in lines if line[:1] == ["rows"])[:3] == ["rows", "block", "PEIR"]
    assert any(line[1:2] == ["lm_head"] for line in lines)
    assert not any(line[1:2] == ["model.layers.2.mlp.up_proj"] for line in lines)
    assert any("rows in groups beyond --top" in line for line in shown.splitlines())
    assert "lists them" not in shown


def test_json_has_all_rows_and_the_groups(files):
    report = json.loads(invoke("diff", *files, "--group-by", "kind", "--format", "json").stdout)

    assert report["complete"] is True
    assert len(report["rows"]) == len(qvtrace.diff(*files).rows)
    group = next(group for group in report["groups"] if group["name"] == "lm_head")
    assert set(group) == {
        *("name", "modules", "rows", "compared", "nonfinite", "made_up_for"),
        *("metrics", "undefined", "worst"),
    }
    assert group["worst"]["module"] == "lm_head"
    assert group["metrics"]["peir"] > 0


def test_a_result_with_groups_is_judged_anew(files, tmp_path):
    result = tmp_path / "result.json"
    invoke("diff", *files, "--group-by", "block", "--top", 1, "--format", "json", "-o", result)

    judged = qvtrace.judge(qvtrace.load_result(result), fail_on=["peir>0.01"])

    assert judged.verdict.exit_code == 1
    assert judged.verdict.lines == qvtrace.diff(*files).verdict.lines


def test_csv_has_a_line_for_each_group(files):
    text = invoke("diff", *files, "--group-by", "kind", "--format", "csv").stdout

    lines = list(csv.DictReader(StringIO(text)))
    assert [line["name"] for line in lines] == [g.name for g in grouped(files, "kind").groups]
    head = next(line for line in lines if line["name"] == "lm_head")
    assert float(head["peir"]) > 0
    assert head["worst_module"] == "lm_head"


def test_markdown_has_a_table_of_groups(files):
    text = invoke("diff", *files, "--group-by", "kind", "--format", "markdown").stdout

    assert "| kind | rows | PEIR |" in text
    assert "| `model.layers.(0-3).mlp.up_proj` | 8 |" in text


@pytest.mark.skipif(
    None in (find_spec("bokeh"), find_spec("itables")), reason="needs pip install '.[html]'"
)
def test_the_page_has_a_table_of_groups(files, tmp_path):
    page = tmp_path / "report.html"
    invoke("diff", *files, "--group-by", "kind", "--format", "html", "-o", page)

    text = page.read_text()
    assert '<h2 id="groups-title">By kind</h2>' in text
    assert '<td class="name">model.layers.(0-3).mlp.up_proj</td><td>8</td>' in text


def test_what_is_no_grouping_is_refused():
    with pytest.raises(UsageError, match=r"^--group-by 'size': is not known; choose one of block"):
        DiffOptions(group_by="size")
