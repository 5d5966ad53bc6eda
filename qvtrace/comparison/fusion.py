"""Modules that stand for several: torch.ao fuses a layer with the normalization and the activation
that follow it, and is then compared with what the last of these gives.

That one module follows another is seen in the reference, where it is given what the other gave.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qvtrace.comparison.alignment import Alignment, Pair
from qvtrace.manifest import CallEntry, Manifest, ModuleEntry
from qvtrace.trees import tensor_leaves

_FUSED_CLASS = re.compile(r"(?:Conv|Linear|BN)(?P<norm>Bn)?(?P<last>(?:Leaky)?ReLU|Tanh)?(?:\dd)?")
_ACTIVATIONS = frozenset({"ReLU", "LeakyReLU", "Tanh"})
_LAYERS = ("Conv", "Linear")
_NORM = "BatchNorm"
_LEFT_BEHIND = "Identity"  # in the place of what was fused


class Followers:
    """What follows the layers of a reference, as far as it can be fused with them."""

    def __init__(self, reference: Manifest) -> None:
        self._classes = classes_of(reference.modules)
        self._calls = reference.calls
        self._given: dict[str, list[int]] = defaultdict(list)
        for position, call in enumerate(reference.calls):
            digest = _digest(call, "inputs") if self._may_follow(call) else None
            if digest is not None:
                self._given[digest].append(position)

    def of(self, position: int, class_name: str) -> Iterator[int]:
        """The calls that a module of this class stands for beside that at `position`, in order: a
        normalization can be folded into the weights of any layer, an activation needs a class."""
        match = _FUSED_CLASS.fullmatch(class_name)
        last = None if match is None else match["last"]
        if self._class(position).startswith(_LAYERS):
            norm = self._next(position, _NORM)
            if norm is not None:
                yield norm
                position = norm
        if last is not None and (activation := self._next(position, last)) is not None:
            yield activation

    def _next(self, position: int, kind: str) -> int | None:
        call = self._calls[position]
        digest = _digest(call, "output")
        for other in self._given.get(digest or "", ()):
            after = self._calls[other]
            name = self._class(other)
            fits = name.startswith(_NORM) if kind == _NORM else name == kind
            if fits and other > position and _step(after) == _step(call):
                return other
        return None

    def _may_follow(self, call: CallEntry) -> bool:
        name = self._classes.get(call.module, "")
        return name in _ACTIVATIONS or name.startswith(_NORM)

    def _class(self, position: int) -> str:
        return self._classes.get(self._calls[position].module, "")


def classes_of(modules: Iterable[ModuleEntry]) -> dict[str, str]:
    """The class of each module."""
    return {entry.name: entry.class_name for entry in modules}


def may_be_fused(reference: Mapping[str, str], candidate: Mapping[str, str]) -> bool:
    """Whether the classes of both sides leave that open."""
    return any(map(_is_fused, candidate.values())) or any(
        class_name.startswith(_NORM) and not candidate.get(name, "").startswith(_NORM)
        for name, class_name in reference.items()
    )


def as_fused(call: CallEntry, last: CallEntry) -> CallEntry:
    """A call that takes what the one takes and gives what the other gives."""
    return replace(call, output=last.output)


def fused(alignment: Alignment, reference: Manifest, candidate: Manifest) -> Alignment:
    """The alignment with each fused module paired with all that it stands for."""
    classes = classes_of(reference.modules), classes_of(candidate.modules)
    if not may_be_fused(*classes):
        return alignment
    partners = {pair.reference.module: pair.candidate.module for pair in alignment.pairs}
    fusion = _Fusion(reference, candidate, *classes, partners)
    pairs = [fusion.widened(pair) for pair in alignment.pairs]
    if not fusion.modules:
        return alignment
    pairs = list(fusion.shifted(pairs))
    paired = {id(pair.candidate) for pair in pairs}, {pair.order for pair in pairs}
    inside = tuple(f"{name}." for name in fusion.modules)
    return replace(
        alignment,
        pairs=tuple(sorted(pairs, key=lambda pair: pair.order)),
        only_in_reference=tuple(
            call for order, call in enumerate(reference.calls) if order not in paired[1]
        ),
        only_in_candidate=tuple(call for call in candidate.calls if id(call) not in paired[0]),
        reference_wrappers=alignment.reference_wrappers
        | {reference.calls[position].module for position in fusion.absorbed},
        candidate_wrappers=alignment.candidate_wrappers
        | {call.module for call in alignment.only_in_candidate if call.module.startswith(inside)},
    )


@dataclass
class _Fusion:
    """What of the reference the fused modules of the candidate stand for."""

    reference: Manifest
    candidate: Manifest
    floats: Mapping[str, str]  # the classes of the reference
    classes: Mapping[str, str]  # of the candidate
    partners: Mapping[str, str]  # of modules of the reference

    def __post_init__(self) -> None:
        self.absorbed: set[int] = set()
        self.modules: set[str] = set()
        self._followers = Followers(self.reference)
        self._calls = _counts(self.reference.calls), _counts(self.candidate.calls)

    def widened(self, pair: Pair) -> Pair:
        """The pair with what follows its call in the reference, where the candidate lacks that."""
        last = None
        class_name = self.classes.get(pair.candidate.module, "")
        for position in self._followers.of(pair.order, class_name):
            call = self.reference.calls[position]
            if self._is_missing(call):
                self.absorbed.add(position)
            elif self.floats[call.module].startswith(_NORM):
                break
            last = call
        if last is None:
            return pair
        self.modules.add(pair.candidate.module)
        rule = f"{pair.rule}, fused with {self.floats[last.module]}"
        return replace(pair, reference=as_fused(pair.reference, last), rule=rule)

    def _is_missing(self, call: CallEntry) -> bool:
        """Whether the candidate has no such module, less calls of it, or nothing in its place."""
        partner = self.partners.get(call.module)
        if partner is None:  # which may only not have been recorded
            return not self.classes.get(call.module, "").startswith(_NORM)
        key = call.module, *_step(call)
        counts = self._calls[0][key], self._calls[1].get((partner, *_step(call)), 0)
        return counts[1] < counts[0] or self._is_left_behind(partner)

    def shifted(self, pairs: Sequence[Pair]) -> Iterator[Pair]:
        """The pairs, where a shared module no longer makes the calls that are absorbed: those that
        are left belong together in their order."""
        absorbed = {self.reference.calls[position].module for position in self.absorbed}
        lost: dict[tuple[str, int, int], list[Pair]] = defaultdict(list)
        for pair in pairs:
            call = pair.reference
            if call.module in absorbed and not self._is_left_behind(pair.candidate.module):
                lost[(call.module, *_step(call))].append(pair)
            else:
                yield pair
        for key, its_pairs in lost.items():
            left = [
                position
                for position, call in enumerate(self.reference.calls)
                if (call.module, *_step(call)) == key and position not in self.absorbed
            ]
            if len(left) != len(its_pairs):
                yield from its_pairs
                continue
            for position, pair in zip(left, its_pairs, strict=True):
                yield replace(pair, order=position, reference=self.reference.calls[position])

    def _is_left_behind(self, module: str) -> bool:
        return self.classes.get(module) == _LEFT_BEHIND


def _counts(calls: Iterable[CallEntry]) -> dict[tuple[str, int, int], int]:
    counts: dict[tuple[str, int, int], int] = defaultdict(int)
    for call in calls:
        counts[(call.module, *_step(call))] += 1
    return counts


def _step(call: CallEntry) -> tuple[int, int]:
    return call.sample, call.step


def _is_fused(class_name: str) -> bool:
    match = _FUSED_CLASS.fullmatch(class_name)
    return match is not None and any(match.groups())


def _digest(call: CallEntry, part: str) -> str | None:
    """Of the first tensor of a part; None where it was not stored, or is damaged."""
    try:
        node = call.tree(part)
    except ValueError:
        return None
    leaf = None if node is None else next(tensor_leaves(node, part), None)
    return None if leaf is None else leaf[1].digest
