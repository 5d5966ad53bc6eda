"""Which call of the candidate belongs to which call of the reference, and by which rule.

Modules are paired by name, calls by sample, step and their count therein. An exact name comes
first, then an alias of a shared module, then what is left of the names once declared wrappers are
taken off, then the float name that a wrapper carries. Class and order of execution never decide,
nor do names that are merely alike.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from qvtrace.errors import UsageError
from qvtrace.manifest import CallEntry, Manifest, ModuleEntry
from qvtrace.patterns import shown

COMPILED = "_orig_mod"  # torch.compile, at any depth
PARALLEL = "module"  # DataParallel and its kin, in front only
WRAPPED = "wrapped"  # quantizers that put a module into a wrapper, at any depth
FLOAT_NAME = "fp_name"  # the attribute in which wrappers say which module they stand for
# Below these a quantizer keeps modules of its own: nncf's hooks, torch.ao's weights and observers.
_ADDED = re.compile(r"__nncf_hooks|_packed_params|activation_post_process(_\d+)?")

_RULES = {
    COMPILED: f"prefix {COMPILED}.",
    PARALLEL: f"prefix {PARALLEL}.",
    WRAPPED: f"suffix .{WRAPPED}",
}
# The mildest first: `wrapped` is also a name that people give to a module of their own.
_LEVELS: tuple[tuple[str, ...], ...] = (
    (),
    (COMPILED,),
    (COMPILED, PARALLEL),
    (COMPILED, PARALLEL, WRAPPED),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A call of the reference and the call of the candidate that belongs to it."""

    order: int  # position in the reference's order of execution
    reference: CallEntry
    candidate: CallEntry
    rule: str  # `exact`, `alias`, `prefix _orig_mod.`, `map PATTERN=REPLACEMENT`


@dataclass(frozen=True)
class Alignment:
    """Every recorded call of both sides, paired or not; each list in order of execution."""

    pairs: tuple[Pair, ...]
    only_in_reference: tuple[CallEntry, ...]
    only_in_candidate: tuple[CallEntry, ...]
    # Modules that wrap, or are wrapped by, a paired one, and those that a quantizer added.
    reference_wrappers: frozenset[str]
    candidate_wrappers: frozenset[str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class NameMap:
    """A regular expression on candidate names and what replaces it, as the user wrote them."""

    text: str
    pattern: re.Pattern[str]
    replacement: str

    @classmethod
    def parse(cls, text: str) -> "NameMap":
        """From `PATTERN=REPLACEMENT`, split at the last `=`; raises `UsageError`."""
        pattern, equals, replacement = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--map {text!r}: is no 'PATTERN=REPLACEMENT'; write both parts")
        try:
            return cls(text, re.compile(pattern), replacement)
        except re.error as error:
            raise UsageError(
                f"--map {text!r}: {pattern!r} is no regular expression ({error}); "
                "write it as Python's `re` reads it"
            ) from error

    def apply(self, name: str) -> str:
        """`name` with every match replaced; raises `UsageError` where that cannot be done."""
        try:
            return self.pattern.sub(self.replacement, name)
        except (re.error, IndexError) as error:
            raise UsageError(
                f"--map {self.text!r}: {self.replacement!r} is no replacement ({error}); "
                "groups are written \\1 or \\g<name>"
            ) from error


def unwrapped(name: str, wrappers: Iterable[str] = (COMPILED, PARALLEL, WRAPPED)) -> str:
    """`name` without the components that these wrappers put into it."""
    wrappers = frozenset(wrappers)
    anywhere = wrappers - {PARALLEL}
    components = [component for component in name.split(".") if component not in anywhere]
    if PARALLEL in wrappers:
        while components[:1] == [PARALLEL]:
            del components[0]
    return ".".join(components)


Slot = tuple[int, int, int]  # sample, step, count of the module's calls therein


@dataclass(frozen=True)
class CalledModule:
    """A module that was called, with its names as they are compared."""

    name: str  # in its own archive
    names: tuple[str, ...]  # the name first, then aliases; after the maps
    slots: dict[Slot, int]  # position in the order of execution
    maps: tuple[str, ...] = ()  # the maps that changed the name
    float_name: str | None = None

    @property
    def depth(self) -> int:
        """How many modules are around this one."""
        return self.name.count(".") + bool(self.name)

    def keys(self, wrappers: Sequence[str], *, aliases: bool) -> dict[str, str]:
        """The names without wrappers, each with the name that it was."""
        names = self.names if aliases else self.names[:1]
        return {unwrapped(name, wrappers): name for name in reversed(names)}


@dataclass
class _ModulePairs:
    """Pairs of modules, found one rule after the other."""

    reference: dict[str, CalledModule]  # those that are not paired yet
    candidate: dict[str, CalledModule]
    found: list[tuple[CalledModule, CalledModule, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, reference: CalledModule, candidate: CalledModule, rule: str) -> None:
        del self.reference[reference.name]
        del self.candidate[candidate.name]
        self.found.append((reference, candidate, rule))


def align(reference: Manifest, candidate: Manifest, maps: Sequence[str] = ()) -> Alignment:
    """Pair the calls of two traces.

    `maps` are `PATTERN=REPLACEMENT`: regular expressions on names of the candidate, one after the
    other until a name is one of the reference. A name that the reference has from the start is
    given up only for another of its names, and only where that is free, as in a swap. Raises
    `UsageError` for a map that cannot be read, and for one that gives a module the name of another.
    """
    name_maps = [NameMap.parse(text) for text in maps]
    reference_modules = called_modules(reference)
    candidate_modules = called_modules(candidate, name_maps, reference_modules)
    modules = _pair_modules(reference_modules, candidate_modules)
    partners = _pair_calls(modules.found)
    _pair_calls_of_shared(reference_modules.values(), candidate_modules.values(), partners)
    taken = {position for position, _ in partners.values()}
    return Alignment(
        tuple(
            Pair(order, reference.calls[order], candidate.calls[position], rule)
            for order, (position, rule) in sorted(partners.items())
        ),
        tuple(call for order, call in enumerate(reference.calls) if order not in partners),
        tuple(call for order, call in enumerate(candidate.calls) if order not in taken),
        _wrappers(modules.reference.values(), [pair[0] for pair in modules.found]),
        _wrappers(modules.candidate.values(), [pair[1] for pair in modules.found]),
        (
            *modules.warnings,
            *_unused(name_maps, candidate_modules.values()),
            *_taken_for_root(candidate_modules.values()),
        ),
    )


def called_modules(
    manifest: Manifest, maps: Sequence[NameMap] = (), known: Collection[str] = ()
) -> dict[str, CalledModule]:
    """The modules that were called, by their names in their own archive."""
    positions: dict[str, list[int]] = defaultdict(list)
    for position, call in enumerate(manifest.calls):
        positions[call.module].append(position)
    entries = {entry.name: entry for entry in manifest.modules}
    aliases = {name: entry.aliases for name, entry in entries.items()}
    names = {other for name in positions for other in (name, *aliases.get(name, ()))}
    renamed = _renamed(names, maps, known)
    modules = {}
    for name, its_positions in positions.items():
        entry = entries.get(name, ModuleEntry(name, "", None))
        mapped, applied = renamed[name]
        others = tuple(renamed[alias][0] for alias in entry.aliases)
        slots = _slots(manifest.calls, its_positions)
        modules[name] = CalledModule(name, (mapped, *others), slots, applied, entry.float_name)
    return modules


_Renamed = tuple[str, tuple[str, ...]]  # a name after the maps, and those that changed it


def _renamed(
    names: Collection[str], maps: Sequence[NameMap], known: Collection[str]
) -> dict[str, _Renamed]:
    """What the maps make of each name of the candidate; `known` are those of the reference."""
    renamed = {name: mapped_name(name, maps, known) for name in names}
    while blocked := [
        name
        for name, (new, applied) in renamed.items()
        if applied and name in known and new in renamed and not renamed[new][1]
    ]:
        renamed.update((name, (name, ())) for name in blocked)
    return renamed


def mapped_name(name: str, maps: Sequence[NameMap], known: Collection[str]) -> _Renamed:
    """A name of the candidate after the maps, and those that changed it; `known` are the
    reference's."""
    mapped, applied = name, []
    for name_map in maps:
        replaced = ".".join(filter(None, name_map.apply(mapped).split(".")))
        if replaced != mapped:
            applied.append(name_map.text)
            mapped = replaced
            if mapped in known:
                break
    if name in known and mapped not in known:
        return name, ()
    return mapped, tuple(applied)


def _slots(calls: Sequence[CallEntry], positions: list[int]) -> dict[Slot, int]:
    """Each call by its count within its sample and step, so that a call that one side makes less
    often in one step does not shift the steps after it."""
    slots: dict[Slot, int] = {}
    first: dict[tuple[int, int], int] = {}
    for position in sorted(positions, key=lambda position: calls[position].index):
        call = calls[position]
        # A recovered trace may lack the first calls: those of the first step still count from 0.
        start = first.setdefault((call.sample, call.step), call.index if first else 0)
        slots.setdefault((call.sample, call.step, call.index - start), position)
    return slots


def _pair_modules(
    reference: dict[str, CalledModule], candidate: dict[str, CalledModule]
) -> _ModulePairs:
    modules = _ModulePairs(dict(reference), dict(candidate))
    for wrappers, aliases in product(_LEVELS, (False, True)):
        if modules.reference and modules.candidate:
            _pair_by_key(modules, wrappers, aliases=aliases)
    _pair_by_float_name(modules)
    return modules


def _pair_by_float_name(modules: _ModulePairs) -> None:
    """What is left, where one side is made of wrappers that carry the names of the other."""
    claims = _float_claims(modules.candidate)
    for name, references in _float_claims(modules.reference).items():
        candidates = claims.get(name, ())
        pairs = [pair for pair in product(references, candidates) if any(map(_is_wrapper, pair))]
        if pairs:
            modules.add(*min(pairs, key=_preference), FLOAT_NAME)


def _float_claims(modules: dict[str, CalledModule]) -> dict[str, list[CalledModule]]:
    claims = defaultdict(list)
    for module in modules.values():
        claims[module.names[0] if module.float_name is None else module.float_name].append(module)
    return claims


def _is_wrapper(module: CalledModule) -> bool:
    return module.float_name is not None


def _pair_by_key(modules: _ModulePairs, wrappers: Sequence[str], *, aliases: bool) -> None:
    claims = _claims(modules.candidate.values(), wrappers, aliases=aliases)
    for key, references in _claims(modules.reference.values(), wrappers, aliases=aliases).items():
        references = [module for module in references if module.name in modules.reference]
        candidates = [module for module in claims.get(key, ()) if module.name in modules.candidate]
        if not references or not candidates:
            continue
        if len(candidates) > 1:  # of wrappers on both sides, the outermost are held together
            references = [min(references, key=lambda module: (module.depth, module.name))]
        reference, candidate = min(product(references, candidates), key=_preference)
        rule = _rule(reference, candidate, key, wrappers, aliases=aliases)
        modules.add(reference, candidate, rule)
        if not aliases:
            modules.warnings += _conflict(reference, candidate, candidates)


def _claims(
    modules: Iterable[CalledModule], wrappers: Sequence[str], *, aliases: bool
) -> dict[str, list[CalledModule]]:
    claims = defaultdict(list)
    for module in modules:
        for key in module.keys(wrappers, aliases=aliases):
            claims[key].append(module)
    return claims


def _preference(pair: tuple[CalledModule, CalledModule]) -> tuple[bool, bool, int, int, str, str]:
    """An unmapped name, then equal calls, then the outermost of nested wrappers."""
    reference, candidate = pair
    return (
        bool(candidate.maps),
        reference.slots.keys() != candidate.slots.keys(),
        reference.depth,
        candidate.depth,
        reference.name,
        candidate.name,
    )


def _rule(
    reference: CalledModule,
    candidate: CalledModule,
    key: str,
    wrappers: Sequence[str],
    *,
    aliases: bool,
) -> str:
    rules = [f"map {text}" for text in candidate.maps]
    if aliases:
        rules.append("alias")
    reference_kinds = _kinds(reference.keys(wrappers, aliases=True)[key], wrappers)
    candidate_kinds = _kinds(candidate.keys(wrappers, aliases=True)[key], wrappers)
    kinds = reference_kinds ^ candidate_kinds or reference_kinds | candidate_kinds
    rules += [rule for kind, rule in _RULES.items() if kind in kinds]
    return ", ".join(rules) or "exact"


def _kinds(name: str, wrappers: Sequence[str]) -> set[str]:
    """Which of the wrappers are in a name."""
    kinds = set(wrappers).difference([PARALLEL]).intersection(name.split("."))
    if PARALLEL in wrappers and unwrapped(name, kinds | {PARALLEL}) != unwrapped(name, kinds):
        kinds.add(PARALLEL)
    return kinds


def _conflict(
    reference: CalledModule, candidate: CalledModule, candidates: Sequence[CalledModule]
) -> Iterator[str]:
    """Says which modules lost against `candidate`; a wrapper around the same module is no rival."""
    for rival in candidates:
        if rival is candidate or _nested(rival.name, candidate.name):
            continue
        both = f"{shown(candidate.name)} and {shown(rival.name)}"
        for text in (*rival.maps, *candidate.maps):
            raise UsageError(
                f"--map {text!r}: gives {both} of the candidate one name, "
                f"{shown(reference.name)}; make the pattern narrower"
            )
        yield f"{both} both stand for {shown(reference.name)}: the first was compared"


def _nested(one: str, other: str) -> bool:
    outer, inner = sorted((one, other), key=len)
    return not outer or inner.startswith(f"{outer}.")


def _pair_calls(
    found: Iterable[tuple[CalledModule, CalledModule, str]],
) -> dict[int, tuple[int, str]]:
    """The position of each paired call of the reference -> the candidate's, and the rule."""
    return {
        position: (candidate.slots[slot], rule)
        for reference, candidate, rule in found
        for slot, position in reference.slots.items()
        if slot in candidate.slots
    }


def _pair_calls_of_shared(
    references: Collection[CalledModule],
    candidates: Collection[CalledModule],
    partners: dict[int, tuple[int, str]],
) -> None:
    """Pair what is left where one side shares a module and the other has one under each name.

    Only where both have as many calls left in each step: then the count of a call among them is
    what its index would be, were both sides shared alike.
    """
    taken = {position for position, _ in partners.values()}
    for reference, candidate in _sharings(references, candidates):
        if _count_calls(reference) != _count_calls(candidate):
            continue
        left = _left_over(reference, partners)
        others = _left_over(candidate, taken)
        if [step for _, step in left] == [step for _, step in others]:
            for (order, _), (position, _) in zip(left, others, strict=True):
                partners[order] = position, "alias"
                taken.add(position)


def _sharings(
    references: Collection[CalledModule], candidates: Collection[CalledModule]
) -> Iterator[tuple[list[CalledModule], list[CalledModule]]]:
    """A module with aliases and those of the other side that have one of its names."""
    candidate_of_name = {module.names[0]: module for module in candidates}
    reference_of_name = {module.names[0]: module for module in references}
    for module in references:
        if len(module.names) > 1:
            yield [module], _having(module.names, candidate_of_name)
    for module in candidates:
        if len(module.names) > 1:
            yield _having(module.names, reference_of_name), [module]


def _having(names: Iterable[str], modules: dict[str, CalledModule]) -> list[CalledModule]:
    return [modules[name] for name in dict.fromkeys(names) if name in modules]


def _count_calls(modules: Iterable[CalledModule]) -> int:
    return sum(len(module.slots) for module in modules)


def _left_over(
    modules: Iterable[CalledModule], done: Collection[int]
) -> list[tuple[int, tuple[int, int]]]:
    """The calls that are not paired, in order of execution, each with its sample and step."""
    return sorted(
        (position, slot[:2])
        for module in modules
        for slot, position in module.slots.items()
        if position not in done
    )


def _wrappers(unpaired: Iterable[CalledModule], paired: Iterable[CalledModule]) -> frozenset[str]:
    """Modules that have the name of a paired one but for wrappers, and lie around it or in it; and
    modules that a quantizer added."""
    names = defaultdict(list)
    for module in paired:
        for name in _plain_names(module):
            names[name].append(module.name)
    return frozenset(
        module.name
        for module in unpaired
        if any(map(_ADDED.fullmatch, module.name.split(".")))
        or any(
            _nested(module.name, name)
            for plain in _plain_names(module)
            for name in names.get(plain, ())
        )
    )


def _plain_names(module: CalledModule) -> set[str]:
    """The name but for wrappers, and the float name that it carries."""
    plain = unwrapped(module.names[0])
    return {plain} if module.float_name is None else {plain, module.float_name}


def _taken_for_root(modules: Iterable[CalledModule]) -> Iterator[str]:
    for module in modules:
        if module.maps and module.name and not module.names[0]:
            texts = ", ".join(f"--map {text!r}" for text in module.maps)
            yield f"{texts} gives {module.name} the name of the root"


def _unused(maps: Iterable[NameMap], modules: Collection[CalledModule]) -> Iterator[str]:
    used = {text for module in modules for text in module.maps}
    for name_map in maps:
        if name_map.text not in used:
            yield f"--map {name_map.text!r} changed no name"
