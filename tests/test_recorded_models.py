"""A recorded model does not notice it, whatever it does and whatever others did to it."""

import contextlib
import copy
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from recordings import (
    Adding,
    Mlp,
    Raising,
    Returning,
    calls_of,
    container,
    hooks_on,
    modules_of,
    only,
    recorded,
    seeded,
    tensors_of,
    tree_of,
)
from torch import Tensor, nn

from qvtrace.archive import Archive, ArchiveWriter, writer
from qvtrace.errors import ArchiveError, ExistingFileError, RecordingError, UsageError
from qvtrace.recording.recorder import record
from qvtrace.recording.skips import BYPASSED, UNCALLED_WEIGHTS
from qvtrace.trees import OpaqueLeaf


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_a_recorded_model_gives_the_same_output_and_keeps_no_hook(file: Path, name: str) -> None:
    model, inputs = tiny_models.build(name)
    with torch.no_grad():
        bare = model(**inputs)

        with record(model, file) as recording:
            output = model(**inputs)

    assert type(output) is type(bare)
    for field in bare:
        assert_equal(output[field], bare[field])
    assert hooks_on(model) == 0
    report = recording.report
    assert report is not None
    assert report.recorded == report.called > 10
    assert report.opaque == {}
    assert BYPASSED not in report.reasons
    assert (UNCALLED_WEIGHTS in report.reasons) == (name == "mamba")
    with Archive.open(file) as archive:
        assert not list(archive.damaged_tensors())
        assert calls_of(archive, "")[0].error is None


def assert_equal(value: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, tuple):
        for one, other in zip(value, expected, strict=True):
            assert_equal(one, other)
    else:
        assert type(value) is type(expected)


def test_an_output_is_the_very_object_that_the_module_returned(file: Path) -> None:
    value = {"a": [torch.ones(1)], "b": iter([1])}

    with record(model := Returning(), file):
        assert model(value) is value


def test_gradients_flow_as_without_a_recording(file: Path) -> None:
    model, given = seeded(Mlp), torch.randn(3, 4)
    model(given).sum().backward()
    expected = [gradient_of(parameter) for parameter in model.parameters()]
    model.zero_grad()

    with record(model, file):
        model(given).sum().backward()

    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(gradient_of(parameter), gradient)


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_mode_of_autograd_is_recorded(file: Path, mode: Callable[[], Any]) -> None:
    model, given = seeded(Mlp), torch.randn(3, 4)

    with record(model, file), mode():
        output = model(given)
        assert output.is_inference() == (mode is torch.inference_mode)
        assert output.requires_grad == (mode is torch.enable_grad)

    with Archive.open(file) as archive:
        assert torch.equal(only(tensors_of(archive, "")), output.detach().clone())


def test_the_random_numbers_of_a_model_stay_the_same(file: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    torch.manual_seed(1)
    expected = model(torch.ones(50))

    torch.manual_seed(1)
    with record(model, file):
        output = model(torch.ones(50))

    assert torch.equal(output, expected)


def test_hooks_of_others_stay_and_what_they_return_is_recorded(file: Path) -> None:
    model = Adding(1)
    handle = model.register_forward_hook(lambda module, args, output: output * 10)

    archive = recorded(model, file, torch.zeros(1))

    assert only(tensors_of(archive, "")).item() == 10
    assert hooks_on(model) == 1
    handle.remove()


def test_a_model_that_raises_is_closed_as_partial_with_the_reason(file: Path) -> None:
    model = nn.Sequential(Adding(1), Raising(ValueError("boom\nmore")))

    with pytest.raises(ValueError, match="boom"), record(model, file) as recording:
        model(torch.zeros(1))

    assert not file.exists()
    assert hooks_on(model) == 0
    assert recording.report is not None
    assert not recording.report.complete
    with Archive.open(f"{file}.partial") as archive:
        assert (archive.manifest.complete, archive.manifest.error) == (False, "ValueError: boom")
        assert [(call.module, call.error) for call in archive.manifest.calls] == [
            ("0", None),
            ("1", "ValueError: boom"),
            ("", "ValueError: boom"),
        ]
        assert tensors_of(archive, "1", "inputs")["inputs.0"].item() == 1


def test_an_exception_that_cannot_even_be_described_goes_on_its_way(file: Path) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    model = Raising(MuteError())

    with pytest.raises(MuteError), record(model, file):
        model(torch.zeros(1))

    assert Archive.open(f"{file}.partial").manifest.error == "MuteError"


def test_an_exception_that_the_parent_catches_is_noted_at_the_child_only(file: Path) -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Raising(ValueError("boom"))
            self.after = Adding(1)

        def forward(self, hidden: Tensor) -> object:
            try:
                self.inner(hidden)
            except ValueError:
                return self.after(hidden)
            raise AssertionError

    archive = recorded(Catching(), file, torch.zeros(1))

    errors = {call.module: call.error for call in archive.manifest.calls}
    assert errors == {"inner": "ValueError: boom", "after": None, "": None}
    assert archive.manifest.complete


def test_a_call_within_an_except_block_is_no_call_that_raised(file: Path) -> None:
    model = Adding(1)

    with record(model, file):
        try:
            raise ValueError("before")
        except ValueError:
            model(torch.zeros(1))

    assert calls_of(Archive.open(file), "")[0].error is None


def test_ctrl_c_closes_what_there_is_and_goes_on_its_way(file: Path) -> None:
    class Interrupted(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            signal.raise_signal(signal.SIGINT)
            return hidden

    model = nn.Sequential(Adding(1), Interrupted())

    with pytest.raises(KeyboardInterrupt), record(model, file):
        model(torch.zeros(1))

    assert hooks_on(model) == 0
    assert [path.name for path in file.parent.iterdir()] == ["fp.st.partial"]
    with Archive.open(f"{file}.partial") as archive:
        assert archive.manifest.error == "KeyboardInterrupt"
        errors = {call.module: call.error for call in archive.manifest.calls}
        assert errors == {"0": None, "": "did not return", "1": "did not return"}


def test_ctrl_c_in_the_middle_of_writing_leaves_a_readable_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a write it comes: before, or when the bytes are already there."""
    for late in (False, True):
        for write in range(12):
            interrupt_at(write, late, file, monkeypatch)

            with Archive.open(f"{file}.partial") as archive:
                assert not list(archive.damaged_tensors())
                assert archive.manifest.error == "KeyboardInterrupt"


def interrupt_at(number: int, late: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Adding(1), Adding(2), Adding(3))
    real, left = os.write, [number]

    def write(descriptor: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] >= 0 or left[0] < -1:
            return real(descriptor, data)
        if late:
            real(descriptor, data)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), record(model, file, overwrite=True):
        monkeypatch.setattr(os, "write", write)
        try:
            model(torch.zeros(3))
        finally:
            monkeypatch.undo()


def test_a_writer_that_fails_ends_the_recording_and_not_the_forward(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(Adding(1), Adding(2))
    monkeypatch.setattr(writer, "MAX_HEADER_BYTES", (1 << 20) + 100)

    with pytest.raises(RecordingError, match=r"ended early: .*more tensors than"):  # noqa: SIM117
        with record(model, file):
            assert model(torch.zeros(1)).item() == 3

    assert hooks_on(model) == 0
    assert not Archive.open(f"{file}.partial").manifest.complete


def test_more_calls_than_a_reader_takes_in_end_the_recording(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(Adding(1), Adding(2))
    monkeypatch.setattr(writer, "MAX_MANIFEST_NODES", (1 << 20) + 100)

    with pytest.raises(RecordingError, match="more calls than an archive can hold"):  # noqa: SIM117
        with record(model, file):
            assert model(torch.zeros(1)).item() == 3

    assert Archive.open(f"{file}.partial").manifest.calls


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_writer(file: Path) -> None:
    model = Adding(1)

    with pytest.raises(ValueError, match="mine") as caught, record(model, file):
        model(torch.zeros(1))
        Path(f"{file}.partial.journal").unlink()  # without it the file cannot be finished
        raise ValueError("mine")

    (note,) = caught.value.__notes__
    assert "fp.st.partial: cannot be finished" in note


def test_recording_twice_in_a_row_gives_two_whole_archives(tmp_path: Path) -> None:
    model = seeded(Mlp)

    for name in ("one.st", "two.st"):
        archive = recorded(model, tmp_path / name, torch.ones(1, 4))
        assert len(archive.manifest.calls) == 4
        assert hooks_on(model) == 0


def test_two_recordings_of_one_model_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    model = seeded(Mlp)

    with record(model, tmp_path / "outer.st"), torch.no_grad():
        model(torch.zeros(1, 4))
        with record(model, tmp_path / "inner.st"):
            model(torch.ones(1, 4))

    outer, inner = (Archive.open(tmp_path / name) for name in ("outer.st", "inner.st"))
    assert (len(outer.manifest.calls), len(inner.manifest.calls)) == (8, 4)
    last = only(tensors_of(outer, "", "output", 1))
    assert torch.equal(last, only(tensors_of(inner, "")))


def test_a_recording_runs_once(file: Path) -> None:
    recording = record(Mlp(), file)
    with recording:
        pass

    with pytest.raises(UsageError, match="a recording runs once"), recording:
        pass


def test_only_a_module_can_be_recorded(file: Path) -> None:
    with pytest.raises(UsageError, match=r"model: is function; .*torch\.nn\.Module"):
        record(lambda hidden: hidden, file)  # type: ignore[arg-type]


def test_a_refused_file_leaves_no_hook(file: Path) -> None:
    file.write_text("precious")
    model = Mlp()

    with pytest.raises(ExistingFileError), record(model, file):
        pass

    assert hooks_on(model) == 0


def test_two_threads_at_once_are_recorded_whole(file: Path) -> None:
    model = nn.Sequential(Adding(1), nn.Sequential(Adding(10)))

    def run(thread: int) -> None:
        for number in range(25):
            model(torch.full((100,), 1000.0 * thread + number))

    with record(model, file):
        threads = [threading.Thread(target=run, args=[number]) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    archive = Archive.open(file)
    assert not list(archive.damaged_tensors())
    given = set()
    for module, added in {"": 11, "0": 1, "1": 10, "1.0": 10}.items():
        calls = calls_of(archive, module)
        assert [call.index for call in calls] == list(range(50))
        for index in range(50):
            before = only(tensors_of(archive, module, "inputs", index))
            after = only(tensors_of(archive, module, "output", index))
            assert torch.equal(after, before + added)
            given.add((module, float(before[0])))
    assert len(given) == 200
    by_call = {(call.module, call.index): call for call in archive.manifest.calls}
    for call in calls_of(archive, "0"):
        assert call.parent is not None
        assert by_call[call.parent].inputs == call.inputs


def test_a_thread_that_outlives_the_recording_writes_nowhere(file: Path) -> None:
    model = Waiting()
    thread = threading.Thread(target=model, args=[torch.zeros(1)])

    with record(model, file):
        thread.start()
        model.entered.wait(10)
    model.leave.set()
    thread.join()

    with Archive.open(file) as archive:
        assert [call.error for call in archive.manifest.calls] == ["did not return"]


class Slow(Mapping[str, Tensor]):
    """An output that is looked at slowly."""

    def __init__(self) -> None:
        self.looked_at, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, key: str) -> Tensor:
        return torch.full((5,), 7.0)

    def __iter__(self) -> Iterator[str]:
        self.looked_at.set()
        self.go_on.wait(10)
        return iter(["late"])

    def __len__(self) -> int:
        return 1


def test_a_hook_that_outlives_the_recording_writes_to_no_other_file(
    file: Path, tmp_path: Path
) -> None:
    class Model(nn.Module):
        def forward(self, value: Tensor) -> Slow:
            return output

    model, output = Model(), Slow()
    thread = threading.Thread(target=model, args=[torch.zeros(1)])
    with record(model, file):
        thread.start()
        output.looked_at.wait(10)
    others = [(tmp_path / f"other{number}").open("w+b", buffering=0) for number in range(5)]
    output.go_on.set()
    thread.join()

    assert [os.fstat(other.fileno()).st_size for other in others] == [0] * 5
    for other in others:
        other.close()
    with Archive.open(file) as archive:
        assert [call.error for call in archive.manifest.calls] == ["did not return"]


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entered, self.leave = threading.Event(), threading.Event()

    def forward(self, hidden: Tensor) -> Tensor:
        self.entered.set()
        self.leave.wait(10)
        return hidden


def test_a_copy_made_while_recording_is_not_taken_for_the_model(file: Path) -> None:
    model = seeded(Mlp)

    with record(model, file), torch.no_grad():
        replica = copy.deepcopy(model)
        replica(torch.zeros(1, 4))
        model(torch.ones(1, 4))
        replica(torch.zeros(1, 4))

    archive = Archive.open(file)
    assert modules_of(archive) == ["up", "act", "down", ""]
    assert only(tensors_of(archive, "", "inputs")).max() == 1


def test_a_compiled_model_is_recorded_eagerly(file: Path) -> None:
    model, given = seeded(Mlp), torch.randn(3, 4)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = compiled(given)

    archive = recorded(compiled, file, given)

    assert set(modules_of(archive)) == {
        "_orig_mod.up",
        "_orig_mod.act",
        "_orig_mod.down",
        "_orig_mod",
        "",
    }
    assert torch.equal(only(tensors_of(archive, "")), expected)
    assert hooks_on(compiled) == 0


def test_a_model_that_compiles_itself_is_recorded_eagerly(file: Path) -> None:
    model, given = seeded(Mlp), torch.randn(3, 4)
    model.compile(backend="eager")
    with torch.no_grad():
        expected = model(given)

    archive = recorded(model, file, given)

    assert modules_of(archive) == ["up", "act", "down", ""]
    assert torch.equal(only(tensors_of(archive, "")), expected)


def test_what_was_compiled_is_compiled_again_after_the_recording(file: Path) -> None:
    seen: list[str] = []

    def backend(graph: Any, inputs: object) -> Any:
        seen.append("compiled")
        return graph.forward

    model, given = nn.Sequential(Adding(1)), torch.zeros(2)
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        recorded(compiled, file, given)
        during = len(seen)
        compiled(given)

    assert during == 0
    assert len(seen) > 0


def test_a_scripted_model_is_recorded_at_its_root(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give it up
        model = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))

    archive = recorded(model, file, torch.ones(1, 2))

    assert modules_of(archive) == [""]
    assert not len(model._forward_hooks)


def test_a_quantized_model_is_recorded_like_its_original(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports that are not ours
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    model, given = seeded(Mlp), torch.randn(3, 4)
    names = modules_of(recorded(model, file, given))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        expected = model(given)

    archive = recorded(model, file, given)

    assert modules_of(archive) == names
    assert torch.equal(only(tensors_of(archive, "")), expected)
    assert archive.manifest.skipped.opaque == {}


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_a_model_whose_weights_are_offloaded_is_recorded(
    file: Path, tmp_path: Path, offload: str
) -> None:
    import accelerate

    model, given = seeded(Mlp), torch.randn(3, 4)
    with torch.no_grad():
        expected = model(given)
    places = [tmp_path / "weights"] if offload == "disk_offload" else []
    getattr(accelerate, offload)(model, *places, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta

    with record(model, file, variant="fp"), torch.no_grad():
        model(given)

    archive = Archive.open(file)
    assert modules_of(archive) == ["up", "act", "down", ""]
    assert torch.equal(only(tensors_of(archive, "")), expected)
    assert archive.manifest.model.weights_digest is None


def test_a_model_on_the_meta_device_is_recorded_by_its_structure(file: Path) -> None:
    model = Mlp().to("meta")

    archive = recorded(model, file, torch.zeros(1, 4, device="meta"))

    assert modules_of(archive) == ["up", "act", "down", ""]
    assert tree_of(archive, "") == OpaqueLeaf("Tensor", "on the meta device, without data")
    assert archive.manifest.skipped.opaque == {"Tensor: on the meta device, without data": 8}


def test_a_cache_is_recorded_at_every_step_by_its_length(file: Path) -> None:
    model, inputs = tiny_models.build("llama")

    with record(model, file) as recording, torch.no_grad():
        output = model(**inputs, use_cache=True)
        recording.step = 1
        model(torch.tensor([[5]]), past_key_values=output.past_key_values, use_cache=True)

    archive = Archive.open(file)
    lengths = []
    for index in range(2):
        kwargs = container(tree_of(archive, "model.layers.0.self_attn", "kwargs", index))
        lengths.append(container(dict(kwargs.items)["past_key_values"]).length)
    assert lengths == [0, inputs["input_ids"].shape[1]]


def test_ctrl_c_while_the_archive_is_closed_waits_until_it_is_whole(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = ArchiveWriter.close

    def close_while_pressed(writer: ArchiveWriter, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return close(writer, *arguments)

    monkeypatch.setattr(ArchiveWriter, "close", close_while_pressed)
    model = nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), record(model, file):
        model(torch.ones(1, 2))

    with Archive.open(file) as archive:
        assert archive.manifest.complete


class Moody(Mlp):
    """Raises at one thing that it is asked for."""

    mood = ""

    @property
    def config(self) -> Any:
        if self.mood == "config":
            raise RuntimeError("no configuration today")
        if self.mood == "to_dict":
            return Config()
        raise AttributeError("config")

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        if self.mood == "state_dict":
            raise KeyError("weights")
        return super().state_dict(*arguments, **keywords)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        if self.mood == "parameters":
            raise OSError("disk gone")
        return super().parameters(recurse)

    def __getattr__(self, name: str) -> Any:
        if self.mood == "__getattr__" and name not in ("up", "act", "down"):
            raise ZeroDivisionError(name)
        return super().__getattr__(name)


class Config:
    def to_dict(self) -> Any:
        raise LookupError("half a configuration")


@pytest.mark.parametrize(
    ("mood", "warnings"),
    [
        (
            "config",
            (
                "configuration unknown: the model raised RuntimeError: no configuration today",
                "attention implementation unknown: the model raised RuntimeError: no configuration "
                "today",
            ),
        ),
        (
            "to_dict",
            ("configuration unknown: the model raised LookupError: half a configuration",),
        ),
        ("state_dict", ("float weights unknown: the model raised KeyError: 'weights'",)),
        (
            "parameters",
            (
                "dtype unknown: the model raised OSError: disk gone",
                "device unknown: the model raised OSError: disk gone",
            ),
        ),
        (
            "__getattr__",
            (
                "configuration unknown: the model raised ZeroDivisionError: config",
                "attention implementation unknown: the model raised ZeroDivisionError: config",
            ),
        ),
    ],
)
def test_a_model_that_raises_when_it_is_asked_about_itself_is_recorded_all_the_same(
    file: Path, mood: str, warnings: tuple[str, ...]
) -> None:
    model = seeded(Moody)
    model.mood = mood

    with record(model, file, variant="fp") as recording, torch.no_grad():
        model(torch.ones(1, 4))

    assert recording.report is not None
    assert recording.report.warnings == warnings
    with Archive.open(file) as archive:
        assert modules_of(archive) == ["up", "act", "down", ""]
        assert archive.manifest.skipped.warnings == warnings
        assert archive.manifest.complete
        known = archive.manifest.model
        assert (known.weights_digest is None) == (mood == "state_dict")
        assert (known.dtype is None) == (mood == "parameters")


def test_a_value_that_raises_what_a_full_disk_raises_does_not_end_the_recording(file: Path) -> None:
    class Gone(Mapping[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            raise OSError(28, "No space left on device")

        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    archive = recorded(Returning(), file, [Gone(), torch.ones(1)])

    assert archive.manifest.complete
    value, tensor = container(tree_of(archive, "")).items
    assert value[1] == OpaqueLeaf("Gone", "[Errno 28] No space left on device")
    assert tensors_of(archive, "")["output.1"].tolist() == [1]
    assert tensor[0] == "1"


def test_copies_and_pickles_of_a_recorded_model_neither_fail_nor_record(
    file: Path, tmp_path: Path
) -> None:
    model, given = seeded(Mlp), torch.ones(1, 4)
    with record(model, file), torch.no_grad():
        expected = model(given)
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)

    for again in (copied, loaded):
        with torch.no_grad():
            assert torch.equal(again(given), expected)
        with pytest.raises(RuntimeError, match="shapes"):
            again(torch.ones(1, 3))
        for module in again.modules():
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                assert hook.__module__ == "contextlib"
    archive = recorded(loaded, tmp_path / "again.st", given)
    assert modules_of(archive) == ["up", "act", "down", ""]
    assert len(Archive.open(file).manifest.calls) == 4


@pytest.mark.parametrize("ending", ["whole", "raised"])
def test_a_relative_name_is_of_the_folder_where_the_block_was_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = Adding(1) if ending == "whole" else Raising(ValueError("boom"))

    recording = record(model, "sub/fp.st")
    with contextlib.suppress(ValueError), recording:
        os.chdir(tmp_path / "there")
        model(torch.zeros(1))

    assert not list((tmp_path / "there").iterdir())
    left = sorted(path.name for path in (tmp_path / "here" / "sub").iterdir())
    whole = ending == "whole"
    assert left == (["fp.manifest.json", "fp.st"] if whole else ["fp.st.partial"])
    assert recording.report is not None
    assert recording.report.file == Path("sub/fp.st" if whole else "sub/fp.st.partial")
    with Archive.open(tmp_path / "here" / "sub" / left[-1]) as archive:
        assert len(archive.manifest.calls) == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["folder.st", ".", "", "folder.st/.."])
def test_a_folder_is_refused_when_the_block_is_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    (tmp_path / "folder.st").mkdir()
    monkeypatch.chdir(tmp_path)
    model = Mlp()

    with (
        pytest.raises(ArchiveError, match=r": is a folder; name a file in it, such as .*fp\.st$"),
        record(model, name, overwrite=overwrite),
    ):
        pass

    assert hooks_on(model) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder.st"]
    assert not list((tmp_path / "folder.st").iterdir())


def test_a_name_that_ends_as_that_of_a_folder_is_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ArchiveError, match=r"new/: is a folder; name a file in it$"),
        record(Mlp(), f"{tmp_path}/new/"),
    ):
        pass

    assert not list(tmp_path.iterdir())
