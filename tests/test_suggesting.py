"""Which modules to keep float: the ones that err, few of them, within runs and bytes."""

import json
import math
import shlex
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import invoke
from model_fixtures import Saved
from test_quantizer_packages import PACKAGES

import qvtrace
from qvtrace import UsageError
from qvtrace.models import ModelRequest
from qvtrace.suggesting.search import Order, Search, outermost, within
from qvtrace.suggesting.suggestion import Figure, Step, Suggestion
from qvtrace.suggesting.targets import Target

WEAK = "blocks.2.inner"
# One weight of each row of a weak module is far larger than the rest, so that a scale for the row
# leaves these none of their digits. Its input is next to nothing, in every block.
MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)

    def forward(self, hidden):
        return hidden + torch.tanh(self.inner(hidden))


class Toy(nn.Module):
    def __init__(self, weak=(2,)):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(6)])
        self.out = nn.Linear(32, 16)
        for index in weak:
            self.blocks[index].inner.weight.data[:, 5] = 60.0
        for block in self.blocks:
            block.inner.weight.data[5] = 0.0

    def forward(self, x):
        x = x.clone()
        x[:, 5] = 0.001
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def inputs():
    return torch.randn(24, 32, generator=torch.Generator().manual_seed(1))


def model():
    torch.manual_seed(0)
    return Toy(), inputs()


class Silent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        self.linear(x)

def silent():
    torch.manual_seed(0)
    return Silent().eval(), torch.randn(4, 32)

def three_weak():
    torch.manual_seed(0)
    return Toy((0, 2, 4)), inputs()


def coarse(model, keep_float=()):
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name not in keep_float:
                step = module.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-6) / 127
                module.weight.copy_((module.weight / step).round() * step)
    return model


def coarse_and_biased(model, keep_float=()):
    model.blocks[5].register_forward_hook(lambda module, inputs, output: output * 1.2)
    return coarse(model, keep_float)


def deaf(model):
    return model
"""


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's models and their float recordings; not to be changed."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(MODEL)
    for name in ("model", "three_weak"):
        words = ["record", "-m", f"{folder}/toys.py:{name}", "-o", f"{folder}/{name}.st"]
        assert invoke(*words).exit_code == 0
    return folder


def suggested(
    toys: Path,
    target: str,
    name: str = "model",
    quantizer: str = "torchao:int8-weight",
    **more: Any,
) -> Suggestion:
    if ":" in quantizer and quantizer.startswith("toys.py"):
        quantizer = f"{toys}/{quantizer}"
    request = ModelRequest(model=f"{toys}/toys.py:{name}", variant="quant", quantizer=quantizer)
    return qvtrace.suggest(toys / f"{name}.st", target, request, **more)


def sets(suggestion: Suggestion) -> list[frozenset[str]]:
    return [frozenset(step.kept) for step in suggestion.steps]


@pytest.mark.parametrize(
    "quantizer",
    [
        "torchao:int8-weight",
        "torchao:int8-dynamic",
        "bitsandbytes:int8",
        "compressed-tensors:w8a8",
        "quanto:int8",
        "quanto:w8a8",
        "toys.py:coarse",
    ],
)
def test_the_one_weak_module_is_named(toys: Path, quantizer: str) -> None:
    package = quantizer.partition(":")[0]
    pytest.importorskip({"torchao": "torchao", "toys.py": "torch", **PACKAGES}[package])

    found = suggested(toys, "sqnr 30", quantizer=quantizer)

    assert found.reached
    assert found.keep_float == (WEAK,)
    assert found.candidates[0].name == WEAK
    assert found.minimal
    assert found.steps[0].kept == ()
    assert not found.steps[0].figure.ok


def test_each_figure_is_that_of_a_real_recording_with_these_modules_kept(
    toys: Path, tmp_path: Path
) -> None:
    found = suggested(toys, "sqnr 30")

    for step in found.steps:
        file = tmp_path / f"{step.run}.st"
        kept = [word for name in step.kept for word in ("--keep-float", name)]
        recorded = invoke(
            *("record", "--variant", "quant", "-m", f"{toys}/toys.py:model"),
            *("--quantizer", "torchao:int8-weight", "--like", toys / "model.st", *kept, "-o", file),
        )
        assert recorded.exit_code == 0, recorded.stderr
        (row,) = qvtrace.diff(toys / "model.st", file, include=["(root)"]).rows
        assert row.metrics.sqnr == step.figure.value
        assert step.figure.ok == (row.status == "identical" or (row.metrics.sqnr or 0) >= 30)


def test_a_target_that_is_met_needs_nothing_and_one_run(toys: Path) -> None:
    found = suggested(toys, "sqnr -20")

    assert (found.reached, found.keep_float, found.extra_bytes) == (True, (), 0)
    assert len(found.steps) == 1
    assert found.reason.startswith("reached with nothing kept float: sqnr ")


def test_a_target_is_met_exactly_at_its_number(toys: Path) -> None:
    first = suggested(toys, "sqnr 0", max_runs=1).steps[0].figure.value
    assert first is not None

    assert suggested(toys, f"sqnr {first!r}", max_runs=1).reached
    assert not suggested(toys, f"sqnr {math.nextafter(first, math.inf)!r}", max_runs=1).reached


def test_what_no_float_module_mends_cannot_be_reached(toys: Path) -> None:
    found = suggested(toys, "sqnr 30", quantizer="toys.py:coarse_and_biased")

    assert not found.reached
    assert len(found.steps) == 3  # nothing, those that hold no others, and all
    assert "cannot be reached: with all" in found.reason
    assert "what is left comes from elsewhere" in found.reason
    # The best that there was.
    assert found.figure == max(
        (step.figure for step in found.steps), key=lambda figure: figure.value or 0
    )


def test_the_target_may_be_about_modules_within(toys: Path) -> None:
    before, after = (
        suggested(toys, f"sqnr 30 @ {pattern}") for pattern in ("blocks.1", "blocks.[34]")
    )

    assert (before.keep_float, before.modules) == ((), ("blocks.1",))
    assert (after.keep_float, after.modules) == ((WEAK,), ("blocks.3", "blocks.4"))


def test_the_worst_of_several_modules_counts(toys: Path) -> None:
    found = suggested(toys, "sqnr 30 @ blocks.[0-5]", max_runs=1)

    assert found.figure.module in {f"blocks.{index}" for index in range(2, 6)}


@pytest.mark.parametrize("metric", ["peir 0.02", "relative_l2 0.03", "token_sqnr_p50 30"])
def test_any_metric_of_outputs_may_be_the_target(toys: Path, metric: str) -> None:
    assert suggested(toys, metric).keep_float == (WEAK,)


def test_three_weak_modules_are_all_named_and_nothing_else(toys: Path) -> None:
    found = suggested(toys, "sqnr 30", "three_weak")

    assert set(found.keep_float) == {f"blocks.{index}.inner" for index in (0, 2, 4)}
    assert found.minimal
    assert "none could be left out when it was tried" in found.reason


@pytest.mark.parametrize("runs", [1, 2, 3, 6])
def test_no_more_runs_are_made_than_are_allowed(toys: Path, runs: int) -> None:
    found = suggested(toys, "sqnr 30", "three_weak", max_runs=runs)

    assert len(found.steps) <= runs
    assert len(set(sets(found))) == len(found.steps)
    assert found.reached == (runs > 1)
    if runs == 1:
        assert found.reason.startswith("not reached in 1 run, all that --max-runs allows")
    if runs == 2:
        assert len(found.keep_float) == len(found.candidates)
        assert "fewer may do" in found.reason


def test_bytes_are_those_of_floats_less_those_of_the_quantized(toys: Path) -> None:
    found = suggested(toys, "sqnr 30")

    # 32 rows of 32 weights: 4 bytes each, or 1 and a scale of 4 for each row.
    assert found.extra_bytes == 32 * 32 * 3 - 32 * 4
    assert {one.extra_bytes for one in found.candidates if one.name != "out"} == {found.extra_bytes}


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        ("bitsandbytes:int8", 32 * 32 * 3 - 32 * 4),
        ("bitsandbytes:nf4", 32 * 32 * 4 - 32 * 32 // 2 - 32 * 32 // 64 * 4),
        ("compressed-tensors:w8a8", 32 * 32 * 3 - 32 * 4),
        ("torchao:int4-weight", 32 * 32 * 4 - 32 * 32 // 2 - 32 * 4),
        ("quanto:int8", 32 * 32 * 3 - 32 * 4),
        ("toys.py:coarse", 0),
    ],
)
def test_bytes_are_counted_for_every_quantizer(toys: Path, quantizer: str, expected: int) -> None:
    package = quantizer.partition(":")[0]
    pytest.importorskip({"torchao": "torchao", "toys.py": "torch", **PACKAGES}[package])

    found = suggested(toys, "sqnr 200", quantizer=quantizer, max_runs=2)

    inner = next(one for one in found.candidates if one.name == WEAK)
    assert inner.extra_bytes == expected


def test_a_budget_is_kept_in_every_run_and_what_it_does_not_allow_is_told(toys: Path) -> None:
    one = 32 * 32 * 3 - 32 * 4

    enough = suggested(toys, "sqnr 30", "three_weak", budget=3 * one)
    short = suggested(toys, "sqnr 30", "three_weak", budget=3 * one - 1)
    nothing = suggested(toys, "sqnr 30", "three_weak", budget="1kB")

    assert (enough.reached, enough.extra_bytes) == (True, 3 * one)
    assert not short.reached
    assert short.reason.startswith("not reached within 8.83 KB: the best was sqnr ")
    assert all(step.extra_bytes < 3 * one for step in short.steps)
    weak = {f"blocks.{index}.inner" for index in (0, 2, 4)}
    assert 0 < len(weak.intersection(short.keep_float)) < 3
    assert (nothing.reached, nothing.keep_float) == (False, ())
    assert len(nothing.steps) == 1


def test_a_large_module_gives_way_where_it_eats_the_budget(tmp_path: Path) -> None:
    wide = MODEL.replace("60.0", "20.0").replace(
        "self.out = nn.Linear(32, 16)",
        "self.out = nn.Linear(32, 1024)\n        self.out.weight.data[:, 5] = 200.0",
    )
    (tmp_path / "wide.py").write_text(wide)
    place = f"{tmp_path}/wide.py:model"
    assert invoke("record", "-m", place, "-o", tmp_path / "fp.st").exit_code == 0
    request = ModelRequest(model=place, variant="quant", quantizer="torchao:int8-weight")

    found = qvtrace.suggest(
        tmp_path / "fp.st", "sqnr 30 @ blocks.5", request, budget=1024 * (32 * 3 - 4)
    )

    assert found.steps[1].kept == ("out",)
    assert found.keep_float == (WEAK,)


def test_patterns_narrow_what_may_be_kept(toys: Path) -> None:
    found = suggested(toys, "sqnr 30", exclude=[WEAK])

    assert not found.reached
    assert WEAK not in {one.name for one in found.candidates}
    assert suggested(toys, "sqnr 30", include=["blocks.[12].*"]).keep_float == (WEAK,)
    with pytest.raises(UsageError, match="--include 'nowhere': matches none"):
        suggested(toys, "sqnr 30", include=["nowhere"])


def test_modules_without_a_local_error_come_last_and_say_why(toys: Path, tmp_path: Path) -> None:
    file = tmp_path / "fp.st"
    recorded = invoke("record", "-m", f"{toys}/toys.py:model", "--no-inputs", "-o", file)
    assert recorded.exit_code == 0
    request = ModelRequest(
        model=f"{toys}/toys.py:model", variant="quant", quantizer="torchao:int8-weight"
    )

    found = qvtrace.suggest(file, "sqnr 30", request)

    assert {one.reason for one in found.candidates} == {"their inputs were not stored"}
    assert found.warnings == (
        "no local error of 7 of 7 modules, their inputs were not stored: they come last, in order "
        "of execution",
    )
    assert found.reached
    assert WEAK in found.keep_float


def test_nothing_is_left_behind(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(toys.iterdir())

    suggested(toys, "sqnr 30")
    with pytest.raises(UsageError):
        suggested(toys, "kl 0.1")

    assert list(tmp_path.iterdir()) == []
    assert sorted(toys.iterdir()) == before


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("peir", "is no 'METRIC NUMBER [@ PATTERN]'"),
        ("peir>0.02", "is no 'METRIC NUMBER [@ PATTERN]'"),
        ("pier 0.02", "'pier' is not known; choose one of "),
        ("gain 3", "'gain' is not known"),
        ("local_peir 3", "'local_peir' is not known"),
        ("peir nan", "'nan' is no finite number"),
        ("peir 2%", "'2%' is no finite number"),
        ("peir -1", "peir is never -1; give a number 0 or more"),
        ("kl -0.1", "kl is never -0.1; give a number 0 or more"),
        ("top1 99", "top1 is never 99; give a number between 0 and 1"),
        ("cosine 1.5", "cosine is never 1.5; give a number between -1 and 1"),
        ("peir 0.02 @", "has no pattern after '@'"),
        ("peir 0.02 @ lm_head", "the pattern 'lm_head' matches none of 14 modules in "),
        ("kl 0.02 @ lm_head", "kl is of the whole model; leave '@ lm_head' out"),
        ("kl 0.02", "there are no logits of a language model"),
        ("mismatches 3", "nothing that it covers could be judged"),
    ],
)
def test_a_target_that_says_nothing_is_an_error(toys: Path, target: str, fault: str) -> None:
    result = invoke(
        *("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model"), "--target", target
    )

    assert (result.exit_code, result.stdout) == (2, "")
    error = result.stderr.splitlines()[-1]
    assert error.startswith(f"qvtrace: --target {target!r}: ")
    assert fault in error


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--variant", "fp"], "--variant fp: is not quantized"),
        (["--budget", "lots"], "--budget 'lots': is no size"),
        (["--keep-float", "out"], "--keep-float 'out': what to keep is looked for here"),
        (["--prompt", "hi"], "--prompt: the inputs are those of "),
        (["--use-cache"], "--use-cache: the inputs are those of "),
        (["-o", "result.st"], "--output result.st: is the name of an archive"),
        (["--exclude", "*"], "--include and --exclude: leave none of the modules that torchao"),
        (["--no-quantize"], "--no-quantize: torchao:int8-dynamic puts no wrappers"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_options_that_make_no_sense_are_errors(toys: Path, words: list[str], fault: str) -> None:
    given = ("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model", "--target", "sqnr 30")

    result = invoke(*given, *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert fault in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_quantizer_that_cannot_keep_modules_is_an_error(toys: Path) -> None:
    with pytest.raises(UsageError, match=r"toys\.py:deaf does not say that it can"):
        suggested(toys, "sqnr 30", quantizer="toys.py:deaf")


@pytest.mark.parametrize(
    ("stored", "fault"),
    [
        ("--stats-only", "has only statistics of (root), which tell of no target"),
        ("--private", "is private, and holds no inputs that modules could be given"),
    ],
)
def test_an_archive_that_holds_too_little_is_an_error(
    toys: Path, tmp_path: Path, stored: str, fault: str
) -> None:
    words = ("-m", f"{toys}/toys.py:model")
    assert invoke("record", *words, stored, "-o", tmp_path / "fp.st").exit_code == 0

    result = invoke("suggest", tmp_path / "fp.st", *words, "--target", "sqnr 30")

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"qvtrace: {tmp_path / 'fp.st'}: {fault}")


def test_a_recording_of_a_quantized_model_is_no_reference(toys: Path, tmp_path: Path) -> None:
    words = ("-m", f"{toys}/toys.py:model")
    quantized = invoke("record", *words, "--variant", "quant", "-o", tmp_path / "quant.st")
    assert quantized.exit_code == 0

    result = invoke("suggest", tmp_path / "quant.st", *words, "--target", "peir 1")

    assert result.exit_code == 2
    assert "quant.st: is of a model that torchao:int8-dynamic quantized" in result.stderr


def test_a_model_that_gives_no_tensor_has_no_target_of_its_own(toys: Path, tmp_path: Path) -> None:
    words = ("-m", f"{toys}/toys.py:silent")
    assert invoke("record", *words, "-o", tmp_path / "fp.st").exit_code == 0

    result = invoke("suggest", tmp_path / "fp.st", *words, "--target", "peir 1")

    assert result.exit_code == 2
    assert result.stderr == (
        "qvtrace: --target 'peir 1': no output that it covers has a tensor; "
        "choose other modules with '@ PATTERN'\n"
    )


def test_an_archive_of_another_model_is_an_error(toys: Path) -> None:
    request = ModelRequest(model=f"{toys}/toys.py:three_weak", variant="quant")

    with pytest.raises(UsageError, match=r"model\.st: another model or other inputs"):
        qvtrace.suggest(toys / "model.st", "sqnr 30", request)


def test_a_quantized_checkpoint_is_an_error(saved: Saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, TorchAoConfig

    quantization = pytest.importorskip("torchao.quantization")
    model: Any = AutoModelForCausalLM.from_pretrained(
        saved("llama"), quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    model.save_pretrained(tmp_path / "quantized")
    assert invoke("record", "-m", saved("llama"), "-o", tmp_path / "fp.st").exit_code == 0

    result = invoke(
        *("suggest", tmp_path / "fp.st", "-m", tmp_path / "quantized", "--target", "kl 0.001")
    )

    assert result.exit_code == 2
    assert "is already quantized, and its modules cannot be kept float" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("target", ["kl 1e-5", "top1 1"])
def test_what_a_language_model_says_may_be_the_target(
    saved: Saved, tmp_path: Path, target: str
) -> None:
    file = tmp_path / "fp.st"
    assert invoke("record", "-m", saved("llama"), "-o", file).exit_code == 0
    request = ModelRequest(variant="quant", quantizer="torchao:int4-weight")

    found = qvtrace.suggest(file, target, request, max_runs=6)

    assert found.reached
    assert found.keep_float
    assert found.target.is_end_to_end


def test_a_factor_that_is_made_up_for_is_no_local_error(tmp_path: Path) -> None:
    pytest.importorskip("tico")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 160, "vocab_size": 300}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.15, attn_implementation="eager")
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "fp.st"
    assert invoke("record", "-m", tmp_path / "model", "-o", file).exit_code == 0
    request = ModelRequest(variant="quant", quantizer="tico:uint8")

    found = qvtrace.suggest(file, "sqnr 60 @ lm_head", request, max_runs=2)

    # TICO folds the scale of attention into k_proj, and leaves it out behind.
    noises = {one.name: one.noise for one in found.candidates if one.noise is not None}
    keys = [noise for name, noise in noises.items() if name.endswith("k_proj")]
    assert len(keys) == 2
    assert max(keys) < 0.01
    assert not found.candidates[0].name.endswith("k_proj")


def test_blocks_that_tico_quantizes_are_kept_only_where_what_is_in_them_is_not_enough(
    saved: Saved, tmp_path: Path
) -> None:
    pytest.importorskip("tico")
    file = tmp_path / "fp.st"
    assert invoke("record", "-m", saved("llama"), "-o", file).exit_code == 0
    request = ModelRequest(variant="quant", quantizer="tico:uint8")
    most = qvtrace.suggest(file, "sqnr 1000 @ lm_head", request, max_runs=4)
    leaves, blocks = most.steps[1:3]
    assert leaves.figure.value is not None
    assert blocks.figure.value is not None
    assert leaves.figure.value < blocks.figure.value
    target = f"sqnr {leaves.figure.value + 1} @ lm_head"

    found = qvtrace.suggest(file, target, request)

    assert found.reached
    assert "model" not in found.keep_float
    assert found.extra_bytes < most.steps[-1].extra_bytes
    assert found.extra_bytes == min(step.extra_bytes for step in found.steps if step.figure.ok)
    last = next(step for step in found.steps if step.kept == found.keep_float)
    assert last.modules >= len(last.kept)
    assert f"reached with {last.modules} module" in found.reason


def test_tico_switches_wrappers_off(saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("tico")
    file = tmp_path / "fp.st"
    assert invoke("record", "-m", saved("llama"), "-o", file).exit_code == 0
    request = ModelRequest(variant="quant", quantizer="tico:uint8")

    found = qvtrace.suggest(file, "sqnr 60 @ lm_head", request, max_runs=3)

    assert found.reached
    assert found.steps[2].figure.ok
    assert "model.layers.0.mlp.down_proj" in {one.name for one in found.candidates}
    assert found.extra_bytes > 0


def test_the_report_has_a_row_for_each_run_and_says_what_to_type(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = invoke(
        *("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model", "--target", "sqnr 30"),
        *("--quantizer", "torchao:int8-weight"),
    )

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "target      sqnr at least 30 at (root)" in lines
    assert any(line.split()[:3] == ["1", "nothing", "kept"] for line in lines)
    assert any("reached with 1 module kept float" in line for line in lines)
    assert "quantize_(model, config" in result.stdout
    progress = result.stderr.splitlines()
    assert progress[0] == "looking for sqnr at least 30 at (root), in at most 16 runs"
    assert progress[1].startswith("run 1 of at most 16: nothing kept (0 float): sqnr ")
    program, *words = shlex.split(progress[-1].removeprefix("next"))
    assert program == "qvtrace"
    again = invoke(*words)
    assert again.exit_code == 0, again.stderr
    (row,) = qvtrace.diff(toys / "model.st", "traces/kept.st", include=["(root)"]).rows
    assert row.metrics.sqnr is not None
    assert row.metrics.sqnr >= 30


def test_the_result_as_json_is_a_file_of_modules_to_keep(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = invoke(
        *("suggest", toys / "three_weak.st", "-m", f"{toys}/toys.py:three_weak"),
        *("--target", "sqnr 30", "--quantizer", "torchao:int8-weight", "--budget", "20MB"),
        *("--format", "json", "-o", "result.json"),
    )

    assert (result.exit_code, result.stdout) == (0, "")
    found = json.loads(Path("result.json").read_text())
    assert sorted(found["keep_float"]) == [f"blocks.{index}.inner" for index in (0, 2, 4)]
    assert (found["reached"], found["minimal"], found["budget"]) == (True, True, 20_000_000)
    assert found["runs"] == len(found["steps"]) <= found["max_runs"] == 16
    assert found["target"]["metric"] == "sqnr"
    assert found["steps"][0]["keep_float"] == []
    assert set(found["skip_lists"]) == {"torchao", *PACKAGES}
    again = invoke(*shlex.split(found["command"])[1:])
    assert again.exit_code == 0, again.stderr
    with qvtrace.load("traces/kept.st") as archive:
        assert sorted(archive.manifest.variant.left_float) == sorted(found["keep_float"])


def test_the_list_is_written_to_a_file_that_record_takes(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = (
        *("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model"),
        *("--quantizer", "torchao:int8-weight", "--keep-float-file", "keep.txt"),
    )

    for _ in range(2):  # an older list gives way
        result = invoke(*given, "--target", "sqnr 30", "-o", "report.txt")

        assert result.exit_code == 0, result.stderr
        _, *names = Path("keep.txt").read_text().splitlines()
        command = result.stderr.splitlines()[-1].removeprefix("next").split()
        assert command[command.index("--keep-float-file") + 1] == "keep.txt"
        assert "--keep-float" not in command
        assert invoke(*command[1:], "--force").exit_code == 0
        with qvtrace.load("traces/kept.st") as kept:
            assert kept.manifest.variant.settings["keep_float"] == names
    Path("keep.txt").unlink()
    assert "keep.txt is not written" in invoke(*given, "--target", "sqnr 1").stderr
    assert not Path("keep.txt").exists()


def test_a_list_that_somebody_wrote_is_not_replaced(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("out\n")
    given = ("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model", "--target", "sqnr 30")

    result = invoke(*given, "--keep-float-file", "mine.txt")

    assert result.exit_code == 2
    assert result.stderr.startswith("qvtrace: --keep-float-file mine.txt: is there, and ")
    assert Path("mine.txt").read_text() == "out\n"


def test_a_target_that_is_missed_has_an_exit_code_of_its_own(toys: Path) -> None:
    result = invoke(
        *("suggest", toys / "model.st", "-m", f"{toys}/toys.py:model", "--target", "sqnr 30"),
        *("--max-runs", "1", "--format", "json"),
    )

    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["reached"], found["keep_float"], found["command"]) == (False, [], None)


def searched(
    names: str, needed: Callable[[frozenset[str]], bool], max_runs: int = 16
) -> tuple[Search, Step]:
    """A search over modules of one letter, where a function says which sets are enough."""

    def measure(step: Step) -> Step:
        ok = needed(frozenset(step.kept))
        missing = float(len(names) - len(step.kept))
        figure = Figure(missing, ok, excess=-1.0 if ok else missing)
        return replace(step, figure=figure)

    def sizes(kept: Iterable[str]) -> int:
        return len(list(kept))

    search = Search(
        lambda: [Order(tuple(names), "in order", complete=True)], sizes, sizes, measure, max_runs
    )
    return search, search.run()


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("count", range(1, 27))
def test_the_shortest_beginning_is_found_by_halving(count: int) -> None:
    search, best = searched(LETTERS, lambda kept: kept >= set(LETTERS[:count]))

    assert set(best.kept) == set(LETTERS[:count])
    assert len(search.steps) <= 16


def test_what_is_not_needed_is_left_out_again() -> None:
    search, best = searched(LETTERS, lambda kept: kept >= {"a", "d", "f"}, max_runs=40)

    assert set(best.kept) == {"a", "d", "f"}
    assert search.minimal


@pytest.mark.parametrize("runs", range(1, 20))
def test_what_is_suggested_was_run_itself(runs: int) -> None:
    search, best = searched(LETTERS, lambda kept: len(kept & set("cgkq")) > 2, max_runs=runs)

    assert best in search.steps
    assert len(search.steps) <= runs
    assert best.figure.ok == search.reached == (runs > 1)


def test_the_answer_takes_fewest_bytes_however_many_names_it_has() -> None:
    """One block of all, or two of its parts: the parts take less."""
    inner = ("m.a", "m.b", "m.c")

    def sizes(kept: Iterable[str]) -> int:
        return sum(any(one in (name, "m") for one in set(kept)) for name in inner)

    def measure(step: Step) -> Step:
        ok = "m" in step.kept or {"m.a", "m.c"} <= set(step.kept)
        return replace(step, figure=Figure(1.0, ok, excess=-1.0 if ok else 1.0))

    order = Order(("m", *inner), "in order", complete=True)
    search = Search(lambda: [order], sizes, sizes, measure, 16)

    best = search.run()

    assert set(best.kept) == {"m.a", "m.c"}
    assert (best.extra_bytes, best.modules) == (2, 2)
    assert search.minimal


def test_more_float_modules_that_do_harm_do_not_lead_astray() -> None:
    search, best = searched(LETTERS, lambda kept: "a" in kept and len(kept) not in (2, 3, 5))

    assert search.reached
    assert best.figure.ok


def test_what_is_within_a_kept_block_is_not_named_beside_it() -> None:
    assert outermost(["a.b", "c", "a.b.d", "ab", "a", "e.f"]) == ("c", "ab", "a", "e.f")


def test_a_budget_passes_over_what_does_not_fit() -> None:
    sizes = {"a": 5, "b": 9, "c": 2, "d": 3}

    def total(names: Iterable[str]) -> int:
        return sum(sizes[name] for name in names)

    assert within("abcd", 8, total) == ("a", "c")
    assert within("abcd", 10, total) == ("a", "c", "d")
    assert within("abcd", None, total) == tuple("abcd")
    assert within("abcd", 0, total) == ()


def test_a_target_says_on_which_side_it_must_be() -> None:
    assert Target.parse("peir 0.02 @ lm_head").described == "peir at most 0.02 at lm_head"
    assert Target.parse(" top1 0.99 ").described == "top1 at least 0.99"
    assert Target.parse("token_sqnr_p50 20").gate.operator == "<"
    assert Target.parse("noise_out 1e-3 @ *.mlp").gate.text == "noise_out>0.001 @ *.mlp"
