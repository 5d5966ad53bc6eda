"""What `--private` keeps out of archives and reports, and what it leaves to be told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import invoke
from recordings import Raising, Returning, calls_of, tree_of
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.comparison.diffing import diff
from qvtrace.privacy import KEY_VARIABLE, Privacy, load_privacy
from qvtrace.recording.recorder import record
from qvtrace.reports.html import comparison_page
from qvtrace.reports.json import comparison_text
from qvtrace.trees import Container, OpaqueLeaf, TensorLeaf, leaves

PROMPT = "The zebrafish is our secret"
TOKEN = "hf_abcdefghijklmnop12345678"
FORMATS = ("table", "json", "csv", "markdown", "junit")
IDS = torch.tensor([[731, 12, 905, 44, 731, 260]])


class Answering(nn.Module):
    """Takes ids, a mask and a text, hands the text down, and returns ids as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(1000, 16)
        self.through = Returning()
        self.layer = Conditioned()

    def forward(self, ids: Tensor, picture: Tensor, text: str, number: int = 7) -> Any:
        picture = self.through(picture)
        hidden = self.layer(self.embed(ids), text=text, options={text: number})
        return hidden + picture, hidden.argmax(-1), text


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, text: str, options: dict[str, int]) -> Tensor:
        return self.linear(hidden)


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No key of whoever runs the tests is used, and none is left there."""
    folder = tmp_path / "configuration"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    yield folder / "qvtrace" / "private.key"


def picture() -> Tensor:
    return torch.randn(1, 6, 16, generator=torch.manual_seed(3))


def recorded(file: Path, text: str = PROMPT, ids: Tensor = IDS, **options: Any) -> Archive:
    model = Answering().eval()
    with torch.no_grad(), record(model, file, overwrite=True, **{"private": True, **options}):
        model(ids, picture(), text)
    return Archive.open(file)


def bytes_below(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".key"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def files_with(folder: Path, *wanted: str | bytes) -> list[str]:
    """The files that hold any of these."""
    needles = [text.encode() if isinstance(text, str) else text for text in wanted]
    contents = bytes_below(folder)
    return [name for name, data in contents.items() if any(n in data for n in needles)]


def test_neither_text_nor_ids_nor_picture_are_anywhere_in_the_file(tmp_path: Path) -> None:
    recorded(tmp_path / "private.st")
    recorded(tmp_path / "open.st", private=False)
    secrets = [PROMPT, IDS.numpy().tobytes(), picture().numpy().tobytes()]

    for secret in secrets:
        assert set(files_with(tmp_path, secret)) <= {"open.st", "open.manifest.json"}
        assert files_with(tmp_path, secret) != []  # the search would find it


class Keyed(nn.Module):
    """Is given dicts and hands one of them out again, beside one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Returning()

    def forward(self, batch: dict[str, Any], mask: Tensor | None = None, **more: Any) -> Any:
        return {"hidden": self.inner(batch["patient_smith"]["scan"]), "batch": batch}


def keyed(file: Path, **options: Any) -> Archive:
    model = Keyed()
    with record(model, file, **{"private": True, **options}):
        model(
            {"patient_smith": {"scan": picture()}},
            mask=torch.ones(2),
            options={"ward_seven": 1.5},
        )
    return Archive.open(file)


def test_keys_of_dicts_that_are_given_are_withheld_and_names_of_parameters_are_not(
    tmp_path: Path,
) -> None:
    archive = keyed(tmp_path / "private.st")
    keyed(tmp_path / "open.st", private=False)
    for secret in ("patient_smith", "scan", "ward_seven"):
        assert set(files_with(tmp_path, secret)) == {"open.st", "open.manifest.json"}
    places = [path for path, _ in leaves(tree_of(archive, "", "kwargs"), "kwargs")]
    assert places[0] == "kwargs.mask"
    assert places[1].startswith("kwargs.options.private_")
    given = [path for path, _ in leaves(tree_of(archive, "", "inputs"), "inputs")]
    handed = [path for path, _ in leaves(tree_of(archive, ""), "output")]
    assert handed == ["output.hidden", given[0].replace("inputs.0", "output.batch")]


def test_private_keys_stand_for_the_same_under_one_key(tmp_path: Path) -> None:
    archives = keyed(tmp_path / "one.st"), keyed(tmp_path / "other.st")
    comparison = diff(*archives, path="all")
    assert comparison.comparable.ok
    assert comparison.coverage.only_in_reference == comparison.coverage.only_in_candidate == ()
    assert {row.status for row in comparison.rows} <= {"identical", "exact"}


def test_the_ids_that_a_model_answers_with_are_withheld_too(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")
    answer = Answering()(IDS, picture(), PROMPT)[1]

    assert files_with(tmp_path, answer.numpy().tobytes()) == []
    found = dict(leaves(tree_of(archive, ""), "output"))
    assert isinstance(found["output.1"], TensorLeaf)
    assert not archive.has_elements(found["output.1"])
    assert archive.has_elements(found["output.0"])  # type: ignore[arg-type]


def test_a_module_that_hands_its_input_on_gives_nothing_away(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")
    leaf = tree_of(archive, "through")

    assert isinstance(leaf, TensorLeaf)
    assert not archive.has_elements(leaf)


def test_what_one_module_returned_can_be_read_where_another_is_given_it(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")
    (_, given), *_ = tree_of(archive, "layer", "inputs").items  # type: ignore[union-attr]

    assert archive.has_elements(given)


def test_values_and_odd_keys_of_dicts_are_keyed_digests(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")
    kwargs = dict(leaves(tree_of(archive, "layer", "kwargs"), "kwargs"))

    assert isinstance(kwargs["kwargs.text"], OpaqueLeaf)
    assert all(isinstance(leaf, OpaqueLeaf) and leaf.digest for leaf in kwargs.values())
    assert not any("zebrafish" in path for path in kwargs)


def test_a_file_says_that_it_is_private(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")

    assert archive.is_private
    assert archive.manifest.contains == ("keyed digests of inputs", "elements")


def test_words_of_exceptions_are_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(Returning(), Raising(ValueError(f"cannot parse {PROMPT!r}")))
    file = tmp_path / "private.st"
    with pytest.raises(ValueError, match="zebrafish"), record(model, file, private=True):
        model(torch.ones(2))

    assert files_with(tmp_path, "zebrafish") == []
    with Archive.open(tmp_path / "private.st.partial") as archive:
        assert archive.manifest.error == "ValueError"
        assert calls_of(archive, "1")[0].error == "ValueError"


def test_a_killed_recording_leaves_nothing_behind_either(tmp_path: Path) -> None:
    model = Answering()
    recording = record(model, tmp_path / "private.st", private=True)
    recording.__enter__()
    with torch.no_grad():
        model(IDS, picture(), PROMPT)
    left = files_with(tmp_path, PROMPT, IDS.numpy().tobytes(), picture().numpy().tobytes())
    recording.__exit__(None, None, None)

    assert left == []


def test_two_private_archives_tell_that_they_were_given_the_same(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one.st")
    other = recorded(tmp_path / "other.st", variant="quant")
    comparison = diff(one, other, path="all")

    assert comparison.comparable.ok
    assert comparison.comparable.differences == ()
    assert {row.status for row in comparison.rows} <= {"identical", "exact"}
    shown = invoke("diff", tmp_path / "one.st", tmp_path / "other.st").stdout
    assert "same inputs by keyed digest" in shown


@pytest.mark.parametrize(
    "change",
    [{"text": "another text"}, {"ids": IDS + 1}],
    ids=["text", "ids"],
)
def test_other_inputs_are_told_without_saying_what_they_are(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    comparison = diff(
        recorded(tmp_path / "one.st"),
        recorded(tmp_path / "other.st", **change),
        path="all",
        fail_on=("peir>0.5",),
    )

    assert not comparison.comparable.ok
    assert "inputs differ" in comparison.comparable.differences[0]
    assert comparison.verdict.exit_code == 3
    assert "mismatch" in {row.status for row in comparison.rows}
    assert "zebrafish" not in comparison_text(comparison, "1")


def test_digests_under_two_keys_say_nothing_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recorded(tmp_path / "one.st")
    monkeypatch.setenv(KEY_VARIABLE, "another key of this very test")
    other = recorded(tmp_path / "other.st")
    comparison = diff(one, other, path="all")

    assert "inputs not compared: private under two keys" in comparison.comparable.differences
    assert comparison.comparable.ok
    assert "mismatch" not in {row.status for row in comparison.rows}
    (ids,) = (r for r in comparison.rows if r.module == "embed" and r.path == "inputs.0")
    assert (ids.status, ids.reason) == ("opaque", "private")


def test_beside_an_open_archive_what_is_private_is_not_known(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one.st")
    other = recorded(tmp_path / "other.st", private=False)
    comparison = diff(one, other, path="all")
    rows = {(row.module, row.path): row for row in comparison.rows}

    assert "inputs not compared: private in the reference" in comparison.comparable.differences
    assert rows["embed", "inputs.0"].status == "opaque"
    assert rows["layer", "kwargs.text"].reason == "a str, private in the reference"
    assert rows["layer", "output"].status == "identical"


def test_no_gate_holds_on_what_is_private(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one.st")
    other = recorded(tmp_path / "other.st", private=False)
    comparison = diff(one, other, path="inputs", fail_on=("peir>1e30 @ through",))

    assert comparison.verdict.exit_code == 1


def test_statistics_alone_tell_nothing_of_what_is_withheld(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st", stats_only=True)
    by_digest = {entry.digest: entry for entry in archive.manifest.portions}
    leaf = tree_of(archive, "embed", "inputs").items[0][1]  # type: ignore[union-attr]

    assert isinstance(leaf, TensorLeaf)
    assert by_digest[leaf.digest].statistics is None
    assert archive.manifest.tensors == ()


def test_a_replay_of_a_private_archive_is_refused_in_a_line(tmp_path: Path) -> None:
    recorded(tmp_path / "private.st")
    result = invoke("replay", tmp_path / "private.st", "-o", tmp_path / "local.st")

    assert result.exit_code == 2
    assert "is private, and holds no inputs" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_recording_like_a_private_one_needs_its_inputs_again(tmp_path: Path) -> None:
    fp, quant = tmp_path / "fp.st", tmp_path / "quant.st"
    narrow = ["--include", "*.mlp*"]
    first = invoke("record", "--private", "--prompt", PROMPT, "-o", fp, *narrow)
    refused = invoke("record", "--variant", "quant", "--like", fp, "-o", quant)
    again = invoke("record", "--variant", "quant", "--like", fp, "--prompt", PROMPT, "-o", quant)

    assert (first.exit_code, again.exit_code) == (0, 0), again.stderr
    assert refused.exit_code == 2
    assert "is private and its inputs were named; give the same with" in refused.stderr
    assert not (tmp_path / "quant.st.partial").exists()
    assert files_with(tmp_path, PROMPT) == []
    with Archive.open(quant) as archive:
        assert archive.is_private
    assert diff(fp, quant).comparable.ok


def test_inputs_that_nobody_named_are_made_again(tmp_path: Path) -> None:
    fp, quant = tmp_path / "fp.st", tmp_path / "quant.st"
    first = invoke("record", "--private", "-o", fp, "--include", "*.mlp*")
    second = invoke("record", "--variant", "quant", "--like", fp, "-o", quant)

    assert (first.exit_code, second.exit_code) == (0, 0), second.stderr
    assert diff(fp, quant).comparable.ok


def test_a_file_of_inputs_has_to_be_named_again(tmp_path: Path) -> None:
    source = tmp_path / "models.py"
    source.write_text("import torch\ndef model():\n    return torch.nn.Linear(2, 2)\n")
    given, fp = tmp_path / "given.json", tmp_path / "fp.st"
    given.write_text(json.dumps({"input": [[1.0, 2.0]]}))
    model = ["--model", f"{source}:model"]
    first = invoke("record", "--private", *model, "--inputs", given, "-o", fp)
    refused = invoke("record", "--like", fp, *model, "-o", tmp_path / "other.st")
    second = invoke("record", "--like", fp, *model, "--inputs", given, "-o", tmp_path / "o.st")

    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert refused.exit_code == 2
    assert "is private and holds no inputs; give the inputs with" in refused.stderr
    assert diff(fp, tmp_path / "o.st").comparable.ok


def test_an_archive_in_flight_is_compared_by_keyed_digests(tmp_path: Path) -> None:
    fp, report = tmp_path / "fp.st", tmp_path / "report.json"
    narrow = ["--include", "*.mlp*"]
    invoke("record", "--private", "--prompt", PROMPT, "-o", fp, *narrow)
    arguments = ["--variant", "quant", "--prompt", PROMPT, "--format", "json", "-o", report]
    result = invoke("run", "--in-flight", fp, *arguments)

    assert result.exit_code == 0, result.stderr
    assert json.loads(report.read_text())["comparable"]["ok"]
    assert files_with(tmp_path, PROMPT, str(tmp_path)) == []


def test_no_command_tells_prompt_home_or_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    source = home / "models.py"
    source.write_text(
        "import torch\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "    return module, torch.linspace(0, 1, 80).reshape(10, 8)\n"
        "def quantize(module):\n"
        "    with torch.no_grad():\n"
        "        module[0].weight.add_(0.01)\n"
        "    return module\n"
    )
    traces = home / "traces"
    arguments = ["--private", "--model", f"{source}:model", "--hf-token", TOKEN]
    one = invoke("record", *arguments, "-o", traces / "fp.st")
    quant = ["--variant", "quant", "--quantizer", f"{source}:quantize"]
    other = invoke("record", *arguments, *quant, "-o", traces / "quant.st")
    assert (one.exit_code, other.exit_code) == (0, 0), one.stderr + other.stderr
    for name in FORMATS:
        report = invoke(
            "diff", traces / "fp.st", traces / "quant.st", "--path", "all", "--format", name,
            "-o", traces / f"report.{name}",
        )  # fmt: skip
        assert report.exit_code == 0, report.stderr
    reports = [file for file in traces.iterdir() if file.name.startswith("report")]

    assert len(reports) == len(FORMATS)
    assert files_with(traces, str(home), str(tmp_path), TOKEN, "somebody") == []
    assert "quant.st" in (traces / "report.json").read_text()


def test_the_page_is_free_of_folders_too(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    pytest.importorskip("itables")
    recorded(tmp_path / "one.st")
    recorded(tmp_path / "other.st")
    page = comparison_page(diff(tmp_path / "one.st", tmp_path / "other.st", path="all"), "1")

    assert str(tmp_path) not in page
    assert "zebrafish" not in page


def test_both_variants_of_a_private_run_are_given_the_same(tmp_path: Path) -> None:
    narrow = ["--include", "*.mlp*", "--traces", tmp_path]
    result = invoke("run", "--private", "--prompt", PROMPT, *narrow, "--format", "json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["comparable"] == {"ok": True, "differences": []}
    assert files_with(tmp_path, PROMPT) == []
    assert "zebrafish" not in result.stdout


def test_the_tokens_of_a_generation_are_text(tmp_path: Path) -> None:
    result = invoke(
        "record", "--private", "--generate", 3, "--prompt", PROMPT,
        "--include", "lm_head", "-o", tmp_path / "private.st",
    )  # fmt: skip

    assert result.exit_code == 0, result.stderr
    with Archive.open(tmp_path / "private.st") as archive:
        assert archive.manifest.steps == ()
        assert [call.step for call in archive.manifest.calls] == [0, 1, 2]
    comparison = diff(tmp_path / "private.st", tmp_path / "private.st")
    assert "texts not compared: their tokens are private" in comparison.comparable.differences


def test_the_key_is_made_once_and_for_its_owner_alone(own_key: Path) -> None:
    one, other = load_privacy(), load_privacy()

    assert one.digest("x") == other.digest("x")
    assert own_key.stat().st_mode & 0o777 == 0o600


def test_a_file_wins_over_the_environment_and_that_over_the_own_key(
    tmp_path: Path, own_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("a key that a file has in it\n")
    monkeypatch.setenv(KEY_VARIABLE, "a key of the environment")

    assert load_privacy(file).key_digest == Privacy(b"a key that a file has in it").key_digest
    assert load_privacy().key_digest == Privacy(b"a key of the environment").key_digest
    assert not own_key.exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--private", "--private-key", "no-such-key"], "cannot be read"),
        (["--private", "--private-key", "SHORT"], "a key of 5 bytes can be guessed"),
        (["--private-key", "SHORT"], "is the key of --private"),
    ],
    ids=["missing", "short", "alone"],
)
def test_a_key_of_no_use_is_refused_in_a_line(
    tmp_path: Path, arguments: list[str], fault: str
) -> None:
    (tmp_path / "short").write_text("12345")
    words = [str(tmp_path / "short") if word == "SHORT" else word for word in arguments]
    result = invoke("record", *words, "-o", tmp_path / "private.st")

    assert result.exit_code == 2
    assert fault in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "private.st").exists()


def test_nobody_without_the_key_can_test_a_guess(tmp_path: Path) -> None:
    """Digests of equal inputs under two keys have nothing in common."""
    one, other = Privacy(b"k" * 16), Privacy(b"l" * 16)

    assert one.digest("yes")[8:] != other.digest("yes")[8:]
    assert one.digest("yes") != one.digest("no")
    assert one.key_digest not in one.digest("yes")[8:]


@pytest.mark.parametrize(
    "text",
    [
        "/home/somebody/model",
        "~/model",
        "torchao read /home/somebody/a.json, and stopped",
        "file:///home/somebody/x",
        "(/home/somebody)",
        "cache=/srv/models/x:main",
    ],
)
def test_absolute_paths_are_replaced_in_any_text(text: str) -> None:
    told = Privacy(b"k" * 16)._text(text)

    assert "somebody" not in told
    assert "/srv" not in told
    assert "~/" not in told
    assert "[private " in told


@pytest.mark.parametrize(
    "text",
    ["and/or", "Qwen/Qwen3-VL-2B", "models/tiny", "https://huggingface.co/a/b", "p50 / p5", "a:b"],
)
def test_what_is_no_absolute_path_stays(text: str) -> None:
    assert Privacy(b"k" * 16)._text(text) == text


def test_the_home_is_not_told_from_a_folder_above_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    told = Privacy(b"k" * 16)._text("home/somebody/models/tiny")

    assert told.startswith("[private ")
    assert told.endswith("]/models/tiny")


def test_a_label_is_not_labelled_again() -> None:
    privacy = Privacy(b"k" * 16)

    assert privacy.label(privacy.label("text")) == privacy.label("text")


def test_structure_is_kept(tmp_path: Path) -> None:
    archive = recorded(tmp_path / "private.st")
    tree = tree_of(archive, "")

    assert isinstance(tree, Container)
    assert tree.kind == "tuple"
    assert [name for name, _ in tree.items] == ["0", "1", "2"]
