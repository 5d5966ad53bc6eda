"""What a model is given, as lines of text: values by their names, elements as torch prints them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from qvtrace.reports.formatting import printable
from qvtrace.reports.styled import Styled, styled


def input_lines(
    parameters: Sequence[str | None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Styled]:
    """Each input by its name: of a tensor the dtype, the shape, and under them the elements.

    `parameters` are the names that forward's signature gives to `args`; one without a name is
    called by its place, and so is what a list, a tuple or a mapping holds: `past.0`.
    """
    for place, value in enumerate(args):
        name = parameters[place] if place < len(parameters) else None
        yield from _lines(name or f"inputs.{place}", value)
    for name, value in kwargs.items():
        yield from _lines(name, value)


def _lines(name: str, value: object) -> Iterator[Styled]:
    items: Iterator[tuple[object, object]] | None = None
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items or ():
        yield from _lines(f"{name}.{key}", item)
    if items is None:
        yield from _leaf_lines(styled(printable(name), "bold cyan"), value)


def _leaf_lines(name: Styled, value: object) -> Iterator[Styled]:
    if not isinstance(value, Tensor):
        yield name + styled(f"  {printable(repr(value))}")
        return
    yield name + styled(f"  {value.dtype} {list(value.shape)}", "dim")
    for line in str(value).splitlines():
        yield styled(printable(line))
