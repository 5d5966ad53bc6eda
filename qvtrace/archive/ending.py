"""The end of an archive, written from its journal: the manifest, then the header.

Both a recording that ends and the recovery of one that was killed come here, so that there is one
way only to finish a file. Nothing here holds more than one line of the journal in memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvtrace.archive.journal import Journal, JournalLines, write_all
from qvtrace.archive.layout import (
    LENGTH,
    MANIFEST_KEY,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    encode_json,
    tensor_header_entry,
)
from qvtrace.digests import DIGEST_LENGTH, Hasher
from qvtrace.errors import DISK_FULL, ArchiveError
from qvtrace.manifest import DID_NOT_RETURN, Manifest
from qvtrace.manifest_json import head_to_json, module_to_json
from qvtrace.trees import Json, escape_name

LOST = "lost when the recording ended early"

_BUFFER_BYTES = 1 << 20
_MOVE_STEP = 1 << 16
_MOVE_CHUNK = 8 << 20


@dataclass
class Data:
    """Where the contents stand in the file."""

    start: int  # the first byte after the header
    end: int  # bytes of contents, counted from `start`


@dataclass(frozen=True)
class Ending:
    """What became of a file."""

    file: Path | None
    error: str | None  # why the archive is not complete


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored tensor: where its bytes lie among the contents."""

    digest: str
    begin: int
    end: int


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """What a person sees at a glance in the safetensors header."""
    known = {
        "model": manifest.model.name or manifest.model.class_name,
        "variant": manifest.variant.name,
        "quantizer": manifest.variant.quantizer,
    }
    return {
        "qvtrace": str(manifest.format),
        "version": manifest.qvtrace,
        "recorded_by": manifest.recorded_by,
        **{name: escape_name(value) for name, value in known.items() if value is not None},
    }


def finish(
    descriptor: int, journal: JournalLines, data: Data, manifest: Manifest, lost: frozenset[str]
) -> Manifest:
    """Write manifest and header behind and before the contents; the file is then readable.

    Returns the manifest as it was written.

    `manifest` comes without calls, tensors and root calls: those are in the journal. `lost` are
    the digests of contents that are there no more. When the disk is full, as many of the last
    tensors are given up as the manifest needs room; their places say so, and the trace is not
    complete. Raises `OSError` when even that would not be enough: nothing is given up then.
    """
    while True:
        try:
            _write_ending(descriptor, journal, data, manifest, lost)
            return manifest
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            reason = manifest.error or f"{type(error).__name__}: {error}"
            manifest = replace(manifest, complete=False, error=reason)
            given_up = _give_up_tail(descriptor, journal, data, manifest, lost)
            if given_up is None:
                raise
            lost = given_up


def resume_move(descriptor: int, journal: JournalLines, data: Data, move: Json) -> None:
    """Go on with moving the contents where a killed process stopped."""
    _move(descriptor, journal, data, int(move["to"]), int(move["remaining"]))


def lost_tail(descriptor: int, journal: JournalLines, data: Data) -> frozenset[str]:
    """The digests of the last tensors whose bytes are not there: the file was cut short, or they
    were given up when the disk was full. `data` then ends before them."""
    lost = set()
    for stored in reversed(list(_stored(journal, frozenset()))):
        if _is_there(descriptor, data.start, stored):
            break
        lost.add(stored.digest)
        data.end = stored.begin
    return frozenset(lost)


def _is_there(descriptor: int, start: int, stored: Stored) -> bool:
    hasher = Hasher()
    for begin in range(stored.begin, stored.end, _BUFFER_BYTES):
        length = min(_BUFFER_BYTES, stored.end - begin)
        hasher.update(os.pread(descriptor, length, start + begin))
    return str(hasher.hexdigest()) == stored.digest


def _write_ending(
    descriptor: int, journal: JournalLines, data: Data, manifest: Manifest, lost: frozenset[str]
) -> None:
    metadata = metadata_of(manifest)
    room = _header_room(journal, manifest, lost)
    if room > MAX_HEADER_BYTES:
        raise ArchiveError(
            f"{journal.file.stem}: more tensors than a safetensors header can name; "
            "record fewer modules with --include"
        )
    start = start_of_data(data.start, room)
    if start > data.start:
        _make_room(descriptor, journal, data, start)
    os.lseek(descriptor, data.start + data.end, os.SEEK_SET)
    output = _Output(descriptor)
    for text in _texts(journal, manifest, lost):
        output.write(text)
    output.flush()
    os.ftruncate(descriptor, data.start + data.end + output.written)
    metadata["manifest_digest"] = output.hasher.hexdigest()
    _write_header(descriptor, journal, data, metadata, lost, output.written)


def _header_room(journal: JournalLines, manifest: Manifest, lost: frozenset[str]) -> int:
    entries = sum(len(entry) + 1 for _, entry in _tensors(journal, lost))
    return header_bound(metadata_of(manifest), entries)


def _texts(journal: JournalLines, manifest: Manifest, lost: frozenset[str]) -> Iterator[str]:
    """The manifest of what the journal names, but for what is lost."""
    tensors = (described for described, _ in _tensors(journal, lost))
    if lost:
        modules = (
            replace(m, quantization=_replaced(m.quantization, lost)) for m in manifest.modules
        )
        manifest = replace(manifest, modules=tuple(modules))
    portions = _portions(journal, lost)
    if lost:  # what is lost of a portion is lost at the places that name the whole
        lost |= {whole for whole, stored, _ in _portions(journal, frozenset()) if stored in lost}
    items = Items(
        _lines(journal, "R", lost),
        _lines(journal, "W", lost),
        _calls(journal, lost),
        (text for _, _, text in portions),
        tensors,
    )
    return manifest_text(manifest, items)


def _portions(journal: JournalLines, lost: frozenset[str]) -> Iterator[tuple[str, str | None, str]]:
    """The digest of each content that is not stored whole, that of what is, and its JSON."""
    for _, payload in journal.of("S"):
        described = json.loads(payload)
        stored = described.get("stored")
        if stored not in lost:
            yield described["digest"], stored, payload


class _Output:
    """Gathers text into large writes, and digests it on the way."""

    def __init__(self, descriptor: int) -> None:
        self.hasher = Hasher()
        self.written = 0
        self._descriptor = descriptor
        self._pending = bytearray()

    def write(self, text: str) -> None:
        self._pending += text.encode("ascii")
        if len(self._pending) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        pending = bytes(self._pending)
        write_all(self._descriptor, pending)
        self.hasher.update(pending)
        self.written += len(pending)
        self._pending.clear()


@dataclass(frozen=True)
class Items:
    """What of a manifest may be long, as JSON, one text an item."""

    root_calls: Iterable[str] = ()
    weights: Iterable[str] = ()
    calls: Iterable[str] = ()
    portions: Iterable[str] = ()
    tensors: Iterable[str] = ()


def manifest_text(manifest: Manifest, items: Items) -> Iterator[str]:
    """The manifest in pieces, with one line each for the items."""
    head = head_to_json(manifest)
    for name in ("calls", "modules", "tensors"):
        del head[name]
    weights = head.pop("weights", None)
    inputs = head.pop("inputs")
    del inputs["root_calls"]
    yield encode_json(head)[:-1]
    yield f',\n"inputs":{encode_json(inputs)[:-1]},"root_calls":['
    yield from _joined(items.root_calls)
    yield ']},\n"modules":['
    yield from _joined(encode_json(module_to_json(module)) for module in manifest.modules)
    if weights is not None:
        yield '],\n"weights":['
        yield from _joined(items.weights)
    yield '],\n"calls":['
    yield from _joined(items.calls)
    portions = _joined(items.portions)
    for first in portions:  # a file without any says nothing of them
        yield '],\n"portions":[' + first
        yield from portions
    yield '],\n"tensors":['
    yield from _joined(items.tensors)
    yield "]}\n"


def _joined(items: Iterable[str]) -> Iterator[str]:
    separator = "\n"
    for item in items:
        yield separator + item
        separator = ",\n"


def _lines(journal: JournalLines, wanted: str, lost: frozenset[str]) -> Iterator[str]:
    return (_without(lost, payload) for _, payload in journal.of(wanted))


def _calls(journal: JournalLines, lost: frozenset[str]) -> Iterator[str]:
    """Each call in the order in which they returned, those that never did at the end."""
    open_calls: dict[str, str] = {}
    for tag, payload in journal.of("EL"):
        number, described = payload.split("\t", 1)
        if tag == "E":
            open_calls[number] = described
        else:
            yield _without(lost, f"{open_calls.pop(number)[:-1]},{described[1:]}")
    unfinished = encode_json({"output": None, "seconds": None, "error": DID_NOT_RETURN})
    for beginning in open_calls.values():
        yield _without(lost, f"{beginning[:-1]},{unfinished[1:]}")


def _tensors(journal: JournalLines, lost: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Each stored tensor: as in the manifest, and as in the header."""
    for _, payload in journal.of("T"):
        described, entry = payload.split("\t", 1)
        if not lost or json.loads(described)["digest"] not in lost:
            yield described, entry


def _stored(journal: JournalLines, lost: frozenset[str]) -> Iterator[Stored]:
    for described, entry in _tensors(journal, lost):
        ((begin, end),) = (
            known["data_offsets"] for known in json.loads("{" + entry + "}").values()
        )
        yield Stored(json.loads(described)["digest"], begin, end)


def _without(lost: frozenset[str], text: str) -> str:
    """A call's JSON in which tensors that had to be given up are opaque leaves."""
    if not lost:
        return text
    return encode_json(_replaced(json.loads(text), lost))


def _replaced(value: Any, lost: frozenset[str]) -> Any:
    if isinstance(value, list):
        return [_replaced(item, lost) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "tensor" and value.get("digest") in lost:
        return {"type": "opaque", "class": "Tensor", "reason": LOST}
    kept = {name: _replaced(item, lost) for name, item in value.items()}
    if isinstance(kept.get("original"), dict):
        for part in ("scale", "zero_point"):
            if kept["original"].get(part, {}).get("type") == "opaque":
                del kept["original"][part]
    return kept


def header_bound(metadata: dict[str, str], entries: int) -> int:
    """Bytes that the header needs at most, `entries` of them for tensors and their commas."""
    fixed = encode_json({METADATA_KEY: {**metadata, "manifest_digest": "0" * DIGEST_LENGTH}})
    manifest_entry = tensor_header_entry(MANIFEST_KEY, "uint8", (2**63,), 2**63)
    return len(fixed) + entries + len(manifest_entry) + 1


def start_of_data(reserved: int, header: int) -> int:
    """Where the contents begin: behind the reserved space, or further away when that is too
    small."""
    needed = LENGTH.size + header
    if needed <= reserved:
        return reserved
    return -(-(needed + needed // 8) // _MOVE_STEP) * _MOVE_STEP + _MOVE_STEP


def _write_header(
    descriptor: int,
    journal: JournalLines,
    data: Data,
    metadata: dict[str, str],
    lost: frozenset[str],
    manifest_bytes: int,
) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, LENGTH.pack(data.start - LENGTH.size))
    output = _Output(descriptor)
    output.write(encode_json({METADATA_KEY: metadata})[:-1])
    for _, entry in _tensors(journal, lost):
        output.write("," + entry)
    output.write("," + tensor_header_entry(MANIFEST_KEY, "uint8", (manifest_bytes,), data.end))
    output.write("}")
    output.flush()
    write_all(descriptor, b" " * (data.start - LENGTH.size - output.written))


def _make_room(descriptor: int, journal: JournalLines, data: Data, to: int) -> None:
    """Move the contents further from the start of the file."""
    os.ftruncate(descriptor, data.start + data.end)
    _reserve(descriptor, data.start + data.end, to - data.start)
    _move(descriptor, journal, data, to, data.end)


def _reserve(descriptor: int, offset: int, length: int) -> None:
    """Find out that the disk is full before the first byte is moved."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    for position in range(0, length, _BUFFER_BYTES):
        write_all(descriptor, bytes(min(_BUFFER_BYTES, length - position)))


def _move(descriptor: int, journal: JournalLines, data: Data, to: int, remaining: int) -> None:
    """Move the contents from their end backwards in chunks that never overlap what they replace.

    After each chunk the journal says what is still to be moved: killed at any time, the chunk in
    work is whole in its old place.
    """
    log = Journal(journal.file, append=True)
    try:
        chunk = min(to - data.start, _MOVE_CHUNK)
        while remaining:
            remaining = max(0, remaining - chunk)
            length = min(chunk, data.end - remaining)
            block = os.pread(descriptor, length, data.start + remaining)
            _pwrite_all(descriptor, block, to + remaining)
            with _despite_full_disk():
                log.append("D", encode_json({"to": to, "remaining": remaining}))
    finally:
        log.close()
    data.start = to


@contextmanager
def _despite_full_disk() -> Iterator[None]:
    """Go on without the line: a move that stops half-way would lose more than a kill now could."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise


def _pwrite_all(descriptor: int, block: bytes, offset: int) -> None:
    os.lseek(descriptor, offset, os.SEEK_SET)
    write_all(descriptor, block)


def _give_up_tail(
    descriptor: int, journal: JournalLines, data: Data, manifest: Manifest, lost: frozenset[str]
) -> frozenset[str] | None:
    """Give up the last tensors, as few as leave room for the manifest before the file's present
    end; returns the digests of all that is lost, or None when giving up all is not enough."""
    room = os.fstat(descriptor).st_size
    tensors = list(_stored(journal, lost))
    given_up = set(lost)
    end, target = data.end, data.end - 1
    while end > target:
        while end > target and tensors:
            last = tensors.pop()
            given_up.add(last.digest)
            end = last.begin
        if end > target:
            return None
        header = _header_room(journal, manifest, frozenset(given_up))
        texts = _texts(journal, manifest, frozenset(given_up))
        target = room - start_of_data(data.start, header) - sum(map(len, texts))
    data.end = end
    os.ftruncate(descriptor, data.start + data.end)
    return frozenset(given_up)
