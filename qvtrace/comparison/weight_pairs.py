"""Which weight of the candidate belongs to which of the reference, and by which rule."""

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace

from qvtrace.comparison.alignment import Alignment, NameMap, unwrapped
from qvtrace.manifest import Manifest, WeightEntry

# What quantizers put between a module and the float one that holds its weights.
_HOLDERS = frozenset({"wrapped", "module"})


@dataclass(frozen=True)
class WeightPair:
    """A weight at one place of the reference, and the candidate's in its place."""

    order: int  # position among the reference's weights
    module: str  # of the reference's place: a tied weight has several
    name: str
    reference: WeightEntry
    candidate: WeightEntry
    rule: str

    def places(self) -> list["WeightPair"]:
        """The pair as it stands at each place where the reference has it tied."""
        names = (name.rpartition(".") for name in _names(self.reference))
        return [replace(self, module=module, name=name) for module, _, name in names]


@dataclass(frozen=True)
class WeightPairs:
    """Every weight of both sides, paired or not."""

    pairs: tuple[WeightPair, ...] = ()
    only_in_reference: tuple[WeightEntry, ...] = ()
    only_in_candidate: tuple[WeightEntry, ...] = ()

    @property
    def everywhere(self) -> list[WeightPair]:
        """Each pair at its own place, and at those others of a tied weight that no pair has."""
        taken = {(pair.module, pair.name) for pair in self.pairs}
        others = (place for pair in self.pairs for place in pair.places())
        return [*self.pairs, *(at for at in others if (at.module, at.name) not in taken)]

    @property
    def modules(self) -> set[str]:
        """The modules that hold them, as `--include` and `--exclude` name them."""
        alone = (*self.only_in_reference, *self.only_in_candidate)
        paired = {pair.module for pair in self.everywhere}
        return paired | {module for entry in alone for module in _modules(entry)}

    def of(self, modules: Set[str]) -> "WeightPairs":
        """Those of the modules, each once: at its first place among these."""
        chosen: dict[tuple[int, int], WeightPair] = {}
        for pair in self.everywhere:
            if pair.module in modules:
                chosen.setdefault((id(pair.reference), id(pair.candidate)), pair)
        return replace(
            self,
            pairs=tuple(sorted(chosen.values(), key=lambda pair: pair.order)),
            only_in_reference=_held_by(self.only_in_reference, modules),
            only_in_candidate=_held_by(self.only_in_candidate, modules),
        )


def pair_weights(
    reference: Manifest, candidate: Manifest, alignment: Alignment, maps: Sequence[str]
) -> WeightPairs:
    """Pair by name, as the modules were paired; a weight that only one side has tied is compared
    at each place."""
    entries = reference.weights or ()
    places = {name: position for position, entry in enumerate(entries) for name in _names(entry)}
    translated = _Translation(places, alignment, [NameMap.parse(text) for text in maps])
    pairs, alone = [], []
    for entry in candidate.weights or ():
        found = {
            places[place]: (place, rule)
            for place, rule in reversed([*filter(None, map(translated.place, _names(entry)))])
        }
        for position, (place, rule) in found.items():
            module, _, name = place.rpartition(".")
            pairs.append(WeightPair(position, module, name, entries[position], entry, rule))
        if not found:
            alone.append(entry)
    taken = {pair.order for pair in pairs}
    return WeightPairs(
        tuple(sorted(pairs, key=lambda pair: pair.order)),
        tuple(entry for position, entry in enumerate(entries) if position not in taken),
        tuple(alone),
    )


class _Translation:
    """Full names of the candidate's weights -> places of the reference."""

    def __init__(
        self, places: Collection[str], alignment: Alignment, maps: Sequence[NameMap]
    ) -> None:
        self._places = places
        self._maps = maps
        self._unwrapped = {unwrapped(name): name for name in reversed([*places])}
        self._partners = {
            pair.candidate.module: (pair.reference.module, pair.rule) for pair in alignment.pairs
        }

    def place(self, name: str) -> tuple[str, str] | None:
        """The place that a name stands for, and the rule."""
        if name in self._places:
            return name, "exact"
        mapped = self._mapped(name)
        unwrapped_name = self._unwrapped.get(unwrapped(mapped))
        by_name = None if unwrapped_name is None else (unwrapped_name, "wrapper")
        return self._as_modules(name) or by_name

    def _as_modules(self, name: str) -> tuple[str, str] | None:
        """By the partner of the module that holds the weight, or of what is around it."""
        module, _, last = name.rpartition(".")
        while module not in self._partners and module.rpartition(".")[2] in _HOLDERS:
            module = module.rpartition(".")[0]
        if module in self._partners:
            partner, rule = self._partners[module]
            place = f"{partner}.{last}" if partner else last
            if place in self._places:
                return place, rule
        return None

    def _mapped(self, name: str) -> str:
        module, _, last = name.rpartition(".")
        for name_map in self._maps:
            module = ".".join(filter(None, name_map.apply(module).split(".")))
        return f"{module}.{last}" if module else last


def _names(entry: WeightEntry) -> list[str]:
    first = f"{entry.module}.{entry.name}" if entry.module else entry.name
    return [first, *entry.aliases]


def _modules(entry: WeightEntry) -> list[str]:
    """That hold it: a tied weight is in several."""
    return [name.rpartition(".")[0] for name in _names(entry)]


def _held_by(entries: Sequence[WeightEntry], modules: Set[str]) -> tuple[WeightEntry, ...]:
    return tuple(entry for entry in entries if not modules.isdisjoint(_modules(entry)))
