"""The modules of a trace as a tree."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from qvtrace.manifest import Manifest, ModuleEntry
from qvtrace.patterns import shown


@dataclass(frozen=True)
class Branch:
    """One module in the tree."""

    name: str
    label: str  # the part of the name that the branch above has not told
    class_name: str
    depth: int
    aliases: tuple[str, ...] = ()


def branches(manifest: Manifest, chosen: frozenset[str]) -> Iterator[Branch]:
    """The chosen modules and those above them, each after its parent.

    A file may name parents that are not there, or that go in a circle: each module is met once.
    """
    entries = {entry.name: entry for entry in manifest.modules}
    for call in manifest.calls:
        if call.module not in entries:
            entries[call.module] = ModuleEntry(call.module, "", None)
    wanted = _with_ancestors(entries, chosen)
    children = defaultdict(list)
    for name in wanted:
        parent = entries[name].parent
        children[parent if parent in wanted else None].append(name)
    met: set[str] = set()
    for root in (*children[None], *wanted):
        yield from _below(root, entries, children, met)


def _with_ancestors(entries: dict[str, ModuleEntry], chosen: frozenset[str]) -> dict[str, None]:
    wanted: set[str] = set()
    for name in chosen:
        above: str | None = name
        while above is not None and above in entries and above not in wanted:
            wanted.add(above)
            above = entries[above].parent
    return dict.fromkeys(name for name in entries if name in wanted)


def _below(
    root: str,
    entries: dict[str, ModuleEntry],
    children: dict[str | None, list[str]],
    met: set[str],
) -> Iterator[Branch]:
    waiting = [(root, 0)]
    while waiting:
        name, depth = waiting.pop()
        if name in met:
            continue
        met.add(name)
        entry = entries[name]
        prefix = f"{entry.parent}." if depth and entry.parent else ""
        label = shown(name).removeprefix(prefix)
        yield Branch(name, label, entry.class_name, depth, entry.aliases)
        waiting.extend((child, depth + 1) for child in reversed(children[name]))
