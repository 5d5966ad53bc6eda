"""What is left of a recording that was killed, or that filled the disk, can be read."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_apart
from recordings import Mlp, calls_of, elements_of, seeded, tensors_of, tree_of
from safetensors.torch import load_file
from small_archives import SmallTrace, manifest, read_everything, write_small
from torch import Tensor, nn

from qvtrace.archive import Archive, recover
from qvtrace.archive import ending as ending_module
from qvtrace.archive.ending import LOST
from qvtrace.archive.journal import JournalLines, journal_line
from qvtrace.errors import (
    ArchiveError,
    DamagedArchiveError,
    MissingArchiveError,
    RecordingError,
    UnfinishedArchiveError,
)
from qvtrace.recording.recorder import record
from qvtrace.trees import OpaqueLeaf, TensorLeaf, leaves


class Killing(nn.Module):
    """Kills the process in its second call."""

    calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return hidden + 1


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(inplace=True), Killing()))


def record_and_die(file: Path) -> None:
    model = chain()
    with record(model, file), torch.no_grad():
        model(torch.arange(4.0))
        model(torch.ones(4))


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """What a recording leaves that was killed in the middle of a forward."""
    assert run_apart(record_and_die, tmp_path / "fp.st") == -signal.SIGKILL
    return tmp_path / "fp.st.partial"


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The file and the journal of a recording of four calls that did not come to its end."""
    trace = SmallTrace(tmp_path / "running.st")
    trace.fill()
    trace.call("layer", 2, trace.tensor("layer#2/inputs.0", np.arange(100)), None)
    partial = tmp_path / "fp.st.partial"
    shutil.copy(trace.writer.partial, partial)
    shutil.copy(f"{trace.writer.partial}.journal", journal_of(partial))
    trace.writer.discard()
    return partial


def journal_of(partial: Path) -> Path:
    return partial.with_name(partial.name + ".journal")


def test_a_killed_recording_is_recovered_with_every_call_that_had_returned(killed: Path) -> None:
    with pytest.raises(UnfinishedArchiveError, match="qvtrace recover"):
        Archive.open(killed)

    found = recover(killed)

    assert (found.calls, found.lost, found.was_readable) == (10, 0, False)
    with Archive.open(killed) as archive:
        returned = [call.module for call in archive.manifest.calls if call.error is None]
        assert returned == ["0", "1.0", "1.1", "1", "", "0", "1.0"]
        assert not list(archive.damaged_tensors())
        linear = chain()[0]
        for index, given in enumerate([torch.arange(4.0), torch.ones(4)]):
            (inputs,) = tensors_of(archive, "0", "inputs", index).values()
            (output,) = tensors_of(archive, "0", "output", index).values()
            assert torch.equal(inputs, given)
            assert torch.equal(output, linear(given))


def test_calls_that_had_not_returned_say_so(killed: Path) -> None:
    recover(killed)

    with Archive.open(killed) as archive:
        for module in ("", "1", "1.1"):
            call = calls_of(archive, module)[1]
            assert (call.error, call.output) == ("did not return", None)
            assert call.inputs is not None


def test_a_recovered_archive_is_marked_as_incomplete_and_is_a_safetensors_file(
    killed: Path,
) -> None:
    recover(killed)

    with Archive.open(killed) as archive:
        assert (archive.manifest.complete, archive.manifest.error) == (
            False,
            "the recording was killed",
        )
        assert len(load_file(killed)) == len(archive.manifest.tensors) + 1
        assert [module.calls for module in archive.manifest.modules] == [2, 2, 2, 2, 2]
    assert [path.name for path in killed.parent.iterdir()] == ["fp.st.partial"]


def test_recovering_twice_does_no_harm(unfinished: Path) -> None:
    first = recover(unfinished)
    content = unfinished.read_bytes()

    second = recover(unfinished)

    assert (second.calls, second.tensors) == (first.calls, first.tensors) == (4, 6)
    assert second.was_readable
    assert unfinished.read_bytes() == content


def test_recovery_that_was_itself_killed_before_it_removed_the_journal_is_run_again(
    unfinished: Path,
) -> None:
    journal = journal_of(unfinished).read_bytes()
    recover(unfinished)
    journal_of(unfinished).write_bytes(journal)

    assert recover(unfinished).calls == 4
    assert read_everything(unfinished) == 10


def test_a_missing_journal_is_an_error_that_says_so(unfinished: Path) -> None:
    journal_of(unfinished).unlink()
    content = unfinished.read_bytes()

    with pytest.raises(ArchiveError, match=r"fp\.st\.partial: its journal .* is missing"):
        recover(unfinished)

    assert unfinished.read_bytes() == content


def test_a_missing_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingArchiveError, match=r"fp\.st\.partial: there is no such file"):
        recover(tmp_path / "fp.st.partial")


def test_a_whole_archive_needs_no_recovery(tmp_path: Path) -> None:
    file = write_small(tmp_path / "fp.st")
    content = file.read_bytes()

    assert recover(file).was_readable
    assert file.read_bytes() == content


def test_a_recording_that_still_runs_cannot_be_recovered(tmp_path: Path) -> None:
    model = seeded(Mlp)
    with record(model, tmp_path / "fp.st"):
        with pytest.raises(ArchiveError, match="still being recorded"):
            recover(tmp_path / "fp.st.partial")
        model(torch.ones(1, 4))

    assert not list(Archive.open(tmp_path / "fp.st").damaged_tensors())


def test_a_killed_recording_does_not_stop_the_next_one_with_overwrite(killed: Path) -> None:
    model = seeded(Mlp)

    with record(model, killed.with_suffix(""), overwrite=True):
        model(torch.ones(1, 4))

    assert sorted(path.name for path in killed.parent.iterdir()) == ["fp.manifest.json", "fp.st"]


def test_a_journal_cut_off_at_any_byte_costs_only_what_it_had_not_said(unfinished: Path) -> None:
    journal = journal_of(unfinished)
    content, lines = unfinished.read_bytes(), journal.read_bytes()
    begin = lines.index(b"\nM ") + 1
    last = lines.rindex(b"\n", 0, -1) + 1
    for length in [*range(begin, last, 23), *range(last, len(lines))]:
        unfinished.write_bytes(content)
        journal.write_bytes(lines[:length])
        whole = lines[:length].count(b"\nE ")
        whole -= lines[:length].rfind(b"\nE ") >= lines[:length].rfind(b"\n")

        found = recover(unfinished)

        assert (found.calls, found.lost) == (whole, 0)
        read_everything(unfinished)


def test_a_journal_cut_off_in_its_first_line_says_that_it_says_nothing(unfinished: Path) -> None:
    journal = journal_of(unfinished)
    journal.write_bytes(journal.read_bytes()[:100])

    with pytest.raises(DamagedArchiveError, match=r"journal: .*does not say what was recorded"):
        recover(unfinished)


def test_bytes_of_a_tensor_that_the_journal_does_not_know_are_left_out(unfinished: Path) -> None:
    with unfinished.open("ab") as output:
        output.write(b"half a tensor")

    found = recover(unfinished)

    assert (found.calls, found.tensors, found.lost) == (4, 6, 0)
    assert read_everything(unfinished) == 10


def test_tensors_that_were_cut_off_are_named_where_they_were(unfinished: Path) -> None:
    os.truncate(unfinished, unfinished.stat().st_size - 1)

    found = recover(unfinished)

    assert (found.calls, found.tensors, found.lost) == (4, 5, 1)
    with Archive.open(unfinished) as archive:
        tree = tree_of(archive, "layer", "inputs", 2)
        assert tree == OpaqueLeaf("Tensor", LOST)
    assert read_everything(unfinished) == 9


def test_a_file_that_holds_nothing_of_what_its_journal_says_is_left_as_it_is(
    unfinished: Path,
) -> None:
    content = bytes(unfinished.stat().st_size)
    unfinished.write_bytes(content)

    with pytest.raises(DamagedArchiveError, match="do not belong together"):
        recover(unfinished)

    assert unfinished.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "P {}",
        "P []",
        "M 1",
        "T {}",
        "T {}\tnothing",
        'L 99\t{"output":null}',
        "E 1",
        "E 1\t[]",
        "R not JSON",
        "D {}",
        'D {"to":-1,"remaining":1}',
    ],
)
def test_a_whole_line_that_no_recording_writes_is_refused(unfinished: Path, line: str) -> None:
    with journal_of(unfinished).open("ab") as journal:
        journal.write(journal_line(*line.split(" ", 1)))

    with pytest.raises(ArchiveError, match=r"fp\.st\.partial"):
        recover(unfinished)


@pytest.mark.parametrize("line", [b"no line of ours\n", b"X {}\n", b"P {}\n", b"\n"], ids=repr)
def test_a_line_that_is_not_as_it_was_written_costs_only_what_comes_after(
    unfinished: Path, line: bytes
) -> None:
    with journal_of(unfinished).open("ab") as journal:
        journal.write(line + journal_line("X", "never read"))

    found = recover(unfinished)

    assert (found.calls, found.tensors, found.lost) == (4, 6, 0)
    assert found.damage is not None
    assert found.damage.lines_lost == 2
    assert read_everything(unfinished) == 10


def test_a_bit_flipped_anywhere_in_the_journal_costs_only_what_comes_after(
    unfinished: Path,
) -> None:
    journal = journal_of(unfinished)
    content, written = unfinished.read_bytes(), journal.read_bytes()
    first = written.index(b"\n") + 1
    for position in range(first, len(written), 13):
        flipped = bytearray(written)
        flipped[position] ^= 1 << position % 8
        unfinished.write_bytes(content)
        journal.write_bytes(flipped)
        number = 1 + written[:position].count(b"\n")
        before = written[: written.rindex(b"\n", 0, position + (position == 0)) + 1]

        found = recover(unfinished)

        assert found.calls == before.count(b"\nE ")
        assert found.tensors == before.count(b"\nT ")
        assert found.lost == 0
        assert found.damage is None or found.damage.line == number
        read_everything(unfinished)
        with Archive.open(unfinished) as archive:
            assert not list(archive.damaged_tensors())
            told = f"the recording was killed; line {number} of its journal was damaged"
            assert found.damage is None or str(archive.manifest.error).startswith(told)


def test_a_journal_whose_first_line_is_damaged_says_so_and_leaves_the_file(
    unfinished: Path,
) -> None:
    journal, content = journal_of(unfinished), unfinished.read_bytes()
    journal.write_bytes(journal.read_bytes().replace(b"start", b"stars", 1))

    with pytest.raises(DamagedArchiveError, match=r"journal: its first line is damaged, .*copy"):
        recover(unfinished)

    assert unfinished.read_bytes() == content


def test_a_damaged_journal_beside_a_finished_file_costs_nothing(unfinished: Path) -> None:
    journal = journal_of(unfinished).read_bytes()
    recover(unfinished)
    content = unfinished.read_bytes()
    journal_of(unfinished).write_bytes(journal.replace(b"layer", b"later", 1))

    found = recover(unfinished)

    assert (found.calls, found.was_readable) == (4, True)
    assert unfinished.read_bytes() == content
    assert not journal_of(unfinished).exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def close_until(write: int, trace: SmallTrace, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether closing came to its end before that write, in the middle of which it is killed."""
    writes = 0

    def write_all(descriptor: int, data: bytes) -> None:
        nonlocal writes
        if writes == write:
            os.write(descriptor, data[: len(data) // 2])
            raise Killed
        writes += 1
        os.write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(ending_module, "write_all", write_all)
        try:
            trace.writer.close(manifest())
        except Killed:
            return False
    return True


def many_tensors(file: Path) -> SmallTrace:
    """More than the reserved header has room for."""
    trace = SmallTrace(file, overwrite=True)
    trace.fill()
    trace.tensor("large", np.arange(50_000.0))  # more than the distance that it is moved by
    for index in range(250):
        leaf = trace.tensor(f"layer#{index + 2}/output.a.long.path", np.array([index, 0.5]))
        trace.call("layer", index + 2, leaf, leaf)
    return trace


def test_a_kill_at_any_write_of_the_ending_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "fp.st.partial"
    kills = 0
    while not close_until(kills, many_tensors(tmp_path / "fp.st"), monkeypatch):
        found = recover(partial)
        assert (found.calls, found.tensors, found.lost) == (253, 256, 0)
        with Archive.open(partial) as archive:
            assert not list(archive.damaged_tensors())
        kills += 1

    assert kills > 8  # the move, the manifest, the header
    assert read_everything(tmp_path / "fp.st") == 509


def test_a_kill_during_recovery_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "fp.st.partial"
    close_until(4, many_tensors(tmp_path / "fp.st"), monkeypatch)
    assert any(JournalLines(journal_of(partial)).of("D"))

    for write in range(1, 5):
        left = [write]

        def write_all(descriptor: int, data: bytes, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            os.write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(ending_module, "write_all", write_all)
            with pytest.raises(Killed):
                recover(partial)

    assert recover(partial).lost == 0
    with Archive.open(partial) as archive:
        assert not list(archive.damaged_tensors())


def test_a_kill_during_recovery_with_a_journal_that_was_cut_off_loses_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "fp.st.partial"
    trace = many_tensors(tmp_path / "fp.st")
    shutil.copy(partial, tmp_path / "kept")
    lines = journal_of(partial).read_bytes()
    trace.writer.discard()
    (tmp_path / "kept").rename(partial)
    journal_of(partial).write_bytes(lines[: lines.rindex(b"\nT ") + 40])

    def write_all(descriptor: int, data: bytes) -> None:
        if data.startswith(b'{"__metadata__"'):
            raise Killed
        os.write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(ending_module, "write_all", write_all)
        with pytest.raises(Killed):
            recover(partial)
    assert any(JournalLines(journal_of(partial)).of("D"))

    found = recover(partial)

    assert (found.calls, found.tensors, found.lost) == (252, 255, 0)
    with Archive.open(partial) as archive:
        assert not list(archive.damaged_tensors())


def record_on_a_full_disk(
    build: Callable[[], tuple[nn.Module, Tensor]], file: Path, limit: int
) -> None:
    """Record where no file can grow beyond a limit; what was raised goes to `outcome.txt`."""
    model, given = build()
    with torch.no_grad():
        expected = model(given)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    raised: Exception | None = None
    output = expected
    try:
        with record(model, file), torch.no_grad():
            output = model(given)
    except (RecordingError, ArchiveError) as error:
        raised = error
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert torch.equal(output, expected)
    assert not any(module._forward_hooks for module in model.modules())
    (file.parent / "outcome.txt").write_text(f"{type(raised).__name__}: {raised}")


def wide() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(20))), torch.randn(64, 64)


def narrow() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(40))), torch.randn(1, 4)


class Scattering(nn.Module):
    """Returns more tensors than the reserved header has room for."""

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return [hidden + number for number in range(300)]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scatter = Scattering()

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.stack(self.scatter(hidden)).sum(0)


def scattered() -> tuple[nn.Module, Tensor]:
    return Counting(), torch.randn(200)


def outcome(build: Callable[[], tuple[nn.Module, Tensor]], file: Path, limit: int) -> str:
    assert run_apart(record_on_a_full_disk, build, file, limit) == 0
    return (file.parent / "outcome.txt").read_text()


def test_a_full_disk_ends_the_recording_but_not_the_forward(tmp_path: Path) -> None:
    file = tmp_path / "fp.st"

    message = outcome(wide, file, 200_000)

    assert message.startswith(f"RecordingError: {file}: the recording ended early: ")
    assert "File too large" in message
    assert message.endswith(f"{file}.partial")
    with Archive.open(f"{file}.partial") as archive:
        assert not archive.manifest.complete
        assert "File too large" in str(archive.manifest.error)
        assert not list(archive.damaged_tensors())
        model, given = wide()
        for index in range(8):
            given = model[index](given)
            (output,) = tensors_of(archive, str(index)).values()
            assert torch.equal(output, given)
    assert not file.exists()
    assert not journal_of(tmp_path / "fp.st.partial").exists()


def test_the_last_tensors_make_room_for_the_manifest_and_their_places_say_so(
    tmp_path: Path,
) -> None:
    outcome(wide, tmp_path / "fp.st", 203_000)

    with Archive.open(tmp_path / "fp.st.partial") as archive:
        nodes = [
            leaf
            for call in archive.manifest.calls
            for part in ("inputs", "output")
            if (tree := call.tree(part)) is not None
            for _, leaf in leaves(tree, part)
        ]
        lost = [node for node in nodes if node == OpaqueLeaf("Tensor", LOST)]
        kept = [elements_of(archive, node) for node in nodes if isinstance(node, TensorLeaf)]
    assert 0 < len(lost) < 6
    assert len(kept) > 12


def test_a_trace_that_lost_tensors_to_a_full_disk_is_not_complete(tmp_path: Path) -> None:
    """The disk fills up only when the manifest is written: every call was recorded."""
    file = tmp_path / "fp.st"

    message = outcome(wide, file, 385_000)

    assert message.startswith(f"RecordingError: {file}: the recording ended early: ")
    with Archive.open(f"{file}.partial") as archive:
        assert len(archive.manifest.calls) == 21
        assert not archive.manifest.complete
        assert "File too large" in str(archive.manifest.error)


@pytest.mark.parametrize("limit", [65_000, 70_000, 75_000, 80_000])
def test_a_disk_without_room_for_the_manifest_leaves_everything_for_recovery(
    tmp_path: Path, limit: int
) -> None:
    file = tmp_path / "fp.st"

    message = outcome(narrow, file, limit)

    assert message.startswith("ArchiveError: ")
    assert message.endswith(f"make room, then run: qvtrace recover {file}.partial")
    found = recover(f"{file}.partial")
    assert (found.calls, found.tensors, found.lost) == (41, 41, 0)
    with Archive.open(f"{file}.partial") as archive:
        assert not list(archive.damaged_tensors())


@pytest.mark.parametrize("limit", [200_000, 250_000, 270_000, 290_000])
def test_a_disk_without_room_to_move_the_data_leaves_a_readable_file(
    tmp_path: Path, limit: int
) -> None:
    file = tmp_path / "fp.st"

    outcome(scattered, file, limit)

    with Archive.open(f"{file}.partial") as archive:
        assert not archive.manifest.complete
        assert len(archive.manifest.tensors) > 50
        assert not list(archive.damaged_tensors())


def test_a_disk_without_room_for_a_beginning_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "fp.st"

    message = outcome(narrow, file, 10_000)

    assert message == f"ArchiveError: {file}: cannot be written: File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.txt"]


class Growing(nn.Module):
    """Makes a module in its first call, and is killed in its second."""

    def forward(self, hidden: Tensor) -> Tensor:
        if hasattr(self, "late"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.late = nn.Identity()
        return hidden


def record_growing_and_die(file: Path) -> None:
    model = nn.Sequential(Growing())
    with record(model, file):
        model(torch.ones(4))
        model(torch.ones(4))


def test_modules_that_were_made_while_recording_are_named_after_a_kill(tmp_path: Path) -> None:
    assert run_apart(record_growing_and_die, tmp_path / "fp.st") == -signal.SIGKILL

    recover(tmp_path / "fp.st.partial")

    with Archive.open(tmp_path / "fp.st.partial") as archive:
        entries = {entry.name: entry.class_name for entry in archive.manifest.modules}
        assert entries == {"": "Sequential", "0": "Growing", "0.late": "Identity"}
