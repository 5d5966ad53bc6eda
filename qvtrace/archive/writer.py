"""Writes an archive as the trace comes: contents to the file, everything else to the journal."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qvtrace.archive.destinations import archive_fault
from qvtrace.archive.ending import Data, Ending, finish, metadata_of
from qvtrace.archive.journal import Journal, JournalLines, write_all
from qvtrace.archive.layout import (
    LENGTH,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_NODES,
    count_nodes,
    encode_json,
    journal_of,
    manifest_copy_of,
    nbytes,
    partial_of,
    placeholder_header,
    reserve_for,
    tensor_header_entry,
)
from qvtrace.digests import Hasher, digest_bytes
from qvtrace.errors import ArchiveError, ExistingFileError
from qvtrace.manifest import Manifest, ModuleEntry, PortionEntry, RootCall, WeightEntry
from qvtrace.manifest_json import (
    head_to_json,
    module_to_json,
    portion_to_json,
    root_call_to_json,
    weight_to_json,
)
from qvtrace.trees import Json

_HEADER_MARGIN = 1 << 20
_MANIFEST_MARGIN = 1 << 20
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is first met, and how its bytes are to be read."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    whole_shape: tuple[int, ...] | None = None  # of what is stored in another form, such as complex

    @property
    def place_shape(self) -> tuple[int, ...]:
        """The shape at the place, whatever the form in which it is stored."""
        return self.shape if self.whole_shape is None else self.whole_shape

    def to_json(self, digest: str) -> Json:
        """The tensor as it stands in the manifest."""
        return {
            "key": self.key,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "digest": digest,
        }


class ArchiveWriter:
    """Streams one archive to `FILE.partial`, which becomes `FILE` when it is whole.

    Every method may be called from several threads. Raises `OSError` when the disk is full: what
    was written until then stays, and `close` makes it readable.
    """

    def __init__(self, file: Path, manifest: Manifest, *, overwrite: bool = False) -> None:
        """Create the file; `manifest` says what is known before the first call.

        Raises `ExistingFileError` when it, its readable copy or a `.partial` of an earlier
        recording is there and `overwrite` is not asked for, and `ArchiveError` when it is a folder
        or a device, or cannot be created.
        """
        self.file = file
        self._place = _place_of(file)  # there, wherever the model's code changes folder to
        self.partial = partial_of(file)
        self.distinct_bytes = 0
        self.size = 0
        self._known: set[bytes] = set()
        self._header_bytes = 0
        self._manifest_bytes = 0
        self._manifest_nodes = 0
        self._calls = 0
        self._lock = threading.Lock()
        if not overwrite:
            refuse_existing(file)
        self._descriptor = _create(self.partial)
        reserve = reserve_for(len(manifest.modules))
        try:
            # Some file systems flush a file that was ever truncated when it is closed.
            if os.fstat(self._descriptor).st_size:
                os.ftruncate(self._descriptor, 0)
            write_all(self._descriptor, placeholder_header(reserve, metadata_of(manifest)))
            self._journal = Journal(journal_of(partial_of(self._place)))
            self._start = LENGTH.size + reserve
            self.describe(manifest)
            self.add_modules(manifest.modules)
        except OSError as error:
            self.discard()
            raise ArchiveError(f"{file}: cannot be written: {error.strerror}") from error

    def describe(self, manifest: Manifest) -> None:
        """Note in the journal what is now known of the trace, but for its modules."""
        described = encode_json({"start": self._start, "head": head_to_json(manifest)})
        with self._lock:
            self._journal.append("P", described)

    def add_modules(self, modules: tuple[ModuleEntry, ...]) -> None:
        """Note in the journal which modules there are."""
        described = encode_json([module_to_json(module) for module in modules])
        with self._lock:
            self._journal.append("M", described)

    def add_tensor(self, data: memoryview, tensor: Tensor) -> str:
        """Store the bytes, unless equal ones are there; returns their digest."""
        digest = digest_bytes(data)
        with self._lock:
            if bytes.fromhex(digest) not in self._known:
                self._append(data, tensor, digest)
        return digest

    def add_pieces(self, pieces: Iterator[memoryview], tensor: Tensor) -> str:
        """Store contents that come in pieces, unless equal ones are there; returns their digest.

        They are written before their digest is known, and taken back when it is an old one.
        """
        hasher = Hasher()
        with self._lock:
            try:
                for piece in pieces:
                    hasher.update(piece)
                    write_all(self._descriptor, piece)
                digest = str(hasher.hexdigest())
                if bytes.fromhex(digest) in self._known:
                    self._rewind()
                else:
                    self._note(tensor, digest)
            except BaseException:
                self._rewind()
                raise
        return digest

    def add_portion(self, portion: PortionEntry) -> None:
        """Note what is stored of a content, before any place names it."""
        self._append_line("S", encode_json(portion_to_json(portion)))

    def add_root_call(self, call: RootCall) -> None:
        """Note the inputs of an outermost call."""
        self._append_line("R", encode_json(root_call_to_json(call)))

    def add_weight(self, weight: WeightEntry) -> None:
        """Note a weight, whose values have been added."""
        self._append_line("W", encode_json(weight_to_json(weight)))

    def begin_call(self, beginning: Json) -> int:
        """Note a call and its inputs; returns its number, to be given to `end_call`."""
        with self._lock:
            self._calls += 1
            number = self._calls
        self._append_line("E", f"{number}\t{encode_json(beginning)}")
        return number

    def end_call(self, number: int, end: Json) -> None:
        """Note what the call returned."""
        self._append_line("L", f"{number}\t{encode_json(end)}")

    def close(self, manifest: Manifest) -> Ending:
        """Finish the file: `FILE` if the trace is complete, else `FILE.partial`.

        Raises `ArchiveError` when the disk is so full that not even the index fits; the journal
        then stays, and `recover` can finish the file when there is room.
        """
        with self._lock:  # a thread that still runs the model must not write to a closed file
            self._journal.close()
            descriptor, self._descriptor = self._descriptor, -1
        partial = partial_of(self._place)
        journal = journal_of(partial)
        try:
            data = Data(self._start, self.distinct_bytes)
            manifest = finish(descriptor, JournalLines(journal), data, manifest, frozenset())
            self.size = os.fstat(descriptor).st_size
            if manifest.complete:
                partial.replace(self._place)
                _copy_manifest(descriptor, data.start + data.end, manifest_copy_of(self._place))
            journal.unlink(missing_ok=True)
        except OSError as error:
            raise ArchiveError(
                f"{self.partial}: cannot be finished: {error.strerror}; "
                f"make room, then run: qvtrace recover {self.partial}"
            ) from error
        finally:
            os.close(descriptor)
        if not manifest.complete:
            return Ending(self.partial, manifest.error)
        return Ending(self.file, None)

    def discard(self) -> None:
        """Take the file away again: the recording never began."""
        os.close(self._descriptor)
        partial = partial_of(self._place)
        for file in (journal_of(partial), partial):
            with suppress(OSError):  # what stands there is not ours
                file.unlink()

    def _append(self, data: memoryview, tensor: Tensor, digest: str) -> None:
        try:
            write_all(self._descriptor, data)
            self._note(tensor, digest)
        except BaseException:
            self._rewind()
            raise

    def _note(self, tensor: Tensor, digest: str) -> None:
        """Count in what was just written: only now is it part of the archive."""
        begin = self.distinct_bytes
        entry = tensor_header_entry(tensor.key, tensor.dtype, tensor.shape, begin)
        described = encode_json(tensor.to_json(digest))
        self._count(described)
        self._header_bytes += len(entry) + 1
        if self._header_bytes > MAX_HEADER_BYTES - _HEADER_MARGIN:
            raise ArchiveError(
                f"{self.file}: more tensors than a safetensors header can name; "
                "record fewer modules with --include"
            )
        end = begin + nbytes(tensor.dtype, tensor.shape)
        self._journal.append("T", f"{described}\t{entry}")
        self.distinct_bytes = end  # at once: what Ctrl-C takes back must not have its line
        self._known.add(bytes.fromhex(digest))

    def _rewind(self) -> None:
        """Take back what was written since the last whole tensor."""
        end = self._start + self.distinct_bytes
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)

    def _append_line(self, tag: str, payload: str) -> None:
        with self._lock:
            self._count(payload)
            self._journal.append(tag, payload)

    def _count(self, text: str) -> None:
        """Stop before the manifest says more than a reader would take in."""
        self._manifest_bytes += len(text)
        self._manifest_nodes += count_nodes(text.encode())
        if (
            self._manifest_bytes > MAX_MANIFEST_BYTES - _MANIFEST_MARGIN
            or self._manifest_nodes > MAX_MANIFEST_NODES - _MANIFEST_MARGIN
        ):
            raise ArchiveError(
                f"{self.file}: more calls than an archive can hold; "
                "record fewer steps, or fewer modules with --include"
            )


def _place_of(file: Path) -> Path:
    """The absolute name of a file; raises `ArchiveError` where no archive can be."""
    try:
        place, fault = file.absolute(), archive_fault(file)
    except OSError as error:  # the working folder was deleted
        raise ArchiveError(f"{file}: cannot be written: {error.strerror}") from error
    if fault is not None:
        raise ArchiveError(f"{file}: {fault}")
    return place


def refuse_existing(file: Path) -> None:
    """Raise `ExistingFileError` where writing an archive would overwrite any file of one."""
    for there in (file, manifest_copy_of(file)):
        if there.exists():
            raise ExistingFileError(
                f"{there}: already exists; choose another name, "
                "or overwrite it with --force (overwrite=True in Python)"
            )
    partial = partial_of(file)
    if partial.exists():
        raise ExistingFileError(
            f"{partial}: an earlier recording left it; keep it under another name, "
            "or overwrite it with --force (overwrite=True in Python)"
        )


def _create(partial: Path) -> int:
    """Open the `.partial` file, locked against a second recording and against recovery."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ArchiveError(f"{partial}: cannot be written: {error.strerror}") from error
    if not lock(descriptor):
        os.close(descriptor)
        raise ArchiveError(
            f"{partial}: another process is recording it; wait for it or choose another name"
        )
    return descriptor


def lock(descriptor: int) -> bool:
    """Take the file for this process; False when another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _copy_manifest(descriptor: int, begin: int, copy: Path) -> None:
    """Write the readable copy of the manifest, which reaches from `begin` to the end of the file;
    an archive is whole without it."""
    unfinished = partial_of(copy)
    try:
        with unfinished.open("wb") as output:
            while block := os.pread(descriptor, _COPY_BYTES, begin):
                output.write(block)
                begin += len(block)
        unfinished.replace(copy)
    except OSError:
        unfinished.unlink(missing_ok=True)
