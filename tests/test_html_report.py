"""The HTML report as people use it: in a real browser, from disk."""

import os
import pty
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from small_archives import edit_manifest, write_small
from small_comparisons import compared, row
from torch import nn
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.comparison.rows import Place
from qvtrace.metrics.names import Metrics
from qvtrace.qparams.parameters import Parameters
from qvtrace.reports.html import comparison_page
from qvtrace.reports.html.data import json_in_html, page_data
from qvtrace.reports.html.layers import LayerPlace, layer_places

pytest.importorskip("bokeh")
pytest.importorskip("itables")

HOSTILE = "<img src=x onerror=alert(1)>"
SECRETS = "a quince in the attic", "a plum in the attic"
LAYERS = 3


# Where the charts have lines from side to side.
LINES = """Bokeh.documents.flatMap((document) => document.roots())
    .flatMap((plot) => plot.center).filter(({type}) => type === "Span").map((span) => span.location)
"""


class Block(nn.Module):
    """Two layers; its output is that of the last one."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, hidden):
        return self.down(self.up(hidden).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(16)
        self.register_module(HOSTILE, nn.Identity())

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden)
        return self.get_submodule(HOSTILE)(self.norm(hidden))


class Chain(nn.Module):
    """Many tiny modules, as a large model has."""

    def __init__(self, layers):
        super().__init__()
        linears = [nn.ModuleDict({k: nn.Linear(8, 8) for k in "qkvo"}) for _ in range(layers)]
        self.layers = nn.ModuleList(linears)

    def forward(self, hidden):
        for layer in self.layers:
            for linear in layer.values():
                hidden = torch.sin(3 * linear(hidden))
        return hidden


class Asked(nn.Module):
    """Is given a text beside its tensor."""

    def forward(self, hidden, prompt):
        return hidden * len(prompt)


def record_both(folder, model, inputs):
    """Archives of a model, and of the same with other weights but for those of its first layer."""
    files = folder / "fp.st", folder / "quant.st"
    for file in files:
        with torch.no_grad():
            with qvtrace.record(model, file):
                model(inputs)
            for parameter in list(model.parameters())[2:]:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return [str(file) for file in files]


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("html")
    return record_both(folder, Net().eval(), torch.randn(1, 40, 16))


@pytest.fixture(scope="session")
def report(archives, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    words = ["diff", *archives, "--format", "html", "-o", str(file)]
    assert CliRunner().invoke(app, words).exit_code == 0
    return file


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no chromium here: apt-get install chromium")
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("chromium does not start under a limit of address space (ulimit -v)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"],
        )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """Opens a file; what it asks of a network or complains of fails the test."""
    contexts, trouble = [], []

    def open_file(file, **settings):
        context = browser.new_context(viewport={"width": 1400, "height": 900}, **settings)
        contexts.append(context)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("console", lambda said: said.type in ("log", "info") or trouble.append(said.text))
        page.on("request", lambda asked: asked.url == file.as_uri() or trouble.append(asked.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture
def page(opened, report):
    return opened(report)


def names(page):
    """The names in the rows that are shown, from top to bottom."""
    return page.locator("#rows tbody td:nth-child(2) span").all_inner_texts()


def column(page, title):
    titles = page.locator("#rows thead th").all_inner_texts()
    position = [found.strip() for found in titles].index(title) + 1
    return page.locator(f"#rows tbody td:nth-child({position})").all_inner_texts()


def sort(page, title, order):
    """Click on a title, and wait for the order that this gives."""
    page.locator("#rows thead th", has_text=title).click()
    page.locator(f"#rows thead th[aria-sort={order}]", has_text=title).wait_for()


def count(page):
    return page.locator("#count").inner_text()


def drawn(page, place, how_many=1):
    """Wait until a place has its charts; whether something is drawn there."""
    page.wait_for_function(
        "([place, count]) => document.querySelectorAll(`${place} .bk-Figure`).length === count",
        arg=[place, how_many],
    )
    return True


def test_the_page_shows_the_head_the_charts_and_every_row(page, archives):
    head = page.locator("#head").inner_text()

    assert archives[0] in head
    assert "same inputs" in head
    assert "12 of 12 modules, 12 pairs: 1 identical" in head
    assert "PEIR" in page.locator("#verdict").inner_text()
    assert drawn(page, "#depth")
    assert drawn(page, "#heat")
    assert "blocks.1.up" in names(page)
    assert page.title().endswith("qvtrace")


def test_a_hostile_name_is_a_text_like_any_other(page):
    assert HOSTILE in " ".join(page.locator("#rows tbody td:nth-child(2)").all_inner_texts())
    assert page.locator("#rows img").count() == 0


def test_a_click_on_a_title_sorts_the_worst_first_and_then_last(page):
    sort(page, "PEIR", "descending")
    worst_first = column(page, "PEIR")
    sort(page, "PEIR", "ascending")

    assert worst_first == sorted(worst_first, key=float, reverse=True)
    assert column(page, "PEIR") == sorted(worst_first, key=float)


def test_the_worst_decibels_are_the_lowest(page):
    sort(page, "token p50", "descending")

    found = [text for text in column(page, "token p50") if "identical" not in text]
    decibels = [float(text.removesuffix(" dB")) for text in found]
    assert decibels == sorted(decibels)


def test_titles_sort_by_keyboard(page):
    page.locator("#rows thead th", has_text="module").locator("[tabindex='0']").focus()
    page.keyboard.press("Enter")
    page.locator("#rows thead th[aria-sort=ascending]", has_text="module").wait_for()

    assert names(page) == sorted(names(page))


def test_rows_are_filtered_by_name_kind_class_and_status(page):
    page.get_by_label("Name", exact=True).fill("BLOCKS.1")
    assert set(names(page)) == {"blocks.1.up", "blocks.1.down"}
    page.get_by_label("Kind", exact=True).select_option("up")
    assert names(page) == ["blocks.1.up"]
    page.get_by_label("Name", exact=True).fill("")
    assert names(page) == [f"blocks.{layer}.up" for layer in range(LAYERS)]
    page.get_by_label("Status", exact=True).select_option("identical")
    assert names(page) == ["blocks.0.up"]
    page.get_by_label("Status", exact=True).select_option("")
    page.get_by_label("Kind", exact=True).select_option("")
    page.get_by_label("Class", exact=True).select_option("LayerNorm")
    assert names(page) == ["norm"]


def test_a_threshold_marks_rows_and_filters_them(page):
    values = sorted({float(text) for text in column(page, "PEIR")})
    threshold = (values[-1] + values[-2]) / 2

    page.get_by_label("Threshold").fill(str(threshold))
    marked = page.locator("#rows tbody tr.beyond")
    worst = marked.locator("td:nth-child(2) span").all_inner_texts()
    page.get_by_label("only rows beyond it").check()

    assert len(worst) == 1
    assert names(page) == worst
    assert f"1 beyond PEIR {threshold}" in count(page)


def test_a_threshold_of_decibels_marks_what_is_below(page):
    page.get_by_label("Metric").select_option("token_sqnr_p50")
    page.get_by_label("Threshold").fill("1000")

    marked = page.locator("#rows tbody tr.beyond").count()
    identical = column(page, "status").count("identical")
    assert (marked, identical) == (len(names(page)) - identical, 1)


def test_a_gate_is_told_in_the_head_and_drawn_as_a_line(opened, archives, tmp_path):
    file = tmp_path / "report.html"
    words = ["--format", "html", "-o", str(file), "--fail-on", "peir>0.012"]
    assert CliRunner().invoke(app, ["diff", *archives, *words]).exit_code == 1
    page = opened(file)

    assert drawn(page, "#depth")
    assert page.evaluate(LINES) == [0.012]
    assert "FAILED peir>0.012:" in page.locator("#head").inner_text()
    assert page.get_by_label("Threshold").input_value() == "0.012"
    assert page.locator("#rows tbody tr.beyond").count() > 0


def test_a_click_on_a_row_shows_its_details(page):
    page.locator("#rows tbody tr", has_text="blocks.1.up").click()

    details = page.get_by_role("dialog")
    text = details.inner_text()
    assert details.get_by_role("heading").first.inner_text() == "blocks.1.up"
    assert re.search(r"peak\s+token \d+, channel \d+, at \[0, \d+, \d+\]: reference ", text)
    assert re.search(r"reference\s+1280\s+-", text)
    assert re.search(r"candidate\s+1280\s+-", text)
    assert "From 1280 elements, all." in text
    assert drawn(page, "#histograms", 2)
    details.get_by_role("button", name="Close").click()
    assert not details.is_visible()


def test_the_details_of_a_row_tell_where_its_error_is(page):
    page.locator("#rows tbody tr", has_text="blocks.1.up").click()

    details = page.get_by_role("dialog")
    assert re.search(
        r"by channel: \d+ of 32 channels carry 90 % of the error", details.inner_text()
    )
    by_token = details.get_by_role("img", name="Error by token: 40 tokens", exact=True)
    assert by_token.locator("i").count() == 40
    heights = by_token.locator("i").evaluate_all("bars => bars.map(bar => bar.offsetHeight)")
    assert max(heights) > 30


class Attention(nn.Module):
    """What is known of its heads is all that makes it attention."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q_proj = nn.Linear(16, 32)

    def forward(self, hidden):
        return self.q_proj(hidden)


def test_the_details_of_a_projection_show_its_heads(opened, tmp_path):
    torch.manual_seed(0)
    attention, inputs = Attention(), torch.randn(1, 40, 16)
    files = [str(tmp_path / "fp.st"), str(tmp_path / "quant.st")]
    for file, factor in zip(files, (1, 2), strict=True):
        with torch.no_grad():
            attention.q_proj.weight[8:16] *= factor
            with qvtrace.record(attention, file):
                attention(inputs)
    report = tmp_path / "report.html"
    CliRunner().invoke(app, ["diff", *files, "--format", "html", "-o", str(report)])
    page = opened(report)

    page.locator("#rows tbody tr", has_text="q_proj").click()

    details = page.get_by_role("dialog")
    assert "by head: 1 of 4 heads carries 90 % of the error; worst head 1" in details.inner_text()
    by_head = details.get_by_role("img", name="Error by head: 4 heads", exact=True)
    heights = by_head.locator("i").evaluate_all("bars => bars.map(bar => bar.offsetHeight)")
    assert heights[1] > 30
    assert [heights[0], *heights[2:]] == [0, 0, 0]


def test_rows_are_reached_opened_and_left_by_keyboard(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the table"
    page.locator("#rows tbody tr").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    name = dialog.get_by_role("heading").first.inner_text()
    page.keyboard.press("Escape")

    assert name == names(page)[1]
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.dataset.row") == "1"


def test_details_lead_to_those_of_the_next_row_in_the_order_shown(page):
    sort(page, "PEIR", "descending")
    page.locator("#rows tbody tr").first.click()

    page.get_by_role("button", name="Next", exact=True).click()

    shown = page.get_by_role("dialog").get_by_role("heading").first.inner_text()
    assert shown == names(page)[1]


def test_a_row_that_equals_an_earlier_one_is_folded_into_it(page):
    assert "blocks.1" not in names(page)
    assert "= blocks.1" in page.locator("#rows tbody tr", has_text="blocks.1.down").inner_text()

    page.get_by_label("fold").uncheck()

    assert "blocks.1" in names(page)


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_colours_are_those_of_the_system_or_what_is_chosen(opened, report, scheme, other):
    page = opened(report, color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    papers = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 28)"}

    assert page.evaluate(background) == papers[scheme]
    while page.locator("#theme").inner_text() != f"Colours: {other}":
        page.locator("#theme").click()
    assert page.evaluate(background) == papers[other]
    assert drawn(page, "#depth")


def test_a_thousand_modules_stay_below_five_megabytes_and_are_drawn(opened, tmp_path):
    torch.manual_seed(0)
    files = record_both(tmp_path, Chain(250).eval(), torch.randn(1, 32, 8))
    file = tmp_path / "report.html"

    words = ["diff", *files, "--format", "html", "-o", str(file), "--path", "all"]
    assert CliRunner().invoke(app, words).exit_code == 0

    assert file.stat().st_size < 5_000_000
    page = opened(file)
    assert count(page).endswith("2002 rows")
    assert drawn(page, "#heat")


def test_the_page_holds_no_prompt_and_no_element_that_is_not_at_a_peak(tmp_path):
    hidden = torch.linspace(-1, 1, 64).reshape(1, 4, 16)
    hidden[0, 1, 2] = 0.1234567
    model, files = Asked(), [tmp_path / "fp.st", tmp_path / "quant.st"]
    for index, file in enumerate(files):
        with qvtrace.record(model, file):
            model(hidden + 0.001 * index, prompt=SECRETS[index])

    text = comparison_page(qvtrace.diff(*files, path="all", details=True), "1.2.3")

    assert "kwargs.prompt" in text
    assert not [secret for secret in (*SECRETS, "attic", "0.12345", "0.12445") if secret in text]


def test_a_page_is_not_written_to_a_terminal(archives):
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "qvtrace", "diff", *archives, "--format", "html"]
    result = subprocess.run(words, stdout=slave, stderr=subprocess.PIPE, text=True, check=False)
    os.close(master)
    os.close(slave)

    assert result.returncode == 2
    assert (
        result.stderr == "qvtrace: --format html: is no text for a terminal; name a file with -o\n"
    )


def test_layers_and_kinds_are_read_from_names():
    places = layer_places(["", "model.layers.0", "model.layers.11.mlp.up", "model.norm"])

    assert places == {
        "": LayerPlace("(root)"),
        "model.layers.0": LayerPlace("(layer)", 0),
        "model.layers.11.mlp.up": LayerPlace("mlp.up", 11),
        "model.norm": LayerPlace("model.norm"),
    }


def test_kinds_of_several_stacks_are_told_apart():
    names = ["model.text.layers.0.mlp", "model.vision.blocks.0.mlp", "model.vision.blocks.1"]

    kinds = [place.kind for place in layer_places(names).values()]

    assert kinds == ["text.layers.*.mlp", "vision.blocks.*.mlp", "vision.blocks.*"]


def test_data_in_a_page_ends_no_script():
    assert json_in_html({"a": "</script><!--&"}) == (
        '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026"}'
    )


def test_an_undefined_metric_carries_its_reason_and_its_rank():
    undefined = {"peir": "constant reference", "sqnr": "identical", "mismatches": "floating point"}
    metrics = Metrics(max_abs_error=0.5)
    data = page_data(compared(row(metrics=metrics, undefined=undefined)), everything=False)

    assert data["rows"]["peir"] == [None]
    assert data["rows"]["undefined"]["of"] == [
        (
            ("peir", "constant reference", 1),
            ("sqnr", "identical", -1),
            ("mismatches", "floating point", -2),
        )
    ]


def test_rows_without_details_and_folded_beyond_top_are_drawn_all_the_same():
    lonely = row("b", 1, same_as=Place("a", 0, "output"))
    data = page_data(compared(lonely), everything=True)

    assert (data["rows"]["details"], data["rows"]["same_as"], data["fold"]) == (
        [None],
        [None],
        False,
    )


def test_quantization_parameters_of_both_sides_are_among_the_details(tmp_path):
    quantized = Parameters("weight", "Int8Tensor", dtype="int8", scheme="symmetric")
    files = [write_small(tmp_path / name) for name in ("fp.st", "quant.st")]
    edit_manifest(files[1], lambda it: it["modules"][1].update(quantization=quantized.to_json()))

    comparison = qvtrace.diff(*files, details=True)

    assert comparison.quantization["layer"] == ((), (quantized,))
    found = page_data(comparison, everything=False)["rows"]["quantization"]["of"]
    assert "candidate: weight Int8Tensor int8 symmetric" in found


def test_a_page_without_rows_opens(opened, tmp_path):
    file = tmp_path / "empty.html"
    file.write_text(comparison_page(compared(), "1.2.3"), encoding="utf-8")

    assert count(opened(file)) == "0 of 0 rows"


def test_values_that_are_set_by_alignment_are_among_the_details(opened, tmp_path):
    changes = {"layout": "transposed (1, 0)", "scale_factor": 0.25, "residual_peir": 1e-7}
    file = tmp_path / "factor.html"
    file.write_text(comparison_page(compared(row("fc", **changes)), "1.2.3"), encoding="utf-8")
    page = opened(file)

    page.locator("#rows tbody tr").first.click()

    text = page.get_by_role("dialog").inner_text()
    for wanted in ("transposed (1, 0)", r"scale factor\s+0.25", r"residual PEIR\s+1.00e-7"):
        assert re.search(wanted.replace("(1, 0)", r"\(1, 0\)"), text)
