"""Two trees of one call -> pairs of leaves: what is compared with what, and where forms differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TypeAlias

from qvtrace.trees import (
    Container,
    ContainerKind,
    Node,
    OpaqueLeaf,
    TensorLeaf,
    ValueLeaf,
    join_path,
    leaves,
)

_BY_POSITION: frozenset[ContainerKind] = frozenset({"tuple", "list"})
# A field that is absent is the same as one that is None; transformers drops those that are None.
_WITH_FIELDS: frozenset[ContainerKind] = frozenset({"dataclass", "model_output"})

_NUMBERS = frozenset({"bool", "int", "float"})

_Child: TypeAlias = tuple[str, Node | None, Node | None]


@dataclass(frozen=True, slots=True)
class LeafPair:
    """One place of a call on both sides; a side that lacks the place has None.

    What stands there are leaves, or containers of different kinds, or two caches.
    """

    path: str  # the reference's, where it has the place
    reference: Node | None
    candidate: Node | None
    note: str | None = None  # how the forms around the place differ
    stored: bool = True  # False where the other side was recorded without this part
    listed: bool = False  # an element of a list or tuple of numbers


@dataclass(frozen=True)
class Arguments:
    """What a call was given; None: not stored."""

    inputs: Node | None
    kwargs: Node | None
    parameters: tuple[str | None, ...]  # names of the positional inputs

    @property
    def stored(self) -> bool:
        """Whether an argument that is not here was not given."""
        return self.inputs is not None and self.kwargs is not None

    def items(self) -> Iterator["Argument"]:
        """Each argument, positional ones first."""
        for position, (path, node) in enumerate(_items(self.inputs, "inputs")):
            known = position < len(self.parameters)
            yield Argument(path, self.parameters[position] if known else None, node)
        for path, node in _items(self.kwargs, "kwargs"):
            yield Argument(path, path.removeprefix("kwargs."), node)


@dataclass(frozen=True, slots=True)
class Argument:
    """One positional or keyword argument."""

    path: str
    name: str | None
    node: Node

    @property
    def part(self) -> str:
        """`inputs` or `kwargs`."""
        return self.path.partition(".")[0]


def pair_nodes(
    reference: Node, candidate: Node, path: str, note: str | None = None, *, listed: bool = False
) -> Iterator[LeafPair]:
    """The places of two trees, depth first; a place that is None on both sides is left out.

    `listed`: what stands here is an element of a list of numbers.
    """
    if isinstance(reference, Container) and isinstance(candidate, Container):
        yield from _pair_containers(reference, candidate, path, note)
    elif isinstance(reference, Container) and isinstance(candidate, TensorLeaf):
        inner, leaf = _only_tensor(reference, path)
        note = _join(note, f"{described(reference)} against a tensor") if leaf else note
        yield LeafPair(inner, leaf or reference, candidate, note)
    elif isinstance(reference, TensorLeaf) and isinstance(candidate, Container):
        _, leaf = _only_tensor(candidate, path)
        note = _join(note, f"a tensor against {described(candidate)}") if leaf else note
        yield LeafPair(path, reference, leaf or candidate, note)
    elif not (_is_none(reference) and _is_none(candidate)):
        yield LeafPair(path, reference, candidate, note, listed=listed)


def pair_stored(reference: Node | None, candidate: Node | None, path: str) -> Iterator[LeafPair]:
    """As `pair_nodes`, where a side may not have been recorded."""
    if reference is not None and candidate is not None:
        return pair_nodes(reference, candidate, path)
    return _alone(path, reference, candidate, stored=False)


def pair_arguments(reference: Arguments, candidate: Arguments) -> Iterator[LeafPair]:
    """The places of what two calls were given.

    Arguments of one name are one argument, whether given by position or by name; what has no
    partner of its name goes by its position.
    """
    for one, other in _pair_by_name_or_position(list(reference.items()), list(candidate.items())):
        if one is not None and other is not None:
            note = None if one.part == other.part else f"{one.path} against {other.path}"
            yield from pair_nodes(one.node, other.node, one.path, note)
        elif one is not None and not _is_none(one.node):
            yield from _alone(one.path, one.node, None, candidate.stored)
        elif other is not None and not _is_none(other.node):
            yield from _alone(other.path, None, other.node, reference.stored)


def filled(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    """Each leaf that is not None, with its path."""
    return ((place, leaf) for place, leaf in leaves(node, path) if not _is_none(leaf))


def described(node: Node) -> str:
    """What a node is, in words and without its contents: a text may be a prompt."""
    match node:
        case TensorLeaf():
            return "a tensor"
        case ValueLeaf():
            return "None" if node.value is None else f"a value of type {node.class_name}"
        case OpaqueLeaf():
            return f"an object of type {node.class_name}"
        case Container(kind="cache" | "dataclass" | "model_output" | "named_tuple"):
            return node.class_name
        case Container():
            return f"a {node.kind} of {len(node.items)}"


def _lists_numbers(node: Container) -> bool:
    """Whether it is data in the form of Python's lists: token ids, say, or lists of such."""
    return node.kind in _BY_POSITION and all(
        child.kind in _BY_POSITION
        if isinstance(child, Container)
        else isinstance(child, ValueLeaf) and child.class_name in _NUMBERS
        for _, child in node.items
    )


def _pair_containers(
    reference: Container, candidate: Container, path: str, note: str | None
) -> Iterator[LeafPair]:
    if "cache" in (reference.kind, candidate.kind):
        yield LeafPair(path, reference, candidate, note)
        if reference.kind != candidate.kind or not (reference.items and candidate.items):
            return
    elif (reference.kind, reference.class_name) != (candidate.kind, candidate.class_name):
        note = _join(note, f"{described(reference)} against {described(candidate)}")
    children = _children(reference, candidate)
    if children is None:
        inner, only = _only_tensor(reference, path)
        _, other_only = _only_tensor(candidate, path)
        if only is not None and other_only is not None:
            yield LeafPair(inner, only, other_only, note)
        else:
            yield LeafPair(path, reference, candidate, None)
        return
    listed = _lists_numbers(reference) or _lists_numbers(candidate)
    optional = bool({reference.kind, candidate.kind} & _WITH_FIELDS)
    for component, one, other in children:
        inner = join_path(path, component)
        if one is not None and other is not None:
            yield from pair_nodes(one, other, inner, note, listed=listed)
        elif not (optional and _is_none(one or other)):
            yield from _alone(inner, one, other)


def _children(reference: Container, candidate: Container) -> Iterator[_Child] | None:
    """What belongs together in two containers; None where that cannot be said."""
    by_position = [node.kind in _BY_POSITION for node in (reference, candidate)]
    if by_position[0] == by_position[1]:
        return _children_by_name(reference, candidate)
    if "dict" in (reference.kind, candidate.kind):
        return None
    return _children_by_position(reference, candidate)


def _children_by_name(reference: Container, candidate: Container) -> Iterator[_Child]:
    others = dict(candidate.items)
    for component, one in reference.items:
        yield component, one, others.pop(component, None)
    for component, other in others.items():
        yield component, None, other


def _children_by_position(reference: Container, candidate: Container) -> Iterator[_Child]:
    for one, other in zip_longest(_in_order(reference), _in_order(candidate)):
        if one is not None:
            yield one[0], one[1], other[1] if other is not None else None
        elif other is not None:
            yield other[0], None, other[1]


def _in_order(node: Container) -> list[tuple[str, Node]]:
    """As the container would be as a tuple: without the fields that are None."""
    if node.kind in _WITH_FIELDS:
        return [item for item in node.items if not _is_none(item[1])]
    return list(node.items)


def _only_tensor(node: Container, path: str) -> tuple[str, TensorLeaf | None]:
    """The one leaf of a container, if it is a tensor."""
    found = list(islice(filled(node, path), 2))
    if len(found) == 1 and node.kind != "cache":
        inner, leaf = found[0]
        if isinstance(leaf, TensorLeaf):
            return inner, leaf
    return path, None


def _alone(
    path: str, reference: Node | None, candidate: Node | None, stored: bool = True
) -> Iterator[LeafPair]:
    """The places of a tree that only one side has; the tree itself where it holds nothing."""
    if reference is not None:
        for place, leaf in _or_itself(filled(reference, path), path, reference):
            yield LeafPair(place, leaf, None, stored=stored)
    elif candidate is not None:
        for place, leaf in _or_itself(filled(candidate, path), path, candidate):
            yield LeafPair(place, None, leaf, stored=stored)


def _or_itself(
    found: Iterator[tuple[str, Node]], path: str, node: Node
) -> Iterator[tuple[str, Node]]:
    yield next(found, (path, node))
    yield from found


def _pair_by_name_or_position(
    reference: list[Argument], candidate: list[Argument]
) -> Iterator[tuple[Argument | None, Argument | None]]:
    names = {argument.name: argument for argument in candidate if argument.name is not None}
    partners = {one.path: names.pop(one.name) for one in reference if one.name in names}
    used = {other.path for other in partners.values()}
    left = {other.path: other for other in candidate if other.path not in used}
    for one in reference:
        yield one, partners.get(one.path) or left.pop(one.path, None)
    for other in left.values():
        yield None, other


def _items(node: Node | None, path: str) -> list[tuple[str, Node]]:
    if node is None:
        return []
    if not isinstance(node, Container):
        return [(path, node)]
    return [(join_path(path, component), child) for component, child in node.items]


def _is_none(node: Node | None) -> bool:
    return isinstance(node, ValueLeaf) and node.value is None


def _join(*notes: str | None) -> str:
    return "; ".join(note for note in notes if note)
