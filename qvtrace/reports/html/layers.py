"""Names of modules as places in a network: which layer of a stack, and what in it."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile

from qvtrace.patterns import shown


@dataclass(frozen=True)
class LayerPlace:
    """Where a module stands."""

    kind: str  # the same for every layer: `mlp.down_proj`; with its stack where there are several
    layer: int | None = None  # None outside of numbered layers


def layer_places(modules: Collection[str]) -> dict[str, LayerPlace]:
    """Where each module stands; its layer is the first number in its name."""
    split = {name: _split(name) for name in modules}
    stacks = {parts[0] for parts in split.values() if parts is not None}
    common = _common_components(stacks)
    places = {}
    for name, parts in split.items():
        if parts is None:
            places[name] = LayerPlace(shown(name))
            continue
        stack, layer, rest = parts
        kind = ".".join(rest) or "(layer)"
        if len(stacks) > 1:
            kind = ".".join((*stack[common:], "*", *rest))
        places[name] = LayerPlace(kind, layer)
    return places


def _split(name: str) -> tuple[tuple[str, ...], int, tuple[str, ...]] | None:
    components = tuple(name.split("."))
    for position, component in enumerate(components):
        if component.isdecimal() and component.isascii() and len(component) < 10:
            return components[:position], int(component), components[position + 1 :]
    return None


def _common_components(stacks: Collection[tuple[str, ...]]) -> int:
    """How many components all stacks begin with."""
    first, last = min(stacks, default=()), max(stacks, default=())
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return sum(1 for _ in alike)
