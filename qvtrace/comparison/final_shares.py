"""How much of the final error comes in at each place, about: what a replay tells of the places,
carried to the end.

Noise that comes in beside a residual stream is noise of one summand of that stream, and small in it
where the summand is. What is computed from a stream is as noisy as the stream, to a first
approximation, so that from there on the ratio of powers stays what it is.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import TypeAlias

from qvtrace.comparison.additions import Addition
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.noise import CallKey, CallNoise, calls_around, is_float, noise
from qvtrace.comparison.noise_steps import Step, local_within, showing
from qvtrace.comparison.rows import Place, Row
from qvtrace.metrics.sizes import Sizes
from qvtrace.trees import TensorLeaf


@dataclass(frozen=True)
class Passed:
    """What noise comes by on its way to the end."""

    share: float  # of its power that is left in what comes next
    noise: float  # of that, from wherever it came: no more can have come this way


Way: TypeAlias = tuple[Passed, ...]


class Shares:
    """What each place of a diff has of all that is known to come in anywhere."""

    def __init__(
        self, steps: Sequence[Step], ways: Mapping[Place, Way] = MappingProxyType({})
    ) -> None:
        """`ways` are those of `find_ways`."""
        self._ways = ways
        is_replayed = any(step.is_local for step in steps)
        self._within = local_within(steps, self._alone) if is_replayed else {}
        self.total = sum(map(self.noise, steps)) if is_replayed else None

    def noise(self, step: Step) -> float:
        """Noise that is known to come in here and nowhere else, as the model's output shows it."""
        return self._alone(step, self._within)

    def _alone(self, step: Step, within: Mapping[CallKey, float]) -> float:
        if step.on_top is not None:
            return self._carried(step.on_top.noise, showing(step))
        if not step.is_local:
            return 0.0
        carried = self._carried(step.noise_out or 0.0, step.call.outputs)
        return max(0.0, carried - within.get(step.call.key, 0.0))

    def _carried(self, noise: float, rows: Iterable[Row]) -> float:
        """So much of the noise of these rows reaches the end."""
        return max(
            (
                reduce(
                    lambda left, passed: min(passed.share * left, passed.noise),
                    self._ways.get(row.place, ()),
                    noise,
                )
                for row in rows
            ),
            default=noise,
        )


def find_ways(
    calls: Sequence[CallNoise],
    additions: Mapping[Place, Addition],
    tensors: Mapping[Place, tuple[TensorLeaf, TensorLeaf]],
    contents: ContentPairs,
) -> dict[Place, Way]:
    """By place, how noise that is there gets into a residual stream, or to the end.

    Of a summand, noise is left in the sum as far as its own power is: the median over tokens.
    `tensors` are those of all rows. Elements of the reference are read again.
    """
    return _Ways(calls, additions, tensors, contents).found()


class _Ways:
    """The ways that what calls give takes to a stream.

    What a call gives goes where it is taken first; where nobody takes it, it is somewhere in what
    the call around gives. Contents are known by the reference's digests.
    """

    def __init__(
        self,
        calls: Sequence[CallNoise],
        additions: Mapping[Place, Addition],
        tensors: Mapping[Place, tuple[TensorLeaf, TensorLeaf]],
        contents: ContentPairs,
    ) -> None:
        self._calls = {call.key: call for call in calls}
        self._leaves = {place: reference for place, (reference, _) in tensors.items()}
        self._contents = contents
        self._takers: dict[str, list[CallNoise]] = defaultdict(list)
        self._givers: dict[str, CallNoise] = {}
        for call in calls:
            for leaf in self._given(call.inputs):
                self._takers[leaf.digest].append(call)
            for leaf in self._given(call.outputs):
                self._givers[leaf.digest] = call  # at last the innermost
        self._noises = self._most_noises()
        self._sizes: dict[str, Sizes | None] = {}
        self._sums: dict[str, TensorLeaf] = {}  # by what is added to a stream, or to its like
        self._streams: set[str] = set()
        for place, addition in additions.items():
            if addition.operation == "sum" and len(addition.parts) > 1:
                self._add(place, addition.parts)

    def found(self) -> dict[Place, Way]:
        """By place."""
        known: dict[str, Way] = {}
        for leaf in self._leaves.values():
            if leaf.digest not in known:
                known[leaf.digest] = self._way(leaf)
        return {place: known[leaf.digest] for place, leaf in self._leaves.items()}

    def _most_noises(self) -> dict[str, float]:
        """By contents, of all places where they stand."""
        found: dict[str, float] = {}
        for call in self._calls.values():
            for row in (*call.inputs, *call.outputs):
                if row.place in self._leaves:
                    own = noise(row)
                    digest = self._leaves[row.place].digest
                    found[digest] = max(found.get(digest, 0.0), math.inf if own is None else own)
        return found

    def _add(self, place: Place, parts: Sequence[Place]) -> None:
        """One sum: what something else is computed from is a stream, and in all of the sum."""
        call = self._calls[place.module, place.call]
        around = {call.key, *(above.key for above in calls_around(call, self._calls))}
        for part in parts:
            digest = self._leaves[part].digest
            if any(taker.key not in around for taker in self._computing(digest)):
                self._streams.add(digest)
            else:
                self._sums.setdefault(digest, self._leaves[place])

    def _way(self, leaf: TensorLeaf) -> Way:
        passed: list[Passed] = []
        met: set[str] = set()
        here: TensorLeaf | None = leaf
        while here is not None and here.digest not in met | self._streams:
            met.add(here.digest)
            whole = self._sums.get(here.digest)
            share = 1.0 if whole is None else self._ratio(here, whole)
            here = whole or self._next(here.digest)
            if here is not None:
                passed.append(Passed(share, self._noises.get(here.digest, math.inf)))
        return tuple(passed)

    def _next(self, digest: str) -> TensorLeaf | None:
        """Where this goes: to what is computed from it first, or around it."""
        for call in self._computing(digest):
            given = self._given(call.inputs)
            if given and given[0].digest == digest:
                return next(iter(self._given(call.outputs)), None)
        giver = self._givers.get(digest)
        if giver is None:
            return None
        around = (self._given(call.outputs) for call in calls_around(giver, self._calls))
        return next((gave[0] for gave in around if gave and gave[0].digest != digest), None)

    def _computing(self, digest: str) -> Iterator[CallNoise]:
        """The calls that take this, but for those that hand it on."""
        for call in self._takers.get(digest, ()):
            if all(leaf.digest != digest for leaf in self._given(call.outputs)):
                yield call

    def _given(self, rows: Iterable[Row]) -> list[TensorLeaf]:
        """Tensors of floats."""
        found = ((row, self._leaves.get(row.place)) for row in rows)
        return [leaf for row, leaf in found if leaf is not None and is_float(row.dtype[0])]

    def _ratio(self, part: TensorLeaf, whole: TensorLeaf) -> float:
        sizes = self._size(part), self._size(whole)
        return 1.0 if sizes[0] is None or sizes[1] is None else sizes[0].mean / sizes[1].mean

    def _size(self, leaf: TensorLeaf) -> Sizes | None:
        if leaf.digest not in self._sizes:
            self._sizes[leaf.digest] = self._contents.sizes(leaf)
        return self._sizes[leaf.digest]
