"""Counts what an archive would hold, and writes nothing."""

import threading
from collections.abc import Iterator

from qvtrace.archive.ending import (
    Ending,
    Items,
    header_bound,
    manifest_text,
    metadata_of,
    start_of_data,
)
from qvtrace.archive.layout import LENGTH, encode_json, nbytes, reserve_for, tensor_header_entry
from qvtrace.archive.writer import Tensor
from qvtrace.digests import Hasher, digest_bytes
from qvtrace.manifest import Manifest, ModuleEntry, PortionEntry, RootCall, WeightEntry
from qvtrace.manifest_json import portion_to_json, root_call_to_json, weight_to_json
from qvtrace.trees import Json

_SEPARATOR = 2  # a comma and the end of a line, between items of the manifest


class DryWriter:
    """Takes what an `ArchiveWriter` takes; `size` is the size of the file that would be written."""

    def __init__(self, manifest: Manifest) -> None:
        self.distinct_bytes = 0
        self.size = 0
        self._reserved = LENGTH.size + reserve_for(len(manifest.modules))
        self._known: set[str] = set()
        self._header_bytes = 0
        self._manifest_bytes = 0
        self._calls = 0
        self._lock = threading.Lock()

    def describe(self, manifest: Manifest) -> None:
        """What is known comes with the manifest when it is closed."""

    def add_modules(self, modules: tuple[ModuleEntry, ...]) -> None:
        """The modules come with the manifest when it is closed."""

    def add_tensor(self, data: memoryview, tensor: Tensor) -> str:
        """Count the bytes, unless equal ones were; returns their digest."""
        return self._note(digest_bytes(data), tensor)

    def add_pieces(self, pieces: Iterator[memoryview], tensor: Tensor) -> str:
        """Count contents that come in pieces; returns their digest."""
        hasher = Hasher()
        for piece in pieces:
            hasher.update(piece)
        return self._note(str(hasher.hexdigest()), tensor)

    def add_portion(self, portion: PortionEntry) -> None:
        """Count what is stored of a content."""
        with self._lock:
            self._count(portion_to_json(portion))

    def add_root_call(self, call: RootCall) -> None:
        """Count the inputs of an outermost call."""
        with self._lock:
            self._count(root_call_to_json(call))

    def add_weight(self, weight: WeightEntry) -> None:
        """Count a weight."""
        with self._lock:
            self._count(weight_to_json(weight))

    def begin_call(self, beginning: Json) -> int:
        """Count a call and its inputs; returns its number."""
        with self._lock:
            self._calls += 1
            self._count(beginning)
            return self._calls

    def end_call(self, number: int, end: Json) -> None:
        """Count what the call returned: it joins what `begin_call` counted."""
        with self._lock:
            self._manifest_bytes += len(encode_json(end)) - 1

    def close(self, manifest: Manifest) -> Ending:
        """Compute `size`; there is no file."""
        self._metadata = metadata_of(manifest)
        self._fixed = sum(map(len, manifest_text(manifest, Items())))
        self.size = self.size_with(0, 0, 0)
        return Ending(None, manifest.error)

    def size_with(self, header: int, manifest: int, data: int) -> int:
        """The size of the file with so many more bytes of each; once it is closed."""
        bound = header_bound(self._metadata, self._header_bytes + header)
        start = start_of_data(self._reserved, bound)
        return start + self.distinct_bytes + data + self._manifest_bytes + manifest + self._fixed

    def discard(self) -> None:
        """There is nothing to take away."""

    def _note(self, digest: str, tensor: Tensor) -> str:
        with self._lock:
            if digest not in self._known:
                self._known.add(digest)
                begin = self.distinct_bytes
                self.distinct_bytes += nbytes(tensor.dtype, tensor.shape)
                entry = tensor_header_entry(tensor.key, tensor.dtype, tensor.shape, begin)
                self._header_bytes += len(entry) + 1
                self._count(tensor.to_json(digest))
        return digest

    def _count(self, item: Json) -> None:
        self._manifest_bytes += len(encode_json(item)) + _SEPARATOR
