"""A trace that is never stored: its manifest stays, its contents are at hand while they pass by."""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qvtrace.archive.arrays import array_of, form_of
from qvtrace.archive.ending import Ending, Items, manifest_text
from qvtrace.archive.layout import encode_json, nbytes
from qvtrace.archive.reader import Archive
from qvtrace.archive.writer import Tensor
from qvtrace.digests import digest_bytes
from qvtrace.errors import NotAtHandError
from qvtrace.manifest import (
    DID_NOT_RETURN,
    CallEntry,
    Manifest,
    ModuleEntry,
    PortionEntry,
    RootCall,
    WeightEntry,
)
from qvtrace.manifest_json import (
    call_from_json,
    manifest_from_json,
    portion_to_json,
    root_call_to_json,
    weight_to_json,
)
from qvtrace.sampling import Places, count_vectors, sampled_places
from qvtrace.trees import Container, Json, Node, TensorLeaf


class _Passing(threading.local):
    """The contents that this thread has met since the last call began or ended."""

    def __init__(self) -> None:
        self.of_digest: dict[str, memoryview] = {}


class PassingTrace(Archive):
    """What a comparison asks of an archive, while the model runs and afterwards.

    Of contents there are those that pass by, those that are kept, and those that an archive holds
    as well.
    """

    def __init__(self, name: str, manifest: Manifest, stored: Archive) -> None:
        """`name` stands for the file that there is not; `stored` may hold equal contents."""
        self.file = Path(name)
        self.size = 0
        self.label = name
        self.manifest = manifest
        self.passing = _Passing()
        self._stored = stored
        self._whole: set[bytes] = set()  # digests of contents that an archive would hold whole
        self._portions = {}
        self._kept: dict[str, memoryview] = {}
        self._keepers: Counter[str] = Counter()
        self._earlier: Mapping[str, memoryview] = {}

    def array(self, leaf: TensorLeaf) -> np.ndarray[Any, Any]:
        """The elements of a leaf; raises `NotAtHandError` where they have passed by."""
        leaf = self._as_stored(leaf)
        return array_of(leaf, self.stored(leaf.digest))

    def form(self, leaf: TensorLeaf) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype and shape of what `array` gave."""
        return form_of(self._as_stored(leaf))

    def portion(self, leaf: TensorLeaf) -> PortionEntry | None:
        """What an archive would hold of a leaf; None where that is all of it."""
        if not self._portions or bytes.fromhex(leaf.digest) in self._whole:
            return None
        return self._portions.get((leaf.digest, leaf.shape))

    def places(self, leaf: TensorLeaf) -> Places | None:
        """Which of a leaf's vectors there were; None: all of them."""
        portion = self.portion(leaf)
        if portion is None or portion.stored is None:
            return None
        return sampled_places(count_vectors(leaf.shape), portion.vectors, self._seed())

    def holds(self, digest: str) -> bool:
        """Whether an archive would hold a content."""
        return bytes.fromhex(digest) in self._whole

    def note(self, digest: str) -> bool:
        """Take in that there is a content; returns whether it is new."""
        is_new = bytes.fromhex(digest) not in self._whole
        self._whole.add(bytes.fromhex(digest))
        return is_new

    def portions(self) -> Iterable[PortionEntry]:
        """All that were noted."""
        return self._portions.values()

    def note_portion(self, portion: PortionEntry) -> None:
        """Take in what there is of a content."""
        self._portions[portion.digest, portion.shape] = portion

    def stored(self, digest: str) -> memoryview:
        """The bytes of a content; raises `NotAtHandError` where they have passed by."""
        for contents in (self.passing.of_digest, self._kept):
            if digest in contents:
                return contents[digest]
        if self._stored.holds(digest):
            return self._stored.stored(digest)
        if digest in self._earlier and digest_bytes(self._earlier[digest]) == digest:
            return self._earlier[digest]
        raise NotAtHandError(
            f"{self.file}: contents were wanted after they had passed by; record the candidate in "
            "an archive of its own and compare that"
        )

    def contents(self, leaf: TensorLeaf) -> bytes:
        """The bytes of a leaf; raises `NotAtHandError` where they have passed by."""
        return bytes(self.stored(leaf.digest))

    def keep(self, digest: str) -> int:
        """Have contents that are at hand until `drop`; returns the bytes that this takes."""
        self._keepers[digest] += 1
        if digest in self._kept or self._stored.holds(digest):
            return 0
        self._kept[digest] = memoryview(bytes(self.stored(digest)))
        return self._kept[digest].nbytes

    def drop(self, digest: str) -> int:
        """Let go of what was kept, once for each time; returns the bytes that this frees."""
        self._keepers[digest] -= 1
        if self._keepers[digest] or digest not in self._kept:
            return 0
        return self._kept.pop(digest).nbytes

    @contextmanager
    def again(self, earlier: Mapping[str, memoryview]) -> Iterator[None]:
        """Have contents at hand that passed by earlier, those that were not overwritten since."""
        self._earlier = earlier
        try:
            yield
        finally:
            self._earlier = {}

    def close(self) -> None:
        """Let go of all contents."""
        self._kept.clear()


class CallListener(Protocol):
    """Looks at contents while they are at hand."""

    def begin(self, trace: PassingTrace) -> None:
        """The trace begins: nothing has run yet."""

    def modules(self, modules: tuple[ModuleEntry, ...]) -> None:
        """Which modules there are, as far as is known."""

    def began(self, call: CallEntry) -> None:
        """What a call was given is at hand."""

    def ended(self, call: CallEntry) -> None:
        """What a call gave is at hand."""


class PassingWriter:
    """Takes what an `ArchiveWriter` takes, and lets its contents pass by."""

    def __init__(self, trace: PassingTrace, listener: CallListener) -> None:
        self.distinct_bytes = 0
        self.size = 0
        self._trace = trace
        self._listener = listener
        self._modules = trace.manifest.modules
        self._root_calls: list[RootCall] = []
        self._weights: list[str] = []
        self._open: dict[int, Json] = {}
        self._calls: list[str] = []
        self._count = 0
        self._lock = threading.RLock()
        listener.begin(trace)
        self.describe(trace.manifest)
        self.add_modules(trace.manifest.modules)

    def describe(self, manifest: Manifest) -> None:
        """Take what is now known of the trace, but for its modules."""
        with self._lock:
            given = manifest.inputs.given
            if given is not None and self._trace.manifest.inputs.given is None:
                self._keep(*given.input_trees())
            self._describe(manifest)

    def add_modules(self, modules: tuple[ModuleEntry, ...]) -> None:
        """Take which modules there are."""
        with self._lock:
            self._trace.passing.of_digest.clear()
            self._modules = modules
            self._describe(self._trace.manifest)
            self._listener.modules(modules)

    def add_tensor(self, data: memoryview, tensor: Tensor) -> str:
        """Have contents at hand until the next call begins or ends; returns their digest."""
        digest = digest_bytes(data)
        self._trace.passing.of_digest[digest] = data
        with self._lock:
            if self._trace.note(digest):
                self.distinct_bytes += nbytes(tensor.dtype, tensor.shape)
        return digest

    def add_pieces(self, pieces: Iterator[memoryview], tensor: Tensor) -> str:
        """The same for contents that come in pieces."""
        return self.add_tensor(memoryview(b"".join(pieces)), tensor)

    def add_portion(self, portion: PortionEntry) -> None:
        """Take what there is of a content."""
        with self._lock:
            self._trace.note_portion(portion)

    def add_root_call(self, call: RootCall) -> None:
        """Take the inputs of an outermost call, which tell whether two runs are comparable."""
        with self._lock:
            self._root_calls.append(call)
            self._describe(self._trace.manifest)
            self._keep(*call.input_trees())

    def add_weight(self, weight: WeightEntry) -> None:
        """Take a weight."""
        with self._lock:
            self._weights.append(encode_json(weight_to_json(weight)))
            self._trace.passing.of_digest.clear()

    def begin_call(self, beginning: Json) -> int:
        """Take a call and its inputs; returns its number, to be given to `end_call`."""
        with self._lock:
            self._count += 1
            self._open[self._count] = beginning
            self._listener.began(call_from_json({**beginning, **_UNKNOWN}))
            self._trace.passing.of_digest.clear()
            return self._count

    def end_call(self, number: int, end: Json) -> None:
        """Take what the call returned."""
        with self._lock:
            call = {**self._open.pop(number), **end}
            self._calls.append(encode_json(call))
            self._listener.ended(call_from_json(call))
            self._trace.passing.of_digest.clear()

    def close(self, manifest: Manifest) -> Ending:
        """The trace has its whole manifest, as it would have been read from a file."""
        with self._lock:
            for beginning in self._open.values():
                self._calls.append(encode_json({**beginning, **_UNKNOWN, "error": DID_NOT_RETURN}))
            self._open.clear()
            root_calls = (encode_json(root_call_to_json(call)) for call in self._root_calls)
            portions = map(encode_json, map(portion_to_json, self._trace.portions()))
            items = Items(root_calls, self._weights, self._calls, portions)
            text = "".join(manifest_text(manifest, items))
            for taken in (self._root_calls, self._weights, self._calls):
                taken.clear()
            self._trace.passing.of_digest.clear()
            self._trace.manifest = manifest_from_json(json.loads(text))
        return Ending(None, manifest.error)

    def discard(self) -> None:
        """There is nothing to take away."""

    def _describe(self, manifest: Manifest) -> None:
        inputs = replace(manifest.inputs, root_calls=tuple(self._root_calls))
        self._trace.manifest = replace(manifest, inputs=inputs, modules=self._modules)

    def _keep(self, *nodes: Node) -> None:
        for node in nodes:
            for digest in _digests(node):
                if digest in self._trace.passing.of_digest:
                    self._trace.keep(digest)


_UNKNOWN: Mapping[str, Any] = {"output": None, "seconds": None, "error": None}


def _digests(node: Node) -> Iterator[str]:
    """Of the tensors in a tree but for those of a Cache, which a model has computed itself."""
    if isinstance(node, TensorLeaf):
        yield node.digest
    elif isinstance(node, Container) and node.kind != "cache":
        for _, child in node.items:
            yield from _digests(child)
