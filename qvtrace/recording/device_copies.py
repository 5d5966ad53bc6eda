"""Tensors on a GPU -> contents of an archive, with bounded memory on either side.

Most of what a trace meets was stored before: a layer's output is the next one's input. So a
fingerprint is taken on the device first, and only contents that are new to it are copied, through a
ring of pinned host buffers on a stream of their own: while one piece is written, the next travels.
"""

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch

from qvtrace.archive import Tensor
from qvtrace.digests import Hasher
from qvtrace.recording.snapshots import flat_bytes

RING_BUFFERS = 4
BUFFER_BYTES = 8 << 20

_BLOCK_WORDS = 1 << 20  # fingerprinted at once: bounds the memory that it takes on the device
_WORD_BYTES = 8
# The increments and multipliers of splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers.
_INCREMENTS = (-0x61C8864680B583EB, -0x4498517A7B3558C5)
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


class PieceStore(Protocol):
    """What is needed of an archive's writer."""

    def add_pieces(self, pieces: Iterator[memoryview], tensor: Tensor) -> str:
        """Store contents that come in pieces; returns their digest."""


class DeviceCopies:
    """Stores tensors that lie on a device; remembers by fingerprint which contents were stored."""

    def __init__(self, store: PieceStore) -> None:
        self._store = store
        self._digests: dict[tuple[int, ...], str] = {}
        self._told: dict[tuple[int, ...], str] = {}  # of what was not stored
        self._ring: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def store(self, tensor: torch.Tensor, described: Tensor) -> str:
        """Store the elements unless equal ones were; returns the digest of their bytes.

        Takes at most one copy of a tensor that is not contiguous, and a few blocks, on the device.
        """
        flat = flat_bytes(tensor)
        known = fingerprint(flat)
        if known not in self._digests:
            self._digests[known] = self._store.add_pieces(self._pieces(flat), described)
        return self._digests[known]

    def digest(self, tensor: torch.Tensor) -> str:
        """The digest that `store` would return; nothing is stored."""
        flat = flat_bytes(tensor)
        known = fingerprint(flat)
        if known not in self._digests and known not in self._told:
            hasher = Hasher()
            for piece in self._pieces(flat):
                hasher.update(piece)
            self._told[known] = str(hasher.hexdigest())
        return self._digests.get(known) or self._told[known]

    def _pieces(self, flat: torch.Tensor) -> Iterator[memoryview]:
        """The bytes in pieces; each is valid until the next one but `RING_BUFFERS - 2` is asked
        for."""
        self._prepare(flat.device)
        under_way: deque[tuple[torch.cuda.Event | None, memoryview]] = deque()
        for number, begin in enumerate(range(0, flat.numel(), BUFFER_BYTES)):
            piece = flat[begin : begin + BUFFER_BYTES]
            buffer = self._ring[number % RING_BUFFERS][: piece.numel()]
            under_way.append((self._copy(buffer, piece), memoryview(buffer.numpy().data)))
            if len(under_way) == RING_BUFFERS - 1:
                yield _arrived(*under_way.popleft())
        while under_way:
            yield _arrived(*under_way.popleft())

    def _prepare(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if not self._ring:
            self._ring = [
                torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
                for _ in range(RING_BUFFERS)
            ]
        if on_gpu:
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def _copy(self, buffer: torch.Tensor, piece: torch.Tensor) -> torch.cuda.Event | None:
        if self._stream is None:
            buffer.copy_(piece)
            return None
        with torch.cuda.stream(self._stream):
            buffer.copy_(piece, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event


def fingerprint(flat: torch.Tensor) -> tuple[int, ...]:
    """128 bits, and the length, that tell contents apart without bringing them to the host.

    `flat` are bytes (uint8). Each word is mixed with its position by the finalizer of splitmix64
    and the results are added up, so that neither two swapped words nor two equal changes cancel.
    """
    sums = [torch.zeros((), dtype=torch.int64, device=flat.device) for _ in _INCREMENTS]
    block_bytes = _BLOCK_WORDS * _WORD_BYTES
    for begin in range(0, flat.numel(), block_bytes):
        words = _words(flat[begin : begin + block_bytes])
        first = begin // _WORD_BYTES
        positions = torch.arange(first, first + words.numel(), device=flat.device)
        for total, increment in zip(sums, _INCREMENTS, strict=True):
            total += _mixed(words ^ _mixed((positions + 1) * increment)).sum()
    return (flat.numel(), *(int(total) for total in torch.stack(sums).tolist()))


def _words(piece: torch.Tensor) -> torch.Tensor:
    missing = -piece.numel() % _WORD_BYTES
    if missing or piece.storage_offset() % _WORD_BYTES:
        piece = torch.nn.functional.pad(piece, (0, missing)).clone()
    return piece.view(torch.int64)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        words = (words ^ _shifted(words, shift)) * multiplier
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, count: int) -> torch.Tensor:
    """A shift that brings in zeros; torch's own brings in the sign."""
    return (words >> count) & ((1 << (64 - count)) - 1)


def _arrived(event: torch.cuda.Event | None, view: memoryview) -> memoryview:
    if event is not None:
        event.synchronize()
    return view
