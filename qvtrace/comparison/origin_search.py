"""Where error comes in: calls and gaps between calls that give more noise than they received.

A call without calls of its own errs when its output is noisier than its inputs. One with calls of
its own is these calls and what happens between them: an input of a call is bounded by the noisiest
of what its parent received and what the calls before it in the same parent gave, and so is the
parent's output by all of them. More than that came in between: by a functional operation, a
residual add, an edit in place, or an input of the parent that differs in kind.

What is usual is told by a floor, or else by the run's own places of the same kind.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from qvtrace.comparison.additions import Addition
from qvtrace.comparison.edits import Edits
from qvtrace.comparison.final_shares import Shares, Way
from qvtrace.comparison.noise import (
    CallKey,
    CallNoise,
    calls_around,
    first_in_kind,
    in_few_tokens,
    is_float,
    is_of_output,
    noise,
    other_values,
    rounding_noise,
)
from qvtrace.comparison.noise_levels import (
    LEAST_EXCESS,
    MOST_OF_QUANTIZATION,
    Excess,
    FloorLevels,
    OwnLevels,
    nothing,
)
from qvtrace.comparison.noise_steps import Dtypes, Step, StepPlace, showing, steps_of
from qvtrace.comparison.origins import Origin, Origins, named_once, unrecorded_origin
from qvtrace.comparison.refuted_factors import refuted_factors
from qvtrace.comparison.replayed_blocks import ReplayedBlocks, Told
from qvtrace.comparison.replayed_sizes import CallSizes
from qvtrace.comparison.rows import Place, Row
from qvtrace.comparison.takers import Takers
from qvtrace.comparison.unrecorded import unrecorded_steps

_LEAST_IN_FEW = 10.0  # a ratio of powers: the worst of tokens vary more than most of them do
_SHARE_OF_FEW = 0.05  # of all tokens
_OFTEN_AMPLIFIED = 10.0  # times the noise that came in: values that cancel what is large do so


@dataclass(frozen=True)
class Floor:
    """The noise of the calls of a run that differs from the reference by noise alone."""

    calls: Sequence[CallNoise]
    file: str

    @property
    def in_few_tokens(self) -> "Floor":
        """The same by the noise of the worst of its tokens."""
        return replace(self, calls=tuple(map(in_few_tokens, self.calls)))


def find_origins(
    calls: Sequence[CallNoise],
    exact: float,
    *,
    unsure: float = 0.0,
    narrowed: bool = False,
    floor: Floor | None = None,
    quantized: Collection[str] = (),
    additions: Mapping[Place, Addition] | None = None,
    edits: Edits | None = None,
    sizes: Mapping[CallKey, CallSizes] = MappingProxyType({}),
    ways: Mapping[Place, Way] = MappingProxyType({}),
) -> Origins:
    """The origins among all calls of the reference that have rows, in order of execution.

    `exact` is the noise of mere rounding, `unsure` that of vectors which are turned back by a
    rotation that was found in noise; `narrowed`: calls were left out on purpose;
    `quantized`: modules that are known to be, by the reference's names; `sizes` are those of calls
    that were replayed, `ways` those of what calls give to the end. A call of which inputs or
    outputs are not known is neither blamed nor taken for clean.
    """
    rounding = max(exact, unsure)
    judged = partial(
        _judged,
        edits or Edits(),
        rounding=rounding,
        exact=exact,
        narrowed=narrowed,
        quantized=quantized,
        sizes=sizes,
    )
    whole = judged(calls, floor, additions or {})
    few = judged(list(map(in_few_tokens, calls)), None if floor is None else floor.in_few_tokens)
    steps, called, excesses = whole.steps, whole.called, whole.excesses
    broken = [found for found in excesses if found[1].breaks]
    noisy = ReplayedBlocks(excesses, called).settle(_with_few_tokens(whole, few))
    noisy = _from_a_beginning(noisy)
    told = named_once(
        [*broken[:1], *_most_important_first(_behind_givers(_each_cast_once(noisy)))],
        called,
        rounding,
    )
    is_noisy = bool(told) or any(step.noise_out for step in steps)
    shares = Shares(steps, ways)
    return Origins(
        tuple(one.origin for one in told),
        tuple(one.noises for one in told),
        tuple(shares.noise(one.step) for one in told),
        whole.levels.text if is_noisy else None,
        known=any(step.noise_in is not None for step in steps),
        local=shares.total,
        quantized=bool(quantized),
        before=_before(whole.unrecorded, rounding),
        refuted=refuted_factors([step for _, step in noisy], called),
    )


@dataclass(frozen=True)
class _Judged:
    """All places by one measure of noise, and those of them that are told."""

    called: Mapping[CallKey, CallNoise]
    levels: OwnLevels | FloorLevels
    excesses: Sequence[Told]
    noisy: Sequence[Told]
    made_up_for: frozenset[StepPlace]
    exact: float  # noise up to which nothing came in
    unrecorded: Sequence[Step]

    @property
    def steps(self) -> list[Step]:
        return [step for _, step in self.excesses]


def _judged(
    edits: Edits,
    calls: Sequence[CallNoise],
    floor: Floor | None,
    additions: Mapping[Place, Addition] = MappingProxyType({}),
    *,
    rounding: float,
    exact: float,
    narrowed: bool,
    quantized: Collection[str],
    sizes: Mapping[CallKey, CallSizes],
) -> _Judged:
    unrecorded = unrecorded_steps(calls, narrowed=narrowed)
    bare = [*steps_of(calls, narrowed=narrowed, additions=additions), *unrecorded]
    steps = list(map(edits.on, bare))
    own = OwnLevels(steps, rounding, quantized, sizes)
    levels: OwnLevels | FloorLevels = own
    if floor is not None:
        of_floor = [
            *steps_of(floor.calls, narrowed=narrowed),
            *unrecorded_steps(floor.calls, narrowed=narrowed),
        ]
        levels = FloorLevels(steps, of_floor, own, file=floor.file)
    called = {call.key: call for call in calls}
    takers = Takers(calls)
    excesses = [(_of_values(step, rounding) or levels.excess(step), step) for step in steps]
    noisy = [
        found
        for found in excesses
        if found[0].is_told and not found[1].breaks and not _follows_a_choice(found[1].call)
    ]
    made_up_for = frozenset(
        step.place
        for _, step in noisy
        if _is_undone(step, called, nothing(exact)) or _is_made_up_for(step, called, takers, levels)
    )
    told = [step for _, step in noisy if step.place not in made_up_for]
    told += [step for step in steps if step.breaks]
    if edits.doubt(steps, told):
        again = partial(_judged, edits, rounding=rounding, exact=exact, narrowed=narrowed)
        return again(calls, floor, additions, quantized=quantized, sizes=sizes)
    least = LEAST_EXCESS * rounding
    return _Judged(called, levels, excesses, noisy, made_up_for, least, unrecorded)


def _of_values(step: Step, rounding: float) -> Excess | None:
    """That of a call which gives other integers for the same inputs, of which there is no noise."""
    if step.after or step.is_local or step.noise_in is None or first_in_kind(step.call.inputs):
        return None
    is_exact = step.noise_in <= LEAST_EXCESS * rounding
    return Excess(1.0, 1.0, is_told=True) if is_exact and other_values(step.call.outputs) else None


def _with_few_tokens(whole: _Judged, few: _Judged) -> list[Told]:
    """What is told by most tokens, and what only the worst of them tell, in order of execution.

    What mixes tokens makes all of them noisy where only few were: such a place comes behind.
    """
    in_few = {step.place: (excess, step) for excess, step in few.excesses}
    noisy_in_few = [one for one in few.noisy if one[1].place not in few.made_up_for]
    made_up_for = whole.made_up_for - {step.place for _, step in noisy_in_few}
    told = {
        step.place: excess.ratio for excess, step in whole.noisy if step.place not in made_up_for
    }
    found = {
        step.place
        for excess, step in noisy_in_few
        if excess.ratio >= _LEAST_IN_FEW * told.get(step.place, 1.0) and _is_own(step)
    }
    shown_by_few = whole.made_up_for - made_up_for
    merged, has_begun = [], False
    for own, step in whole.excesses:
        excess, other = in_few.get(step.place, (own, step))
        noises = other.noise_in or 0.0, other.noise_out or 0.0
        in_few_alone = _SHARE_OF_FEW * excess.importance
        if step.place in found:
            lesser = replace(excess, importance=in_few_alone)
            merged.append((lesser, replace(step, in_few=noises)))
            has_begun = True
        elif step.place in shown_by_few:
            merged.append((replace(own, importance=max(own.importance, in_few_alone)), step))
            has_begun = True
        elif step.place in told:
            is_as_noisy = noises[0] * LEAST_EXCESS >= (step.noise_out or 0.0)
            is_mild = is_as_noisy and excess.ratio < _LEAST_IN_FEW
            # Of noise that most tokens did not have: of few, or of their other half.
            is_mixed = has_begun and (step.noise_in or 0.0) <= whole.exact < noises[0]
            follows = (bool(found) and is_mild) or is_mixed
            if follows and not step.is_local:
                own = replace(own, importance=0.0, rank=0, may_be_usual=True)
            merged.append((own, step))
    return merged


def _is_own(step: Step) -> bool:
    """Whether it is a call's own output that only two archives tell of: what lies between calls may
    make much of the noise of few tokens, as a softmax does that picks another."""
    return not (step.is_local or step.after or step.source)


def _before(unrecorded: Iterable[Step], rounding: float) -> Origin | None:
    """The first call before which more comes in than rounding makes and calls before it gave."""
    for step in unrecorded:
        least = LEAST_EXCESS * max(step.noise_in or 0.0, rounding)
        if step.noise_in is not None and (step.noise_out or 0.0) > least:
            return unrecorded_origin(step)
    return None


def _each_cast_once(noisy: Iterable[Told]) -> list[Told]:
    """Outputs of another dtype that differ by its rounding are one reason, told at the first."""
    told: list[Told] = []
    first: dict[Dtypes, int] = {}
    for excess, step in noisy:
        known = None
        if _is_rounded_by_a_cast(step):
            known = first.setdefault(step.recast[0].dtype, len(told))
        if known is None or known == len(told):
            told.append((excess, step))
        else:
            excess, step = told[known]
            told[known] = excess, replace(step, recast_after=step.recast_after + 1)
    return told


def _is_rounded_by_a_cast(step: Step) -> bool:
    if not step.recast or step.after or step.noise_out is None:
        return False
    return step.noise_out <= rounding_noise(step.recast)


def _most_important_first(told: Sequence[Told]) -> list[Told]:
    """Noise that may be that of quantization comes behind what is larger; that of other inputs may
    not be."""
    largest = max((step.noise_out or 0.0 for _, step in told), default=0.0)

    def importance(one: Told) -> tuple[bool, int, float]:
        excess, step = one
        is_largest = (step.noise_out or 0.0) >= largest
        is_seen = step.edit is not None or first_in_kind(step.call.inputs) is not None
        is_likely = not excess.may_be_usual or is_largest or is_seen
        return is_likely, excess.rank, excess.importance

    return sorted(told, key=importance, reverse=True)


def _from_a_beginning(told: Iterable[Told]) -> list[Told]:
    """Without what may well only amplify more noise than a quantized module makes, where nothing
    before it is told: that lies behind a fault that could not be."""
    kept: list[Told] = []
    for excess, step in told:
        came_in, gave = step.noise_in or 0.0, step.noise_out or 0.0
        is_faulty = came_in > max(MOST_OF_QUANTIZATION, excess.clean)
        is_mild = bool(step.after) or gave < _OFTEN_AMPLIFIED * came_in
        if kept or not (excess.may_be_amplified and is_faulty and is_mild):
            kept.append((excess, step))
    return kept


def _behind_givers(told: Iterable[Told]) -> list[Told]:
    """What may only amplify the noise of a place that is told as well comes behind that."""
    found: list[Told] = []
    given: dict[Place, float] = {}  # by what a place gives, its importance
    for excess, step in told:
        givers = [given[row.first_place] for row in step.call.inputs if row.first_place in given]
        if excess.may_be_amplified and not step.after and givers:
            most = math.nextafter(min(givers), 0.0)
            excess = replace(excess, importance=min(excess.importance, most))
        for row in showing(step):
            given[row.first_place] = excess.importance
        found.append((excess, step))
    return found


def _is_undone(step: Step, called: Mapping[CallKey, CallNoise], nothing: float) -> bool:
    """Whether nothing of the noise is left in what the nearest call around it gives: channels in
    another order, say, that the next weights expect in that order."""
    if first_in_kind(step.call.inputs) is not None:
        return False
    holder = step.call
    if step.after in ("", "the output"):
        parent = next(calls_around(holder, called), None)
        if parent is None:
            return False
        holder = parent
    if _is_free(holder, holder.noise_out, nothing):
        return True
    # As of attention, which may give its weights as well, for nobody.
    around = next(calls_around(holder, called), None)
    if around is None or len(holder.outputs) < 2:
        return False
    first = noise(holder.outputs[0])
    return _is_free(holder, first, nothing) and _is_free(around, around.noise_out, nothing)


def _is_free(call: CallNoise, left: float | None, nothing: float) -> bool:
    """Whether a call gives numbers in which no noise is left; integers say nothing of it."""
    if left is None or left > nothing:
        return False
    return any(is_float(row.dtype[0]) for row in call.outputs)


def _is_made_up_for(
    step: Step,
    called: Mapping[CallKey, CallNoise],
    takers: Takers,
    levels: OwnLevels | FloorLevels,
) -> bool:
    """Whether nothing that is computed from it shows the noise, as where the next weights take out
    a factor of each channel that no longer can be told from the noise of quantization.

    One factor for all is judged by itself: a norm takes that out of its own input, but not out of
    what else takes this.
    """
    rows = showing(step)
    if first_in_kind(step.call.inputs) is not None or any(map(_has_one_factor, rows)):
        return False
    parent = step.call.parent
    holder = step.call if step.after else None if parent is None else called.get(parent)
    taking = takers.of(rows)
    if not taking or holder is None:
        return False
    most = (step.noise_out or 0.0) / LEAST_EXCESS
    return all(
        call.noise_out is not None and call.noise_out <= most for call in (holder, *taking)
    ) and all(map(levels.is_usual, taking))


def _has_one_factor(row: Row) -> bool:
    return isinstance(row.scale_factor, float)


def _follows_a_choice(call: CallNoise) -> bool:
    """Whether an earlier call chose otherwise for it, as a router does whose numbers are noisy:
    then the noise is what follows of that."""
    given = (row.same_as for row in call.inputs if row.status == "mismatch")
    return any(place is not None and is_of_output(place.path) for place in given)
