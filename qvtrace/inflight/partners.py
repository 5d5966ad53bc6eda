"""Which calls of a stored reference a call that just happens may belong to.

Which one it is, `align` says when all calls are known. Until then all are looked at that it can
say: nearly always one.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from qvtrace.comparison.alignment import NameMap, Slot, called_modules, mapped_name, unwrapped
from qvtrace.comparison.fusion import Followers, as_fused, classes_of, may_be_fused
from qvtrace.manifest import CallEntry, Manifest, ModuleEntry


class Partners:
    """Looks calls of the reference up for those of the candidate."""

    def __init__(self, reference: Manifest, maps: Sequence[str]) -> None:
        """Raises `UsageError` for a map that cannot be read."""
        self._reference = reference
        self._calls = reference.calls
        self._followers: Followers | None = None  # None: nothing of the candidate can be fused
        self._modules = called_modules(reference)
        self._maps = [NameMap.parse(text) for text in maps]
        self._of_key: dict[str, list[str]] = defaultdict(list)
        for module in self._modules.values():
            for key in _keys(module.names, module.float_name):
                self._of_key[key].append(module.name)
        self._entries: dict[str, ModuleEntry] = {}
        self._known: dict[str, tuple[list[str], bool]] = {}
        self._first: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)

    def set_modules(self, modules: Iterable[ModuleEntry]) -> None:
        """Take the modules of the candidate as far as they are known."""
        self._entries = {entry.name: entry for entry in modules}
        self._known.clear()
        classes = classes_of(self._reference.modules), classes_of(self._entries.values())
        if self._followers is None and may_be_fused(*classes):
            self._followers = Followers(self._reference)

    def begin(self, call: CallEntry) -> None:
        """Count a call of the candidate: each comes here in the order of the indices."""
        first = self._first[call.module]
        first.setdefault((call.sample, call.step), call.index if first else 0)

    def of(self, call: CallEntry) -> list[CallEntry]:
        """The calls of the reference that may be its partner."""
        if call.module not in self._known:
            self._known[call.module] = self._candidates(call.module)
        names, is_shared = self._known[call.module]
        start = self._first[call.module].get((call.sample, call.step), 0)
        slot = call.sample, call.step, call.index - start
        whole_step = is_shared or self._followers is not None  # which may have taken some of them
        positions = [
            position
            for name in names
            for position in _positions(self._modules[name].slots, slot, whole_step=whole_step)
        ]
        return [*(self._calls[position] for position in positions), *self._fused(call, positions)]

    def _fused(self, call: CallEntry, positions: Iterable[int]) -> Iterator[CallEntry]:
        """What the module may stand for, where it is a fused one."""
        entry = self._entries.get(call.module)
        if self._followers is None or entry is None:
            return
        for position in positions:
            for last in self._followers.of(position, entry.class_name):
                yield as_fused(self._calls[position], self._calls[last])

    def _candidates(self, module: str) -> tuple[list[str], bool]:
        """The names in the reference, and whether calls may be shared out among several modules."""
        entry = self._entries.get(module, ModuleEntry(module, "", None))
        names = [module, *entry.aliases]
        keys = _keys((*names, *map(self._mapped, names)), entry.float_name)
        found = dict.fromkeys(name for key in sorted(keys) for name in self._of_key.get(key, ()))
        others = {alias for name in found for alias in self._modules[name].names}
        has_aliases = len(names) > 1 or len(others) > len(found)
        is_shared = has_aliases and _keys(names, None) != _keys(others, None)
        return list(found), is_shared

    def _mapped(self, name: str) -> str:
        return mapped_name(name, self._maps, self._modules)[0]


def _keys(names: Iterable[str], float_name: str | None) -> set[str]:
    """What is left of names that may be one: the name that a wrapper carries is one of them."""
    return {unwrapped(name) for name in (*names, float_name) if name is not None}


def _positions(slots: dict[Slot, int], slot: Slot, *, whole_step: bool) -> list[int]:
    if whole_step:
        return [position for other, position in slots.items() if other[:2] == slot[:2]]
    return [slots[slot]] if slot in slots else []
