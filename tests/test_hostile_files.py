"""Damaged and hostile files: an error that names the file and the trouble, soon, never a crash."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_archives import (
    SmallTrace,
    edit_header,
    edit_manifest,
    join,
    read_everything,
    replace_manifest,
    split,
    write_small,
)

from qvtrace.archive import Archive
from qvtrace.archive.layout import LENGTH, MANIFEST_KEY, METADATA_KEY
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
from qvtrace.trees import TensorLeaf


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_small(tmp_path / "fp.st")


def refusal(file: Path, kind: type[ArchiveError]) -> str:
    """What is said of a file that cannot be opened: one line that begins with its name."""
    with pytest.raises(kind) as caught:
        Archive.open(file)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_the_file_that_is_damaged_below_is_good(archive: Path) -> None:
    assert read_everything(archive) == 9


def test_a_missing_file_is_told_from_all_others(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "no.st", MissingArchiveError)


def test_a_file_below_a_file_is_missing(archive: Path) -> None:
    assert "no such file" in refusal(archive / "fp.st", MissingArchiveError)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\0" * 7, b"a text file\n" * 10, b"\x93NUMPY" + b"\0" * 99, b"\0" * 99],
    ids=["empty", "braces", "seven bytes", "text", "npy", "zeros"],
)
def test_another_file_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "fp.st"
    file.write_bytes(content)

    assert "not a safetensors file" in refusal(file, NotSafetensorsError)


def test_a_folder_is_no_archive(tmp_path: Path) -> None:
    assert "not a file" in refusal(tmp_path, NotSafetensorsError)


def test_a_named_pipe_is_no_archive_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.st")

    assert "not a file" in refusal(tmp_path / "pipe.st", NotSafetensorsError)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    loop = tmp_path / "loop.st"
    loop.symlink_to(loop)

    assert "cannot be read" in refusal(loop, ArchiveError)


def test_a_name_that_no_file_can_have_is_an_archive_error() -> None:
    with pytest.raises(ArchiveError, match="cannot be read"):
        Archive.open("a\0b")


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"format": "pt"}, {"qvtrace": "one"}, {"qvtrace": "-1"}, {"qvtrace": "9" * 99}],
    ids=str,
)
def test_a_safetensors_file_of_another_tool_is_no_archive(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"weight": np.ones(3)}, tmp_path / "model.st", metadata)

    message = refusal(tmp_path / "model.st", NotAnArchiveError)
    assert "no qvtrace archive" in message
    assert "qvtrace record" in message


def test_a_newer_format_names_both_numbers_and_the_remedy(archive: Path) -> None:
    edit_header(archive, lambda header: header[METADATA_KEY].update(qvtrace="7", version="9.8"))

    message = refusal(archive, NewerFormatError)
    assert "format 7 (written by qvtrace 9.8)" in message
    assert "up to format 1" in message
    assert "pip install -U qvtrace" in message


def test_a_manifest_of_a_newer_format_is_refused_whatever_the_header_says(archive: Path) -> None:
    edit_manifest(archive, lambda manifest: manifest.update(format=7, qvtrace="9.8"))

    assert "format 7 (written by qvtrace 9.8)" in refusal(archive, NewerFormatError)


def test_a_manifest_and_a_header_of_two_formats_are_damage(archive: Path) -> None:
    edit_manifest(archive, lambda manifest: manifest.update(format=0))

    assert "format 0, the header 1" in refusal(archive, DamagedArchiveError)


def test_a_newer_format_is_named_before_anything_else_is_looked_at(archive: Path) -> None:
    header = {METADATA_KEY: {"qvtrace": "2"}, "strange": {"dtype": "F2", "layout": "new"}}
    join(archive, header, b"")

    assert "format 2" in refusal(archive, NewerFormatError)


def test_a_recording_that_was_killed_says_how_to_recover_it(tmp_path: Path) -> None:
    trace = SmallTrace(tmp_path / "fp.st")
    trace.fill()

    partial = tmp_path / "fp.st.partial"
    assert f"qvtrace recover {partial}" in refusal(partial, UnfinishedArchiveError)


def lengths_to_cut(file: Path) -> Iterator[int]:
    """Ends within every part of a file: length, header, each tensor, the manifest."""
    content = file.read_bytes()
    (header,) = LENGTH.unpack(content[: LENGTH.size])
    yield from range(LENGTH.size + 2)
    yield from range(LENGTH.size + 2, LENGTH.size + header, 997)
    yield from range(LENGTH.size + header - 2, len(content), 7)
    yield len(content) - 1


def test_a_file_cut_anywhere_is_refused_by_name(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    cut = tmp_path / "cut.st"
    for length in lengths_to_cut(archive):
        cut.write_bytes(content[:length])
        if length <= LENGTH.size:
            refusal(cut, NotSafetensorsError)
        else:
            assert "cut short" in refusal(cut, CutShortError)


def test_bytes_behind_the_end_are_damage(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes() + b"\0")

    assert "1 bytes behind" in refusal(archive, DamagedArchiveError)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


def test_one_flipped_bit_in_a_tensor_is_named_by_its_key(archive: Path) -> None:
    header, data = split(archive)
    keys = [key for key in header if key not in (METADATA_KEY, MANIFEST_KEY)]
    start = archive.stat().st_size - len(data)
    good = archive.read_bytes()
    assert len(keys) == 5
    for key in keys:
        begin, end = header[key]["data_offsets"]
        for position in (begin, end - 1):
            archive.write_bytes(good)
            flip(archive, start + position)
            with Archive.open(archive) as damaged:
                assert list(damaged.damaged_tensors()) == [key]


def test_one_flipped_bit_in_the_manifest_is_damage(archive: Path) -> None:
    header, data = split(archive)
    start = archive.stat().st_size - len(data)
    begin, end = header[MANIFEST_KEY]["data_offsets"]
    good = archive.read_bytes()
    for position in range(begin, end, 101):
        archive.write_bytes(good)
        flip(archive, start + position)
        assert "manifest" in refusal(archive, DamagedArchiveError)


def test_one_flipped_bit_in_the_header_never_goes_unnoticed_where_it_matters(archive: Path) -> None:
    good = archive.read_bytes()
    text = json.dumps(split(archive)[0], separators=(",", ":")).encode()
    expected = opened(archive)
    for position in range(LENGTH.size + len(text)):
        archive.write_bytes(good)
        flip(archive, position)
        try:
            assert opened(archive) == expected
        except ArchiveError as error:
            assert str(error).startswith(f"{archive}: ")


def opened(file: Path) -> tuple[Any, list[str]]:
    with Archive.open(file) as archive:
        return archive.manifest, list(archive.damaged_tensors())


F32 = {"dtype": "F32", "shape": [1]}


def placed(begin: Any, end: Any, **changes: Any) -> Callable[[Any], None]:
    return lambda header: header.update({"x": {**F32, "data_offsets": [begin, end], **changes}})


def no_manifest(header: Any) -> None:
    del header[MANIFEST_KEY]


def hole(header: Any) -> None:
    for key, entry in header.items():
        if key != METADATA_KEY:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


HEADERS: dict[str, Callable[[Any], None]] = {
    "outside the file": placed(2**40, 2**40 + 4),
    "beyond 64 bits": placed(2**64, 2**64 + 4),
    "overlapping": placed(4, 8),
    "negative": placed(-4, 0),
    "backwards": placed(4, 0),
    "a hole": hole,
    "a fraction": placed(0.0, 4.0),
    "true": placed(False, 4),
    "texts": placed("0", "4"),
    "three offsets": placed(0, 4, data_offsets=[0, 4, 8]),
    "no offsets": placed(0, 4, data_offsets=None),
    "a shape that does not fit": placed(0, 4, shape=[2]),
    "a shape that overflows": placed(0, 4, shape=[2**40, 2**40]),
    "a shape of huge numbers": placed(0, 4, shape=[10**300]),
    "a shape of zero times a lot": placed(0, 4, shape=[0, 2**62]),
    "a negative shape": placed(0, 4, shape=[-1, -1]),
    "too many dimensions": placed(0, 4, shape=[1] * 10_000),
    "an unknown dtype": placed(0, 4, dtype="F3"),
    "a dtype that is no text": placed(0, 4, dtype=["F32"]),
    "no object": lambda header: header.update(x=1),
    "an unknown tensor of no bytes": placed(0, 0, shape=[0]),
    "no manifest": no_manifest,
    "a manifest of floats": lambda header: header[MANIFEST_KEY].update(dtype="F32"),
}


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS)
def test_a_header_that_contradicts_the_file_is_damage(
    archive: Path, edit: Callable[[Any], None]
) -> None:
    edit_header(archive, edit)

    with pytest.raises((DamagedArchiveError, CutShortError), match=r"fp\.st: "):
        Archive.open(archive)


@pytest.mark.parametrize(
    ("begin", "end"), [(0, 4), (4, 8), (20, 28)], ids=["same", "within", "across"]
)
def test_tensors_that_overlap_are_damage_even_where_the_manifest_agrees(
    archive: Path, begin: int, end: int
) -> None:
    shape = [(end - begin) // 4]
    edit_header(archive, placed(begin, end, shape=shape))
    entry = {"key": "x", "dtype": "float32", "shape": shape, "digest": "x"}
    edit_manifest(archive, lambda manifest: manifest["tensors"].append(entry))

    assert "overlaps another or leaves a hole" in refusal(archive, DamagedArchiveError)


def test_a_hole_between_tensors_is_damage(archive: Path) -> None:
    header, data = split(archive)
    first, *_ = sorted(
        (key for key in header if key != METADATA_KEY),
        key=lambda key: header[key]["data_offsets"],
    )
    hole_at = header[first]["data_offsets"][1]
    for key in header:
        if key not in (METADATA_KEY, first):
            header[key]["data_offsets"] = [offset + 3 for offset in header[key]["data_offsets"]]
    join(archive, header, data[:hole_at] + b"\0\0\0" + data[hole_at:])

    assert "overlaps another or leaves a hole" in refusal(archive, DamagedArchiveError)


def test_a_tensor_named_twice_in_the_header_is_refused(archive: Path) -> None:
    header, data = split(archive)
    text = json.dumps(header)
    entry = json.dumps({"#0/inputs.0": header["#0/inputs.0"]})[1:-1]
    join(archive, f"{text[:-1]},{entry}}}".encode(), data)

    assert "a name twice" in refusal(archive, NotSafetensorsError)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_huge_length_of_the_header_is_not_believed(archive: Path, length: int) -> None:
    content = archive.read_bytes()
    archive.write_bytes(LENGTH.pack(length) + content[LENGTH.size :])

    assert "not a safetensors file" in refusal(archive, NotSafetensorsError)


@pytest.mark.parametrize(
    "text",
    [b"{", b"{}x", b'{"a":NaN}', b"{'a':1}", b'{"a":"\xff"}', b'{"a":' + b"[" * 100_000],
    ids=["open", "trailing", "NaN", "quotes", "no UTF-8", "deep"],
)
def test_a_header_that_is_no_json_is_refused(archive: Path, text: bytes) -> None:
    join(archive, text, b"")

    assert "its header cannot be read" in refusal(archive, NotSafetensorsError)


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


MANIFESTS = {
    "no JSON": b"not JSON",
    "a list": b"[]",
    "a number": b"1",
    "NaN": b'{"complete":NaN}',
    "no UTF-8": b'{"qvtrace":"\xff"}',
    "deep": nested(100_000),
    "empty": b"",
    "a number of many digits": b'{"format":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_no_manifest_is_damage(archive: Path, text: bytes) -> None:
    replace_manifest(archive, text)

    assert "the manifest is damaged" in refusal(archive, DamagedArchiveError)


def deep_tree(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"type": "value", "class": "int", "value": 1}
    for _ in range(levels):
        tree = {"type": "list", "class": "list", "items": [["0", tree]]}
    return tree


def test_a_tree_deeper_than_any_that_is_written_is_refused_when_it_is_read(archive: Path) -> None:
    edit_manifest(archive, lambda manifest: manifest["calls"][0].update(output=deep_tree(100)))

    with Archive.open(archive) as opened, pytest.raises(ValueError, match="nested deeper"):
        opened.manifest.calls[0].tree("output")


def test_a_tree_of_a_hundred_thousand_levels_is_damage(archive: Path) -> None:
    header, data = split(archive)
    text = data[slice(*header[MANIFEST_KEY]["data_offsets"])]
    open_list, close_list = b'{"type":"list","class":"list","items":[["0",', b"]]}"
    deep = open_list * 100_000 + b"1" + close_list * 100_000
    replace_manifest(archive, text.replace(b'"output":{', b'"output":' + deep + b',"x":{', 1))

    assert "the manifest is damaged" in refusal(archive, DamagedArchiveError)


@pytest.mark.parametrize(
    "changes",
    [
        {"digest": "0" * 32},
        {"digest": ""},
        {"shape": [7, 7]},
        {"shape": [10**300]},
        {"shape": [0, 2**62]},
        {"dtype": "float64"},
        {"dtype": "no dtype"},
        {"stored": {"dtype": "float64", "shape": [3]}},
        {"dtype": "complex128", "stored": {"dtype": "float64", "shape": [3]}},
        {"dtype": "complex128", "stored": {"dtype": "float64", "shape": [1, 3]}},
    ],
    ids=str,
)
def test_a_place_that_asks_for_other_elements_than_there_are_is_damage(
    archive: Path, changes: dict[str, Any]
) -> None:
    edit_manifest(archive, lambda manifest: manifest["calls"][0]["inputs"].update(changes))

    with Archive.open(archive) as opened:
        leaf = opened.manifest.calls[0].tree("inputs")
        assert isinstance(leaf, TensorLeaf)
        with pytest.raises(DamagedArchiveError, match=r"fp\.st: "):
            opened.array(leaf)


def test_a_shape_that_numpy_cannot_have_is_damage(archive: Path) -> None:
    header, data = split(archive)
    header["empty"] = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    join(archive, header, data)
    entry = {"key": "empty", "dtype": "float32", "shape": [0, 2**62, 2**62], "digest": "e"}
    edit_manifest(archive, lambda manifest: manifest["tensors"].append(entry))

    with Archive.open(archive) as opened, pytest.raises(DamagedArchiveError, match=r"fp\.st: "):
        opened.array(TensorLeaf("float32", (0, 2**62, 2**62), "e"))


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.pop(),
        lambda tensors: tensors.append(tensors[0]),
        lambda tensors: tensors[0].update(key="another"),
        lambda tensors: tensors[0].update(key=MANIFEST_KEY),
        lambda tensors: tensors[0].update(dtype="int32"),
        lambda tensors: tensors[0].update(shape=[3, 2]),
    ],
    ids=["one less", "one twice", "another key", "the manifest", "another dtype", "another shape"],
)
def test_a_manifest_and_a_header_that_differ_are_damage(
    archive: Path, edit: Callable[[Any], object]
) -> None:
    edit_manifest(archive, lambda manifest: edit(manifest["tensors"]))

    refusal(archive, DamagedArchiveError)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value within a JSON value stands."""
    yield path
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            yield from places(child, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The JSON value with another one at one place; without it where `new` is `DROPPED`."""
    if not path:
        return {} if new is DROPPED else new
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if new is DROPPED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return value


DROPPED = object()
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([-1, 2**63, 10**30, 10**400, 1e308, 0.5]),
        st.text(max_size=3),
        st.sampled_from(["", "0" * 32, "float32", "tensor", "value", "list", "cache", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    file = write_small(tmp_path_factory.mktemp("hostile") / "fp.st")
    with Archive.open(file) as archive:
        return file, json.loads(archive.manifest_bytes())


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_other_value_in_the_manifest_is_read_or_refused(
    good: tuple[Path, Any], data: st.DataObject
) -> None:
    file, manifest = good
    path = data.draw(st.sampled_from(list(places(manifest))))
    new = data.draw(st.one_of(JSON, st.just(DROPPED)))
    text = json.dumps(put(copy.deepcopy(manifest), path, new)).encode()

    try:
        read_everything(replace_manifest(file, text))
    except ArchiveError as error:
        assert str(error).startswith(f"{file}: ")
    except ValueError:  # of a tree, when it is read
        assert {"calls", "root_calls"} & set(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_other_value_in_the_header_is_read_or_refused(
    good: tuple[Path, Any], data: st.DataObject
) -> None:
    file, manifest = good
    replace_manifest(file, json.dumps(manifest).encode())
    header, contents = split(file)
    path = data.draw(st.sampled_from(list(places(header))))
    new = data.draw(st.one_of(JSON, st.just(DROPPED)))
    changed = file.with_name("changed.st")
    join(changed, put(copy.deepcopy(header), path, new), contents)

    try:
        read_everything(changed)
    except ArchiveError as error:
        assert str(error).startswith(f"{changed}: ")


def bounded(script: str, *, seconds: float = 20, gibibytes: float = 2) -> str:
    """What a script prints within limits of time and memory, which it must keep."""
    limits = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, ({int(gibibytes * 2**30)},) * 2)
    """
    program = textwrap.dedent(limits) + textwrap.dedent(script)
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # its buffers are large
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
    from qvtrace.archive import Archive
    from qvtrace.errors import ArchiveError
    try:
        Archive.open({file!r})
    except ArchiveError as error:
        print(type(error).__name__, error)
"""


def test_a_header_of_100_mb_of_brackets_is_refused_soon_and_in_little_memory(
    tmp_path: Path,
) -> None:
    file = tmp_path / "fp.st"
    join(file, b'{"a":' + b"[" * 99_000_000, b"")

    assert bounded(OPEN.format(file=str(file))).startswith(f"NotSafetensorsError {file}: ")


def test_a_bomb_of_empty_calls_is_refused_soon_and_in_little_memory(archive: Path) -> None:
    replace_manifest(archive, b'{"calls":[' + b"{}," * 20_000_000 + b"{}]}")

    assert bounded(OPEN.format(file=str(archive))).startswith(f"DamagedArchiveError {archive}: ")


def test_a_file_of_many_gigabytes_of_nothing_is_refused_soon_and_in_little_memory(
    archive: Path,
) -> None:
    header, _ = split(archive)
    begin, size = header[MANIFEST_KEY]["data_offsets"][0], 2**34
    header[MANIFEST_KEY].update(shape=[size], data_offsets=[begin, begin + size])
    text = json.dumps(header).encode()
    with archive.open("wb") as output:
        output.write(LENGTH.pack(len(text)) + text)
        output.truncate(LENGTH.size + len(text) + begin + size)

    out = bounded(OPEN.format(file=str(archive)))
    assert out.startswith(f"ArchiveError {archive}: cannot be read")
    assert "larger than any trace" in refusal(archive, DamagedArchiveError)
