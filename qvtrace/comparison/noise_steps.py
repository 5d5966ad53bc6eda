"""The places where noise can come in: calls that are looked at as one, and gaps between calls."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from qvtrace.comparison.additions import Addition
from qvtrace.comparison.noise import (
    CallKey,
    CallNoise,
    GivenTokens,
    added,
    calls_around,
    first_in_kind,
    is_float,
    noise,
)
from qvtrace.comparison.rows import Place, Row
from qvtrace.patterns import kind_of, shown

Dtypes: TypeAlias = tuple[str | None, str | None]
StepPlace: TypeAlias = tuple[CallKey, str, CallKey | None, bool]

_MOST_OF_TOKENS = 3  # dimensions
_REPLAYED = " replayed"  # are of a kind of their own
_NOTHING_KNOWN: Mapping[Place, Addition] = {}
_WITHOUT_NOISE = frozenset({"identical", "exact", "opaque"})


@dataclass(frozen=True)
class Edit:
    """An edit in place of what a call is given, which the same call of the other side does not
    make."""

    call: CallKey
    path: str
    by_reference: bool


@dataclass(frozen=True)
class Step:
    """One place where noise can come in: a call without calls of its own, one that was replayed as
    a whole, or a gap in one."""

    call: CallNoise  # that errs
    before: str  # what gave the noise that comes in, in words
    after: str  # where it shows, in words; empty for the call's own output
    noise_in: float | None
    noise_out: float | None
    breaks: str  # what is not finite and was before, in words; empty: nothing
    is_local: bool  # seen in a replay, into which no noise came
    kind: str
    class_name: str  # of a gap, what comes after it, whatever comes before
    taker: CallNoise | None = None  # the call in it whose input that is
    recast: tuple[Row, ...] = ()  # where it shows, what is of another float dtype from there on
    is_own_cast: bool = False  # whether all calls in it are, which is no matter of any one input
    source: str = ""  # in words, of noise that no call with rows holds: nobody knows what gave it
    recast_after: int = 0  # calls after it whose outputs are as well, and differ no more for it
    on_top: Addition | None = None  # what shows beside what was there; None: not known by itself
    is_all_on_top: bool = False  # whether nothing else can have come in
    # Noise in and out of the worst twentieth of tokens, where that tells of it and all does not.
    in_few: tuple[float, float] | None = None
    calls_before: tuple[CallKey, ...] = ()  # in the same call, of what gave the noise that comes in
    edit: Edit | None = None  # which may show here

    @property
    def is_of_block(self) -> bool:
        """Whether it is all that a call with calls of its own adds, as a replay tells."""
        return self.is_local and not self.after and self.call.held > 0

    @property
    def place(self) -> StepPlace:
        """What tells it from all other places."""
        taker = None if self.taker is None else self.taker.key
        return self.call.key, self.after, taker, self.is_local

    @property
    def kind_of_call(self) -> tuple[str, str, bool]:
        """The same in each call of a module."""
        return self.call.module, self.after, self.is_local

    @property
    def tokens(self) -> int:
        """How many vectors a call gives, by the shortest of its outputs."""
        shapes = [row.shape[0] for row in self.call.outputs]
        return min((math.prod(shape[:-1]) for shape in shapes if shape), default=0)

    @property
    def channels(self) -> int:
        """How many numbers a token has that a call gives, in the smallest of its outputs; 0: not
        known, as of an image."""
        shapes = [row.shape[0] for row in self.call.outputs if row.shape[0]]
        if any(len(shape) > _MOST_OF_TOKENS for shape in shapes):
            return 0
        return min((shape[-1] for shape in shapes), default=0)

    @property
    def added(self) -> float | None:
        """Noise beyond what came in; None where that is not known."""
        if self.noise_in is None or self.noise_out is None:
            return None
        return added(self.noise_in, self.noise_out)

    def alone(self, within: Mapping[CallKey, float]) -> float:
        """Noise that is known to come in here and nowhere else; `within`: of each call, what comes
        in at the places in it."""
        if self.on_top is not None:
            return self.on_top.noise
        if not self.is_local:
            return 0.0
        return max(0.0, (self.noise_out or 0.0) - within.get(self.call.key, 0.0))


def steps_of(
    calls: Sequence[CallNoise],
    *,
    narrowed: bool,
    additions: Mapping[Place, Addition] = _NOTHING_KNOWN,
) -> Iterator[Step]:
    """Those of all calls, in order of execution; `narrowed`: calls were left out on purpose."""
    children: dict[CallKey | None, list[CallNoise]] = defaultdict(list)
    for call in calls:
        children[call.parent].append(call)
    orders = {row.place: row.order for call in calls for row in (*call.inputs, *call.outputs)}
    came_in = _all_came_in(calls)
    for call in calls:
        known = children.get(call.key, ())
        are_known = bool(known) and not (narrowed and len(known) < call.held)
        if are_known:
            if call.local is not None:
                yield replace(
                    _own_step(call, came_in[call.key]), breaks=""
                )  # which what lies within tells
            yield from _gaps(call, known, orders, additions, came_in)
            continue
        yield _own_step(call, came_in[call.key])
        if call.local is not None and first_in_kind(call.inputs) is not None:
            # A replay gave it the reference's inputs, and says nothing of what these bring.
            yield replace(_own_step(replace(call, local=None), came_in[call.key]), breaks="")


def showing(step: Step) -> tuple[Row, ...]:
    """The rows in which the noise of a place shows."""
    taker = step.call if step.source else step.taker
    if taker is None:
        return step.call.outputs
    return tuple(row for row in taker.inputs if (noise(row) or 0.0) > (step.noise_in or 0.0))


def local_within(
    steps: Sequence[Step], alone: Callable[[Step, Mapping[CallKey, float]], float] = Step.alone
) -> dict[CallKey, float]:
    """Of each call, the noise that is known to come in at the places within it, added up; `alone`
    tells it of a place, by what is within that already."""
    called = {step.call.key: step.call for step in steps}
    within: dict[CallKey, float] = defaultdict(float)
    for step in reversed(steps):  # what lies within first
        own = alone(step, within)
        around = calls_around(step.call, called) if own else ()
        for call in (*((step.call,) if step.after else ()), *around):
            within[call.key] += own
    return within


def _all_came_in(calls: Iterable[CallNoise]) -> dict[CallKey, float | None]:
    # By kind and contents, the most noise that calls gave that got these.
    given: dict[str, dict[Place, float]] = defaultdict(dict)
    came_in = {}
    for call in calls:
        gave = given[kind_of(call.module)]
        came_in[call.key] = _came_in(call, gave)
        own = math.inf if call.noise_out is None else call.noise_out
        for row in call.inputs:
            if noise(row):
                gave[row.first_place] = max(own, gave.get(row.first_place, 0.0))
    return came_in


def _came_in(call: CallNoise, gave: Mapping[Place, float]) -> float | None:
    """The noise of what a call received. Where calls of its kind got the same beside their first
    argument, as all layers get one position embedding, that is as noisy as it made their outputs:
    shifted positions would else hide whatever comes in later."""
    if not call.noise_in or not gave:
        return call.noise_in
    stream = [row for row in call.inputs if argument(row) == argument(call.inputs[0])]
    own = max((noise(row) or 0.0 for row in stream), default=0.0)
    beside = [row for row in call.inputs if (noise(row) or 0.0) > own]
    if not any(is_float(row.dtype[0]) for row in stream) or not beside:
        return call.noise_in
    shown = max(gave.get(row.first_place, math.inf) for row in beside)
    return min(call.noise_in, max(own, shown))


def argument(row: Row) -> tuple[str, ...]:
    """The argument of a call that a row is of."""
    return tuple(row.path.split(".")[:2])


def _own_step(call: CallNoise, came_in: float | None) -> Step:
    is_local = call.local is not None
    if came_in is None and first_in_kind(call.inputs) is not None:
        came_in = 0.0  # of what is alike, where there is nothing
    return Step(
        call,
        "its inputs",
        "",
        0.0 if is_local else came_in,
        call.local if is_local else call.noise_out,
        "" if not_finite(call.inputs) else not_finite(call.outputs),
        is_local,
        # In a Sequential, modules of several classes have one name but for their numbers.
        f"{kind_of(call.module)} {_class_name(call)}{_REPLAYED * is_local}",
        f"{_class_name(call)}{_REPLAYED * is_local}",
        recast=_recast(call.outputs, {row.dtype for row in call.inputs}),
    )


def _gaps(
    parent: CallNoise,
    children: Sequence[CallNoise],
    orders: Mapping[Place, int],
    additions: Mapping[Place, Addition],
    came_in: Mapping[CallKey, float | None],
) -> Iterator[Step]:
    """Between what a parent received, the calls in it, and what it gave."""
    bound = came_in[parent.key]
    was_broken = bool(not_finite(parent.inputs))
    before, met = ["the inputs"], list[CallKey]()
    last = parent.module
    given = GivenTokens()
    given.add(parent.inputs)
    dtypes = {row.dtype for row in parent.inputs}
    for child in children:
        after = f"the input of {_inner(parent, child)}"
        breaks = "" if was_broken else not_finite(child.inputs)
        kind = f"{kind_of(last)} > {kind_of(child.module)}"
        new = [row for row in child.inputs if not _was_there(row, orders, child)]
        noises = _received(bound, child.noise_in, given, new), child.noise_in
        recast = _recast(child.inputs, dtypes)
        own_cast = bool(recast) and _are_all_recast(children)
        words, kinds = (_joined(before), after), (kind, f"> {kind_of(child.module)}")
        seen = parent, *words, *noises, breaks, False, *kinds, child, recast, own_cast
        yield replace(_measured(Step(*seen), new, additions), calls_before=tuple(met))
        # Noise that has been told of is no news further on.
        for own in (came_in[child.key], child.noise_out):
            bound = None if bound is None or own is None else max(bound, own)
        was_broken = was_broken or bool(not_finite((*child.inputs, *child.outputs)))
        before.append(_inner(parent, child))
        met.append(child.key)
        given.add(child.outputs)
        dtypes.update(row.dtype for row in (*child.inputs, *child.outputs))
        last = child.module
    breaks = "" if was_broken else not_finite(parent.outputs)
    kind = f"{kind_of(last)} > output of {kind_of(parent.module)}"
    new = [row for row in parent.outputs if not _was_there(row, orders)]
    noises = _received(bound, parent.noise_out, given, new), parent.noise_out
    recast = _recast(parent.outputs, dtypes)
    words = _joined(before), "the output"
    last_one = Step(parent, *words, *noises, breaks, False, kind, kind, recast=recast)
    yield replace(_measured(last_one, new, additions), calls_before=tuple(met))


def _measured(step: Step, new: Sequence[Row], additions: Mapping[Place, Addition]) -> Step:
    """A gap with the most of what comes in with what is `new` at it, as far as that is known."""
    if not additions:
        return step
    noisy = [row for row in new if row.status not in _WITHOUT_NOISE]
    known = [additions[row.place] for row in noisy if row.place in additions]
    is_all = len(known) == len(noisy)
    most = max(known, key=lambda one: one.noise, default=Addition(0.0) if is_all else None)
    return replace(step, on_top=most, is_all_on_top=is_all)


def _was_there(row: Row, orders: Mapping[Place, int], child: CallNoise | None = None) -> bool:
    """Whether both sides had these very contents before, and not first within the child."""
    place = row.same_as
    if place is None or (child is not None and place.module.startswith(f"{child.module}.")):
        return False
    return orders.get(place, row.order) < row.order


def _received(
    bound: float | None, shown: float | None, given: GivenTokens, new: Sequence[Row]
) -> float | None:
    """The noise that comes in where so much shows: what was there, or what a few tokens of that
    had all along; all of it where nothing that is `new` is noisier."""
    if bound is None or shown is None or shown <= bound:
        return bound
    if all((noise(row) or 0.0) <= bound for row in new):
        return shown
    return max(bound, min(shown, given.worst_for(new)))


def not_finite(rows: Iterable[Row]) -> str:
    """What only the candidate has that is not finite, in words; empty: nothing."""
    found = set(map(breaks, rows))
    return "NaN" if "NaN" in found else max(found, default="")


def breaks(row: Row) -> str:
    """What only the candidate has in a pair that is not finite, in words; empty: nothing."""
    counts = row.nonfinite
    if counts is None:
        return ""
    return "NaN" if counts.new_nan else "infinities" if counts.new_inf else ""


def _recast(rows: Iterable[Row], before: Collection[Dtypes]) -> tuple[Row, ...]:
    """Those of another float dtype in the candidate, where nothing before them was."""
    return tuple(row for row in rows if _is_recast(row) and row.dtype not in before)


def _are_all_recast(children: Sequence[CallNoise]) -> bool:
    """Whether all calls within a call run in another dtype: then the cast is the call's own."""
    floats = [[row for row in child.inputs if is_float(row.dtype[0])] for child in children]
    return all(any(map(_is_recast, rows)) for rows in floats if rows)


def _is_recast(row: Row) -> bool:
    return row.dtype[0] != row.dtype[1] and all(map(is_float, row.dtype))


def _class_name(call: CallNoise) -> str:
    return (call.outputs or call.inputs)[0].type[0]


def _inner(parent: CallNoise, child: CallNoise) -> str:
    """The child's name within the parent."""
    return shown(child.module.removeprefix(f"{parent.module}."))


def _joined(names: Sequence[str]) -> str:
    shown_names = names if len(names) <= 4 else (names[0], "...", *names[-2:])
    return ", ".join(shown_names)
