"""Values of a call, and elements of its tensors, in words."""

from qvtrace.archive import Archive
from qvtrace.metrics.elements import ElementsJson
from qvtrace.reports.formatting import number, printable
from qvtrace.sampling import count_vectors
from qvtrace.trees import Container, Node, OpaqueLeaf, TensorLeaf, ValueLeaf

ELEMENTS_SHOWN = 64  # of one tensor, in a line of text
_TEXT_SHOWN = 40


def call_text(inputs: Node | None, kwargs: Node | None, output: Node | None) -> str:
    """A call in words: `(float32[1,84,64], use_cache=False) -> float32[1,84,64]`.

    What was not stored is `...`; a keyword that is None says nothing.
    """
    given = [*_positional(inputs), *_named(kwargs)]
    return f"({', '.join(given)}) -> {'...' if output is None else node_text(output)}"


def _positional(inputs: Node | None) -> list[str]:
    if not isinstance(inputs, Container):
        return ["..."]
    return [node_text(child) for _, child in inputs.items]


def _named(node: Node | None) -> list[str]:
    if not isinstance(node, Container):
        return []
    return [f"{printable(name)}={node_text(child)}" for name, child in node.items if _says(child)]


def _says(node: Node) -> bool:
    return not (isinstance(node, ValueLeaf) and node.value is None)


def node_text(node: Node) -> str:
    """A value in words: `float32[1,84,64]`, `(float32[2], None)`, `DynamicCache of 12`."""
    match node:
        case TensorLeaf():
            return f"{printable(node.dtype)}[{','.join(map(str, node.shape))}]"
        case ValueLeaf():
            return _shortened(repr(node.value) if node.class_name == "str" else str(node.value))
        case OpaqueLeaf():
            return f"<{printable(node.class_name)}>"
    return _container_text(node)


def _container_text(node: Container) -> str:
    if node.kind == "cache":
        length = "" if node.length is None else f" of {node.length}"  # of states there is none
        return f"{printable(node.class_name)}{length}"
    if node.kind in ("tuple", "list"):
        left, right = "()" if node.kind == "tuple" else "[]"
        return f"{left}{', '.join(node_text(child) for _, child in node.items)}{right}"
    name = "" if node.kind == "dict" else printable(node.class_name)
    return f"{name}({', '.join(_named(node))})"


def _shortened(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}... ({len(text)} characters)"


def elements_text(elements: ElementsJson) -> str:
    """Elements in words: `[[0.125, -3.00], [NaN, 1.00]]`, `[1, 2, 3] and 128 more`."""
    cut = f" and {elements.cut} more" if elements.cut else ""
    return f"{_nested_text(elements.values)}{cut}"


def _nested_text(values: object) -> str:
    if isinstance(values, list):
        return f"[{', '.join(map(_nested_text, values))}]"
    return number(values) if isinstance(values, int | float) else str(values)


def stored_text(archive: Archive, leaf: TensorLeaf) -> str | None:
    """`sampled: 64 of 512 tokens`, or that there are no elements; None for a whole tensor."""
    portion = archive.portion(leaf)
    if portion is None:
        return None
    if portion.stored is None:
        return portion.portion
    return f"sampled: {portion.vectors} of {count_vectors(leaf.shape)} tokens"
