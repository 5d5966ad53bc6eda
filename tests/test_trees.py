"""Any nested value survives recording, writing and reading; no two places share a path."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import Returning, bytes_of, quantized, recorded, tree_of
from torch import Tensor

from qvtrace import trees
from qvtrace.archive import Archive
from qvtrace.trees import Container, Node, OpaqueLeaf, TensorLeaf, ValueLeaf

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8S = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
SIGNED = [torch.int64, torch.int32, torch.int16, torch.int8]
UNSIGNED = [torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool]
DTYPES = [*FLOATS, *FLOAT8S, *SIGNED, *UNSIGNED, torch.complex64, torch.complex128]

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Result:
    """A dataclass that a module may return."""

    hidden: object
    extra: object = None


def elements(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bits at all, NaN and infinities of every kind included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 256, [count], dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda tensor: tensor,
    lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
    lambda tensor: tensor[::2] if tensor.dim() else tensor,
    lambda tensor: tensor.expand(2, *tensor.shape),
]
tensors = st.builds(
    lambda dtype, shape, seed, view: view(elements(dtype, shape, seed)),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
    st.sampled_from(VIEWS),
)
texts = st.text(st.characters(exclude_categories=()), max_size=5)
strange_texts = st.sampled_from(["", ".", "/", "#", "\\", "[", "[0]", "0", "a.b", "\\.", "'", "\n"])
keys = st.one_of(
    texts,
    strange_texts,
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(),
    st.tuples(st.integers(0, 2), strange_texts),
    st.binary(max_size=3),
)
plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**64, 2**80), st.floats(), texts
)
values = st.recursive(
    st.one_of(tensors, plain_values),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(strange_texts, inner, max_size=3).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Result, inner, inner),
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trees") / "any.st"


@settings(max_examples=150, deadline=None)
@given(value=values)
def test_any_nested_value_survives_recording_writing_and_reading(value: object, file: Path) -> None:
    with recorded(Returning(), file, value) as archive:
        for part in ("inputs.0", "output"):
            tree = tree_of(archive, "", part.split(".")[0])
            node = tree if part == "output" else child(tree, "0")
            assert_same(node, value, archive)


@settings(max_examples=150, deadline=None)
@given(value=values)
def test_no_two_places_share_a_path(value: object, file: Path) -> None:
    with recorded(Returning(), file, value) as archive:
        paths = [path for path, _ in trees.leaves(tree_of(archive, ""), "output")]

    assert len(set(paths)) == len(paths) == count_leaves(value)


def count_leaves(value: Any) -> int:
    children = children_of(value)
    return 1 if children is None else sum(count_leaves(item) for _, item in children)


def children_of(value: Any) -> list[tuple[object, Any]] | None:
    if isinstance(value, Result):
        return [("hidden", value.hidden), ("extra", value.extra)]
    if isinstance(value, Pair):
        return [("left", value.left), ("right", value.right)]
    if isinstance(value, list | tuple):
        return [(str(index), item) for index, item in enumerate(value)]
    return list(value.items()) if isinstance(value, dict) else None


def assert_same(node: Node, value: Any, archive: Archive) -> None:
    children = children_of(value)
    if children is not None:
        assert isinstance(node, Container)
        assert node.class_name == type(value).__name__
        assert node.kind == kind_of(value)
        assert len(node.items) == len(children)
        for (component, item), (key, expected) in zip(node.items, children, strict=True):
            assert component.rstrip("'") == trees.path_component(key).rstrip("'")
            assert_same(item, expected, archive)
    elif isinstance(value, Tensor):
        assert isinstance(node, TensorLeaf)
        assert_same_tensor(node, value, archive)
    else:
        assert isinstance(node, ValueLeaf)
        assert node.class_name == ("None" if value is None else type(value).__name__)
        assert repr(node.value) == repr(joined_surrogates(value))


def kind_of(value: object) -> str:
    kinds = {Result: "dataclass", Pair: "named_tuple", OrderedDict: "dict"}
    return kinds.get(type(value), type(value).__name__)


def joined_surrogates(value: Any) -> Any:
    """Two surrogates that make up one character are that character in JSON."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def assert_same_tensor(leaf: TensorLeaf, tensor: Tensor, archive: Archive) -> None:
    assert leaf.dtype == str(tensor.dtype).removeprefix("torch.")
    assert leaf.shape == tuple(tensor.shape)
    array = archive.array(leaf)
    assert array.shape == leaf.shape
    assert array.tobytes() == bytes_of(tensor)


def child(node: Node, component: str) -> Node:
    assert isinstance(node, Container)
    return dict(node.items)[component]


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("mask", "mask"),
        ("a.b", r"a\.b"),
        ("a/b", r"a\/b"),
        ("a#1", r"a\#1"),
        ("a\\b", r"a\\b"),
        ("[1]", r"\[1]"),
        ("", ""),
        ("a[0]", "a[0]"),
        (1, "[1]"),
        ((1, "a.b"), r"[(1, 'a\.b')]"),
        (None, "[None]"),
        (1.5, r"[1\.5]"),
        ("\ud800", r"\ud800"),
    ],
    ids=repr,
)
def test_a_key_is_escaped_so_that_it_is_one_component_of_a_path(
    key: object, component: str
) -> None:
    assert trees.path_component(key) == component


def test_a_key_whose_repr_holds_an_address_is_named_by_its_class() -> None:
    assert trees.path_component(object()) == "[object]"


def test_a_key_whose_repr_raises_is_named_by_its_class() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert trees.path_component(Shy()) == "[Shy]"


def test_keys_with_the_same_repr_are_told_apart(tmp_path: Path) -> None:
    class Same:
        def __repr__(self) -> str:
            return "same"

    archive = recorded(Returning(), tmp_path / "a.st", {Same(): 1, Same(): 2, "[same]": 3})

    paths = [path for path, _ in trees.leaves(tree_of(archive, ""), "output")]
    assert paths == ["output.[same]", "output.[same]'", r"output.\[same]"]


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_a_float_that_is_not_finite_is_strict_json_and_a_float_again(
    value: float, name: str
) -> None:
    written = trees.to_json(ValueLeaf.of(value))

    assert written["value"] == name
    read = trees.from_json(json.loads(json.dumps(written, allow_nan=False)))
    assert isinstance(read, ValueLeaf)
    assert repr(read.value) == repr(value)


def test_negative_zero_keeps_its_sign() -> None:
    read = trees.from_json(json.loads(json.dumps(trees.to_json(ValueLeaf.of(-0.0)))))

    assert isinstance(read, ValueLeaf)
    assert repr(read.value) == "-0.0"


def test_an_integer_with_too_many_digits_for_json_is_kept_in_hexadecimal(tmp_path: Path) -> None:
    archive = recorded(Returning(), tmp_path / "a.st", 2**20_000 + 1)

    assert tree_of(archive, "") == ValueLeaf(hex(2**20_000 + 1), "int")


def test_a_value_nested_too_deeply_is_opaque_and_its_archive_readable(tmp_path: Path) -> None:
    value: object = torch.ones(2)
    for _ in range(trees.MAX_DEPTH + 5):
        value = [value]

    archive = recorded(Returning(), tmp_path / "a.st", value)

    (leaf,) = [leaf for _, leaf in trees.leaves(tree_of(archive, ""), "output")]
    assert leaf == OpaqueLeaf("list", "contains itself, or nests too deeply")


def test_a_quantized_tensor_at_the_deepest_place_can_be_read_again(tmp_path: Path) -> None:
    value: object = quantized(torch.ones(2), 0.5, 3)
    for _ in range(trees.MAX_DEPTH):
        value = [value]

    archive = recorded(Returning(), tmp_path / "a.st", value)

    (leaf,) = [leaf for _, leaf in trees.leaves(tree_of(archive, ""), "output")]
    assert isinstance(leaf, TensorLeaf)
    assert leaf.original is not None
    assert leaf.original.scale is not None


def test_a_value_that_contains_itself_is_opaque_where_it_does(tmp_path: Path) -> None:
    value: list[object] = [1]
    value.append(value)

    archive = recorded(Returning(), tmp_path / "a.st", value)

    assert child(tree_of(archive, ""), "1") == OpaqueLeaf(
        "list", "contains itself, or nests too deeply"
    )


TENSOR = {"type": "tensor", "dtype": "float32", "shape": [2], "digest": "0" * 32}


@pytest.mark.parametrize(
    "json",
    [
        None,
        [],
        {},
        {"type": "tensor"},
        {"type": ["tensor"]},
        {"type": {}},
        {"type": "tensr", "class": "x"},
        {**TENSOR, "shape": "2"},
        {**TENSOR, "shape": [-1]},
        {**TENSOR, "shape": [True]},
        {**TENSOR, "shape": [2.0]},
        {**TENSOR, "shape": [1] * 65},
        {**TENSOR, "digest": None},
        {**TENSOR, "stored": []},
        {**TENSOR, "stored": {"dtype": 1, "shape": []}},
        {**TENSOR, "original": {"class": "x", "scale": {"type": "opaque", "class": "x"}}},
        {"type": "value", "class": "int", "value": []},
        {"type": "value", "class": None, "value": 1},
        {"type": "value", "class": "float", "value": "much"},
        {"type": "value", "class": "float", "value": 10**400},
        {"type": "opaque"},
        {"type": "opaque", "class": "x", "reason": 1},
        {"type": "list", "class": "list"},
        {"type": "list", "class": "list", "items": {}},
        {"type": "list", "class": "list", "items": [["0"]]},
        {"type": "list", "class": "list", "items": [[0, TENSOR]]},
        {"type": "list", "class": "list", "items": [["0", None]]},
        {"type": "cache", "class": "x", "items": [], "length": -1},
    ],
    ids=lambda json: repr(json)[:60],
)
def test_what_is_no_tree_is_refused(json: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        trees.from_json(json)


def test_a_tree_deeper_than_any_that_is_written_is_refused() -> None:
    json: dict[str, Any] = TENSOR
    for _ in range(1000):
        json = {"type": "list", "class": "list", "items": [["0", json]]}

    with pytest.raises(ValueError, match="nested deeper"):
        trees.from_json(json)


def test_a_chain_of_scales_of_scales_is_refused() -> None:
    json: dict[str, Any] = TENSOR
    for _ in range(1000):
        json = {**TENSOR, "original": {"class": "x", "scale": json}}

    with pytest.raises(ValueError, match="nested deeper"):
        trees.from_json(json)


class Told:
    """Says where it is in memory."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __repr__(self) -> str:
        return f"Told({format(id(self), self.form)})"


@pytest.mark.parametrize(
    ("key", "component"),
    [
        (frozenset("hello"), "[frozenset({'e', 'h', 'l', 'o'})]"),
        ((1, frozenset("ab")), "[(1, frozenset({'a', 'b'}))]"),
        (frozenset([frozenset("ba"), 1]), "[frozenset({1, frozenset({'a', 'b'})})]"),
        (frozenset(), "[frozenset({})]"),
        ((object(), 1), "[(object, 1)]"),
        (Told("x"), "[Told]"),
        (Told("d"), "[Told]"),
        ((1,), "[(1,)]"),
    ],
    ids=["set", "tuple-set", "set-set", "empty", "object", "hex", "decimal", "tuple"],
)
def test_a_key_is_written_alike_by_every_process(key: object, component: str) -> None:
    assert trees.path_component(key) == component


def test_two_processes_name_the_same_places(tmp_path: Path) -> None:
    """Whatever their hash seeds, which order sets."""
    program = (
        "from qvtrace.trees import path_component\n"
        "print(path_component((frozenset(['alpha', 'beta', 'gamma', 'delta']), object())))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(printed) == 1
