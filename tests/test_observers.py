"""Who watches a recording sees every call, and neither the model nor the archive notices."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import (
    Adding,
    Mlp,
    Raising,
    Returning,
    calls_of,
    hooks_on,
    modules_of,
    only,
    seeded,
    tensors_of,
)
from torch import Tensor, nn

import qvtrace
from qvtrace.archive import Archive
from qvtrace.errors import RecordingError, UsageError
from qvtrace.observers import ObservedCall, Observer
from qvtrace.observers.breaking import BreakAt
from qvtrace.observers.printing import PrintCalls
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording, record
from qvtrace.reports.call_json import call_lines
from qvtrace.reports.trace import Selection, Trace


class Noting(Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def begin(self, names: Collection[str]) -> None:
        self.told.append(("begin", sorted(names)))

    def before(self, call: ObservedCall) -> None:
        self.told.append(("before", call.name, call.index))

    def after(self, call: ObservedCall) -> None:
        self.told.append(("after", call.name, call.index, call.error))


class Failing(Observer):
    """Raises when it is told of a call."""

    def before(self, call: ObservedCall) -> None:
        raise ValueError("out of sorts")


class Full(io.StringIO):
    """A stream on a full disk, or whatever else it raises."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def lines_of(text: str) -> list[Any]:
    """Each line as strict JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def printed(model: nn.Module, file: Path, *inputs: Any, **options: Any) -> list[Any]:
    """What is printed of one forward."""
    stream = io.StringIO()
    printer = PrintCalls(stream, **options)
    with record(model, file, overwrite=True, observers=[printer]), torch.no_grad():
        model(*inputs)
    return lines_of(stream.getvalue())


def shown(file: Path, values: Collection[str] = (), limit: int | None = 1000) -> list[Any]:
    """What `qvtrace show --json` has of an archive."""
    with Archive.open(file) as archive:
        trace = Trace(archive, Selection.of(archive, (), tuple(values)))
        return lines_of("\n".join(call_lines(trace, limit)))


def test_observers_are_told_of_every_call_before_and_after_it(file: Path) -> None:
    model, observer = nn.Sequential(Adding(1), Adding(2)), Noting()

    with record(model, file, include=["0"], observers=[observer]):
        model(torch.zeros(1))

    assert observer.told == [
        ("begin", ["", "0", "1"]),
        ("before", "", 0),
        ("before", "0", 0),
        ("after", "0", 0, None),
        ("before", "1", 0),
        ("after", "1", 0, None),
        ("after", "", 0, None),
    ]
    assert hooks_on(model) == 0


def test_an_observer_is_told_what_ended_a_call(file: Path) -> None:
    model, observer = nn.Sequential(Raising(RuntimeError("no luck"))), Noting()

    with pytest.raises(RuntimeError), record(model, file, observers=[observer]):
        model(torch.zeros(1))

    assert [told[-1] for told in observer.told if told[0] == "after"] == [
        "RuntimeError: no luck",
        "RuntimeError: no luck",
    ]


def test_an_observer_that_raises_is_dismissed_and_the_archive_is_whole(file: Path) -> None:
    model, other = nn.Sequential(Adding(1), Adding(2)), Noting()

    with (
        pytest.raises(RecordingError, match=r"as a whole.*Failing ended early.*out of sorts"),
        record(model, file, observers=[Failing(), other]),
    ):
        assert model(torch.zeros(1)).item() == 3

    assert Archive.open(file).manifest.complete
    assert modules_of(Archive.open(file)) == ["0", "1", ""]
    assert other.told[-1] == ("after", "", 0, None)


@pytest.mark.parametrize("observers", [Noting(), [print], "abc"], ids=["one", "function", "text"])
def test_what_is_no_observer_is_refused(file: Path, observers: Any) -> None:
    with pytest.raises(UsageError, match=r"observers: .*qvtrace\.Observer"):
        record(Mlp(), file, observers=observers)


def test_calls_are_printed_as_the_archive_shows_them(file: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()

        def forward(self, hidden: Tensor) -> object:
            hidden = self.mlp(hidden, scale=float("inf"))
            return {"hidden": (hidden, None), "nan": np.float32("nan"), "sum": hidden.sum()}

    lines = printed(Model().eval(), file, torch.randn(3, 4), values=["mlp.*"])

    assert [line["module"] for line in lines] == ["mlp.up", "mlp.act", "mlp.down", "mlp", ""]
    assert lines == shown(file, ["mlp.*"])
    assert list(lines[0]) == ["module", "type", "call", "inputs", "kwargs", "output"]
    assert lines[3]["kwargs"] == {"scale": "Infinity"}
    assert lines[4]["output"]["nan"] == {"type": "float32", "value": "NaN"}


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.5, float("nan"), float("inf"), -float("inf")]),
        torch.tensor(3),
        torch.zeros(0, 4),
        torch.tensor([True]),
        torch.tensor([1.5, -2], dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128),
        torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor(2.0).expand(3, 3),
        torch.eye(3).to_sparse(),
    ],
    ids=[
        "non-finite",
        "scalar",
        "empty",
        "bool",
        "bfloat16",
        "complex128",
        "float8",
        "transposed",
        "expanded",
        "sparse",
    ],
)
def test_tensors_of_every_kind_are_printed_as_the_archive_shows_them(
    file: Path, value: Tensor
) -> None:
    lines = printed(Returning(), file, value, values=["(root)"])

    assert lines == shown(file, ["(root)"])
    assert "values" in lines[0]["output"]


def test_values_that_are_not_finite_are_text(file: Path) -> None:
    given = torch.tensor([1.5, float("nan"), float("inf"), -float("inf")])

    (line,) = printed(Returning(), file, given, values=["(root)"])

    assert line["output"]["values"] == [1.5, "NaN", "Infinity", "-Infinity"]
    assert line["output"]["statistics"] == {
        "mean": 1.5,
        "min": 1.5,
        "max": 1.5,
        "stddev": 0.0,
        "nan": 1,
        "positive_inf": 1,
        "negative_inf": 1,
    }


def test_without_patterns_only_single_elements_are_printed(file: Path) -> None:
    model = nn.Sequential(Returning())

    line, _ = printed(model, file, [torch.ones(2), torch.ones(1, 1), torch.zeros(0)])

    assert [tensor.get("values") for tensor in line["inputs"]["0"]] == [None, [[1.0]], []]


def test_elements_are_cut_with_a_count_unless_all_are_wanted(file: Path) -> None:
    given = torch.arange(1200).reshape(2, 600)

    (cut,) = printed(Returning(), file, given, values=["(root)"])
    (whole,) = printed(Returning(), file, given, values=["(root)"], limit=None)

    assert cut["output"]["values"] == list(range(1000))
    assert cut["output"]["values_cut"] == 200
    assert whole["output"]["values"] == given.tolist()
    assert "values_cut" not in whole["output"]
    assert [whole] == shown(file, ["(root)"], limit=None)


def test_inputs_are_printed_as_they_were_before_the_call(file: Path) -> None:
    class Changing(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.add_(1)

    (line,) = printed(Changing(), file, torch.zeros(1))

    assert line["inputs"]["0"]["values"] == [0]
    assert line["output"]["values"] == [1]


def test_steps_of_a_generation_are_told_as_the_archive_shows_them(file: Path) -> None:
    model, stream = nn.Sequential(Adding(1)), io.StringIO()

    with record(model, file, observers=[PrintCalls(stream)]) as recording:
        for recording.step in range(2):
            model(torch.zeros(2))

    lines = lines_of(stream.getvalue())
    assert [line.get("step") for line in lines] == [None, None, 1, 1]
    assert lines == shown(file)


def test_only_what_is_recorded_is_printed(file: Path) -> None:
    model, stream = nn.Sequential(Adding(1), Adding(2)), io.StringIO()

    with record(model, file, include=["1"], inputs=False, observers=[PrintCalls(stream)]):
        model(torch.zeros(1))

    lines = lines_of(stream.getvalue())
    assert [(line["module"], line["inputs"]) for line in lines] == [("1", None)]
    assert lines == shown(file)


def test_a_call_that_raises_is_printed_with_its_error(file: Path) -> None:
    model, stream = nn.Sequential(Raising(RuntimeError("no luck"))), io.StringIO()

    with pytest.raises(RuntimeError), record(model, file, observers=[PrintCalls(stream)]):
        model(torch.zeros(1))

    lines = lines_of(stream.getvalue())
    assert [(line["output"], line["error"]) for line in lines] == [
        (None, "RuntimeError: no luck"),
        (None, "RuntimeError: no luck"),
    ]
    assert lines == shown(file.with_name("fp.st.partial"))


def test_a_call_that_an_outer_one_gave_up_is_printed_too(file: Path) -> None:
    class Patient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Raising(KeyboardInterrupt())

        def forward(self, hidden: Tensor) -> Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                self.inner(hidden)
            return hidden

    lines = printed(Patient(), file, torch.zeros(1))

    assert [(line["module"], line.get("error")) for line in lines] == [
        ("inner", "did not return"),
        ("", None),
    ]
    assert lines == shown(file)


def test_lines_are_printed_as_calls_return(file: Path) -> None:
    seen: list[int] = []
    stream = io.StringIO()

    class Looking(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.append(stream.getvalue().count("\n"))
            return hidden

    model = nn.Sequential(Looking(), Looking())
    with record(model, file, observers=[PrintCalls(stream)]):
        model(torch.zeros(1))

    assert seen == [0, 1]


def test_a_dry_run_prints_too(tmp_path: Path) -> None:
    model, stream = seeded(Mlp), io.StringIO()
    options = RecordOptions(dry_run=True, observers=(PrintCalls(stream),))

    with Recording(model, None, options):
        model(torch.zeros(1, 4))

    assert [line["module"] for line in lines_of(stream.getvalue())] == ["up", "act", "down", ""]
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_ends_the_printing_and_nothing_else(file: Path) -> None:
    model, printer = seeded(Mlp), PrintCalls(Full(BrokenPipeError()))

    with record(model, file, observers=[printer]) as recording:
        model(torch.zeros(1, 4))

    assert printer.is_cut
    assert recording.report is not None
    assert (recording.report.complete, recording.report.calls) == (True, 4)


def test_a_full_disk_under_the_lines_leaves_the_archive_whole(file: Path) -> None:
    model, printer = seeded(Mlp), PrintCalls(Full(OSError(28, "No space left on device")))

    with (
        pytest.raises(RecordingError, match=r"printing of calls ended early: .*No space left"),
        record(model, file, observers=[printer]),
    ):
        model(torch.zeros(1, 4))

    assert len(Archive.open(file).manifest.calls) == 4


@pytest.mark.parametrize(
    ("observer", "option"),
    [(PrintCalls(values=["mlp"]), "--values"), (BreakAt("mlp"), "--break")],
    ids=["values", "break"],
)
def test_a_pattern_that_fits_no_module_is_refused_before_anything_is_written(
    file: Path, observer: Observer, option: str
) -> None:
    with (
        pytest.raises(UsageError, match=f"{option} 'mlp': matches none"),
        record(Mlp(), file, observers=[observer]),
    ):
        pass

    assert not list(file.parent.iterdir())


def test_patterns_fit_aliases_and_modules_that_come_later(file: Path) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = self.alias = Adding(1)

        def forward(self, hidden: Tensor) -> object:
            if not hasattr(self, "later"):
                self.later = Adding(1)
            return self.later(self.early(hidden))

    model, stream = Lazy(), io.StringIO()
    with record(model, file, observers=[PrintCalls(stream, values=["a*", "[el]a*"])]):
        model(torch.zeros(2))
        model(torch.zeros(2))

    has_values = {
        line["module"]: "values" in line["output"] for line in lines_of(stream.getvalue())
    }
    assert has_values == {"early": True, "later": True, "": False}


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Each stop in the debugger: the function that it is in, and its locals."""
    found: list[tuple[str, dict[str, Any]]] = []

    def note() -> None:
        frame = sys._getframe(1)
        found.append((frame.f_code.co_name, dict(frame.f_locals)))

    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", note)
    return found


def test_the_debugger_finds_the_call_in_its_locals(
    file: Path, stops: list[tuple[str, dict[str, Any]]]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = seeded(Mlp)

        def forward(self, hidden: Tensor) -> object:
            return self.mlp(self.mlp(hidden), scale=2.0)

    model, given = Model(), torch.ones(1, 4)
    with record(model, file, observers=[BreakAt("mlp")]), torch.no_grad():
        returned = model(given)

    assert [where for where, _ in stops] == ["after_call", "after_call"]
    first, second = (found for _, found in stops)
    assert list(first) == ["module", "name", "call", "inputs", "kwargs", "output"]
    assert (first["module"], first["name"], first["call"]) == (model.mlp, "mlp", 0)
    assert (first["inputs"][0] is given, first["kwargs"]) == (True, {})
    assert (second["call"], second["kwargs"]) == (1, {"scale": 2.0})
    assert second["output"] is returned


def test_on_request_the_debugger_stops_before_the_call_too(
    file: Path, stops: list[tuple[str, dict[str, Any]]]
) -> None:
    model = nn.Sequential(Adding(1))

    with record(model, file, observers=[BreakAt("0", before=True)]):
        model(torch.zeros(1))

    assert [where for where, _ in stops] == ["before_call", "after_call"]
    assert [found["output"] for _, found in stops] == [None, torch.ones(1)]


def test_a_stop_does_not_need_a_recorded_module(
    file: Path, stops: list[tuple[str, dict[str, Any]]]
) -> None:
    model = nn.Sequential(Adding(1), Adding(2))

    with record(model, file, include=["1"], observers=[BreakAt("0")]):
        model(torch.zeros(1))

    assert [found["name"] for _, found in stops] == ["0"]


def in_debugger(act: Callable[[dict[str, Any]], object]) -> Callable[[], None]:
    """A debugger in which somebody does something with the locals."""
    return lambda: (act(sys._getframe(1).f_locals), None)[1]


def test_another_output_in_the_debugger_does_not_reach_the_model(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assign(found: dict[str, Any]) -> None:
        found["output"] = found["output"] * 0

    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", in_debugger(assign))
    model = nn.Sequential(Adding(1))

    with record(model, file, observers=[BreakAt("0")]):
        assert model(torch.zeros(1)).item() == 1


def test_work_in_place_in_the_debugger_reaches_the_model_but_not_the_record(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", in_debugger(lambda found: found["output"].mul_(7)))
    model = nn.Sequential(Adding(1))

    with record(model, file, observers=[BreakAt("0")]):
        assert model(torch.zeros(1)).item() == 7

    assert only(tensors_of(Archive.open(file), "0")).item() == 1


@pytest.mark.parametrize("quit_with", ["bdb.BdbQuit", "SystemExit"])
def test_quitting_the_debugger_interrupts(
    file: Path, monkeypatch: pytest.MonkeyPatch, quit_with: str
) -> None:
    import bdb

    error = {"bdb.BdbQuit": bdb.BdbQuit(), "SystemExit": SystemExit(0)}[quit_with]

    def quit_debugger() -> None:
        raise error

    monkeypatch.delenv("PYTHONBREAKPOINT", raising=False)
    monkeypatch.setattr(sys, "breakpointhook", quit_debugger)
    model = nn.Sequential(Adding(1), Adding(2))

    with pytest.raises(KeyboardInterrupt), record(model, file, observers=[BreakAt("0")]):
        model(torch.zeros(1))

    archive = Archive.open(file.with_name("fp.st.partial"))
    assert archive.manifest.error == "KeyboardInterrupt"
    assert [call.error for call in calls_of(archive, "0")] == [None]
    assert hooks_on(model) == 0


def test_a_debugger_that_the_environment_names_comes_first(
    file: Path, stops: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = BreakAt("(root)")
    model = Adding(1)

    monkeypatch.setenv("PYTHONBREAKPOINT", "builtins.id")  # raises: it takes an argument
    with (
        pytest.raises(RecordingError, match="the debugger ended early: TypeError"),
        record(model, file, observers=[observer]),
    ):
        model(torch.zeros(1))
    monkeypatch.setenv("PYTHONBREAKPOINT", "0")
    with record(model, file, overwrite=True, observers=[observer]):
        model(torch.zeros(1))

    assert (stops, observer.stops) == ([], 1)


def test_the_names_are_public() -> None:
    assert (qvtrace.Observer, qvtrace.ObservedCall) == (Observer, ObservedCall)
    assert (qvtrace.PrintCalls, qvtrace.BreakAt) == (PrintCalls, BreakAt)
