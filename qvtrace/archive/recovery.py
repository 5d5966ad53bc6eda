"""Makes the file of a killed recording readable, in place, from the journal beside it."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvtrace.archive.ending import Data, finish, lost_tail, resume_move
from qvtrace.archive.journal import JournalDamage, JournalLines, find_damage
from qvtrace.archive.layout import journal_of
from qvtrace.archive.reader import Archive
from qvtrace.archive.writer import lock
from qvtrace.errors import ArchiveError, DamagedArchiveError, MissingArchiveError
from qvtrace.manifest import Manifest, ModuleEntry, Skipped
from qvtrace.manifest_json import manifest_from_json

KILLED = "the recording was killed"


@dataclass(frozen=True)
class Recovery:
    """What was found in the file."""

    file: Path
    calls: int
    tensors: int
    lost: int = 0  # tensors that were cut off
    was_readable: bool = False  # there was nothing to do
    damage: JournalDamage | None = None  # of the journal: only what it says before that is here


@dataclass
class _Found:
    """What the journal says."""

    start: int
    head: dict[str, Any]
    modules: list[dict[str, Any]]
    calls: dict[str, int]
    end: int
    move: dict[str, Any] | None


def recover(file: str | os.PathLike[str]) -> Recovery:
    """Finish the `.partial` file of a killed recording; it stays marked as incomplete.

    Of a damaged journal, what it says before the damage is used. Raises `ArchiveError` when the
    file or its journal is missing, when they do not belong together, or while the recording is
    still running.
    """
    partial = Path(file)
    if not partial.name or partial.is_dir():
        raise ArchiveError(f"{partial}: is a folder; name the .partial file in it")
    journal = journal_of(partial)
    if not partial.exists():
        raise MissingArchiveError(
            f"{partial}: there is no such file; name the .partial file that a recording left"
        )
    if not journal.exists():
        return _without_journal(partial, journal)
    try:
        descriptor = os.open(partial, os.O_RDWR)
    except OSError as error:
        raise ArchiveError(f"{partial}: cannot be written: {error.strerror}") from error
    try:
        if not lock(descriptor):
            raise ArchiveError(f"{partial}: is still being recorded; wait until that has ended")
        damage = find_damage(journal)
        if damage is not None and _is_readable(partial):  # it was finished, and only this was left
            journal.unlink()
            return _without_journal(partial, journal)
        lost = _finish(descriptor, partial, journal, damage)
    except OSError as error:
        raise ArchiveError(
            f"{partial}: cannot be finished: {error.strerror}; make room and run this again"
        ) from error
    finally:
        os.close(descriptor)
    with Archive.open(partial) as archive:
        journal.unlink()
        manifest = archive.manifest
        return Recovery(partial, len(manifest.calls), len(manifest.tensors), lost, damage=damage)


def _is_readable(partial: Path) -> bool:
    try:
        Archive.open(partial).close()
    except ArchiveError:
        return False
    return True


def _without_journal(partial: Path, journal: Path) -> Recovery:
    try:
        with Archive.open(partial) as archive:
            manifest = archive.manifest
            return Recovery(partial, len(manifest.calls), len(manifest.tensors), was_readable=True)
    except DamagedArchiveError:
        raise
    except ArchiveError as error:
        raise ArchiveError(
            f"{partial}: its journal {journal.name} is missing, and without it nothing says which "
            "bytes are which tensor; bring the journal back beside it, or record again"
        ) from error


def _finish(descriptor: int, partial: Path, journal: Path, damage: JournalDamage | None) -> int:
    """Write the ending; returns how many tensors were lost."""
    if damage is not None and damage.line == 1:
        raise DamagedArchiveError(
            f"{journal}: its first line is damaged, and nothing can be read without it; "
            "restore the journal from a copy, or record again"
        )
    lines = JournalLines(journal)
    try:
        found = _read(lines)
        manifest = _manifest(found, damage)
        data = Data(found.start, found.end)
        _end_move(descriptor, lines, data, found.move)
        lost = lost_tail(descriptor, lines, data)
        if lost and not data.end:
            raise DamagedArchiveError(
                f"{partial}: holds none of the tensors that its journal {journal.name} names; "
                "they do not belong together, record again"
            )
        finish(descriptor, lines, data, manifest, lost)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedArchiveError(
            f"{journal}: was not written by a recording ({error}); record again"
        ) from error
    return len(lost)


def _end_move(
    descriptor: int, journal: JournalLines, data: Data, move: dict[str, Any] | None
) -> None:
    """Bring the contents where they were being moved to, if they were."""
    if move is not None and move["remaining"]:
        resume_move(descriptor, journal, data, move)
    elif move is not None:
        data.start = move["to"]


def _read(journal: JournalLines) -> _Found:
    found = _Found(0, {}, [], {}, 0, None)
    for tag, payload in journal.of("PMTED"):
        if tag == "P":
            described = json.loads(payload)
            found.start, found.head = int(described["start"]), described["head"]
        elif tag == "M":
            found.modules = json.loads(payload)
        elif tag == "T":
            (entry,) = json.loads("{" + payload.split("\t", 1)[1] + "}").values()
            found.end = int(entry["data_offsets"][1])
        elif tag == "E":
            module = json.loads(payload.split("\t", 1)[1])["module"]
            found.calls[module] = found.calls.get(module, 0) + 1
        elif tag == "D":
            found.move = json.loads(payload)
    if not found.head:
        raise ValueError("it does not say what was recorded")
    return found


def _manifest(found: _Found, damage: JournalDamage | None) -> Manifest:
    manifest = manifest_from_json({**found.head, "modules": found.modules})
    modules = tuple(_counted(module, found.calls) for module in manifest.modules)
    called = sum(module.calls > 0 for module in modules)
    skipped = Skipped(registered=len(modules), called=called, recorded=called)
    error = KILLED
    if damage is not None:
        error += f"; line {damage.line} of its journal was damaged: what came after it is lost"
    return replace(manifest, complete=False, error=error, modules=modules, skipped=skipped)


def _counted(module: ModuleEntry, calls: dict[str, int]) -> ModuleEntry:
    return replace(module, calls=calls.get(module.name, 0))
