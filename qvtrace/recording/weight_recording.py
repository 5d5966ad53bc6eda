"""Records the weights of a model, dequantized, one after the other and each once."""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field

import torch

from qvtrace.errors import ArchiveError
from qvtrace.manifest import WeightEntry
from qvtrace.qparams.dequantized import ModuleWeight, NoWeightError, module_weights
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.snapshots import Snapshots
from qvtrace.trees import Node, OpaqueLeaf, key_name, path_component, to_json

_NAMED = 3


class WeightRecorder:
    """Stores weights before a model has run; those that are packed until then, afterwards."""

    def __init__(self, snapshots: Snapshots, add: Callable[[WeightEntry], None]) -> None:
        """`add` takes each weight when its values are stored."""
        self._snapshots = snapshots
        self._add = add
        self._waiting: list[_Place] = []
        self._missing: dict[str, list[str]] = {}

    def record(self, modules: Iterable[NamedModule], recorded: Set[str]) -> None:
        """Store the weights of the modules that are `recorded`, by name.

        Raises only what the store raises as `OSError` or `ArchiveError`.
        """
        chosen = [m for m in modules if any(n in recorded for n in (m.name, *m.aliases))]
        for place in _places(chosen):
            node = self._taken(place, place.weight)
            if isinstance(node, OpaqueLeaf):
                self._waiting.append(place)
            else:
                self._add(place.entry(node))

    def finish(self) -> None:
        """Store the weights that could not be read before the model ran, or say why not."""
        for place in self._waiting:
            now = {weight.name: weight for weight in _weights(place.module)}
            node = self._taken(place, now.get(place.weight.name, place.weight))
            self._add(place.entry(node))
            if isinstance(node, OpaqueLeaf):
                self._missing.setdefault(str(node.reason), []).append(place.name)
        self._waiting.clear()

    def warnings(self) -> tuple[str, ...]:
        """Which weights are not stored, and why."""
        return tuple(
            f"{len(names)} weight{'s' * (len(names) > 1)} not stored, {reason}: "
            f"{', '.join(names[:_NAMED])}{' and more' * (len(names) > _NAMED)}"
            for reason, names in self._missing.items()
        )

    def _taken(self, place: "_Place", weight: ModuleWeight) -> Node:
        try:
            with torch.no_grad():
                values = weight.values()
        except (OSError, ArchiveError):
            raise
        except NoWeightError as error:
            return OpaqueLeaf(weight.class_name, str(error))
        except Exception as error:  # another library's objects may raise anything
            return OpaqueLeaf(weight.class_name, f"it cannot be read ({type(error).__name__})")
        if values.is_meta:
            return OpaqueLeaf(weight.class_name, "on the meta device or offloaded")
        return self._snapshots.take(values, place.key, "")


@dataclass
class _Place:
    """A weight where it is first met, and its further names."""

    module: NamedModule
    weight: ModuleWeight
    aliases: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return _full_name(self.module.name, self.weight.name)

    @property
    def key(self) -> str:
        return f"{key_name(self.module.name)}/weights.{path_component(self.weight.name)}"

    def entry(self, node: Node) -> WeightEntry:
        shared = [_full_name(alias, self.weight.name) for alias in self.module.aliases]
        return WeightEntry(
            module=self.module.name,
            name=self.weight.name,
            class_name=self.weight.class_name,
            aliases=(*shared, *self.aliases),
            value=to_json(node),
        )


def _places(modules: Iterable[NamedModule]) -> Iterator["_Place"]:
    """Each weight once; a tied one at its first place."""
    places: list[_Place] = []
    of_tensor: dict[int, _Place] = {}
    for module in modules:
        for weight in _weights(module):
            known = of_tensor.get(id(weight.sources[0])) if weight.is_plain else None
            if known is not None and known.weight.is_plain:
                known.aliases.append(_full_name(module.name, weight.name))
            elif known is None or not _is_below(module.name, known.module.name):
                place = _Place(module, weight)
                places.append(place)
                for source in weight.sources:
                    of_tensor.setdefault(id(source), place)
    return iter(places)


def _weights(module: NamedModule) -> list[ModuleWeight]:
    try:
        return module_weights(module.module)
    except Exception:  # a module of the user's whose attributes raise
        return []


def _is_below(name: str, above: str) -> bool:
    return name.startswith(f"{above}.") if above else bool(name)


def _full_name(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
