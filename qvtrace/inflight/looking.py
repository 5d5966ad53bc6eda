"""Looks at each call of the candidate as it happens, in every way in which the comparison at the
end may ask for it."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TypeAlias

from qvtrace.archive import Archive
from qvtrace.archive.passing import PassingTrace
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.axes import TensorAxes
from qvtrace.comparison.call_leaves import (
    argument_leaves,
    have_other_tokens,
    output_leaves,
    tensors_of,
)
from qvtrace.comparison.leaves import LeafPair
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.rotating import Rotations
from qvtrace.comparison.rotation_files import load_rotations
from qvtrace.comparison.routing import is_expert_by_name
from qvtrace.comparison.rows import COMPARED, PARTS
from qvtrace.comparison.surroundings import Output, is_scaled, may_hold
from qvtrace.inflight.contents import PassingContents
from qvtrace.inflight.logits import LogitsLook
from qvtrace.inflight.partners import Partners
from qvtrace.manifest import CallEntry, ModuleEntry
from qvtrace.metrics.elements import Floats
from qvtrace.metrics.factors import ScaleFactor
from qvtrace.metrics.scaling import is_worth_a_factor
from qvtrace.patterns import select
from qvtrace.qparams.parameters import ModuleParameters
from qvtrace.qparams.saturation import saturated_pairs
from qvtrace.trees import Node, TensorLeaf, tensor_leaves

_KEPT_BYTES = 64 << 20  # of contents for which a factor may still be found

_Key: TypeAlias = tuple[str, int]
_Tensors: TypeAlias = tuple[TensorLeaf, TensorLeaf]


@dataclass
class _OpenCall:
    """A call that runs, with what was given to it."""

    call: CallEntry
    pairs: list[Pair]
    given: dict[str, memoryview]  # contents that are vectors, maybe overwritten since
    scaled: list[tuple[Output, Floats]] = field(default_factory=list)  # within it, or given to it


class Looking:
    """What is done with calls as they happen."""

    def __init__(self, reference: Archive, options: DiffOptions) -> None:
        """Raises `UsageError` for maps or a rotation that cannot be read."""
        manifest = reference.manifest
        self._reference = reference
        self._axes = TensorAxes(manifest)
        self._partners = Partners(manifest, options.maps)
        self._options = options
        declared = None if options.transform is None else load_rotations(options.transform)
        self._rotations = Rotations(declared.stream if declared else ())
        names = {call.module for call in manifest.calls}
        self._valued = select(names, include=options.values) if options.values else set()
        self._factors = _Factors(manifest.calls)
        self._open: dict[_Key, _OpenCall] = {}
        self._logits = LogitsLook(manifest)

    def begin(self, trace: PassingTrace) -> None:
        """The trace begins: nothing has run yet."""
        self.trace = trace
        self.contents = PassingContents(self._reference, trace)
        self.contents.rotations = self._rotations  # none can be found: no two are at hand together

    def modules(self, modules: tuple[ModuleEntry, ...]) -> None:
        """Which modules there are, as far as is known."""
        self._partners.set_modules(modules)
        self._parameters = ModuleParameters(self.trace.manifest)

    def began(self, call: CallEntry) -> None:
        """What a call was given is at hand."""
        self._partners.begin(call)
        pairs = [Pair(0, other, call, "") for other in self._partners.of(call)]
        opened = _OpenCall(call, pairs, self._vectors_of(call))
        self._open[call.module, call.index] = opened
        for pair in pairs:
            leaves = list(argument_leaves(self._reference, self.trace, pair))
            self._look(pair, leaves)
            opened.scaled += self._scaled(self._outputs(leaves))
            self._look_at_routing(pair, leaves)

    def ended(self, call: CallEntry) -> None:
        """What a call gave is at hand."""
        opened = self._open.pop((call.module, call.index))
        outputs = []
        for known in opened.pairs:
            pair = replace(known, candidate=call)
            leaves = list(output_leaves(self._reference, self.trace, pair))
            self._look(pair, leaves)
            outputs += self._outputs(leaves)
            self._logits.look(self.contents, pair)
        self._look_around(call, opened, outputs)

    def _look(self, pair: Pair, leaves: Sequence[LeafPair]) -> None:
        parts = PARTS[self._options.path]
        for place in leaves:
            self.contents.want(place.reference, place.candidate)
            if self._options.details and place.path.partition(".")[0] in parts:
                axes = partial(self._axes.of, pair.reference.module, place.path)
                self.contents.show(pair.reference, place.reference, place.candidate, axes)
        self.contents.compare()
        for place in leaves:
            tensors = tensors_of(place)
            if tensors is not None and place.path.partition(".")[0] in parts:
                self._factors.lend(self.contents, (pair.reference.module, place.path), tensors)
                self._look_at_elements(pair, tensors)
        saturated_pairs(self.contents, [pair], self._parameters)

    def _look_at_elements(self, pair: Pair, tensors: _Tensors) -> None:
        if (
            pair.reference.module in self._valued
            and self.contents.outcome(*tensors).status in COMPARED
        ):
            self.contents.elements(*tensors, self._options.values_limit)

    def _outputs(self, leaves: Sequence[LeafPair]) -> list[Output]:
        found = []
        for place in leaves:
            tensors = tensors_of(place)
            if tensors is not None:
                outcome = self.contents.outcome(*tensors)
                if outcome.status in COMPARED:
                    found.append(self.contents.output(*tensors, outcome))
        return found

    def _scaled(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Floats]]:
        """Those that are a factor off, with their errors."""
        for output in outputs:
            if output.scaling is not None and not output.is_complex:
                yield output, self.contents.errors(output)

    def _look_around(self, call: CallEntry, opened: _OpenCall, outputs: list[Output]) -> None:
        """Whether errors of what was given to a call, or happened in it, are in its outputs; those
        that are not judged by these go on to the call around it."""
        going_on = []
        for scaled, error in opened.scaled:
            rest = [other for other in outputs if not is_scaled(other, scaled)]
            for other in rest:
                if may_hold(other, scaled):
                    self.contents.note_summand(scaled, error, other)
            if not outputs or len(rest) < len(outputs):
                going_on.append((scaled, error))
        around = None if call.parent is None else self._open.get(call.parent)
        if around is not None:
            around.scaled += [*going_on, *self._scaled(outputs)]

    def _vectors_of(self, call: CallEntry) -> dict[str, memoryview]:
        """The contents that a call was given and that may be tokens."""
        passing = self.trace.passing.of_digest
        return {
            leaf.digest: passing[leaf.digest]
            for leaf in _given(call)
            if _may_be_tokens(leaf) and leaf.digest in passing
        }

    def _look_at_routing(self, pair: Pair, leaves: Sequence[LeafPair]) -> None:
        """Which tokens an expert was sent, and where they are in what the calls around it were
        given."""
        if not (
            any(map(have_other_tokens, leaves))
            or is_expert_by_name(pair)
            or self._sees_fewer_tokens(pair.candidate)
        ):
            return
        self._look_at_vectors(pair.candidate)
        for around in self._around(pair.candidate):
            self._look_at_vectors(around)

    def _sees_fewer_tokens(self, call: CallEntry) -> bool:
        around = next(self._around(call), call)
        return 0 < _count_tokens(call) < _count_tokens(around)

    def _around(self, call: CallEntry) -> Iterator[CallEntry]:
        key = call.parent
        while key is not None and key in self._open:
            yield self._open[key].call
            key = self._open[key].call.parent

    def _look_at_vectors(self, call: CallEntry) -> None:
        opened = self._open[call.module, call.index]
        with self.trace.again(opened.given):
            for leaf in _given(call):
                if _may_be_tokens(leaf):
                    self.contents.note_vectors(leaf)


class _Factors:
    """Factors that calls of a module have, and contents that one of them may explain."""

    def __init__(self, calls: Sequence[CallEntry]) -> None:
        counts = Counter(call.module for call in calls)
        self._several = {module for module, count in counts.items() if count > 1}
        self._factors: dict[tuple[str, str], ScaleFactor] = {}
        self._waiting: dict[tuple[str, str], list[_Tensors]] = defaultdict(list)
        self._kept = 0

    def lend(self, contents: PassingContents, place: tuple[str, str], tensors: _Tensors) -> None:
        """Try what is known of a place on two tensors there, now or when it is known."""
        outcome = contents.found(*tensors)
        difference = None if outcome is None else outcome.difference
        if outcome is None or difference is None or not is_worth_a_factor(difference):
            return
        if place[0] not in self._several:
            return
        if outcome.scaling is None and place in self._factors:
            contents.scaled_by(self._factors[place], *tensors)
        elif outcome.scaling is None:
            self._wait(contents, place, tensors)
        elif place not in self._factors:
            self._factors[place] = outcome.scaling.factor
            for others in self._waiting.pop(place, ()):
                contents.scaled_by(outcome.scaling.factor, *others)
                self._kept -= contents.candidate.drop(others[1].digest)

    def _wait(self, contents: PassingContents, place: tuple[str, str], tensors: _Tensors) -> None:
        if self._kept < _KEPT_BYTES:
            self._kept += contents.candidate.keep(tensors[1].digest)
            self._waiting[place].append(tensors)


def _given(call: CallEntry) -> Iterator[TensorLeaf]:
    for part in ("inputs", "kwargs"):
        tree: Node | None = call.tree(part)
        if tree is not None:
            yield from (leaf for _, leaf in tensor_leaves(tree, part))


def _may_be_tokens(leaf: TensorLeaf) -> bool:
    return len(leaf.shape) >= 2 and "float" in leaf.dtype


def _count_tokens(call: CallEntry) -> int:
    """Of the first tensor that a call was given and that may be tokens; 0 where there is none."""
    first = next(filter(_may_be_tokens, _given(call)), None)
    return 0 if first is None else prod(first.shape[:-1])
