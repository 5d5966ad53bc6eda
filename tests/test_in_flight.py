"""A comparison while the candidate runs: the same numbers as a diff of two archives, and no second
archive."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_routing
import tiny_models
import torch
from command_lines import invoke
from model_fixtures import Saved
from recordings import Raising
from torch import Tensor, nn

import qvtrace
from qvtrace.archive import Archive
from qvtrace.comparison.comparison import Comparison
from qvtrace.errors import UsageError
from qvtrace.reports.json import comparison_text

Change = Callable[[nn.Module], object]
Json = dict[str, Any]
Both = Callable[..., tuple[Json, Json]]

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), torch.ones(4, 16)

class Raises(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        self.inner(x)
        raise RuntimeError("no such luck")

def raising(model):
    return Raises(model)
"""


def round_weights(model: nn.Module) -> None:
    """As int8 weights would be."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(dim=-1, keepdim=True) / 127
            module.weight.copy_((module.weight / scale).round() * scale)


def round_coarsely(model: nn.Module) -> None:
    """As int4 weights would be, so that a factor is looked for everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(dim=-1, keepdim=True) / 7
            module.weight.copy_((module.weight / scale).round() * scale)


def bring_in_nan(model: nn.Module) -> None:
    round_weights(model)
    model.get_submodule("model.layers.0.mlp.down_proj").weight[3] = torch.nan


def leave_as_it_is(model: nn.Module) -> None:
    """The same model."""


def as_json(comparison: Comparison | None) -> Json:
    """But for the name of the candidate's file."""
    assert comparison is not None
    found: Json = json.loads(comparison_text(comparison, "0"))
    del found["candidate"]["file"]
    return found


@pytest.fixture
def both(tmp_path: Path) -> Both:
    """A diff of two archives, and one in flight."""

    def run(
        model: nn.Module,
        change: Change,
        *args: Tensor,
        given: Json | None = None,
        stored: Json | None = None,
        **options: Any,
    ) -> tuple[Json, Json]:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            change(changed)
            for each, file in ((model, "fp.st"), (copy.deepcopy(changed), "quant.st")):
                with qvtrace.record(each, tmp_path / file, variant=file[:-3], **(stored or {})):
                    each(*args, **given or {})
            compared = qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st", **options)
            files = set(tmp_path.iterdir())
            with qvtrace.diff_in_flight(
                tmp_path / "fp.st", changed, variant="quant", **options
            ) as flight:
                changed(*args, **given or {})
        assert set(tmp_path.iterdir()) == files
        return as_json(compared), as_json(flight.comparison)

    return run


@pytest.mark.parametrize(
    "change",
    [round_weights, round_coarsely, bring_in_nan, leave_as_it_is],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("path", ["output", "all"])
def test_the_numbers_are_those_of_a_diff_to_the_last_digit(
    both: Both, change: Change, path: str
) -> None:
    model, inputs = tiny_models.build("llama")

    stored, flown = both(model, change, given=inputs, path=path)

    assert flown == stored
    assert stored["coverage"]["compared"] > 20


def test_details_and_elements_are_taken_as_they_pass(both: Both, tmp_path: Path) -> None:
    model, inputs = tiny_models.build("llama")
    wanted: Json = {"details": True, "values": "*.q_proj", "path": "all"}

    stored, flown = both(model, round_weights, given=inputs, **wanted)

    assert flown == stored
    found = []
    with torch.no_grad():
        changed, _ = tiny_models.build("llama")
        round_weights(changed)
        with qvtrace.diff_in_flight(tmp_path / "fp.st", changed, **wanted) as flight:
            changed(**inputs)
    for comparison in (
        qvtrace.diff(tmp_path / "fp.st", tmp_path / "quant.st", **wanted),
        flight.comparison,
    ):
        assert comparison is not None
        assert comparison.elements
        found.append((comparison.elements, [repr(row.details) for row in comparison.rows]))
    assert found[0] == found[1]
    assert "Statistics" in found[0][1][0]


@pytest.mark.parametrize("name", ["experts", "parts"])
@pytest.mark.parametrize(
    "change", [test_routing.move_a_little, test_routing.swap_two], ids=["moved", "swapped"]
)
def test_how_experts_were_routed_is_told(both: Both, change: Any, name: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 20, test_routing.WIDTH)

    stored, flown = both(test_routing.Model(name, 4).eval(), change, hidden)

    assert flown == stored
    assert any(row["status"] == "routing" for row in stored["rows"])


@pytest.mark.parametrize("name", ["qwen3_moe", "whisper", "gemma3", "bert", "vit"])
def test_so_it_is_in_other_families(both: Both, name: str) -> None:
    model, inputs = tiny_models.build(name)

    stored, flown = both(model, round_weights, given=inputs, path="all")

    assert flown == stored
    assert stored["coverage"]["compared"] > 20


@pytest.mark.parametrize(
    "stored",
    [
        {"sample_tokens": 4},
        {"stats_only": True},
        {"inputs": False},
        {"include": ["*.mlp", "lm_head"]},
    ],
    ids=["samples", "statistics", "no inputs", "few modules"],
)
@pytest.mark.parametrize("change", [round_weights, bring_in_nan], ids=["rounded", "nan"])
def test_what_is_recorded_is_what_the_reference_has(
    both: Both, change: Change, stored: Json
) -> None:
    model, inputs = tiny_models.build("llama")

    compared, flown = both(model, change, given=inputs, stored=stored, path="all")

    assert flown == compared
    assert compared["coverage"]["only_in_candidate"] == []


def rotate(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.weight.copy_(rotation.T @ first.weight)
    first.bias.copy_(first.bias @ rotation)


def test_a_rotation_that_is_not_declared_is_at_least_suspected(both: Both) -> None:
    """In two archives it is found."""
    torch.manual_seed(0)
    norms = [nn.LayerNorm(16, elementwise_affine=False) for _ in range(3)]
    model = nn.Sequential(nn.Linear(16, 16), *norms).eval()

    _, flown = both(model, rotate, torch.randn(1, 64, 16))

    assert any("tensors look rotated" in text for text in flown["candidate"]["warnings"])


class Folding(nn.Module):
    """A factor in its norm is made up for in the linear layer after it; both are called again with
    a single token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.up(self.norm(hidden))
        self.up(self.norm(hidden[:, -1:]))
        return hidden


def fold(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, Folding):
            factors = torch.linspace(0.5, 2.0, 16)
            module.norm.weight.mul_(factors)
            module.norm.bias.mul_(factors)
            module.up.weight.div_(factors)


@pytest.mark.parametrize("path", ["output", "inputs", "all"])
def test_factors_are_found_lent_and_judged_by_what_lies_around(both: Both, path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Folding(), Folding()).eval()

    stored, flown = both(model, fold, torch.randn(1, 24, 16), path=path)

    assert flown == stored
    scaled = [row for row in stored["rows"] if row["scale_factor"] is not None]
    assert {row["call"] for row in scaled} == {0, 1}


def test_a_factor_that_a_later_call_tells_is_lent_to_an_earlier_one(both: Both) -> None:
    class Later(Folding):
        def forward(self, hidden: Tensor) -> Tensor:
            self.up(self.norm(hidden[:, -1:]))
            return self.up(self.norm(hidden))

    torch.manual_seed(0)

    stored, flown = both(Later().eval(), fold, torch.randn(1, 24, 16))

    assert flown == stored
    first = next(row for row in stored["rows"] if (row["module"], row["call"]) == ("norm", 0))
    assert first["scale_factor"] is not None


class Chain(nn.Module):
    """Modules by these names, one after the other."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, hidden: Tensor) -> Tensor:
        for module in self._modules.values():  # a shared one again
            hidden = module(hidden)  # type: ignore[misc]
        return hidden


def rename_and_add(chain: nn.Module) -> None:
    modules = dict(chain.named_children())
    chain._modules.clear()
    chain._modules.update(z=modules["a"], b=modules["b"], c=nn.Linear(16, 16))


def test_names_are_mapped_and_modules_that_one_side_lacks_are_listed(both: Both) -> None:
    torch.manual_seed(0)
    chain = Chain(a=nn.Linear(16, 16), b=nn.ReLU()).eval()

    stored, flown = both(chain, rename_and_add, torch.randn(2, 16), maps="^z$=a")

    assert flown == stored
    assert {row["module"] for row in stored["rows"]} == {"", "a", "b"}
    assert [place["module"] for place in stored["coverage"]["only_in_candidate"]] == ["c"]


class Wrapper(nn.Module):
    """As quantizers put around a module."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.001 * self.wrapped(hidden)


def wrap(chain: nn.Module) -> None:
    chain.a = Wrapper(chain.a)  # type: ignore[arg-type]


def share(chain: nn.Module) -> None:
    round_coarsely(chain)
    chain.c = chain.a


@pytest.mark.parametrize("change", [wrap, share], ids=["wrapped", "shared"])
def test_wrappers_and_shared_modules_find_their_partners(both: Both, change: Change) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    chain = Chain(a=layer, b=nn.ReLU(), c=copy.deepcopy(layer)).eval()

    stored, flown = both(chain, change, torch.randn(4, 16), path="all")

    assert flown == stored
    assert not stored["coverage"]["only_in_reference"]


def test_layouts_are_found(both: Both) -> None:
    class Turned(nn.Module):
        turn = False

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.transpose(1, 2).contiguous() if self.turn else hidden

    def turn(model: nn.Module) -> None:
        model[1].turn = True  # type: ignore[index]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Turned(), nn.Identity()).eval()

    stored, flown = both(model, turn, torch.randn(1, 24, 16))

    assert flown == stored
    assert any(row["layout"] for row in stored["rows"])


def test_what_is_overwritten_in_place_was_looked_at_before(both: Both) -> None:
    class InPlace(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mul_(2.0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), InPlace(), nn.ReLU(inplace=True)).eval()

    stored, flown = both(model, round_coarsely, torch.randn(4, 16), path="all")

    assert flown == stored


def test_an_exception_goes_on_its_way_and_there_is_no_comparison(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with qvtrace.record(model, tmp_path / "fp.st"):
        model(torch.ones(1, 4))
    model.append(Raising(ValueError("mine")))

    with (
        pytest.raises(ValueError, match="mine"),
        qvtrace.diff_in_flight(tmp_path / "fp.st", model) as flight,
    ):
        model(torch.ones(1, 4))

    assert flight.comparison is None
    assert not model[0]._forward_hooks
    assert {file.name for file in tmp_path.iterdir()} == {"fp.st", "fp.manifest.json"}


def test_what_cannot_be_asked_for_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with qvtrace.record(model, tmp_path / "fp.st"):
        model(torch.ones(1, 4))

    with pytest.raises(UsageError, match="--map"):
        qvtrace.diff_in_flight(tmp_path / "fp.st", model, maps="no-map")
    with pytest.raises(UsageError, match="weights are not compared in flight"):
        qvtrace.diff_in_flight(tmp_path / "fp.st", model, path="weights")
    with pytest.raises(UsageError, match="--local"):
        qvtrace.diff_in_flight(tmp_path / "fp.st", model, sort_by="local_noise")


def run(*words: str, code: int = 0) -> str:
    result = invoke(*words)
    assert result.exit_code == code, result.output
    return result.stdout


def result_of(*words: str) -> Json:
    found: Json = json.loads(run(*words, "--format", "json"))
    del found["candidate"]["file"]
    return found


def test_the_embedded_model_is_compared_without_a_second_archive(folder: Path) -> None:
    run("record", "-o", "fp.st")
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")
    files = set(folder.iterdir())

    run("run", "--in-flight", "fp.st", "--variant", "quant", "-o", "result.json", "--path", "all")

    assert set(folder.iterdir()) == {*files, folder / "result.json"}
    flown = json.loads(Path("result.json").read_text())
    assert flown["candidate"].pop("file") == "in flight"
    assert flown == result_of("diff", "fp.st", "quant.st", "--path", "all")
    assert flown["comparable"] == {"ok": True, "differences": []}


@pytest.mark.parametrize("caches", [(), ("--caches",)], ids=["without caches", "with caches"])
def test_a_generation_is_compared_step_by_step(
    folder: Path, saved: Saved, caches: tuple[str, ...]
) -> None:
    run("record", "-m", str(saved("llama")), "--generate", "3", *caches, "-o", "fp.st")
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")

    flown = result_of("run", "--in-flight", "fp.st", "--path", "all")

    assert flown == result_of("diff", "fp.st", "quant.st", "--path", "all")
    assert {row["step"] for row in flown["rows"]} == {0, 1, 2}


def test_several_samples_are_pooled_as_diff_does(folder: Path, saved: Saved) -> None:
    samples = [{"input_ids": [[5 + number, 6, 7, 8]]} for number in range(2)]
    Path("set.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    words = ("--inputs", "set.jsonl", "--samples", "2", "-o", "fp.st")
    run("record", "-m", str(saved("llama")), *words)
    run("record", "--variant", "quant", "--like", "fp.st", "-o", "quant.st")

    flown = result_of("run", "--in-flight", "fp.st")

    assert flown == result_of("diff", "fp.st", "quant.st")
    with Archive.open("fp.st") as archive:
        assert {call.sample for call in archive.manifest.calls} == {0, 1}


def test_gates_floors_and_orders_are_those_of_diff(folder: Path) -> None:
    Path("model.py").write_text(MODEL)
    run("record", "-m", "model.py:model", "-o", "fp.st")
    like = ("--like", "fp.st", "-m", "model.py:model")
    run("record", "--variant", "quant", *like, "-o", "quant.st")
    run("record", *like, "--dtype", "bfloat16", "-o", "floor.st")
    flags = ("--fail-on", "peir>0.0001", "--floor", "floor.st", "--sort-by", "peir", "--top", "2")
    words = (*flags, "--include", "[02]", "--format", "json", "-m", "model.py:model")

    run("run", "--in-flight", "fp.st", *words, "-o", "flown.json", code=1)
    run("diff", "fp.st", "quant.st", *words[:-2], "-o", "stored.json", code=1)

    flown, stored = (json.loads(Path(f"{name}.json").read_text()) for name in ("flown", "stored"))
    del flown["candidate"]["file"], stored["candidate"]["file"]
    assert flown == stored
    assert len(flown["rows"]) == 2


@pytest.mark.parametrize("kind", ["table", "csv", "markdown", "junit", "html"])
def test_every_format_can_be_had(folder: Path, kind: str) -> None:
    if kind == "html":
        pytest.importorskip("bokeh")
        pytest.importorskip("itables")
    Path("model.py").write_text(MODEL)
    run("record", "-m", "model.py:model", "-o", "fp.st")

    words = ("-m", "model.py:model", "--format", kind, "-o", "report")
    run("run", "--in-flight", "fp.st", "--variant", "fp", *words)

    text = Path("report").read_text()
    if kind == "csv":  # names no files
        assert text == run("diff", "fp.st", "fp.st", "--format", "csv")
    else:
        assert "in flight" in text


def test_a_model_that_raises_is_one_line_and_leaves_nothing(folder: Path) -> None:
    Path("model.py").write_text(MODEL)
    run("record", "-m", "model.py:model", "-o", "fp.st")
    files = set(folder.iterdir())

    result = invoke(
        *("run", "--in-flight", "fp.st", "-m", "model.py:model", "--quantizer"),
        *("model.py:raising", "-o", "result.json"),
    )

    assert result.exit_code == 2
    assert "RuntimeError: no such luck" in result.stderr.splitlines()[-1]
    assert {file for file in folder.iterdir() if file.name != "__pycache__"} == files


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in-flight", "fp.st", "--traces", "t"), "--traces: nothing is stored in flight"),
        (("--in-flight", "fp.st", "--like", "fp.st"), "--like: --in-flight says"),
        (("--in-flight", "fp.st", "--weights"), "--weights: no weights are compared in flight"),
        (("--in-flight", "fp.st", "--sample-tokens", "4"), "--sample-tokens: nothing is stored"),
        (("--in-flight", "fp.st", "--max-bytes", "1MB"), "--max-bytes: nothing is stored"),
        (("--in-flight", "fp.st", "--path", "weights"), "--path weights: weights are not compared"),
        (("--in-flight", "fp.st", "-o", "fp.st"), "--output fp.st: is fp.st, which is compared"),
        (("--in-flight", "no.st"), "no.st: there is no such file"),
        (("--variant", "quant"), "--variant: says something with --in-flight only"),
        (("--local", "local.st"), "--local: says something with --in-flight only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_had_is_said_before_anything_runs(
    folder: Path, words: tuple[str, ...], message: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with qvtrace.record(model, folder / "fp.st"):
        model(torch.ones(1, 4))

    result = invoke("run", *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"qvtrace: {message}")
    assert result.stderr.count("\n") == 1
    with Archive.open("fp.st") as archive:
        assert archive.manifest.complete
