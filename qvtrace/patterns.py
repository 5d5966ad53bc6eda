"""Patterns on module names: an exact name first, then a case-sensitive fnmatch.

Exact names come first so that a name with `[0]` in it matches itself. The root, whose name is
empty, is `(root)` in a pattern as it is on screen.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qvtrace.errors import UsageError

ROOT = "(root)"


def shown(name: str) -> str:
    """The name of a module as people see it."""
    return name or ROOT


def above(name: str) -> Iterator[str]:
    """The names of the modules that one is in, the nearest first and the root last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def kind_of(name: str) -> str:
    """The same for the same module of each layer, `layers.*.mixer.dt_proj`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def folded(names: Iterable[str]) -> list[str]:
    """Names as people see them; those that differ in their numbers only are one pattern with a
    count, `layers.*.mixer.dt_proj (2)`, where the first of them stood."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(shown(name))
    return [
        group[0] if len(group) == 1 else f"{pattern} ({len(group)})"
        for pattern, group in groups.items()
    ]


def match(names: Iterable[str], pattern: str) -> set[str]:
    """The names that `pattern` stands for: the one that it is, else those that it fits."""
    names = set(names)
    exact = "" if pattern == ROOT else pattern
    if exact in names:
        return {exact}
    return {name for name in names if fnmatchcase(name, pattern)}


def select(
    names: Collection[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> set[str]:
    """The names that any of `include` fits (all, when there is none) and none of `exclude`."""
    chosen = set(names) if not include else set().union(*(match(names, p) for p in include))
    return chosen.difference(*(match(names, pattern) for pattern in exclude))


def require_matches(names: Collection[str], patterns: Sequence[str], option: str) -> None:
    """Raise `UsageError` for the first pattern that no name fits."""
    for pattern in patterns:
        if not match(names, pattern):
            raise UsageError(
                f"{option} {pattern!r}: matches none of {len(names)} modules; "
                "list them with `qvtrace show ARCHIVE`"
            )


@dataclass(frozen=True)
class Selector:
    """The names that patterns stand for in a model that may yet get further modules."""

    exact: frozenset[str]
    fitting: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Sequence[str], names: Collection[str], option: str) -> "Selector":
        """Of the names that there are; raises `UsageError` for a pattern that fits none of them."""
        require_matches(names, patterns, option)
        exact = {pattern: "" if pattern == ROOT else pattern for pattern in patterns}
        fitting = (pattern for pattern, name in exact.items() if name not in names)
        return cls(frozenset(exact.values()).intersection(names), tuple(fitting))

    def __contains__(self, name: str) -> bool:
        return name in self.exact or any(fnmatchcase(name, pattern) for pattern in self.fitting)
