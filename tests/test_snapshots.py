"""What a value of a running model becomes: its structure stays, and nothing that it does hurts."""

import dataclasses
import enum
import warnings
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import Returning, container, recorded, tree_of
from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.recording.recorder import record
from qvtrace.recording.snapshots import MAX_ITEMS
from qvtrace.trees import Container, Node, OpaqueLeaf, TensorLeaf, ValueLeaf, leaves

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the imports behind it, which are not ours to mend
    from transformers import BatchEncoding, DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput


@pytest.fixture
def take(tmp_path: Path) -> Callable[[object], Node]:
    """What the archive holds of a value that a module returned."""
    return lambda value: tree_of(recorded(Returning(), tmp_path / "a.st", value), "")


Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Result:
    hidden: Tensor
    extra: object = None


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "kind", "class_name", "components"),
    [
        ((torch.ones(1), None), "tuple", "tuple", ["0", "1"]),
        ([torch.ones(1), 2], "list", "list", ["0", "1"]),
        ({"a": torch.ones(1), 1: 2}, "dict", "dict", ["a", "[1]"]),
        (OrderedDict(b=1, a=2), "dict", "OrderedDict", ["b", "a"]),
        (UserDict(b=1, a=2), "dict", "UserDict", ["b", "a"]),
        (BatchEncoding({"input_ids": torch.ones(1)}), "dict", "BatchEncoding", ["input_ids"]),
        (Pair(torch.ones(1), 2), "named_tuple", "Pair", ["left", "right"]),
        (torch.max(torch.ones(2, 2), 0), "tuple", "max", ["0", "1"]),
        (Result(torch.ones(1)), "dataclass", "Result", ["hidden", "extra"]),
        ((), "tuple", "tuple", []),
        ({}, "dict", "dict", []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_container_keeps_its_kind_class_and_items(
    take: Callable[[object], Node],
    value: object,
    kind: str,
    class_name: str,
    components: list[str],
) -> None:
    node = container(take(value))

    assert (node.kind, node.class_name) == (kind, class_name)
    assert [component for component, _ in node.items] == components


def test_a_model_output_keeps_the_fields_that_are_none(take: Callable[[object], Node]) -> None:
    node = container(take(BaseModelOutput(last_hidden_state=torch.ones(2))))

    assert (node.kind, node.class_name) == ("model_output", "BaseModelOutput")
    fields = dict(node.items)
    assert list(fields) == ["last_hidden_state", "hidden_states", "attentions"]
    assert isinstance(fields["last_hidden_state"], TensorLeaf)
    assert fields["attentions"] == ValueLeaf(None, "None")


@pytest.mark.parametrize(
    ("value", "leaf"),
    [
        (None, ValueLeaf(None, "None")),
        (True, ValueLeaf(True, "bool")),
        (2**70, ValueLeaf(2**70, "int")),
        ("text", ValueLeaf("text", "str")),
        (range(3), ValueLeaf("range(0, 3)", "range")),
        (slice(1, None), ValueLeaf("slice(1, None, None)", "slice")),
        (torch.float16, ValueLeaf("torch.float16", "dtype")),
        (torch.device("cpu"), ValueLeaf("device(type='cpu')", "device")),
        (1 + 2j, ValueLeaf("(1+2j)", "complex")),
        (Colour.RED, ValueLeaf("Colour.RED", "Colour")),
        (np.float32(0.5), ValueLeaf(0.5, "float32")),
        (np.int8(-1), ValueLeaf(-1, "int8")),
        (np.bool_(True), ValueLeaf(True, "bool")),
        ({1, 2}, OpaqueLeaf("set")),
        (b"bytes", OpaqueLeaf("bytes")),
        (object(), OpaqueLeaf("object")),
        (print, OpaqueLeaf("builtin_function_or_method")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_leaf_is_a_value_where_it_can_be_said_and_opaque_where_not(
    take: Callable[[object], Node], value: object, leaf: Node
) -> None:
    assert take(value) == leaf


def test_a_nan_of_numpy_is_a_nan_again(take: Callable[[object], Node]) -> None:
    node = take(np.float64("nan"))

    assert isinstance(node, ValueLeaf)
    assert isinstance(node.value, float)
    assert node.value != node.value


@pytest.mark.parametrize(
    "build",
    [lambda: (number for number in range(3)), lambda: iter([1, 2]), lambda: map(str, [1, 2])],
    ids=["generator", "iterator", "map"],
)
def test_what_can_be_iterated_only_once_is_not_used_up(
    tmp_path: Path, build: Callable[[], Iterator[object]]
) -> None:
    class Consuming(nn.Module):
        def forward(self, values: Iterator[object]) -> list[object]:
            return list(values)

    archive = recorded(Consuming(), tmp_path / "a.st", build())

    ((_, leaf),) = container(tree_of(archive, "", "inputs")).items
    assert leaf == OpaqueLeaf(type(build()).__name__)
    assert len(container(tree_of(archive, "")).items) == len(list(build()))


def test_opaque_leaves_are_counted_by_their_type(tmp_path: Path) -> None:
    archive = recorded(Returning(), tmp_path / "a.st", [object(), {1}, {2}])

    assert archive.manifest.skipped.opaque == {"object": 2, "set": 4}


def test_a_numpy_array_is_stored_as_a_tensor(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T

    archive = recorded(Returning(), tmp_path / "a.st", array)

    leaf = tree_of(archive, "")
    assert isinstance(leaf, TensorLeaf)
    np.testing.assert_array_equal(archive.array(leaf), array, strict=True)


def test_a_numpy_array_of_objects_is_opaque(take: Callable[[object], Node]) -> None:
    assert take(np.array(["a", None])) == OpaqueLeaf("ndarray", "dtype object")


def test_a_tensor_on_the_meta_device_is_opaque(take: Callable[[object], Node]) -> None:
    node = take(torch.ones(2, device="meta"))

    assert node == OpaqueLeaf("Tensor", "on the meta device, without data")


def test_a_nested_tensor_is_opaque(take: Callable[[object], Node]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    assert take(nested) == OpaqueLeaf("Tensor", "a nested tensor")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Parameter(torch.ones(2)),
        lambda: nn.Buffer(torch.ones(2)),
        lambda: torch.ones(2, requires_grad=True) * 1,
    ],
    ids=["parameter", "buffer", "with a gradient"],
)
def test_a_parameter_or_a_tensor_with_a_gradient_is_a_plain_tensor(
    take: Callable[[object], Node], build: Callable[[], Tensor]
) -> None:
    leaf = take(build())

    assert isinstance(leaf, TensorLeaf)
    assert (leaf.dtype, leaf.shape, leaf.original) == ("float32", (2,), None)


class Named(Tensor):
    """A subclass that changes nothing."""


def test_a_subclass_that_holds_plain_elements_is_stored_with_its_name(tmp_path: Path) -> None:
    archive = recorded(Returning(), tmp_path / "a.st", torch.arange(3.0).as_subclass(Named))

    leaf = tree_of(archive, "")
    assert isinstance(leaf, TensorLeaf)
    assert leaf.original is not None
    assert (leaf.original.class_name, leaf.original.scale) == ("Named", None)
    np.testing.assert_array_equal(archive.array(leaf), np.arange(3, dtype=np.float32))


class Scaled(Tensor):
    """A quantized tensor: integers and a scale, which is quantized itself where it is nested."""

    scale: Tensor

    @staticmethod
    def of(elements: Tensor, scale: Tensor) -> "Scaled":
        scaled = elements.as_subclass(Scaled)
        scaled.scale = scale
        return scaled

    def dequantize(self) -> Tensor:
        scale = self.scale.dequantize() if isinstance(self.scale, Scaled) else self.scale
        return self.as_subclass(Tensor) * scale.as_subclass(Tensor)


def test_a_scale_that_is_quantized_itself_is_stored_dequantized(tmp_path: Path) -> None:
    scale = Scaled.of(torch.tensor([2.0]), torch.tensor([0.25]))

    archive = recorded(Returning(), tmp_path / "a.st", Scaled.of(torch.tensor([4.0]), scale))

    leaf = tree_of(archive, "")
    assert isinstance(leaf, TensorLeaf)
    assert archive.array(leaf) == 2
    assert leaf.original is not None
    assert leaf.original.scale is not None
    assert archive.array(leaf.original.scale) == 0.5


def test_a_scale_that_is_the_tensor_itself_does_no_harm(tmp_path: Path) -> None:
    tensor: Any = torch.tensor([4.0]).as_subclass(Named)
    tensor.scale = tensor

    archive = recorded(Returning(), tmp_path / "a.st", tensor)

    assert isinstance(tree_of(archive, ""), TensorLeaf)


class Untouchable(Tensor):
    """A tensor that refuses every operation."""

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> Any:
        raise KeyError("hands off")


class ShyRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class ShyClass:
    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("no attribute, not even its class")


class ShyMapping(Mapping[str, object]):
    def __getitem__(self, key: str) -> object:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


class ShyTuple(tuple[int, ...]):
    def __iter__(self) -> Iterator[int]:
        raise RuntimeError("no items")


class ExitingMapping(dict[str, int]):
    def items(self) -> Any:
        raise SystemExit("no items, and no more program")


class ShyInt(int):
    def __int__(self) -> int:
        raise RuntimeError("no number")


class ShyText(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ShyEnum(enum.Enum):
    ONE = 1

    def __str__(self) -> str:
        raise RuntimeError("no name")


@dataclasses.dataclass
class ShyResult:
    hidden: object = None

    def __getattribute__(self, name: str) -> object:
        if name == "hidden":
            raise RuntimeError("no field")
        return object.__getattribute__(self, name)


class ShyError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class ShyMessage(Mapping[str, object]):
    def __getitem__(self, key: str) -> object:
        raise ShyError

    def __iter__(self) -> Iterator[str]:
        raise ShyError

    def __len__(self) -> int:
        return 1


def endless() -> Mapping[int, int]:
    class Endless(Mapping[int, int]):
        def __getitem__(self, key: int) -> int:
            return key

        def __iter__(self) -> Iterator[int]:
            number = 0
            while True:
                yield number
                number += 1

        def __len__(self) -> int:
            return 1

    return Endless()


def unset() -> Result:
    result = Result(torch.ones(1))
    del result.hidden
    return result


SHY = [
    ShyRepr,
    ShyClass,
    ShyMapping,
    ExitingMapping,
    lambda: ShyTuple((1, 2)),
    lambda: ShyInt(3),
    lambda: ShyText("x"),
    lambda: ShyEnum.ONE,
    ShyResult,
    ShyMessage,
    lambda: slice(ShyRepr()),
    lambda: torch.ones(2).as_subclass(Untouchable),
    endless,
]


@pytest.mark.parametrize("build", SHY)
def test_a_value_that_raises_when_it_is_looked_at_is_opaque_and_the_rest_recorded(
    tmp_path: Path, build: Callable[[], object]
) -> None:
    class Holding(nn.Module):
        def forward(self, hidden: Tensor) -> list[object]:
            return [build(), hidden + 1]

    archive = recorded(Holding(), tmp_path / "a.st", torch.ones(2))

    (_, shy), (_, tensor) = container(tree_of(archive, "")).items
    assert shy == OpaqueLeaf(type(build()).__name__, getattr(shy, "reason", ""))
    assert isinstance(tensor, TensorLeaf)
    assert archive.manifest.complete


def test_a_field_that_was_never_set_is_none(take: Callable[[object], Node]) -> None:
    assert container(take(unset())).items[0] == ("hidden", ValueLeaf(None, "None"))


def test_a_container_of_more_items_than_a_structure_has_is_opaque(
    take: Callable[[object], Node],
) -> None:
    assert take([0] * (MAX_ITEMS + 1)) == OpaqueLeaf("list", f"more than {MAX_ITEMS} items")
    assert len(container(take([0] * MAX_ITEMS)).items) == MAX_ITEMS


def cache_of(length: int) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        states = torch.full((1, 2, length, 4), float(layer))
        cache.update(states, states + 10, layer)
    return cache


def test_a_cache_is_named_by_class_and_length(take: Callable[[object], Node]) -> None:
    assert take(cache_of(3)) == Container("cache", "DynamicCache", (), 3)


def test_a_cache_of_caches_is_one_cache(take: Callable[[object], Node]) -> None:
    node = take(EncoderDecoderCache(cache_of(3), cache_of(5)))

    assert node == Container("cache", "EncoderDecoderCache", (), 3)


def test_the_tensors_of_a_cache_are_stored_when_asked_for(tmp_path: Path) -> None:
    archive = with_caches(tmp_path / "a.st", cache_of(3))

    node = container(tree_of(archive, ""))
    assert (node.kind, node.length) == ("cache", 3)
    layers = container(dict(node.items)["layers"])
    assert len(layers.items) == 2
    _, second = layers.items[1]
    keys = dict(container(second).items)["keys"]
    assert isinstance(keys, TensorLeaf)
    assert (keys.shape, archive.array(keys).max()) == ((1, 2, 3, 4), 1)


def with_caches(file: Path, cache: object) -> Archive:
    model = Returning()
    with record(model, file, caches=True):
        model(cache)
    return Archive.open(file)


def test_a_cache_that_grows_does_not_change_what_was_recorded_of_it(tmp_path: Path) -> None:
    class Generating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Returning()

        def forward(self, cache: DynamicCache) -> None:
            for _ in range(2):
                self.step(cache)
                for layer in range(2):
                    states = torch.full((1, 2, 1, 4), 7.0)
                    cache.update(states, states, layer)
                    cache.layers[layer].keys.mul_(2)

    model = Generating()
    with record(model, tmp_path / "a.st", caches=True):
        model(cache_of(3))

    archive = Archive.open(tmp_path / "a.st")
    lengths, sums = [], []
    for index in range(2):
        node = container(tree_of(archive, "step", "output", index))
        (_, layers) = node.items[0]
        keys = dict(container(container(layers).items[1][1]).items)["keys"]
        assert isinstance(keys, TensorLeaf)
        lengths.append(node.length)
        sums.append(float(archive.array(keys).sum()))
    assert lengths == [3, 4]
    assert sums == [24, 2 * (24 + 56)]


def test_only_classes_of_transformers_are_caches(take: Callable[[object], Node]) -> None:
    class MyCache(dict[str, Tensor]):
        pass

    assert container(take(MyCache(a=torch.ones(1)))).kind == "dict"


def test_a_list_that_doubles_with_each_level_is_cut_off(tmp_path: Path) -> None:
    doubled: list[object] = [1]
    for _ in range(40):
        doubled = [doubled, doubled]

    archive = recorded(Returning(), tmp_path / "a.st", doubled)

    found = [leaf for _, leaf in leaves(tree_of(archive, ""), "output")]
    assert ValueLeaf(1, "int") in found
    assert OpaqueLeaf("list", "beyond the first 20000 values") in found
    assert len(found) < 20_000


def test_a_value_of_many_parts_is_stored_whole(tmp_path: Path) -> None:
    value = [[number, number] for number in range(6_000)]

    archive = recorded(Returning(), tmp_path / "a.st", value)

    assert not archive.manifest.skipped.opaque


def test_a_reason_holds_no_address(take: Callable[[object], Node]) -> None:
    class Complaining(Mapping[str, object]):
        def __getitem__(self, key: str) -> object:
            raise NotImplementedError

        def __iter__(self) -> Iterator[str]:
            raise ValueError(f"cannot iterate {object()!r}")

        def __len__(self) -> int:
            return 0

    assert take(Complaining()) == OpaqueLeaf(
        "Complaining", "cannot iterate <object object at 0x...>"
    )
