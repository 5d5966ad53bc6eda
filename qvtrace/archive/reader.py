"""Reads an archive: maps the file, and believes nothing that it says before checking it."""

import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeGuard

import numpy as np

from qvtrace.archive.arrays import array_of
from qvtrace.archive.layout import (
    DTYPES,
    LENGTH,
    MANIFEST_KEY,
    MAX_HEADER_BYTES,
    MAX_HEADER_NODES,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_NODES,
    METADATA_KEY,
    NAME_OF_CODE,
    RECORDING,
    count_nodes,
    nbytes,
)
from qvtrace.collector import without_collector
from qvtrace.digests import digest_bytes
from qvtrace.errors import (
    ArchiveError,
    CutShortError,
    DamagedArchiveError,
    MissingArchiveError,
    NewerFormatError,
    NotAnArchiveError,
    NotSafetensorsError,
    UnfinishedArchiveError,
)
from qvtrace.manifest import (
    FORMAT_VERSION,
    CallEntry,
    GivenInputs,
    Manifest,
    PortionEntry,
    RootCall,
)
from qvtrace.manifest_json import manifest_from_json
from qvtrace.sampling import FEWEST, SEED, Places, count_vectors, sampled_places
from qvtrace.trees import Node, TensorLeaf

MAX_DIMENSIONS = 64
_MOST_VECTORS = 1 << 62


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one stored tensor lies: offsets count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Archive:
    """An archive opened for reading; a context manager.

    Arrays are views of the mapped file: nothing is read before it is looked at. Never imports
    torch.
    """

    def __init__(self, file: Path, mapped: mmap.mmap, header: "Header") -> None:
        """Use `Archive.open`."""
        self.file = file
        self.size = len(mapped)
        self._mapped = mapped
        self._header = header
        self.manifest = self._read_manifest()
        # What reports call it; nobody is to learn of a private one where it lies.
        self.label = file.name if self.is_private else str(file)
        self._extent_of_digest = self._index()
        self._portions = {(entry.digest, entry.shape): entry for entry in self.manifest.portions}

    @classmethod
    def open(cls, file: str | os.PathLike[str]) -> "Archive":
        """Open and check a file.

        Raises a child of `ArchiveError` that names the file: missing, no safetensors file, cut
        short, not written by qvtrace, in a newer format, left unfinished by a kill, or damaged.
        """
        path = Path(file)
        mapped = _map(path)
        try:
            return cls(path, mapped, read_header(path, mapped))
        except BaseException:
            mapped.close()
            raise

    @property
    def key_digest(self) -> str | None:
        """What tells the key of its keyed digests; None where nothing in it is private."""
        private = self.manifest.settings.get("private")
        key = private.get("key") if isinstance(private, dict) else None
        return key if isinstance(key, str) else None

    @property
    def is_private(self) -> bool:
        """Whether it keeps to itself what its model was given."""
        return self.key_digest is not None

    def array(self, leaf: TensorLeaf) -> np.ndarray[Any, Any]:
        """The elements of a leaf, read-only and maybe unaligned, in its dtype and shape.

        What the file holds in another form comes back as `array_of` says; of a tensor that was
        sampled, the vectors at its `places`, in two dimensions.
        Raises `DamagedArchiveError` when the file has no such contents.
        """
        leaf = self._as_stored(leaf)
        extent = self._extent(leaf)
        try:
            return array_of(leaf, self._mapped, self._header.data_start + extent.begin)
        except (ValueError, OverflowError) as error:  # a shape that numpy cannot have
            self._damaged(f"{leaf.dtype} {list(leaf.shape)} cannot be read ({error})")

    def form(self, leaf: TensorLeaf) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The dtype and shape of what `array` gives, or would give where no elements are stored;
        raises as that does."""
        if self.has_elements(leaf):
            array = self.array(leaf)
            return array.dtype, array.shape
        try:
            nothing = array_of(replace(leaf, shape=(0,), stored_shape=(0,)), memoryview(b""))
        except KeyError:
            self._damaged(f"{leaf.dtype} is stored as the unknown dtype {leaf.file_dtype!r}")
        return nothing.dtype, leaf.shape

    def portion(self, leaf: TensorLeaf) -> PortionEntry | None:
        """What the file holds of a leaf; None where that is all of it."""
        if not self._portions or leaf.digest in self._extent_of_digest:
            return None
        return self._portions.get((leaf.digest, leaf.shape))

    def has_elements(self, leaf: TensorLeaf) -> bool:
        """Whether `array` gives elements of a leaf: all, or those that were sampled."""
        portion = self.portion(leaf)
        return portion is None or portion.stored is not None

    def places(self, leaf: TensorLeaf) -> Places | None:
        """Which of a leaf's vectors along the last dimension are stored; None: all of them."""
        portion = self.portion(leaf)
        if portion is None or portion.stored is None:
            return None
        self._extent(self._as_stored(leaf))  # before a number of the file's becomes memory
        return sampled_places(count_vectors(leaf.shape), portion.vectors, self._seed())

    def holds(self, digest: str) -> bool:
        """Whether the file has a content."""
        return digest in self._extent_of_digest

    def stored(self, digest: str) -> memoryview:
        """The bytes of a content as they lie in the file; raises `DamagedArchiveError` when it has
        no such content."""
        extent = self._extent_of_digest.get(digest)
        if extent is None:
            self._damaged(f"no tensor has the digest {digest!r}")
        return memoryview(self._mapped)[self._slice(extent)]

    def contents(self, leaf: TensorLeaf) -> bytes:
        """The stored bytes of a leaf: what `array` makes elements of.

        Raises `DamagedArchiveError` when the file has no such contents.
        """
        return self._bytes(self._extent(leaf))

    def tree(self, call: CallEntry, part: str) -> Node | None:
        """The tree of a call's `inputs`, `kwargs` or `output`; None where it was not stored.

        Raises `DamagedArchiveError` for a tree that no writer writes.
        """
        try:
            return call.tree(part)
        except ValueError as error:
            self._damaged(f"the {part} of {call.module!r}, call {call.index}: {error}")

    def input_trees(self, call: RootCall | GivenInputs) -> tuple[Node, Node]:
        """The trees of what a model was given, by position and by name.

        Raises `DamagedArchiveError` for a tree that no writer writes.
        """
        try:
            return call.input_trees()
        except ValueError as error:
            self._damaged(f"the inputs of the model: {error}")

    def manifest_bytes(self) -> bytes:
        """The manifest as it stands in the file."""
        extent = self._header.tensors[MANIFEST_KEY]
        return self._bytes(extent)

    def damaged_tensors(self) -> Iterator[str]:
        """The key of each tensor whose bytes do not have the digest that the manifest names."""
        for entry in self.manifest.tensors:
            view = memoryview(self._mapped)[self._slice(self._header.tensors[entry.key])]
            with view:
                if digest_bytes(view) != entry.digest:
                    yield entry.key

    def close(self) -> None:
        """Let go of the file; arrays that are still in use keep it mapped."""
        try:
            self._mapped.close()
        except BufferError:
            return

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _as_stored(self, leaf: TensorLeaf) -> TensorLeaf:
        """A leaf of which the file holds a sample, as that sample."""
        portion = self.portion(leaf)
        if portion is None or portion.stored is None:
            return leaf
        rows, depth = portion.vectors, len(leaf.shape) - 1
        all_rows = count_vectors(leaf.shape)
        if depth < 1 or not leaf.shape[-1] or not FEWEST <= rows < all_rows < _MOST_VECTORS:
            self._damaged(f"{rows} vectors of {list(leaf.shape)} cannot be stored")
        return replace(
            leaf,
            shape=(rows, leaf.shape[-1]),
            digest=portion.stored,
            stored_shape=None if leaf.stored_shape is None else (rows, *leaf.stored_shape[depth:]),
        )

    def _seed(self) -> int:
        sampling = self.manifest.settings.get("sampling")
        seed = sampling.get("seed") if isinstance(sampling, dict) else None
        return seed if type(seed) is int and seed >= 0 else SEED

    def _extent(self, leaf: TensorLeaf) -> Extent:
        extent = self._extent_of_digest.get(leaf.digest)
        if extent is None:
            self._damaged(f"no tensor has the digest {leaf.digest!r}")
        as_it_is = (leaf.file_dtype, leaf.file_shape) == (leaf.dtype, leaf.shape)
        if (
            leaf.file_dtype not in DTYPES
            or (leaf.dtype in DTYPES and not as_it_is)
            or extent.end - extent.begin != nbytes(leaf.file_dtype, leaf.file_shape)
        ):
            self._damaged(f"{leaf.dtype} {list(leaf.shape)} is not what is stored for it")
        return extent

    def _slice(self, extent: Extent) -> slice:
        start = self._header.data_start
        return slice(start + extent.begin, start + extent.end)

    def _bytes(self, extent: Extent) -> bytes:
        return self._mapped[self._slice(extent)]

    def _read_manifest(self) -> Manifest:
        extent = self._header.tensors[MANIFEST_KEY]
        if extent.end - extent.begin > MAX_MANIFEST_BYTES:
            self._damaged("the manifest is larger than any trace needs")
        data = self.manifest_bytes()
        if digest_bytes(data) != self._header.metadata.get("manifest_digest"):
            self._damaged("the manifest does not match its digest")
        if count_nodes(data) > MAX_MANIFEST_NODES:
            self._damaged("the manifest describes more than any model can do")
        try:
            with without_collector():
                described = json.loads(data, parse_constant=_refuse_constant)
                self._check_format(described)
                return manifest_from_json(described)
        except (ValueError, RecursionError) as error:
            raise DamagedArchiveError(
                f"{self.file}: the manifest is damaged ({error}); record again"
            ) from error

    def _check_format(self, described: Any) -> None:
        """The manifest is what counts; raises `ValueError` for one that contradicts the header."""
        metadata = self._header.metadata
        found = described.get("format") if isinstance(described, dict) else None
        if type(found) is not int:
            return  # which is told with all else that it lacks
        _check_format(self.file, found, str(described.get("qvtrace")))
        if found != int(metadata["qvtrace"]):
            raise ValueError(f"it has format {found}, the header {metadata['qvtrace']}")

    def _index(self) -> dict[str, Extent]:
        """Where each digest's contents lie; the manifest and the header must name the same
        tensors."""
        stored = {
            key: extent for key, extent in self._header.tensors.items() if key != MANIFEST_KEY
        }
        for entry in self.manifest.tensors:
            extent = stored.pop(entry.key, None)
            if extent is None or (extent.dtype, extent.shape) != (entry.dtype, entry.shape):
                self._damaged(f"manifest and header differ about the tensor {entry.key!r}")
        if stored:
            self._damaged(f"the manifest does not know the tensor {next(iter(stored))!r}")
        tensors = self._header.tensors
        return {entry.digest: tensors[entry.key] for entry in self.manifest.tensors}

    def _damaged(self, what: str) -> NoReturn:
        raise DamagedArchiveError(f"{self.file}: {what}; the file is damaged, record again")


@dataclass(frozen=True)
class Header:
    """The checked safetensors header of an archive."""

    metadata: dict[str, str]
    tensors: dict[str, Extent]
    data_start: int


def recorded_by(file: Path) -> str | None:
    """What recorded a file, whole or not; None where that cannot be told."""
    try:
        with _map(file) as mapped:
            _, json_header = _header_json(file, mapped)
    except ArchiveError:
        return None
    metadata = json_header.get(METADATA_KEY)
    return metadata.get("recorded_by") if _is_archive(metadata) else None


def read_header(file: Path, mapped: mmap.mmap) -> Header:
    """The header, when everything in it agrees with the file; raises children of `ArchiveError`."""
    length, json_header = _header_json(file, mapped)
    metadata = json_header.pop(METADATA_KEY, None)
    if not _is_archive(metadata):
        raise NotAnArchiveError(
            f"{file}: a safetensors file, but no qvtrace archive; make one with: qvtrace record"
        )
    version = metadata.get("version", "of an unknown version")
    _check_format(file, int(metadata["qvtrace"]), version)
    if metadata.get("state") == RECORDING:
        raise UnfinishedArchiveError(
            f"{file}: its recording was killed or is still running; if it was killed, "
            f"make the file readable with: qvtrace recover {file}"
        )
    try:
        tensors = {key: _extent(key, entry) for key, entry in json_header.items()}
    except ValueError as error:
        raise DamagedArchiveError(f"{file}: {error}; the file is damaged, record again") from error
    data_start = LENGTH.size + length
    _check_extents(file, tensors, len(mapped) - data_start)
    if MANIFEST_KEY not in tensors or tensors[MANIFEST_KEY].dtype != "uint8":
        raise DamagedArchiveError(f"{file}: has no manifest; the file is damaged, record again")
    return Header(metadata, tensors, data_start)


def _map(file: Path) -> mmap.mmap:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingArchiveError(
            f"{file}: there is no such file; check the path, or record it: qvtrace record --help"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArchiveError(f"{file}: cannot be read: {reason}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotSafetensorsError(f"{file}: not a file; name an archive, such as fp.st")
        if status.st_size < LENGTH.size:
            raise NotSafetensorsError(
                f"{file}: not a safetensors file, or cut short: it has {status.st_size} bytes; "
                "record again"
            )
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ArchiveError(f"{file}: cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _header_json(file: Path, mapped: mmap.mmap) -> tuple[int, dict[str, Any]]:
    (length,) = LENGTH.unpack(mapped[: LENGTH.size])
    text = mapped[LENGTH.size : LENGTH.size + min(length, MAX_HEADER_BYTES)]
    if length > MAX_HEADER_BYTES or not text.startswith(b"{"):
        raise NotSafetensorsError(
            f"{file}: not a safetensors file; name an archive that `qvtrace record` wrote"
        )
    if len(text) < length:
        raise CutShortError(
            f"{file}: cut short: {len(mapped)} bytes where the header alone has {length}; "
            "copy it again, or record again"
        )
    try:
        header = _parse(text)
    except (ValueError, RecursionError) as error:
        raise NotSafetensorsError(
            f"{file}: not a safetensors file: its header cannot be read ({error}); record again"
        ) from error
    assert isinstance(header, dict)  # it starts with a brace
    return length, header


def _parse(data: bytes) -> Any:
    """Strict JSON: no name twice in one object, no NaN, no more than a header has to say."""
    if count_nodes(data) > MAX_HEADER_NODES:
        raise ValueError("it names more tensors than there can be")
    return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name twice in one object")
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} in JSON")


def _is_archive(metadata: object) -> TypeGuard[dict[str, str]]:
    return (
        isinstance(metadata, dict)
        and all(isinstance(value, str) for value in metadata.values())
        and re.fullmatch(r"[0-9]{1,9}", metadata.get("qvtrace", "")) is not None
    )


def _check_format(file: Path, found: int, version: str) -> None:
    if found > FORMAT_VERSION:
        raise NewerFormatError(
            f"{file}: has format {found} (written by qvtrace {version}); this qvtrace reads up to "
            f"format {FORMAT_VERSION}; upgrade with: pip install -U qvtrace"
        )


def _extent(key: str, entry: object) -> Extent:
    """One tensor of the header; raises `ValueError` for what no writer writes."""
    if not isinstance(entry, dict):
        raise ValueError(f"the tensor {key!r} is not described by an object")
    dtype = NAME_OF_CODE.get(str(entry.get("dtype")))
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if dtype is None:
        raise ValueError(f"the tensor {key!r} has the unknown dtype {entry.get('dtype')!r}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"the tensor {key!r} has a shape or offsets that are no counts")
    if offsets[1] - offsets[0] != nbytes(dtype, shape):
        raise ValueError(f"the tensor {key!r} has offsets that do not fit its shape")
    return Extent(dtype, shape, *offsets)


def _counts(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    if not all(type(count) is int and 0 <= count < 2**63 for count in value):
        return None
    return tuple(value)


def _check_extents(file: Path, tensors: dict[str, Extent], available: int) -> None:
    """Tensors must cover the data without holes or overlaps, to the last byte of the file."""
    position = 0
    for key, extent in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if extent.begin != position:
            raise DamagedArchiveError(
                f"{file}: the tensor {key!r} overlaps another or leaves a hole; "
                "the file is damaged, record again"
            )
        position = extent.end
    if position > available:
        raise CutShortError(
            f"{file}: cut short: {available} bytes of tensors where the header names {position}; "
            "copy it again, or record again"
        )
    if position < available:
        raise DamagedArchiveError(
            f"{file}: {available - position} bytes behind the last tensor; "
            "the file is damaged, record again"
        )
