"""Copies from a device: fingerprints that tell contents apart, and the digests of the plain path.

Tensors of the CPU go the same way here as those of a GPU would, but for streams and events.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recordings import bytes_of
from small_archives import manifest
from torch import Tensor

from qvtrace.archive import Archive, ArchiveWriter
from qvtrace.archive import Tensor as Described
from qvtrace.digests import digest_bytes
from qvtrace.recording import device_copies
from qvtrace.recording.device_copies import DeviceCopies, fingerprint
from qvtrace.recording.snapshots import host_bytes
from qvtrace.trees import TensorLeaf


def some_bytes(count: int) -> Tensor:
    return torch.randint(0, 256, [count], dtype=torch.uint8, generator=torch.manual_seed(count))


def test_equal_bytes_have_equal_fingerprints_wherever_they_lie() -> None:
    content = some_bytes(1000)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), content])[3:]

    assert fingerprint(content) == fingerprint(content.clone()) == fingerprint(shifted)


def test_every_flipped_bit_changes_the_fingerprint() -> None:
    content = some_bytes(40)
    found = {fingerprint(content)}
    for position, bit in itertools.product(range(40), range(8)):
        flipped = content.clone()
        flipped[position] ^= 1 << bit
        found.add(fingerprint(flipped))

    assert len(found) == 1 + 40 * 8


def test_swapped_words_are_told_apart() -> None:
    words = torch.arange(64, dtype=torch.int64)
    found = set()
    for one, other in itertools.combinations(range(64), 2):
        swapped = words.clone()
        swapped[one], swapped[other] = words[other], words[one]
        found.add(fingerprint(swapped.view(torch.uint8)))

    assert len(found) == 64 * 63 // 2


def test_lengths_of_nothing_but_zeros_are_told_apart() -> None:
    found = {fingerprint(torch.zeros(count, dtype=torch.uint8)) for count in range(50)}

    assert len(found) == 50


def test_the_offset_of_a_single_word_matters() -> None:
    found = set()
    for position in range(512):
        content = torch.zeros(512 * 8, dtype=torch.uint8)
        content[position * 8] = 1
        found.add(fingerprint(content))

    assert len(found) == 512


def test_changes_that_cancel_in_a_sum_are_told_apart() -> None:
    words = some_bytes(160).view(torch.int64)
    changed = words.clone()
    changed[3] += 1
    changed[7] -= 1

    assert fingerprint(words.view(torch.uint8)) != fingerprint(changed.view(torch.uint8))


def test_both_halves_of_a_fingerprint_tell_contents_apart() -> None:
    """Either would do for a test; only both have the bits for a trace of millions of tensors."""
    found = [fingerprint(some_bytes(count)) for count in range(8, 200)]
    _, *halves = zip(*found, strict=True)

    assert [len(set(half)) for half in halves] == [192, 192]


def test_a_fingerprint_does_not_depend_on_the_size_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = some_bytes(1003)
    whole = fingerprint(content)

    monkeypatch.setattr(device_copies, "_BLOCK_WORDS", 16)

    assert fingerprint(content) == whole


class Pieces:
    """Takes pieces as an archive's writer does, and remembers what it was given."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.largest = 0

    def add_pieces(self, pieces: Iterator[memoryview], tensor: Described) -> str:
        content = b""
        for piece in pieces:
            self.largest = max(self.largest, len(piece))
            content += piece
        self.stored.append(content)
        return digest_bytes(content)


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "BUFFER_BYTES", 64)


SIZES = [0, 1, 16, 17, 31, 32, 33, 47, 48, 49, 64, 1000]  # floats; a buffer takes 16


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("size", SIZES)
def test_contents_in_pieces_have_the_digest_of_the_whole(size: int) -> None:
    store = Pieces()
    tensor = torch.randn(size)

    digest = DeviceCopies(store).store(tensor, Described("key", "float32", (size,)))

    assert digest == digest_bytes(bytes_of(tensor))
    assert store.stored == [bytes_of(tensor)]
    assert store.largest <= 64


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60.0).reshape(6, 10).t(),
        torch.ones(1, 30).expand(4, 30),
        torch.arange(100.0)[3::7],
        torch.arange(2.0)[::2],
        torch.tensor(True),
        torch.arange(50).to(torch.bfloat16),
    ],
    ids=["transposed", "expanded", "strided", "one element", "0-d", "bfloat16"],
)
def test_a_view_is_stored_by_its_elements(tensor: Tensor) -> None:
    store = Pieces()

    DeviceCopies(store).store(tensor, Described("key", "", tuple(tensor.shape)))

    assert store.stored == [bytes_of(tensor)]


@pytest.mark.usefixtures("small_buffers")
def test_contents_that_were_stored_before_are_not_copied_again() -> None:
    store = Pieces()
    copies = DeviceCopies(store)
    tensor = torch.randn(100)

    first = copies.store(tensor, Described("a", "float32", (100,)))
    again = copies.store(tensor.clone().reshape(10, 10), Described("b", "float32", (10, 10)))
    another = copies.store(tensor + 1, Described("c", "float32", (100,)))

    assert first == again != another
    assert len(store.stored) == 2


@pytest.mark.usefixtures("small_buffers")
def test_an_archive_takes_pieces_as_it_takes_wholes(tmp_path: Path) -> None:
    tensors = [torch.arange(float(count)) for count in (40, 3, 40, 0, 16, 40, 100)]
    wholes = ArchiveWriter(tmp_path / "wholes.st", manifest())
    pieces = ArchiveWriter(tmp_path / "pieces.st", manifest())
    for number, tensor in enumerate(tensors):
        described = Described(str(number), "float32", tuple(tensor.shape))
        expected = wholes.add_tensor(host_bytes(tensor), described)
        # Each time anew, so that the writer and no fingerprint finds what is there already.
        assert DeviceCopies(pieces).store(tensor, described) == expected

    for writer in (wholes, pieces):
        writer.close(manifest())
    assert (tmp_path / "pieces.st").read_bytes() == (tmp_path / "wholes.st").read_bytes()


def test_pieces_that_end_in_an_error_are_taken_back(tmp_path: Path) -> None:
    def failing() -> Iterator[memoryview]:
        yield memoryview(b"half of it")
        raise RuntimeError("device lost")

    writer = ArchiveWriter(tmp_path / "fp.st", manifest())
    with pytest.raises(RuntimeError, match="device lost"):
        writer.add_pieces(failing(), Described("a", "uint8", (20,)))
    writer.add_pieces(iter([memoryview(b"who"), memoryview(b"le")]), Described("b", "uint8", (5,)))
    writer.close(manifest())

    with Archive.open(tmp_path / "fp.st") as archive:
        (entry,) = archive.manifest.tensors
        leaf = TensorLeaf(entry.dtype, entry.shape, entry.digest)
        assert (entry.key, archive.array(leaf).tobytes()) == ("b", b"whole")


def test_a_digest_is_told_without_anything_being_stored(tmp_path: Path) -> None:
    content = some_bytes(3000)
    stored: list[bytes] = []

    class Store:
        def add_pieces(self, pieces: Iterator[memoryview], tensor: Described) -> str:
            stored.append(b"".join(bytes(piece) for piece in pieces))
            return digest_bytes(stored[-1])

    copies = DeviceCopies(Store())
    told = copies.digest(content)

    assert (told, stored) == (digest_bytes(bytes_of(content)), [])
    assert copies.store(content, Described("key", "uint8", (3000,))) == told
    assert stored == [bytes_of(content)]
    assert copies.digest(content) == told
