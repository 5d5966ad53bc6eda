"""Recordings in processes of their own: a fork, memory, imports, a group."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import run_apart
from recordings import Adding, Mlp, only, seeded, tensors_of
from torch import nn

from qvtrace.archive import Archive
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording, record


def fork_while_recording(file: Path) -> None:
    model = seeded(Mlp)
    with record(model, file) as recording, torch.no_grad():
        model(torch.ones(1, 4))
        child = os.fork()
        if child == 0:
            try:
                model(torch.zeros(1, 4))
                recording.__exit__(None, None, None)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        model(torch.full((1, 4), 2.0))


def test_a_forked_child_does_not_write_into_the_archive(file: Path) -> None:
    assert run_apart(fork_while_recording, file) == 0

    archive = Archive.open(file)
    assert archive.manifest.complete
    assert not list(archive.damaged_tensors())
    inputs = [only(tensors_of(archive, "", "inputs", index)) for index in range(2)]
    assert [given.max().item() for given in inputs] == [1, 2]
    assert len(archive.manifest.calls) == 8


def peak_memory() -> int:
    """Bytes that this process ever had in memory."""
    status = Path("/proc/self/status").read_text()
    (kibibytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(kibibytes) * 1024


def record_much(file: Path) -> None:
    model = nn.Sequential(Adding(1), Adding(2))
    with record(model, file), torch.no_grad():
        for number in range(10):
            model(torch.full((2**17,), number * 0.1237))
        before = peak_memory()
        for number in range(100):
            model(torch.full((2**17,), 100 + number * 0.1237))
        grown = peak_memory() - before
    (file.parent / "outcome.txt").write_text(f"{grown} {file.stat().st_size}")


def test_memory_does_not_grow_with_the_trace(file: Path) -> None:
    assert run_apart(record_much, file) == 0

    grown, size = map(int, (file.parent / "outcome.txt").read_text().split())
    assert size > 150e6
    assert grown < 16e6


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two, of which only this process is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_each_process_of_a_group_writes_its_own_file(file: Path) -> None:
    model = Adding(1)

    with record(model, file) as recording:
        model(torch.zeros(1))

    assert recording.report is not None
    assert recording.report.file == file.with_name("fp.rank1-of-2.st")
    environment = Archive.open(recording.report.file).manifest.environment
    assert (environment["rank"], environment["world_size"]) == (1, 2)


def test_recording_imports_neither_transformers_nor_the_compiler() -> None:
    """They take seconds, and a plain module needs neither."""
    assert run_apart(record_plainly) == 0


def record_plainly() -> None:
    model = seeded(Mlp)
    with Recording(model, None, RecordOptions(dry_run=True)):
        model(torch.zeros(1, 4))
    loaded = {"transformers", "torchao", "torch._dynamo"} & sys.modules.keys()
    assert not loaded, loaded


class _CompiledLate(nn.Module):
    """Compiles what it calls when it is first called, as a whole graph or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        run = torch.compile(lambda value: self.block(value), backend="eager", fullgraph=True)
        return run(hidden)


def _record_what_is_compiled_late(file: Path) -> None:
    assert "torch._dynamo" not in sys.modules
    finders = list(sys.meta_path)
    model, hidden = _CompiledLate(), torch.ones(2, 8)
    with record(model, file), torch.no_grad():
        recorded = model(hidden)
    assert sys.meta_path == finders
    assert torch.equal(recorded, model(hidden))


def test_a_model_that_is_compiled_first_while_it_is_recorded_is_recorded_eagerly(tmp_path):
    file = tmp_path / "fp.st"

    assert run_apart(_record_what_is_compiled_late, file) == 0

    with Archive.open(file) as archive:
        outputs = {call.module: call.error for call in archive.manifest.calls if call.output}
    assert outputs == dict.fromkeys(["block.0", "block.1", "block", ""])
