"""Whether what lies around a scaled output agrees: then its factor is made up for.

A factor that a later weight takes out again is no fault. The outputs of the calls around the place
tell: they agree as well as the scaled pair does after its factor, unless the factor reached them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TypeAlias

import numpy as np

from qvtrace.comparison.alignment import Pair
from qvtrace.manifest import CallEntry
from qvtrace.metrics.factors import ScaleFactor, are_one
from qvtrace.metrics.inner_rotations import AnyRotation
from qvtrace.metrics.layouts import Layout
from qvtrace.metrics.names import Metrics
from qvtrace.metrics.scaling import Scaling
from qvtrace.patterns import shown
from qvtrace.trees import TensorLeaf

_MARGIN = 10.0  # dB, by which an output around may be worse than the rest after the factor
_NEVER_ENOUGH = 3.0  # dB
_ALWAYS_ENOUGH = 80.0  # dB
_ABSORBED = 2.0  # dB, by which an output computed from the scaled one differs less than that does
_OFFSET = 0.5  # share of a factor's distance from 1 that an offset takes away at most
_HELD = 0.7  # share of a scaled output's error that a sum with it in it has at least
_JUDGED_BY = ("sqnr", "token_sqnr_p50")


@dataclass(frozen=True, slots=True)
class Output:
    """A pair of tensors that two calls returned, compared."""

    leaves: tuple[TensorLeaf, TensorLeaf]
    status: str
    metrics: Metrics
    epsilon: float  # of the coarser dtype
    shape: tuple[int, ...]  # of the reference's elements
    is_complex: bool
    layout: Layout | None = None  # that the candidate is to be read in
    rotation: AnyRotation | None = None  # that it is to be turned back by, then
    scaling: Scaling | None = None

    @property
    def digests(self) -> tuple[str, str]:
        """Of both contents."""
        return self.leaves[0].digest, self.leaves[1].digest


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a factor is made up for, and which module told."""

    agrees: bool
    module: str | None  # the reference's name; None where nothing around was compared

    @property
    def text(self) -> str:
        """The judgement in words."""
        if self.module is None:
            return "the factor is the fault: no module around it agrees"
        if self.agrees:
            return f"equal up to a factor: {shown(self.module)} agrees"
        return f"the factor is the fault: {shown(self.module)} differs too"


Outputs: TypeAlias = Callable[[Pair], Collection[Output]]  # those that could be compared
# The digests of what the two calls were given.
Given: TypeAlias = Callable[[Pair], tuple[Collection[str], Collection[str]]]
# Whether the error of the second output has that of the first in it.
IsSummand: TypeAlias = Callable[[Output, Output], bool]


class Surroundings:
    """The paired calls around each place, and those that go on from it."""

    def __init__(
        self,
        calls: Iterable[CallEntry],
        pairs: Iterable[Pair],
        outputs: Outputs,
        given: Given,
        is_summand: IsSummand,
    ) -> None:
        """`calls` are all of the reference."""
        self._calls = {_key(call): call for call in calls}
        self._pairs = {_key(pair.reference): pair for pair in pairs}
        self._outputs = outputs
        self._given = given
        self._is_summand = is_summand

    def judge(self, pair: Pair, path: str, scaled: Output) -> Judgement:
        """Whether the nearest output around a place agrees that is not scaled itself; where it does
        not, whether what is computed from the scaled one does: the fault is another, then."""
        judgement = self._judge_alone(pair, path, scaled)
        if not judgement.agrees or judgement.module == pair.reference.module:
            return judgement
        first = self._first_of(pair, path, scaled)
        return judgement if first is None else self._judge_alone(*first)

    def _judge_alone(self, pair: Pair, path: str, scaled: Output) -> Judgement:
        handed_on = [scaled]
        judgement = self._judge_by_around(pair, path, handed_on)
        taker = None if judgement.agrees else self._taken_out_by(scaled)
        if taker is not None:
            judgement = Judgement(True, taker.reference.module)
        refuting = map(self._refuting, handed_on) if judgement.agrees else ()
        refuted = next((taker for taker in refuting if taker is not None), None)
        return judgement if refuted is None else Judgement(False, refuted.reference.module)

    def _first_of(self, pair: Pair, path: str, scaled: Output) -> tuple[Pair, str, Output] | None:
        """Where a factor comes from that a call was given, as a residual stream hands one on from
        block to block: there, other errors do not hide yet what became of it."""
        first = self._scaled.get(scaled.digests)
        if path.partition(".")[0] != "output" and first is not None:
            pair = first[0]
        met = {scaled.digests}
        while True:
            given = map(self._scaled.get, product(*self._given(pair)))
            found = next((one for one in given if one and _have_one_factor(one[2], scaled)), None)
            if found is None or found[2].digests in met:
                return first
            first, (pair, _, scaled) = found, found
            met.add(scaled.digests)

    def _judge_by_around(self, pair: Pair, path: str, handed_on: list[Output]) -> Judgement:
        """`handed_on` begins with the scaled output; what hands its factor on is added to it."""
        for around in self._around(pair, path):
            scaled = handed_on[-1]
            found = self._outputs(around)
            rest = [other for other in found if not is_scaled(other, scaled)]
            if not all(self._agrees(other, scaled) for other in rest):
                return Judgement(False, around.reference.module)
            if found and len(rest) == len(found):
                return Judgement(True, around.reference.module)
            # A factor that has come this far is gone only if it is gone from what holds this.
            handed_on += [other for other in found if other.scaling is not None][:1]
        return Judgement(False, None)

    def _around(self, pair: Pair, path: str) -> Iterator[Pair]:
        """From the inside out; what goes into a call lies within that call."""
        if path.partition(".")[0] != "output":
            yield pair
        for above in self._above(pair.reference):
            if above in self._pairs:
                yield self._pairs[above]

    def _above(self, call: CallEntry) -> Iterator[tuple[str, int]]:
        """The calls that hold a call, from the inside out."""
        met = set()
        above = call.parent
        while above is not None and above not in met:  # a file may hold calls in a circle
            met.add(above)
            yield above
            holder = self._calls.get(above)
            above = None if holder is None else holder.parent

    def _agrees(self, other: Output, scaled: Output) -> bool:
        if other.status != "ok" or other.metrics.sqnr is None or scaled.scaling is None:
            return other.metrics.max_abs_error == 0
        if may_hold(other, scaled) and self._is_summand(scaled, other):
            return False
        if _is_like(other, scaled, scaled.scaling.residual.metrics):
            return True
        # What comes before a model's first quantized weight is exact, what comes after is not.
        noise = self._noise_after(scaled)
        sizes = other.metrics.sqnr, scaled.metrics.sqnr
        return noise is not None and _is_as_good(*sizes, noise, _enough(other))

    def _taken_out_by(self, scaled: Output) -> Pair | None:
        """A call that is given the scaled output and agrees all the same, where no other call hands
        the factor on; what others differ by is theirs."""
        if scaled.scaling is None or self._is_handed_on(scaled):
            return None
        rest = scaled.scaling.residual.metrics
        found: dict[tuple[str, int], list[bool]] = defaultdict(list)
        for taker, other in self._computed_from(scaled):
            agrees = other.scaling is None and _is_like(other, scaled, rest)
            found[_key(taker.reference)].append(agrees)
        return next((self._pairs[key] for key, agree in found.items() if all(agree)), None)

    def _refuting(self, scaled: Output) -> Pair | None:
        """A call that is given the scaled output and differs as much as that does, also after a
        factor of its own. Where others agree that are given it too, the fault is that call's."""
        if scaled.scaling is None or scaled.metrics.sqnr is None:
            return None
        rest = scaled.scaling.residual.metrics
        computed = list(self._computed_from(scaled))
        if any(other.scaling is None and _is_like(other, scaled, rest) for _, other in computed):
            return None
        return next((taker for taker, other in computed if not _is_as_free(other, scaled)), None)

    @cached_property
    def _scaled(self) -> dict[tuple[str, str], tuple[Pair, str, Output]]:
        """By the digests of scaled outputs, the first call that gave them."""
        found: dict[tuple[str, str], tuple[Pair, str, Output]] = {}
        for pair in self._pairs.values():
            for output in self._outputs(pair):
                if output.scaling is not None:
                    found.setdefault(output.digests, (pair, "output", output))
        return found

    def _noise_after(self, scaled: Output) -> float | None:
        """The worst SQNR of what is computed from a scaled output; None unless the factor is gone
        from all of that: it differs less than the scaled output does."""
        if self._is_handed_on(scaled):
            return None
        found = [other for _, other in self._computed_from(scaled) if other.scaling is None]
        if not all(_is_free(other, scaled) for other in found if other.metrics.sqnr is not None):
            return None
        return min(
            (sqnr for other in found if (sqnr := other.metrics.sqnr) is not None), default=None
        )

    def _is_handed_on(self, scaled: Output) -> bool:
        """Whether a call that is given a scaled output gives one with that factor, or a sum with
        that error in it."""
        return any(
            _have_one_factor(other, scaled)
            or (may_hold(other, scaled) and self._is_summand(scaled, other))
            for taker in self._taking(scaled.digests)
            for other in self._outputs(taker)
            if other.digests != scaled.digests
        )

    def _computed_from(self, scaled: Output) -> Iterator[tuple[Pair, Output]]:
        """What calls make of a scaled output, with the call."""
        for taker in self._reading(scaled):
            for other in self._outputs(taker):
                if other.digests != scaled.digests:
                    yield taker, other

    def _reading(self, scaled: Output) -> list[Pair]:
        """The calls that compute something from a scaled output by themselves: those that only hand
        it to calls in them add errors of their own. But one factor for all may be gone from what a
        norm in them gives, and not from the rest."""
        taking = self._taking(scaled.digests)
        if scaled.scaling is None or isinstance(scaled.scaling.factor, float):
            return taking
        above = {key for taker in taking for key in self._above(taker.reference)}
        return [taker for taker in taking if _key(taker.reference) not in above]

    def _taking(self, digests: tuple[str, str]) -> list[Pair]:
        """The paired calls that were given these contents."""
        return self._takers.get(digests, [])

    @cached_property
    def _takers(self) -> dict[tuple[str, str], list[Pair]]:
        takers = defaultdict(list)
        for pair in self._pairs.values():
            for one, other in product(*self._given(pair)):
                takers[one, other].append(pair)
        return takers


def _key(call: CallEntry) -> tuple[str, int]:
    return call.module, call.index


def is_scaled(other: Output, scaled: Output) -> bool:
    """Whether an output is a factor off itself, or is the scaled one."""
    return other.scaling is not None or other.digests == scaled.digests


def may_hold(other: Output, scaled: Output) -> bool:
    """Whether an output may be a sum with the scaled one in it, as in a residual stream, where a
    factor is small beside the rest."""
    if other.is_complex or other.shape != scaled.shape:
        return False
    sizes = [_error_size(output.metrics) for output in (other, scaled)]
    return sizes[0] >= _HELD * sizes[1]


def _error_size(metrics: Metrics) -> float:
    """The root of the mean squared error."""
    return math.hypot(metrics.mean_abs_error or 0.0, metrics.stddev_abs_error or 0.0)


def _have_one_factor(one: Output, other: Output) -> bool:
    """Whether both are scaled by about the same number."""
    if one.scaling is None or other.scaling is None:
        return False
    return are_one(one.scaling.factor, other.scaling.factor)


def _is_free(other: Output, scaled: Output) -> bool:
    """Whether an output computed from a scaled one has noise, but not its factor."""
    before, after = scaled.metrics.sqnr, other.metrics.sqnr
    if before is None or after is None:
        return False
    return after >= max(before + _ABSORBED, _NEVER_ENOUGH)


def _is_as_free(other: Output, scaled: Output) -> bool:
    """Whether an output computed from a scaled one may well come of one without its factor, or has
    it still, as exactly."""
    if scaled.scaling is None or _have_one_factor(other, scaled):
        return True
    rest = scaled.scaling.residual.metrics
    if other.scaling is None:
        return _is_like(other, scaled, rest) or _is_free(other, scaled)
    own = replace(other, metrics=other.scaling.residual.metrics)
    is_of_another = not _has_most_of(other.scaling.factor, scaled.scaling.factor)
    return _is_like(own, scaled, rest) or (is_of_another and _is_free(own, scaled))


def _has_most_of(factor: ScaleFactor, given: ScaleFactor) -> bool:
    """Whether a factor may be what an offset, such as a bias, leaves of a given one."""
    typical, its = (
        one if isinstance(one, float) else float(np.median(one.values)) for one in (factor, given)
    )
    return abs(typical - its) <= _OFFSET * abs(its - 1.0)


def _is_like(other: Output, scaled: Output, rest: Metrics) -> bool:
    """Whether an output agrees as well as a scaled one does after its factor."""
    return all(
        _is_as_good(
            getattr(other.metrics, metric),
            getattr(scaled.metrics, metric),
            getattr(rest, metric),
            _enough(other),
        )
        for metric in _JUDGED_BY
    )


def _enough(other: Output) -> float:
    """The SQNR from which on an output agrees, whatever the rest does."""
    if not other.epsilon:  # of integers
        return _ALWAYS_ENOUGH
    return min(_ALWAYS_ENOUGH, -20.0 * math.log10(other.epsilon) - _MARGIN)


def _is_as_good(
    found: float | None, scaled: float | None, rest: float | None, enough: float
) -> bool:
    """Whether an SQNR is that of what is left after a factor, give or take some noise, rather than
    that of the scaled output; one that is not defined has no say."""
    if found is None:
        return True
    if rest is None:
        return found >= enough
    least = rest - _MARGIN
    if scaled is not None:
        least = max(scaled + _ABSORBED, min(least, (scaled + rest) / 2))
    return found >= min(enough, max(least, _NEVER_ENOUGH))
