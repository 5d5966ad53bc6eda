"""How far a language model is from its reference end to end, by the logits of its tokens."""

import copy
import json
import math

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as functional
from torch import nn
from transformers.modeling_outputs import CausalLMOutput, TokenClassifierOutput
from typer.testing import CliRunner

import qvtrace
from qvtrace.cli import app
from qvtrace.comparison import contents
from qvtrace.comparison.logits import logits_text
from qvtrace.comparison.scored_tokens import TokenPlace
from qvtrace.errors import UsageError
from qvtrace.metrics.logits import NO_TARGET, LogitsPair, compare_logits

VOCABULARY = 40
IDS = torch.arange(36).reshape(2, 18) * 7 % VOCABULARY


class Speaker(nn.Module):
    """A language model that says what it is told to, whatever it is given."""

    output = CausalLMOutput

    def __init__(self, told):
        super().__init__()
        self.lm_head = nn.Identity()
        self.told = told

    def forward(self, input_ids, attention_mask=None):
        return self.output(logits=self.lm_head(self.told))


class Tagger(Speaker):
    """One that gives each token a class."""

    output = TokenClassifierOutput


class Plain(Speaker):
    """One that returns a tensor, from a head."""

    def forward(self, ids):
        return self.lm_head(self.told)


def logits_like(ids=IDS, vocabulary=VOCABULARY, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn((*ids.shape, vocabulary), generator=generator)


def near(reference, size=0.3):
    return reference + size * logits_like(reference[..., 0], reference.shape[-1], 1, scale=1.0)


@pytest.fixture
def compare(tmp_path):
    """Two models recorded on the same inputs, and compared."""

    def compare(reference, candidate, *args, kind=Speaker, other=None, options=None, **kwargs):
        files = tmp_path / "fp.st", tmp_path / "quant.st"
        given = args, args if other is None else (other,)
        for file, told, inputs in zip(files, (reference, candidate), given, strict=True):
            model = kind(told)
            with qvtrace.record(model, file, overwrite=True, **(options or {})):
                model(*inputs, **kwargs)
        return qvtrace.diff(*files)

    return compare


def divergences(reference, candidate):
    """KL(reference || candidate) of each token as torch has it, in float64."""
    sides = [functional.log_softmax(side.double(), -1) for side in (candidate, reference)]
    return functional.kl_div(*sides, log_target=True, reduction="none").sum(-1)


def surprisal(told, ids):
    flat = told[:, :-1].reshape(-1, told.shape[-1]).double()
    return functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none")


def standard_error(values):
    return float(values.double().std()) / math.sqrt(values.numel())


def test_divergence_agreement_and_perplexity_are_those_of_torch(compare):
    reference = logits_like()
    candidate = near(reference)
    kl = divergences(reference, candidate)
    agrees = (reference.argmax(-1) == candidate.argmax(-1)).double()
    sides = [surprisal(side, IDS) for side in (reference, candidate)]
    ratio = float((sides[1] - sides[0]).mean().exp())

    found = compare(reference, candidate, IDS).logits

    assert found.tokens == found.kl.tokens == found.top1.tokens == 36
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl.error == pytest.approx(standard_error(kl), rel=1e-5)
    assert found.kl.max == found.kl.p99 == pytest.approx(float(kl.max()), rel=1e-5)
    sequence, token = divmod(int(kl.argmax()), 18)
    assert found.kl.worst == TokenPlace(0, 0, 0, sequence, token)
    assert found.top1.share == pytest.approx(float(agrees.mean()))
    assert found.top1.error == pytest.approx(standard_error(agrees))
    assert found.perplexity.tokens == 34
    assert found.perplexity.reference == pytest.approx(float(sides[0].mean().exp()), rel=1e-5)
    assert found.perplexity.candidate == pytest.approx(float(sides[1].mean().exp()), rel=1e-5)
    assert found.perplexity.ratio == pytest.approx(ratio, rel=1e-5)
    error = ratio * standard_error(sides[1] - sides[0])
    assert found.perplexity.error == pytest.approx(error, rel=1e-4)


def test_the_divergence_is_from_the_reference_and_not_the_other_way_round(compare):
    reference, candidate = logits_like(), logits_like(seed=1, scale=4.0)

    there = compare(reference, candidate, IDS).logits.kl.mean
    back = compare(candidate, reference, IDS).logits.kl.mean

    assert there == pytest.approx(float(divergences(reference, candidate).mean()), rel=1e-5)
    assert abs(there - back) > 0.1 * there


@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [(3, 7), (700, 1001), (5, 150_000), (2, 600_000)],
    ids=["small", "many blocks", "large", "beyond a block"],
)
def test_any_vocabulary_is_compared_in_whole_tokens(tokens, vocabulary):
    reference = logits_like(torch.zeros(tokens), vocabulary, scale=3.0)
    candidate = near(reference, 0.05)
    targets = np.arange(tokens) - 1

    (found,) = compare_logits([LogitsPair(reference.numpy(), candidate.numpy(), targets)])

    kl = divergences(reference, candidate)
    np.testing.assert_allclose(found.divergence, kl, rtol=1e-3, atol=5e-7)
    assert found.agrees.tolist() == (reference.argmax(-1) == candidate.argmax(-1)).tolist()
    expected = functional.cross_entropy(
        candidate[1:].double(), torch.from_numpy(targets[1:]), reduction="none"
    )
    assert np.isnan(found.candidate_surprisal[0])
    np.testing.assert_allclose(found.candidate_surprisal[1:], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_are_compared_in_float32(compare, dtype):
    reference = logits_like()
    candidate = near(reference).to(dtype)

    found = compare(reference, candidate, IDS).logits

    expected = float(divergences(reference, candidate).mean())
    assert found.kl.mean == pytest.approx(expected, rel=1e-4)


def test_large_logits_lose_nothing():
    reference = logits_like(scale=30.0) + 2000
    candidate = near(reference, 0.01)

    (found,) = compare_logits([LogitsPair(reference.numpy(), candidate.numpy())])

    kl = divergences(reference, candidate)
    np.testing.assert_allclose(found.divergence, kl.reshape(-1), rtol=1e-2, atol=1e-6)


def test_an_id_that_both_sides_rule_out_adds_nothing(compare):
    reference = logits_like()
    reference[..., 3] = -math.inf
    candidate = near(reference)
    likely = torch.arange(VOCABULARY) != 3

    found = compare(reference, candidate, IDS).logits

    expected = divergences(reference[..., likely], candidate[..., likely])
    assert found.kl.mean == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.nonfinite == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_is_counted_and_fails_a_gate(compare, tmp_path, value):
    reference = logits_like()
    candidate = near(reference)
    candidate[1, 4, 3] = value

    comparison = compare(reference, candidate, IDS)

    found = comparison.logits
    assert (found.tokens, found.nonfinite, found.kl.tokens) == (36, 1, 35)
    assert "in 35 tokens (1 not finite), perplexity" in comparison.verdict.text
    files = tmp_path / "fp.st", tmp_path / "quant.st"
    judged = qvtrace.diff(*files, fail_on=["kl>1000"])
    assert judged.verdict.exit_code == 1
    assert "1 of 36 tokens not finite" in judged.verdict.text


def test_identical_logits_are_not_read(compare, monkeypatch):
    monkeypatch.setattr(contents, "compare_logits", lambda pairs: pytest.fail("logits were read"))

    comparison = compare(logits_like(), logits_like(), input_ids=IDS)

    found = comparison.logits
    assert (found.kl.mean, found.kl.max, found.top1.share, found.tokens) == (0, 0, 1, 36)
    assert (found.perplexity.ratio, found.perplexity.tokens) == (1, 34)
    assert found.perplexity.reference is None
    assert "the same perplexity" in comparison.verdict.text


def test_padding_is_neither_scored_nor_predicted_and_is_counted(compare):
    reference = logits_like()
    candidate = near(reference)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    mask[1, 14:] = 0
    kept = mask.bool()
    candidate[~kept] = 100 * candidate[~kept]

    found = compare(reference, candidate, input_ids=IDS, attention_mask=mask).logits

    assert found.not_scored == {"padding": 9}
    assert found.tokens == 27
    assert found.kl.mean == pytest.approx(
        float(divergences(reference[kept], candidate[kept]).mean()), rel=1e-5
    )
    pairs = (kept[:, :-1] & kept[:, 1:]).reshape(-1)
    assert found.perplexity.tokens == int(pairs.sum())
    assert found.perplexity.reference == pytest.approx(
        float(surprisal(reference, IDS)[pairs].mean().exp()), rel=1e-5
    )


def test_logits_of_the_last_tokens_alone_know_their_place(compare):
    last = logits_like()[:, -3:]

    found = compare(last, near(last), IDS).logits

    assert found.tokens == 6
    assert found.perplexity.tokens == 4
    assert found.kl.worst.token in (15, 16, 17)
    assert found.perplexity.reference == pytest.approx(
        float(surprisal(last, IDS[:, -3:]).mean().exp()), rel=1e-5
    )


def test_what_follows_other_input_ids_is_not_scored(compare):
    reference = logits_like()

    comparison = compare(reference, near(reference), IDS, other=(IDS + 1) % VOCABULARY)

    assert comparison.logits.kl is None
    assert comparison.logits.not_scored == {"other input ids": 36}
    assert "logits not compared: 36 of other input ids" in comparison.verdict.text


def test_classes_of_tokens_are_no_vocabulary(compare):
    few = logits_like(vocabulary=5)

    assert compare(few, near(few), IDS).logits is None


def test_a_classifier_is_no_language_model_whatever_it_is_given(compare):
    reference = logits_like()
    kind = type("ForTokenClassification", (Tagger,), {})

    assert compare(reference, near(reference), IDS, kind=kind).logits is None


def test_hidden_states_of_the_size_of_a_vocabulary_are_no_logits(tmp_path):
    embedding = nn.Embedding(VOCABULARY, VOCABULARY)
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(embedding, tmp_path / name):
            embedding(IDS)
        embedding.weight.data += 0.1

    assert qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st").logits is None


@pytest.mark.parametrize(
    "options", [{}, {"include": ["lm_head"]}], ids=["plain tensor", "without the root"]
)
def test_the_output_of_a_head_by_name_is_of_a_vocabulary(compare, options):
    reference = logits_like()
    candidate = near(reference)

    found = compare(reference, candidate, IDS, kind=Plain, options=options).logits

    expected = float(divergences(reference, candidate).mean())
    assert found.kl.mean == pytest.approx(expected, rel=1e-5)
    assert found.perplexity.tokens == 34


class Homemade(nn.Module):
    """One whose head has a name of its own, and which may rule an id out behind it."""

    def __init__(self, *, name="out", hidden=16, ruled_out=None):
        super().__init__()
        self.embedding, self.name, self.ruled_out = (
            nn.Embedding(VOCABULARY, hidden),
            name,
            ruled_out,
        )
        self.add_module(name, nn.Linear(hidden, VOCABULARY))

    def forward(self, ids):
        logits = self.get_submodule(self.name)(self.embedding(ids))
        if self.ruled_out is not None:
            logits[..., self.ruled_out] = -torch.inf
        return logits


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({}, True),
        ({"name": "lm_head", "ruled_out": 3}, True),
        ({"hidden": VOCABULARY}, False),
    ],
    ids=["any name", "behind the head", "may be hidden states"],
)
def test_the_last_module_of_a_model_of_ids_gives_logits_whatever_its_name(
    tmp_path, options, is_told
):
    torch.manual_seed(0)
    model = Homemade(**options)
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(model, tmp_path / name):
            model(IDS)
        model.embedding.weight.data += 0.1

    logits = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st").logits

    assert (logits is not None) == is_told


@pytest.fixture(scope="module")
def llama():
    """A model and its inputs, and one that came out somewhat otherwise."""
    model, inputs = tiny_models.build("llama")
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    return model, other, inputs


def record_both(folder, llama, work):
    files = folder / "fp.st", folder / "quant.st"
    for file, model in zip(files, llama[:2], strict=True):
        with torch.no_grad(), qvtrace.record(model, file) as recording:
            work(model, recording)
    return files


def test_calls_are_pooled_and_the_worst_token_names_its_call(tmp_path, llama):
    ids = llama[2]["input_ids"]
    outputs = []

    def work(model, recording):
        outputs.append([model(input_ids=ids[:, start:]).logits[0] for start in range(3)])

    files = record_both(tmp_path, llama, work)

    found = qvtrace.diff(*files).logits
    kl = torch.cat([divergences(*pair) for pair in zip(*outputs, strict=True)])
    assert found.tokens == 16 + 15 + 14
    assert found.kl.mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found.kl.error == pytest.approx(standard_error(kl), rel=1e-3)
    worst = found.kl.worst
    flat = (0, 16, 31)[worst.call] + worst.token
    assert flat == int(kl.argmax())


def test_a_generation_is_scored_step_by_step_on_what_it_went_on_with(tmp_path, llama):
    inputs = llama[2]
    feed = [(5,), (9,), (7,)]

    def work(model, recording):
        steps = qvtrace.TokenSteps(recording, feed)
        settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        model.generate(**inputs, **settings, logits_processor=[steps])

    files = record_both(tmp_path, llama, work)

    comparison = qvtrace.diff(*files)
    text = torch.cat([inputs["input_ids"], torch.tensor([[5, 9, 7]])], dim=1)
    with torch.no_grad():
        sides = [model(input_ids=text).logits[:, -4:] for model in llama[:2]]
    found = comparison.logits
    assert found.tokens == 3
    assert found.kl.mean == pytest.approx(
        float(divergences(*(side[:, :-1] for side in sides)).mean()), rel=1e-2
    )
    assert found.perplexity.tokens == 3
    assert found.perplexity.candidate == pytest.approx(
        float(surprisal(sides[1], text[:, -4:]).mean().exp()), rel=1e-3
    )


def test_steps_after_the_texts_have_parted_are_not_scored(tmp_path, llama):
    ids = llama[2]["input_ids"]

    def work(model, recording):
        token = 5 if model is llama[0] else 6
        model(input_ids=ids)
        recording.next_step([token])
        model(input_ids=torch.tensor([[token]]))
        recording.next_step([9])
        model(input_ids=torch.tensor([[9]]))

    found = qvtrace.diff(*record_both(tmp_path, llama, work)).logits

    assert found.tokens == 16
    assert found.not_scored == {"other input ids": 2}
    assert found.perplexity.tokens == 15


def test_pictures_in_a_text_are_not_predicted(tmp_path):
    model, inputs = tiny_models.build("qwen3_vl")
    for name in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(model, tmp_path / name):
            model(**inputs)
        for parameter in model.lm_head.parameters():
            parameter.data *= 1.1

    found = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st").logits

    pictures = int(inputs["mm_token_type_ids"][:, 1:].sum())
    assert pictures > 0
    assert found.tokens == inputs["input_ids"].numel()
    assert found.perplexity.tokens == inputs["input_ids"].numel() - 1 - pictures


@pytest.mark.parametrize(("name", "tokens"), [("t5", 4), ("whisper", 4)])
def test_a_decoder_is_scored_by_its_own_ids(tmp_path, name, tokens):
    model, inputs = tiny_models.build(name)
    for file in ("fp.st", "quant.st"):
        with torch.no_grad(), qvtrace.record(model, tmp_path / file):
            model(**inputs)
        for parameter in model.parameters():
            parameter.data *= 1.01

    found = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st").logits

    assert (found.tokens, found.perplexity.tokens) == (tokens, tokens - 1)


@pytest.mark.parametrize("name", ["bert", "vit", "clip"])
def test_other_models_have_no_such_figures(tmp_path, name):
    model, inputs = tiny_models.build(name)
    with torch.no_grad(), qvtrace.record(model, tmp_path / "fp.st"):
        model(**inputs)

    comparison = qvtrace.diff(tmp_path / "fp.st", tmp_path / "fp.st")

    assert comparison.logits is None
    assert "KL" not in comparison.verdict.text


def test_a_thousand_tokens_are_enough_to_judge(compare):
    ids = torch.arange(1000).reshape(1, -1) % VOCABULARY
    reference = logits_like(ids)
    candidate = near(reference)

    text = compare(reference, candidate, ids).verdict.text
    fewer = compare(reference[:, :-1], candidate[:, :-1], ids[:, :-1]).verdict.text

    assert "in 1000 tokens, " in text
    assert "too few" not in text
    assert "in 999 tokens, " in fewer
    assert "in 998: too few to judge;" in fewer


def test_tokens_that_are_not_finite_are_not_enough_to_judge_by(compare):
    ids = torch.arange(1200).reshape(1, -1) % VOCABULARY
    reference = logits_like(ids)
    candidate = near(reference)
    candidate[0, 999:] = math.nan

    comparison = compare(reference, candidate, ids)

    found = comparison.logits
    assert (found.tokens, found.kl.tokens, found.too_few) == (1200, 999, True)
    assert "in 999 tokens (201 not finite)" in comparison.verdict.text
    assert "too few to judge" in comparison.verdict.text


@pytest.mark.parametrize(
    ("apart", "scale", "offset"),
    [(1e-6, 1.0, 0.0), (1e-5, 8.0, 0.0), (1e-3, 3.0, 5.0), (1e-2, 8.0, -2.0)],
)
def test_rounding_does_not_add_up_in_a_small_divergence(apart, scale, offset):
    reference = logits_like(torch.zeros(200), 300, scale=scale)
    candidate = near(reference, apart) + offset

    (found,) = compare_logits([LogitsPair(reference.numpy(), candidate.numpy())])

    expected = float(divergences(reference, candidate).mean())
    assert float(found.divergence.mean()) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("by_both", [True, False], ids=["both", "the reference"])
def test_a_small_divergence_has_what_the_candidate_gives_to_ruled_out_ids(by_both):
    reference = logits_like()
    reference[..., 5] = -math.inf
    candidate = near(reference, 1e-4)
    candidate[..., 5] = -math.inf if by_both else -9.0

    (found,) = compare_logits([LogitsPair(reference.numpy(), candidate.numpy())])

    log_p, log_q = (functional.log_softmax(side.double(), -1) for side in (reference, candidate))
    terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
    np.testing.assert_allclose(found.divergence, terms.sum(-1).reshape(-1), rtol=1e-3)


def test_digits_that_are_rounding_are_not_told(compare):
    reference = logits_like()
    candidate = reference.nextafter(torch.tensor(math.inf))

    comparison = compare(reference, candidate, IDS)

    assert 0 < comparison.logits.kl.max < 1e-12
    assert "KL below 1e-12 nats, top-1 100 " in comparison.verdict.text
    assert "(below 0.0001 %) in 34" in comparison.verdict.text


def test_the_line_has_every_figure_with_its_error_and_count(compare):
    reference = logits_like()

    found = compare(reference, near(reference), IDS).logits

    kl, top1, perplexity = found.kl, found.top1, found.perplexity
    assert logits_text(found) == (
        f"KL {kl.mean:.3g} ± {kl.error:.2g} nats (p99 {kl.p99:.3g}, worst {kl.max:.3g} at sample "
        f"0{f' sequence {kl.worst.sequence}' * (kl.worst.sequence > 0)} token {kl.worst.token}), "
        f"top-1 {100 * top1.share:.4g} ± {100 * top1.error:.2g} % in 36 tokens, "
        f"perplexity {perplexity.reference:.4g} -> {perplexity.candidate:.4g} "
        f"({100 * (perplexity.ratio - 1):+.3g} ± {100 * perplexity.error:.2g} %) in 34: "
        "too few to judge"
    )


@pytest.mark.parametrize("form", ["table", "markdown", "junit"])
def test_every_report_says_it_in_its_verdict(compare, tmp_path, form):
    reference = logits_like()
    compare(reference, near(reference), IDS)

    files = str(tmp_path / "fp.st"), str(tmp_path / "quant.st")
    result = CliRunner().invoke(app, ["diff", *files, "--format", form])

    said = " ".join(result.stdout.split())
    assert "% in 36 tokens, perplexity " in said
    assert ": too few to judge;" in said


@pytest.fixture
def files(compare, tmp_path):
    """Archives of which the one is somewhat off."""
    reference = logits_like()
    compare(reference, near(reference), IDS)
    return tmp_path / "fp.st", tmp_path / "quant.st"


@pytest.mark.parametrize(
    ("gate", "code"), [("kl>1", 0), ("kl>0.0001", 1), ("top1<0.1", 0), ("top1<0.999", 1)]
)
def test_gates_on_the_whole_model(files, tmp_path, gate, code):
    result = tmp_path / "result.json"
    invoked = CliRunner().invoke(
        app, ["diff", *map(str, files), "--format", "json", "-o", str(result)]
    )
    assert invoked.exit_code == 0

    verdict = qvtrace.diff(*files, fail_on=[gate]).verdict
    later = CliRunner().invoke(app, ["gate", str(result), "--fail-on", gate])

    assert verdict.exit_code == later.exit_code == code
    assert "36 tokens: too few to judge" in verdict.text.partition(";")[0]


def test_a_gate_on_a_model_without_a_vocabulary_does_not_hold(compare, tmp_path):
    few = logits_like(vocabulary=5)
    compare(few, near(few), IDS)

    verdict = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st", fail_on=["kl>1"]).verdict

    assert verdict.exit_code == 1
    assert "no logits of a language model" in verdict.text


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        ("kl>0.1 @ lm_head", "is of the whole model; leave '@ lm_head' out"),
        ("kl<0.1", "lower kl is better"),
        ("top1>0.9", "higher top1 is better"),
        ("kl", "has no limit"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused(files, gate, fault):
    with pytest.raises(UsageError, match=fault):
        qvtrace.diff(*files, fail_on=[gate])


def test_json_has_all_of_it_and_is_read_back(files, tmp_path):
    result = tmp_path / "result.json"
    words = ["diff", *map(str, files), "--format", "json", "-o", str(result)]
    CliRunner().invoke(app, words)

    found = json.loads(result.read_text())["logits"]
    assert set(found) == {
        *("tokens", "kl", "top1", "perplexity", "nonfinite", "not_scored", "too_few")
    }
    assert set(found["kl"]) == {"mean", "error", "p99", "max", "worst", "tokens"}
    assert found["too_few"] is True
    assert qvtrace.load_result(result).logits == qvtrace.diff(*files).logits


def test_a_replay_is_not_taken_for_a_model_from_end_to_end(tmp_path, llama):
    model, other, inputs = llama
    with torch.no_grad(), qvtrace.record(model, tmp_path / "fp.st"):
        model(**inputs)
    qvtrace.replay(other, tmp_path / "fp.st", tmp_path / "local.st")

    assert qvtrace.diff(tmp_path / "fp.st", tmp_path / "local.st").logits is None


def test_no_target_is_no_id():
    zeros = np.zeros((2, 3), np.float32)

    (found,) = compare_logits([LogitsPair(zeros, zeros, np.array([NO_TARGET, 7]))])

    assert np.isnan(found.reference_surprisal).all()


def test_a_head_without_ids_is_of_a_vocabulary_only_by_the_name_of_the_model(compare):
    reference = logits_like()
    named = type("ToyForCausalLM", (Plain,), {})
    embedded = torch.randn(2, 18, 4)

    options = {"include": ["lm_head"]}
    of_plain = compare(reference, near(reference), embedded, kind=Plain, options=options)
    of_named = compare(reference, near(reference), embedded, kind=named, options=options)

    assert of_plain.logits is None
    assert of_named.logits.tokens == 36
    assert of_named.logits.perplexity is None


def test_of_a_sample_of_vectors_those_tokens_are_scored_that_both_sides_hold(compare):
    reference = logits_like()
    candidate = near(reference)
    options = {"sample_tokens": 9}

    comparison = compare(reference, candidate, IDS, options=options)

    found = comparison.logits
    row = next(row for row in comparison.rows if row.path == "output.logits")
    assert found.tokens == row.sampled[0] == 9
    assert found.not_scored == {"not stored": 27}
    kl = divergences(reference, candidate)
    worst = found.kl.worst
    assert found.kl.max == pytest.approx(float(kl[worst.sequence, worst.token]), rel=1e-4)
    assert 0 < found.perplexity.tokens <= 9
    assert "% in 9 tokens (27 not stored)" in comparison.verdict.text


def test_without_elements_the_verdict_says_that_logits_were_not_compared(compare):
    reference = logits_like()

    comparison = compare(reference, near(reference), IDS, options={"stats_only": True})

    assert comparison.logits.tokens == 0
    assert "logits not compared: 36 not stored" in comparison.verdict.text


def test_an_id_that_one_side_alone_rules_out_counts_by_which_side_that_is():
    reference, candidate = logits_like(), near(logits_like())
    without = reference.clone(), candidate.clone()
    for side in without:
        side[..., 5] = -math.inf
    pairs = (without[0], candidate), (reference, without[1])

    less, more = compare_logits([LogitsPair(one.numpy(), other.numpy()) for one, other in pairs])

    log_p, log_q = (functional.log_softmax(side.double(), -1) for side in pairs[0])
    likely = torch.arange(VOCABULARY) != 5
    expected = (log_p.exp() * (log_p - log_q))[..., likely].sum(-1)
    np.testing.assert_allclose(less.divergence, expected.reshape(-1), rtol=1e-5)
    assert (more.divergence == math.inf).all()
