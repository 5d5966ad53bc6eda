"""Generations: every step recorded, fed with the reference's tokens, compared step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from command_lines import invoke
from model_fixtures import Saved, change_config, save
from recordings import Adding, calls_of, only, tensors_of
from small_archives import edit_manifest, write_small
from torch import Tensor, nn

import qvtrace
from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.models.chatter import quiet

GENERATING = [
    "qwen3_vl",
    "llama",
    "qwen3",
    "gemma3",
    "gemma3_image",
    "whisper",
    "t5",
    "gpt2",
    "mamba",
    "qwen3_moe",
]
STEPS = 3
# A quantizer that leaves little of the model, so that it would go on otherwise.
SCRAMBLE = """
import torch

def scramble(model):
    generator = torch.Generator().manual_seed(3)
    for linear in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
        noise = torch.randn(linear.weight.shape, generator=generator)
        linear.weight.data.add_(noise * linear.weight.data.std())
    return model
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scramble.py").write_text(SCRAMBLE)
    return tmp_path


@pytest.fixture
def llama(saved: Saved) -> str:
    """A directory that generates; not to be changed."""
    return str(saved("llama"))


def run(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def scrambled(*options: str) -> Any:
    """A candidate that would go on otherwise."""
    quantizer = ("--quantizer", "scramble.py:scramble")
    return run("record", "--variant", "quant", *quantizer, *options, "-o", "quant.st")


def tokens_of(file: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    with Archive.open(file) as archive:
        steps = archive.manifest.steps
        assert [entry.step for entry in steps] == list(range(len(steps)))
        return [(entry.chosen, entry.taken) for entry in steps]


@pytest.mark.parametrize("family", GENERATING)
def test_each_family_generates_and_is_compared_step_by_step(
    family: str, saved: Saved, folder: Path
) -> None:
    run("record", "-m", str(saved(family)), "--generate", str(STEPS), "-o", "fp.st")
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")

    comparison = qvtrace.diff("fp.st", "quant.st")
    assert comparison.comparable.ok, comparison.comparable.differences
    coverage = comparison.coverage
    assert coverage.modules_compared == coverage.modules_reference == coverage.modules_candidate
    assert coverage.compared == coverage.pairs
    logits = [row for row in comparison.rows if row.place.path == "output.logits"]
    assert [row.step for row in logits] == list(range(STEPS))
    if family != "gpt2":  # which torchao does not change
        assert all(row.metrics.sqnr is not None and row.metrics.sqnr > 5 for row in logits)
    assert comparison.tokens is not None
    assert comparison.tokens.compared == STEPS
    assert comparison.tokens.parted is None


@pytest.mark.parametrize("family", ["whisper", "t5"])
def test_an_encoder_that_runs_before_the_first_token_is_of_the_first_step(
    family: str, saved: Saved, folder: Path
) -> None:
    run("record", "-m", str(saved(family)), "--generate", "2", "-o", "fp.st")

    with Archive.open("fp.st") as archive:
        root = archive.manifest.inputs.root_calls
        encoder = [call for call in archive.manifest.calls if "encoder" in call.module]
        decoder = calls_of(archive, "model.decoder" if family == "whisper" else "decoder")
    assert len(root) == 3  # the encoder, and a call of the model for each token
    assert {call.step for call in encoder if "decoder" not in call.module} == {0}
    assert [call.step for call in decoder] == [0, 1]


def test_the_tokens_are_those_of_greedy_generation(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "6", "-o", "fp.st")

    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(llama)
        with Archive.open("fp.st") as archive:
            prompt = only(
                {k: v for k, v in tensors_of(archive, "", "kwargs").items() if "input_ids" in k}
            )
        expected = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    taken = [token for _, (token,) in tokens_of("fp.st")]
    assert taken == expected[0, prompt.shape[1] :].tolist()


def test_a_models_own_settings_neither_sample_nor_penalize_nor_end_a_generation(
    llama: str, folder: Path
) -> None:
    run("record", "-m", llama, "--generate", "4", "-o", "plain.st")
    plain = tokens_of("plain.st")
    directory = save("llama", folder / "own")
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "num_beams": 2,
        "repetition_penalty": 9.0,
        "max_new_tokens": 1,
        "eos_token_id": [plain[1][0][0], 255],
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))

    result = run("record", "-m", str(directory), "--generate", "4", "-o", "own.st")

    assert tokens_of("own.st") == plain
    assert "the model ends the text at step 1; the recording goes on" in result.stderr


def test_the_references_tokens_are_fed_whatever_the_candidate_would_choose(
    llama: str, folder: Path
) -> None:
    run("record", "-m", llama, "--generate", "5", "-o", "fp.st")
    result = scrambled("--like", "fp.st")

    reference, candidate = tokens_of("fp.st"), tokens_of("quant.st")
    assert [taken for _, taken in candidate] == [taken for _, taken in reference]
    assert [chosen for chosen, _ in candidate] != [chosen for chosen, _ in reference]
    assert "5 tokens, fed from fp.st" in result.stderr
    with Archive.open("fp.st") as one, Archive.open("quant.st") as other:
        for step in range(5):
            embedded = [tensors_of(a, "model.embed_tokens", "inputs", step) for a in (one, other)]
            assert torch.equal(only(embedded[0]), only(embedded[1]))


def test_the_first_token_that_differs_is_named_in_record_verdict_and_json(
    llama: str, folder: Path
) -> None:
    run("record", "-m", llama, "--generate", "5", "-o", "fp.st")
    result = scrambled("--like", "fp.st")

    pairs = list(zip(tokens_of("fp.st"), tokens_of("quant.st"), strict=True))
    step, reference, candidate = next(
        (step, one[0][0], other[0][0]) for step, (one, other) in enumerate(pairs) if one != other
    )
    same = sum(one == other for one, other in pairs)
    assert (
        f"first token that differs: step {step}, the model would have gone on with {candidate} in "
        f"place of {reference}; {same} of 5 steps the same"
    ) in " ".join(result.stderr.split())
    report = json.loads(run("diff", "fp.st", "quant.st", "--format", "json").stdout)
    assert report["tokens"]["first"] == {
        "sample": 0,
        "step": step,
        "sequence": 0,
        "reference": reference,
        "candidate": candidate,
    }
    assert (report["tokens"]["compared"], report["tokens"]["agreed"]) == (5, same)
    assert report["tokens"]["parted"] is None
    named = f"first token that differs: step {step}, {candidate} in place of {reference}"
    assert named in report["verdict"]["text"]


def test_texts_that_run_freely_and_part_are_not_comparable(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "4", "-o", "fp.st")
    scrambled("-m", llama, "--generate", "4")

    comparison = qvtrace.diff("fp.st", "quant.st")
    assert comparison.tokens is not None
    parted = comparison.tokens.parted
    assert parted is not None
    assert parted == comparison.tokens.first
    assert not comparison.comparable.ok
    assert comparison.comparable.differences[0] == (
        f"texts part after step {parted.step}: token {parted.reference} in the reference, "
        f"{parted.candidate} in the candidate; record the candidate with --like"
    )


def test_every_sequence_of_a_batch_is_fed_its_own_tokens(llama: str, folder: Path) -> None:
    (folder / "two.json").write_text('{"input_ids": [[5, 6, 7, 8], [90, 80, 70, 60]]}')
    run("record", "-m", llama, "--inputs", "two.json", "--generate", "3", "-o", "fp.st")
    scrambled("--like", "fp.st")

    reference, candidate = tokens_of("fp.st"), tokens_of("quant.st")
    assert {len(chosen) for chosen, _ in reference} == {2}
    assert [taken for _, taken in candidate] == [taken for _, taken in reference]
    comparison = qvtrace.diff("fp.st", "quant.st")
    assert comparison.comparable.ok
    assert comparison.tokens is not None
    assert comparison.tokens.compared == 6


def test_fewer_tokens_can_be_fed_but_no_more_than_there_are(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "3", "-o", "fp.st")

    run("record", "--like", "fp.st", "--generate", "2", "-o", "two.st")
    message = refused("record", "--like", "fp.st", "--generate", "4", "-o", "four.st")

    assert len(tokens_of("two.st")) == 2
    assert "--generate 4: fp.st has 3 steps to feed; give at most 3" in message
    assert not Path("four.st").exists()


def test_an_archive_without_a_generation_feeds_nothing_and_that_is_said(
    llama: str, folder: Path
) -> None:
    run("record", "-m", llama, "-o", "fp.st")

    result = run("record", "--like", "fp.st", "--generate", "2", "-o", "two.st")

    assert "no tokens of fp.st are fed, the text is the model's own" in result.stderr


def test_a_text_of_another_vocabulary_cannot_be_fed(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "2", "-o", "fp.st")
    edit_manifest(Path("fp.st"), lambda manifest: manifest["steps"][0].update(taken=[999]))

    message = refused("record", "--like", "fp.st", "-o", "two.st")

    assert "--like fp.st: the token 999 is none of the model's 256" in message


@pytest.mark.parametrize("family", ["bert", "vit", "clip"])
def test_a_model_that_cannot_generate_is_one_line(family: str, saved: Saved, folder: Path) -> None:
    message = refused("record", "-m", str(saved(family)), "--generate", "2", "-o", "fp.st")

    assert "cannot generate; leave the option out" in message


def test_run_generates_feeds_and_compares_in_one_go(saved: Saved, folder: Path) -> None:
    result = run("run", "--generate", "2", "--prompt", "Hello", "--format", "json")

    report = json.loads(result.stdout)
    assert report["comparable"]["ok"]
    assert report["tokens"]["compared"] == 2
    assert {row["step"] for row in report["rows"]} == {0, 1}


def test_a_dry_run_of_a_generation_knows_the_size(llama: str, folder: Path) -> None:
    dry = run("record", "-m", llama, "--generate", "2", "--dry-run", "-o", "fp.st").stdout
    run("record", "-m", llama, "--generate", "2", "-o", "fp.st")

    size = Path("fp.st").stat().st_size
    told = next(line for line in dry.splitlines() if line.startswith("file"))
    assert float(told.split()[1]) == pytest.approx(size / 1000, rel=0.01)


def test_a_table_and_show_name_the_step(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "2", "-o", "fp.st")
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")

    assert "model.layers.1.mlp.up_proj step 1" in run("diff", "fp.st", "quant.st").stdout
    assert "2 steps" in run("show", "fp.st").stdout
    assert "#1 step 1 (float32[1,1,64])" in run("show", "fp.st", "lm_head").stdout
    lines = run("show", "fp.st", "lm_head", "--json").stdout.splitlines()
    assert [json.loads(line).get("step", 0) for line in lines] == [0, 1]


class Counting(nn.Module):
    """Chooses the number after the last one, in a vocabulary of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Adding(1)

    def forward(self, numbers: Tensor) -> Tensor:
        return nn.functional.one_hot(self.inner(numbers[:, -1:]) % 10, 10).float()


def count(recording: qvtrace.Recording, model: nn.Module, steps: int) -> None:
    numbers = torch.tensor([[3]])
    for _ in range(steps):
        chosen = model(numbers)[:, -1].argmax(-1)
        numbers = torch.cat([numbers, chosen[:, None]], dim=1)
        recording.next_step(chosen)


def test_a_loop_of_ones_own_marks_its_steps(file: Path) -> None:
    with qvtrace.record(Counting(), file) as recording:
        count(recording, recording._model, 3)

    with Archive.open(file) as archive:
        assert [call.step for call in calls_of(archive, "inner")] == [0, 1, 2]
    assert tokens_of(str(file)) == [((4,), (4,)), ((5,), (5,)), ((6,), (6,))]
    assert recording.report is not None
    assert len(recording.report.steps) == 3


def test_a_step_that_calls_a_module_twice_does_not_shift_those_after_it(tmp_path: Path) -> None:
    class Twice(Counting):
        def forward(self, numbers: Tensor) -> Tensor:
            if numbers.shape[1] == 1:
                self.inner(numbers)
            return super().forward(numbers)

    for name, model in {"fp.st": Twice(), "quant.st": Counting()}.items():
        with qvtrace.record(model, tmp_path / name) as recording:
            count(recording, model, 3)

    comparison = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st")
    rows = [row for row in comparison.rows if row.module == "inner"]
    assert [(row.step, row.call, row.status) for row in rows] == [
        (0, 0, "identical"),
        (1, 2, "identical"),
        (2, 3, "identical"),
    ]
    assert [place.call for place in comparison.coverage.only_in_reference] == [1]


class Noisy(nn.Linear):
    """Adds noise to what it computes: a little, and in one call a lot."""

    noise = (0.0,) * 3

    def forward(self, hidden: Tensor) -> Tensor:
        self.noise, (now, *_) = (*self.noise[1:], 0.0), self.noise
        return super().forward(hidden) + now * torch.randn(hidden.shape)


def test_the_origin_of_an_error_is_named_with_its_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Noisy(16, 16) for _ in range(8)])
    for name, noise in {"fp.st": 0.0, "quant.st": 1e-4}.items():
        for module in model:
            module.noise = (noise,) * 3
        if noise:
            model[4].noise = (noise, noise, 1.0)
        with torch.no_grad(), qvtrace.record(model, tmp_path / name) as recording:
            for step in range(3):
                model(torch.full((1, 8, 16), 1.0 + step))
                recording.next_step()

    verdict = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st").verdict
    assert verdict.lines[0].startswith("first seen at 4 step 2 (")


def test_steps_can_be_marked_by_number_and_without_tokens(file: Path) -> None:
    model = Adding(1)
    with qvtrace.record(model, file) as recording:
        recording.step = 7
        model(torch.zeros(1))
        recording.next_step()
        model(torch.zeros(1))

    with Archive.open(file) as archive:
        assert [call.step for call in calls_of(archive, "")] == [7, 8]
        assert archive.manifest.steps == ()


def test_tokens_that_are_no_ids_are_refused(file: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"next_step: the tokens are torch\.float32; give ids"),
        qvtrace.record(Adding(1), file) as recording,
    ):
        recording.next_step(torch.rand(1, 10))


def test_generate_of_transformers_marks_steps_and_takes_the_tokens_that_it_is_fed(
    tmp_path: Path,
) -> None:
    model: Any
    model, inputs = tiny_models.build("llama")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    files = [tmp_path / "fp.st", tmp_path / "quant.st"]
    with quiet(), qvtrace.record(model, files[0]) as recording:
        free = model.generate(**inputs, **options, logits_processor=[qvtrace.TokenSteps(recording)])
    feed = [[(taken[0] + 1) % 256] for _, taken in tokens_of(str(files[0]))]
    with quiet(), qvtrace.record(model, files[1]) as recording:
        steps = qvtrace.TokenSteps(recording, feed)
        fed = model.generate(**inputs, **options, logits_processor=[steps])

    assert free[0, -3:].tolist() == [taken[0] for _, taken in tokens_of(str(files[0]))]
    assert fed[0, -3:].tolist() == [token for (token,) in feed]
    assert [taken for _, taken in tokens_of(str(files[1]))] == [tuple(step) for step in feed]


@pytest.mark.parametrize(
    ("feed", "match"),
    [
        ([[1]], "has 1 steps"),
        ([[1, 2]] * 2, "has 2 sequences, the model runs 1"),
        ([[256]] * 2, "the token 256 is none of the model's 256"),
    ],
    ids=["steps", "batch", "vocabulary"],
)
def test_a_feed_that_does_not_fit_says_why(
    feed: list[list[int]], match: str, tmp_path: Path
) -> None:
    model: Any
    model, inputs = tiny_models.build("llama")
    with (
        pytest.raises(UsageError, match=match),
        quiet(),
        qvtrace.record(model, tmp_path / "fp.st") as recording,
    ):
        steps = qvtrace.TokenSteps(recording, feed)
        model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=[steps])


def test_a_generation_that_raises_keeps_the_tokens_until_then(folder: Path) -> None:
    directory = save("gpt2", folder / "gpt2")
    change_config(directory, n_positions=17)

    result = invoke(
        "record", "-m", str(directory), "--from-config", "--generate", "9", "-o", "fp.st"
    )

    assert result.exit_code == 2
    assert len(tokens_of("fp.st.partial")) == 2


@pytest.mark.parametrize(
    "steps",
    [7, [7], [{"sample": 0, "step": 0, "chosen": ["a"], "taken": [1]}], [{"sample": 0}]],
    ids=["number", "numbers", "text", "missing"],
)
def test_steps_that_no_writer_writes_are_damage(steps: object, file: Path) -> None:
    edit_manifest(write_small(file), lambda manifest: manifest.update(steps=steps))

    with pytest.raises(DamagedArchiveError):
        Archive.open(file)


def test_given_inputs_that_nest_without_end_are_damage(llama: str, folder: Path) -> None:
    run("record", "-m", llama, "--generate", "1", "-o", "fp.st")

    def nest(manifest: Any) -> None:
        deep: Any = {}
        for _ in range(150):
            deep = {"type": "list", "class": "list", "items": [["0", deep]]}
        manifest["inputs"]["given"].update(kwargs=deep, digest="0" * 32)

    Path("deep.st").write_bytes(Path("fp.st").read_bytes())
    edit_manifest(Path("deep.st"), nest)

    assert "deep.st: the inputs of the model: " in refused("diff", "fp.st", "deep.st")
    assert "deep.st: the inputs of the model: " in refused(
        "record", "--like", "deep.st", "-o", "x.st"
    )
    run("show", "deep.st")


def test_an_archive_of_before_there_were_steps_has_none(file: Path) -> None:
    def forget(manifest: Any) -> None:
        del manifest["steps"]
        del manifest["inputs"]["given"]

    edit_manifest(write_small(file), forget)

    with Archive.open(file) as archive:
        assert archive.manifest.steps == ()
        assert archive.manifest.inputs.given is None
