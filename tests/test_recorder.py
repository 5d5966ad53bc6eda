"""Every call of every module, by value, and a model that does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from recordings import (
    Adding,
    Mlp,
    Returning,
    calls_of,
    hooks_on,
    modules_of,
    only,
    recorded,
    report_of,
    seeded,
    tensors_of,
    tree_of,
)
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.errors import ModelError, UsageError
from qvtrace.recording.options import Progress, RecordOptions
from qvtrace.recording.recorder import Recording, record
from qvtrace.recording.skips import (
    BYPASSED,
    CONTAINER,
    EXCLUDED,
    NEVER_CALLED,
    UNCALLED_WEIGHTS,
    UNSEEN,
)
from qvtrace.trees import TensorLeaf, ValueLeaf, leaves


def test_a_module_called_twice_is_recorded_twice(file: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add = Adding(1)

        def forward(self, hidden: Tensor) -> object:
            return self.add(self.add(hidden))

    archive = recorded(Twice(), file, torch.zeros(2))

    assert [call.index for call in calls_of(archive, "add")] == [0, 1]
    assert only(tensors_of(archive, "add", "output", 0)).tolist() == [1, 1]
    assert only(tensors_of(archive, "add", "inputs", 1)).tolist() == [1, 1]
    assert only(tensors_of(archive, "add", "output", 1)).tolist() == [2, 2]


def test_the_root_is_recorded_as_every_other_module(file: Path) -> None:
    model, given = seeded(Mlp), torch.randn(3, 4)

    archive = recorded(model, file, given)

    assert modules_of(archive) == ["up", "act", "down", ""]
    assert torch.equal(only(tensors_of(archive, "", "inputs")), given)
    assert torch.equal(only(tensors_of(archive, "")), model(given))


def test_kwargs_are_recorded_by_their_names(file: Path) -> None:
    class Masked(nn.Module):
        def forward(self, hidden: Tensor, *, mask: Tensor, scale: float) -> Tensor:
            return hidden * mask * scale

    archive = recorded(Masked(), file, torch.ones(2), mask=torch.tensor([1.0, 0.0]), scale=3.0)

    tree = dict(leaves(tree_of(archive, "", "kwargs"), "kwargs"))
    assert tree["kwargs.scale"] == ValueLeaf(3.0, "float")
    assert tensors_of(archive, "", "kwargs")["kwargs.mask"].tolist() == [1, 0]


def test_inputs_are_those_that_the_caller_gave_before_hooks_of_others_change_them(
    file: Path,
) -> None:
    model = Adding(1)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0 + 5,))

    archive = recorded(model, file, torch.zeros(1))

    assert only(tensors_of(archive, "", "inputs")).item() == 0
    assert only(tensors_of(archive, "")).item() == 6


def test_positional_inputs_carry_the_names_of_the_signature(file: Path) -> None:
    class Model(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor, *more: Tensor) -> Tensor:
            return hidden

    archive = recorded(Model(), file, *[torch.ones(1)] * 4)

    assert calls_of(archive, "")[0].parameters == ("hidden", "mask", None, None)


def test_a_call_names_the_call_that_made_it(file: Path) -> None:
    model = nn.Sequential(nn.Sequential(Adding(1)), Adding(2))

    archive = recorded(model, file, torch.zeros(1))

    parents = {call.module: call.parent for call in archive.manifest.calls}
    assert parents == {"0.0": ("0", 0), "0": ("", 0), "1": ("", 0), "": None}


def test_a_call_belongs_to_the_sample_and_step_that_were_set(file: Path) -> None:
    model = Adding(1)

    with record(model, file) as recording:
        for recording.sample in range(2):
            for recording.step in range(3):
                model(torch.zeros(1))

    calls = Archive.open(file).manifest.calls
    assert [(call.sample, call.step) for call in calls] == [
        (sample, step) for sample in range(2) for step in range(3)
    ]


def test_the_time_of_a_call_does_not_count_what_its_hooks_take(file: Path) -> None:
    model = nn.Sequential(Returning(), Returning())
    given = torch.zeros(8_000_000)

    with record(model, file):
        for _ in range(5):
            model(given)

    seconds = [call.seconds for call in calls_of(Archive.open(file), "")]
    fastest = min(taken for taken in seconds if taken is not None)
    assert 0 <= fastest < 0.002  # digests of 128 MB take ten times as long


def test_a_recursive_module_is_recorded_call_by_call(file: Path) -> None:
    class Countdown(nn.Module):
        def forward(self, number: int) -> int:
            return number if number == 0 else self(number - 1) + 1

    archive = recorded(Countdown(), file, 3)

    calls = archive.manifest.calls
    assert [call.index for call in calls] == [3, 2, 1, 0]
    assert [call.tree("output") for call in calls] == [ValueLeaf.of(n) for n in range(4)]
    assert [call.parent for call in calls] == [("", 2), ("", 1), ("", 0), None]


def test_a_shared_module_is_recorded_once_a_call_and_names_its_aliases(file: Path) -> None:
    shared = Adding(1)
    model = nn.Sequential(shared, nn.Sequential(shared), shared)

    archive = recorded(model, file, torch.zeros(1))

    assert len(calls_of(archive, "0")) == 3
    (entry,) = [module for module in archive.manifest.modules if module.name == "0"]
    assert (entry.aliases, entry.calls) == (("1.0", "2"), 3)


def test_the_inputs_of_each_outermost_call_are_stored_with_their_digest(file: Path) -> None:
    model = nn.Sequential(Adding(1))

    with record(model, file):
        model(torch.zeros(2))
        model(torch.zeros(2))
        model(torch.ones(2))

    calls = Archive.open(file).manifest.inputs.root_calls
    assert [(call.module, call.index) for call in calls] == [("", 0), ("", 1), ("", 2)]
    assert calls[0].digest == calls[1].digest != calls[2].digest


def test_the_model_is_told_by_class_dtype_mode_and_weights(file: Path) -> None:
    model = seeded(Mlp).double().train()

    with record(model, file, variant="fp"):
        model(torch.zeros(1, 4).double())

    info = Archive.open(file).manifest.model
    assert (info.class_name, info.dtype, info.training) == ("Mlp", "float64", True)
    assert info.weights_digest is not None


def test_only_float_weights_tell_the_model(file: Path) -> None:
    model = seeded(Mlp)
    digests = []
    for variant in ("fp", "fp", "quant"):
        with record(model, file, variant=variant, overwrite=True):
            model(torch.zeros(1, 4))
        digests.append(Archive.open(file).manifest.model.weights_digest)

    assert digests[0] == digests[1] is not None
    assert digests[2] is None


def test_inplace_relu_does_not_change_what_was_recorded(file: Path) -> None:
    model = seeded(Mlp)
    given = torch.randn(3, 4)
    with torch.no_grad():
        before = model.up(given)

    archive = recorded(model, file, given)

    assert before.min() < 0
    assert torch.equal(only(tensors_of(archive, "up")), before)
    assert torch.equal(only(tensors_of(archive, "act", "inputs")), before)
    assert torch.equal(only(tensors_of(archive, "act")), before.relu())


@pytest.mark.parametrize(
    "change",
    [
        lambda hidden: hidden.add_(1),
        lambda hidden: hidden.data.mul_(2),
        lambda hidden: hidden.__setitem__(0, 7),
        lambda hidden: hidden.numpy().__setitem__(0, 7),
        lambda hidden: hidden.resize_(1),
        lambda hidden: hidden.set_(torch.ones(5)),
    ],
    ids=["add_", "data.mul_", "setitem", "numpy", "resize_", "set_"],
)
def test_inputs_are_taken_before_the_call_and_outputs_after_it(
    file: Path, change: Callable[[Tensor], object]
) -> None:
    class Changing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            change(hidden)
            return hidden

    given = torch.arange(3.0)

    archive = recorded(Changing(), file, given)

    assert only(tensors_of(archive, "", "inputs")).tolist() == [0, 1, 2]
    assert torch.equal(only(tensors_of(archive, "")), given)


def test_a_residual_added_in_place_leaves_the_outputs_before_it(file: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Returning()

        def forward(self, hidden: Tensor) -> Tensor:
            hidden = self.inner(hidden * 2)
            hidden += 1
            return hidden

    archive = recorded(Residual(), file, torch.zeros(2))

    assert only(tensors_of(archive, "inner")).tolist() == [0, 0]
    assert only(tensors_of(archive, "")).tolist() == [1, 1]


def test_a_list_that_a_module_changes_is_recorded_as_it_was_given(file: Path) -> None:
    class Appending(nn.Module):
        def forward(self, hidden: list[Tensor]) -> list[Tensor]:
            hidden.append(hidden[0] + 1)
            return hidden

    archive = recorded(Appending(), file, [torch.zeros(1)])

    assert list(tensors_of(archive, "", "inputs")) == ["inputs.0.0"]
    assert list(tensors_of(archive, "")) == ["output.0", "output.1"]


def test_modules_are_counted_and_the_reasons_given(file: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Adding(1), Adding(2)])
            self.unused = Adding(3)

        def forward(self, hidden: Tensor) -> object:
            return self.layers[1](self.layers[0](hidden))

    report = report_of(Model(), file, torch.zeros(1), exclude=["layers.1"])

    assert (report.registered, report.called, report.recorded) == (5, 3, 2)
    assert report.reasons == {
        CONTAINER: ("layers",),
        NEVER_CALLED: ("unused",),
        EXCLUDED: ("layers.1",),
    }
    assert report.warnings == ()
    skipped = Archive.open(file).manifest.skipped
    assert (skipped.registered, skipped.called, skipped.recorded) == (5, 3, 2)
    assert skipped.reasons == report.reasons


def test_a_report_tells_bytes_by_kind_and_distinct(file: Path) -> None:
    model = nn.Sequential(Returning())

    report = report_of(model, file, torch.zeros(10))

    assert report.bytes_by_kind == {"inputs": 80, "kwargs": 0, "output": 80}
    assert (report.calls, report.places) == (2, 4)
    assert (report.place_bytes, report.distinct_bytes) == (160, 40)
    assert (report.file, report.size) == (file, file.stat().st_size)


def test_nothing_called_is_a_warning(file: Path) -> None:
    with record(Mlp(), file) as recording:
        pass

    assert recording.report is not None
    assert recording.report.recorded == 0
    assert "no call was recorded" in recording.report.warnings[0]


def test_a_module_whose_forward_is_called_directly_is_a_warning(file: Path) -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block: Any = nn.Sequential(nn.Linear(2, 2))

        def forward(self, hidden: Tensor) -> object:
            return self.block.forward(hidden)

    report = report_of(Direct(), file, torch.zeros(1, 2))

    assert report.reasons == {BYPASSED: ("block",)}
    assert report.warnings == (f"1 module: {BYPASSED}: block",)
    assert report.called == 2  # the root and the linear layer


def test_a_module_whose_weights_are_used_directly_is_a_warning(file: Path) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.idle = nn.Dropout()

        def forward(self, hidden: Tensor) -> Tensor:
            weight, _ = self.layers.parameters()
            return nn.functional.linear(hidden, weight)

    report = report_of(Functional(), file, torch.zeros(1, 2))

    assert report.reasons[UNCALLED_WEIGHTS] == ("layers.0",)
    assert report.reasons[NEVER_CALLED] == ("idle",)


def test_what_mamba_uses_without_calling_it_is_a_warning(file: Path) -> None:
    model, inputs = tiny_models.build("mamba")

    with record(model, file) as recording, torch.no_grad():
        model(**inputs)

    assert recording.report is not None
    assert recording.report.reasons[UNCALLED_WEIGHTS] == (
        "backbone.layers.0.mixer.conv1d",
        "backbone.layers.0.mixer.dt_proj",
        "backbone.layers.1.mixer.conv1d",
        "backbone.layers.1.mixer.dt_proj",
    )
    assert recording.report.warnings == (
        f"4 modules: {UNCALLED_WEIGHTS}: "
        "backbone.layers.*.mixer.conv1d (2), backbone.layers.*.mixer.dt_proj (2)",
    )


def test_weights_that_nothing_uses_are_told_as_those_that_are_used_directly(file: Path) -> None:
    model = Mlp()
    model.spare = nn.Linear(4, 4)

    report = report_of(model, file, torch.zeros(1, 4))

    assert report.reasons == {UNCALLED_WEIGHTS: ("spare",)}
    assert report.warnings == (f"1 module: {UNCALLED_WEIGHTS}: spare",)


def test_a_tied_weight_at_work_elsewhere_is_no_warning(file: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4, bias=False)
            self.shadow = nn.Linear(4, 4, bias=False)
            self.shadow.weight = self.head.weight

        def forward(self, hidden: Tensor) -> object:
            return self.head(hidden)

    report = report_of(Tied(), file, torch.zeros(1, 4))

    assert report.reasons == {NEVER_CALLED: ("shadow",)}
    assert report.warnings == ()


def test_a_module_created_during_forward_is_counted_and_seen_from_the_next_root_call(
    file: Path,
) -> None:
    class Lazy(nn.Module):
        def forward(self, hidden: Tensor) -> object:
            if not hasattr(self, "late"):
                self.late = Adding(1)
            return self.late(hidden)

    model = Lazy()
    once = report_of(Lazy(), file, torch.zeros(1))
    with record(model, file, overwrite=True) as recording:
        model(torch.zeros(1))
        model(torch.zeros(1))

    assert once.reasons == {UNSEEN: ("late",)}
    assert UNSEEN in once.warnings[0]
    assert recording.report is not None
    assert recording.report.reasons == {}
    assert modules_of(Archive.open(file)) == ["", "late", ""]
    assert hooks_on(model) == 0


def test_a_lazy_layer_is_recorded_with_the_weights_that_it_makes(file: Path) -> None:
    archive = recorded(nn.Sequential(nn.LazyLinear(3)), file, torch.ones(1, 2))

    assert only(tensors_of(archive, "0")).shape == (1, 3)


def test_a_module_with_a_forward_of_its_own_is_no_mere_container(file: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patched = nn.Module()
            self.patched.forward = lambda hidden: hidden + 1

        def forward(self, hidden: Tensor) -> object:
            return self.patched(hidden)

    archive = recorded(Model(), file, torch.zeros(1))

    assert modules_of(archive) == ["patched", ""]


def test_patterns_choose_what_is_recorded(file: Path) -> None:
    model = nn.Sequential(Adding(1), nn.Sequential(Adding(2), Adding(3)))

    with record(model, file, include=["1*"], exclude=["1.0"]):
        model(torch.zeros(1))

    assert modules_of(Archive.open(file)) == ["1.1", "1"]


def test_an_exact_name_comes_before_a_pattern(file: Path) -> None:
    model = nn.Sequential()
    for name in ("m[0]", "m0"):
        model.add_module(name, Adding(1))

    with record(model, file, include=["m[0]"]):
        model(torch.zeros(1))

    assert modules_of(Archive.open(file)) == ["m[0]"]


def test_a_shared_module_is_chosen_by_any_of_its_names(file: Path) -> None:
    shared = Adding(1)
    model = nn.Sequential(shared, shared)

    with record(model, file, include=["1"]):
        model(torch.zeros(1))

    assert modules_of(Archive.open(file)) == ["0", "0"]


def test_the_parent_of_a_call_is_the_nearest_recorded_one(file: Path) -> None:
    model = nn.Sequential(nn.Sequential(Adding(1)))

    with record(model, file, exclude=["0"]):
        model(torch.zeros(1))

    assert calls_of(Archive.open(file), "0.0")[0].parent == ("", 0)


@pytest.mark.parametrize(
    ("option", "options"), [("include", [["layer.*"], []]), ("exclude", [[], ["layer.*"]])]
)
def test_a_pattern_that_fits_nothing_is_an_error_and_leaves_nothing(
    file: Path, option: str, options: list[list[str]]
) -> None:
    model = Mlp()

    with (
        pytest.raises(UsageError, match=f"--{option} 'layer.\\*': matches none of 4 modules"),
        record(model, file, include=options[0], exclude=options[1]),
    ):
        pass

    assert hooks_on(model) == 0
    assert not list(file.parent.iterdir())


def test_a_pattern_given_as_one_text_is_an_error(file: Path) -> None:
    with pytest.raises(UsageError, match=r"include: .*\['up'\]"):
        record(Mlp(), file, include="up")


def test_inputs_and_kwargs_can_be_left_out_but_for_those_of_root_calls(file: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Masking()

        def forward(self, hidden: Tensor, *, mask: Tensor) -> object:
            return self.inner(hidden + 1, mask=mask + 1)

    class Masking(nn.Module):
        def forward(self, hidden: Tensor, *, mask: Tensor) -> Tensor:
            return hidden * mask

    model = Model()
    with record(model, file, inputs=False, kwargs=False):
        model(torch.ones(1), mask=torch.zeros(1))

    with Archive.open(file) as archive:
        assert all(call.inputs is None and call.kwargs is None for call in archive.manifest.calls)
        assert [entry.key for entry in archive.manifest.tensors] == [
            "#0/inputs.0",
            "#0/kwargs.mask",
            "inner#0/output",
        ]
        (root,) = archive.manifest.inputs.root_calls
        inputs, kwargs = root.input_trees()
        assert isinstance(dict(leaves(inputs, "inputs"))["inputs.0"], TensorLeaf)
        assert isinstance(dict(leaves(kwargs, "kwargs"))["kwargs.mask"], TensorLeaf)


def test_the_inputs_of_root_calls_are_stored_whatever_the_filters(file: Path) -> None:
    model = nn.Sequential(Adding(1))

    with record(model, file, include=["0"], inputs=False):
        model(torch.ones(1))

    with Archive.open(file) as archive:
        assert modules_of(archive) == ["0"]
        (root,) = archive.manifest.inputs.root_calls
        assert [path for path, _ in leaves(root.input_trees()[0], "inputs")] == ["inputs.0"]


@pytest.mark.parametrize("name", ["llama", "bert", "qwen3_vl"])
def test_a_dry_run_writes_nothing_and_knows_the_size(file: Path, name: str) -> None:
    model, inputs = tiny_models.build(name)
    with torch.no_grad():
        with Recording(model, None, RecordOptions(dry_run=True)) as dry:
            model(**inputs)
        assert not list(file.parent.iterdir())
        with Recording(model, file, RecordOptions()) as real:
            model(**inputs)

    assert dry.report is not None
    assert real.report is not None
    assert dry.report.file is None
    assert dry.report.size == pytest.approx(real.report.size, rel=0.001)
    assert dry.report.distinct_bytes == real.report.distinct_bytes
    assert dry.report.bytes_by_kind == real.report.bytes_by_kind


def test_a_dry_run_knows_the_size_of_a_header_that_outgrows_its_reserve(file: Path) -> None:
    class Scattering(nn.Module):
        def forward(self, hidden: Tensor) -> list[Tensor]:
            return [hidden + number for number in range(600)]

    sizes = []
    for dry_run in (True, False):
        model = Scattering()
        with Recording(model, file, RecordOptions(dry_run=dry_run)) as recording:
            model(torch.zeros(2))
        assert recording.report is not None
        sizes.append(recording.report.size)

    assert sizes[0] == pytest.approx(sizes[1], rel=0.001)


def test_progress_is_told_while_modules_return(file: Path, monkeypatch: Any) -> None:
    told: list[Progress] = []
    monkeypatch.setattr("qvtrace.recording.calls._PROGRESS_SECONDS", 0)
    model = nn.Sequential(Adding(1), Adding(2))

    with Recording(model, file, RecordOptions(progress=told.append)):
        model(torch.zeros(10))

    assert [progress.modules_done for progress in told] == [2, 3, 3]
    assert {progress.modules_total for progress in told} == {3}
    assert told[-1].bytes_written == 120


def test_filters_that_leave_nothing_are_not_taken_for_a_model_that_did_not_run(file: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with record(model, file, exclude=["*"]) as recording:
        model(torch.ones(1, 2))

    assert recording.report is not None
    (warning,) = recording.report.warnings
    assert warning.startswith("no call was recorded: --include and --exclude leave")


def test_a_module_that_replaces_another_one_goes_on_with_its_count(file: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with record(model, file) as recording:
        model(torch.ones(1, 2))
        model[0] = nn.Linear(2, 2)
        model(torch.ones(1, 2))

    assert recording.report is not None
    assert (recording.report.called, recording.report.recorded) == (2, 2)
    with Archive.open(file) as archive:
        calls = [(call.module, call.index) for call in archive.manifest.calls]
    assert calls == [("0", 0), ("", 0), ("0", 1), ("", 1)]


def test_a_token_in_what_the_model_raised_is_not_written(file: Path) -> None:
    class Refused(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            raise RuntimeError("401 for hf_ABCDEFGHIJKLMN12345")

    with pytest.raises(RuntimeError), record(Refused(), file):
        Refused.forward(Refused(), torch.ones(1))

    assert b"hf_ABCDEFGHIJKLMN12345" not in file.with_name("fp.st.partial").read_bytes()


@pytest.mark.parametrize("name", ["", "0.weights"], ids=["root", "dotted"])
def test_two_modules_of_one_name_are_refused(file, name):
    model = nn.Sequential(nn.ModuleDict({"weights": nn.Linear(2, 2)}), nn.Identity())
    model._modules[name] = nn.Identity()

    with pytest.raises(ModelError, match=r"is the name of two modules, .* and Identity"):
        record(model, file).__enter__()

    assert not list(file.parent.iterdir())
