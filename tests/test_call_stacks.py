"""Which call made which: on threads that a forward starts, and where calls were left half-way."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from recordings import Adding, Raising, Returning, calls_of
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.comparison.diffing import diff
from qvtrace.manifest import CallEntry
from qvtrace.recording.recorder import record


class Threaded(nn.Module):
    """Calls its two branches on threads, one after the other is done or in any order."""

    def __init__(self, order: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(Adding(1)), Adding(2)])
        self.order = order

    def forward(self, hidden: Tensor) -> Tensor:
        results = {}
        for number in self.order:
            with ThreadPoolExecutor(1) as pool:
                results[number] = pool.submit(self.branches[number], hidden + number).result()
        return results[0] + results[1]


def parents(file: Path) -> dict[str, tuple[str, int] | None]:
    with Archive.open(file) as archive:
        return {call.module: call.parent for call in archive.manifest.calls}


def root_calls(file: Path) -> list[tuple[str, int]]:
    with Archive.open(file) as archive:
        return [(call.module, call.index) for call in archive.manifest.inputs.root_calls]


def test_a_call_on_a_thread_of_the_forward_belongs_to_the_module_around_it(file: Path) -> None:
    model = nn.Sequential(Threaded())

    with record(model, file):
        model(torch.zeros(1))

    assert parents(file) == {
        "0.branches.0.0": ("0.branches.0", 0),
        "0.branches.0": ("0", 0),
        "0.branches.1": ("0", 0),
        "0": ("", 0),
        "": None,
    }
    assert root_calls(file) == [("", 0)]


def test_two_runs_whose_threads_come_in_another_order_have_the_same_inputs(tmp_path: Path) -> None:
    files = []
    for number, order in enumerate([(0, 1), (1, 0)]):
        model = Threaded(order)
        with record(model, tmp_path / f"{number}.st"):
            model(torch.zeros(1))
        files.append(tmp_path / f"{number}.st")

    comparison = diff(*files)

    assert comparison.comparable.ok, comparison.comparable.differences
    assert comparison.coverage.identical == comparison.coverage.pairs == 4


def test_the_same_inputs_in_another_order_are_told_as_such(tmp_path: Path) -> None:
    model = Adding(1)
    for name, numbers in (("one.st", (1.0, 2.0)), ("two.st", (2.0, 1.0))):
        with record(model, tmp_path / name):
            for number in numbers:
                model(torch.full((2,), number))

    comparison = diff(tmp_path / "one.st", tmp_path / "two.st")

    assert not comparison.comparable.ok
    assert comparison.comparable.differences[0] == (
        "inputs differ: the same 2 calls of the model in another order"
    )


def test_the_model_itself_called_on_two_threads_makes_two_outermost_calls(file: Path) -> None:
    model = nn.Sequential(Adding(1))

    with record(model, file), ThreadPoolExecutor(2) as pool:
        list(pool.map(model, [torch.zeros(1), torch.ones(1)]))

    assert sorted(root_calls(file)) == [("", 0), ("", 1)]
    with Archive.open(file) as archive:
        assert {call.parent for call in calls_of(archive, "")} == {None}


def test_parts_of_a_model_called_by_themselves_are_outermost_whatever_other_parts_do(
    file: Path,
) -> None:
    class Meeting(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            barrier.wait(10)
            return hidden

    barrier = threading.Barrier(2)
    model = nn.Sequential(Meeting(), Meeting())

    with record(model, file), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda part: part(torch.zeros(1)), model))

    assert sorted(root_calls(file)) == [("0", 0), ("1", 0)]


def test_a_call_whose_caller_cannot_be_known_has_no_parent_and_is_no_outermost_one(
    file: Path,
) -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Adding(1)

        def forward(self, hidden: Tensor) -> Tensor:
            barrier.wait(10)
            with ThreadPoolExecutor(1) as pool:
                result: Tensor = pool.submit(self.inner, hidden).result()
            barrier.wait(10)
            return result

    barrier = threading.Barrier(2)
    model = Meeting()

    with record(model, file), ThreadPoolExecutor(2) as pool:
        list(pool.map(model, [torch.zeros(1), torch.ones(1)]))

    assert sorted(root_calls(file)) == [("", 0), ("", 1)]
    with Archive.open(file) as archive:
        assert [call.parent for call in calls_of(archive, "inner")] == [None, None]


class Interrupted(nn.Module):
    """Ctrl-C comes in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            signal.raise_signal(signal.SIGINT)
        return hidden


def test_calls_after_a_ctrl_c_that_was_caught_are_not_within_the_one_it_left(file: Path) -> None:
    model = nn.Sequential(nn.Sequential(Interrupted()))

    with record(model, file):
        with pytest.raises(KeyboardInterrupt):
            model(torch.zeros(1))
        model(torch.ones(1))

    assert root_calls(file) == [("", 0), ("", 1)]
    with Archive.open(file) as archive:
        for module in ("", "0", "0.0"):
            left, whole = calls_of(archive, module)
            assert (left.error, whole.error) == ("did not return", None)
            assert (whole.parent or (None, 1))[1] == 1
        assert archive.manifest.complete


def test_a_module_that_catches_the_ctrl_c_of_a_child_goes_on_as_the_parent(file: Path) -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Interrupted()
            self.after = Adding(1)

        def forward(self, hidden: Tensor) -> Tensor:
            with pytest.raises(KeyboardInterrupt):
                self.inner(hidden)
            result: Tensor = self.after(hidden)
            return result

    model = Catching()

    with record(model, file):
        model(torch.zeros(1))

    assert parents(file) == {"inner": ("", 0), "after": ("", 0), "": None}
    assert errors(file) == {"inner": "did not return", "after": None, "": None}


def errors(file: Path) -> dict[str, str | None]:
    with Archive.open(file) as archive:
        return {call.module: call.error for call in archive.manifest.calls}


class Again(nn.Module):
    """Calls a module, and hands what that raises to another one."""

    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        self.first = Raising(ValueError("boom"))
        self.then = then

    def forward(self, hidden: Tensor) -> object:
        try:
            return self.first(hidden)
        except ValueError as error:
            return self.then(error)


class RaisingAgain(nn.Module):
    def forward(self, error: Exception) -> object:
        raise error


@pytest.mark.parametrize(
    ("then", "error"),
    [(RaisingAgain, "ValueError: boom"), (Returning, None), (lambda: Calling(bool), None)],
    ids=["raises-it-again", "returns-it", "returns"],
)
def test_an_exception_raised_again_is_the_error_of_each_call_that_it_goes_through(
    file: Path, then: Callable[[], nn.Module], error: str | None
) -> None:
    model = Again(then())

    with record(model, file):
        try:
            model(torch.zeros(1))
        except ValueError as raised:
            assert str(raised) == error.partition(": ")[2] if error else False

    assert errors(file) == {"first": "ValueError: boom", "then": error, "": error}


class Calling(nn.Module):
    """Returns what a function makes of a value."""

    def __init__(self, function: Callable[[object], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: object) -> object:
        return self.function(value)


def test_a_module_that_returns_none_while_an_exception_is_handled_has_not_raised_it(
    file: Path,
) -> None:
    model = Again(Calling(lambda value: None))

    with record(model, file):
        model(torch.zeros(1))

    assert errors(file) == {"first": "ValueError: boom", "then": None, "": None}
    with Archive.open(file) as archive:
        (call,) = calls_of(archive, "then")
        assert isinstance(call, CallEntry)
        assert call.output is not None


def test_a_thread_that_outlives_the_recording_is_told_of(file: Path) -> None:
    class Waiting(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            entered.set()
            leave.wait(10)
            return hidden

    entered, leave = threading.Event(), threading.Event()
    model = nn.Sequential(Waiting())
    thread = threading.Thread(target=model, args=[torch.zeros(1)])

    with record(model, file) as recording:
        thread.start()
        entered.wait(10)
    leave.set()
    thread.join()

    assert recording.report is not None
    (warning,) = recording.report.warnings
    assert warning.startswith("2 calls had not returned when the recording ended, first (root)#0: ")
    with Archive.open(file) as archive:
        assert warning in archive.manifest.skipped.warnings
    assert warning in diff(file, file).reference.warnings
