"""What is looked at in one archive: calls of chosen modules, their statistics and elements."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import unwrapped
from qvtrace.comparison.portions import stored_statistics
from qvtrace.errors import DamagedArchiveError
from qvtrace.manifest import CallEntry, ModuleEntry, WeightEntry
from qvtrace.metrics.elements import ElementsJson, elements_json
from qvtrace.metrics.statistics import Statistics
from qvtrace.patterns import match, require_matches
from qvtrace.qparams.findings import Finding, parameters_of, suspect
from qvtrace.qparams.saturation import saturated
from qvtrace.sampling import count_vectors
from qvtrace.trees import Node, TensorLeaf

Part = Literal["inputs", "kwargs", "output"]
PARTS: tuple[Part, ...] = ("inputs", "kwargs", "output")


@dataclass(frozen=True)
class Selection:
    """Which modules of an archive are shown, and of which the elements too."""

    modules: frozenset[str]
    with_elements: frozenset[str]

    @classmethod
    def of(cls, archive: Archive, patterns: Sequence[str], values: Sequence[str]) -> "Selection":
        """What patterns select; no pattern selects every module. One that fits no name may fit
        the names of the float model: those without wrappers, or that wrappers carry.

        Raises `UsageError` for a pattern that fits no module.
        """
        entries = archive.manifest.modules
        names = {name for entry in entries for name in (entry.name, *entry.aliases)}
        names.update(call.module for call in archive.manifest.calls)
        wrapped: dict[str, set[str]] = defaultdict(set)
        for entry in entries:
            for name in (unwrapped(entry.name), entry.float_name):
                if name is not None:
                    wrapped[name].add(entry.name)

        def chosen(patterns: Sequence[str], option: str) -> frozenset[str]:
            floats = [each for each in patterns if not match(names, each) and match(wrapped, each)]
            others = [each for each in patterns if each not in floats]
            require_matches(names, others, option)
            found = set().union(*(match(names, each) for each in others))
            for name in set().union(*(match(wrapped, each) for each in floats)):
                found |= wrapped[name]
            return _without_aliases(entries, found)

        return cls(chosen(patterns or ["*"], "PATTERN"), chosen(values, "--values"))


class Trace:
    """A selection of an archive; each distinct tensor is looked at once."""

    def __init__(self, archive: Archive, selection: Selection) -> None:
        self.archive = archive
        self.selection = selection
        self.parameters = parameters_of(archive)
        self._weights: dict[str, list[WeightEntry]] = defaultdict(list)
        for entry in archive.manifest.weights or ():
            self._weights[entry.module].append(entry)
        self._statistics: dict[tuple[str, str], Statistics] = {}

    def calls(self) -> Iterator[CallEntry]:
        """The calls of the selected modules, in order of execution."""
        for call in self.archive.manifest.calls:
            if call.module in self.selection.modules:
                yield call

    def tree(self, call: CallEntry, part: Part) -> Node | None:
        """A part of a call; raises `DamagedArchiveError` where the file holds something else."""
        return self.archive.tree(call, part)

    def weights(self, module: str) -> list[tuple[WeightEntry, Node]]:
        """The weights of a module, and of what it wraps unless that is shown by itself; raises
        `DamagedArchiveError`."""
        inner = f"{module}.wrapped" if module else "wrapped"
        names = [module] if inner in self.selection.modules else [module, inner]
        entries = [entry for name in names for entry in self._weights.get(name, ())]
        try:
            return [(entry, entry.node()) for entry in entries]
        except ValueError as error:
            raise DamagedArchiveError(
                f"{self.archive.file}: the weights of {module}: {error}; the file is damaged, "
                "record again"
            ) from error

    def findings(self) -> list[Finding]:
        """What is suspect about the quantization of the selected modules."""
        found = [*suspect(self.parameters), *saturated(self.archive, self.parameters)]
        return [finding for finding in found if self._is_about_selected(finding.module)]

    def _is_about_selected(self, module: str) -> bool:
        """A module within a wrapper is selected with it."""
        names = (module, module.removesuffix(".wrapped"))
        return any(name in self.selection.modules for name in names)

    def statistics(self, leaf: TensorLeaf) -> Statistics:
        """The statistics of a whole tensor; without any number where nothing is known of it."""
        key = (leaf.digest, leaf.dtype)
        if key not in self._statistics:
            known = stored_statistics(self.archive, leaf)
            nothing = Statistics(math.prod(leaf.shape), None, None, None, None)
            self._statistics[key] = nothing if known is None else known
        return self._statistics[key]

    def sampled(self, leaf: TensorLeaf) -> tuple[int, int] | None:
        """How many vectors are stored, of how many, where not all of them are."""
        portion = self.archive.portion(leaf)
        if portion is None or portion.stored is None:
            return None
        return portion.vectors, count_vectors(leaf.shape)

    def elements(self, leaf: TensorLeaf, limit: int | None) -> ElementsJson | None:
        """The elements of a tensor, or of the vectors of it that were sampled, at most `limit` of
        them; None where none is stored."""
        if not self.archive.has_elements(leaf):
            return None
        return elements_json(self.archive.array(leaf), limit)


def _without_aliases(entries: Sequence[ModuleEntry], names: set[str]) -> frozenset[str]:
    """The names under which calls are stored."""
    name_of_alias = {alias: entry.name for entry in entries for alias in entry.aliases}
    return frozenset(name_of_alias.get(name, name) for name in names)
