"""The places where noise can come in: calls without calls of their own, and gaps between calls."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qvtrace.comparison.noise import CallKey, CallNoise, GivenTokens, added, noise
from qvtrace.comparison.rows import Place, Row
from qvtrace.patterns import shown

_REPLAYED = " replayed"  # are of a kind of their own


@dataclass(frozen=True)
class Step:
    """One place where noise can come in: a call without calls of its own, or a gap in one."""

    call: CallNoise  # that errs
    before: str  # what gave the noise that comes in, in words
    after: str  # where it shows, in words; empty for the call's own output
    noise_in: float | None
    noise_out: float | None
    breaks: str  # what is not finite and was before, in words; empty: nothing
    is_local: bool  # seen in a replay, into which no noise came
    kind: str
    class_name: str

    @property
    def added(self) -> float | None:
        """Noise beyond what came in; None where that is not known."""
        if self.noise_in is None or self.noise_out is None:
            return None
        return added(self.noise_in, self.noise_out)


def steps_of(calls: Sequence[CallNoise], *, narrowed: bool) -> Iterator[Step]:
    """Those of all calls, in order of execution; `narrowed`: calls were left out on purpose."""
    children: dict[CallKey | None, list[CallNoise]] = defaultdict(list)
    for call in calls:
        children[call.parent].append(call)
    orders = {row.place: row.order for call in calls for row in (*call.inputs, *call.outputs)}
    for call in calls:
        known = children.get(call.key, ())
        if known and not (narrowed and len(known) < call.held):
            yield from _gaps(call, known, orders)
        else:
            yield _own_step(call)


def _own_step(call: CallNoise) -> Step:
    is_local = call.local is not None
    return Step(
        call,
        "its inputs",
        "",
        0.0 if is_local else call.noise_in,
        call.local if is_local else call.noise_out,
        "" if _not_finite(call.inputs) else _not_finite(call.outputs),
        is_local,
        f"{_kind(call.module)}{_REPLAYED * is_local}",
        f"{_class_name(call)}{_REPLAYED * is_local}",
    )


def _gaps(
    parent: CallNoise, children: Sequence[CallNoise], orders: Mapping[Place, int]
) -> Iterator[Step]:
    """Between what a parent received, the calls in it, and what it gave."""
    bound = parent.noise_in
    was_broken = bool(_not_finite(parent.inputs))
    before = ["the inputs"]
    last = parent.module
    given = GivenTokens()
    given.add(parent.inputs)
    for child in children:
        after = f"the input of {_inner(parent, child)}"
        breaks = "" if was_broken else _not_finite(child.inputs)
        kind = f"{_kind(last)} > {_kind(child.module)}"
        new = [row for row in child.inputs if not _was_there(row, orders, child)]
        noises = _received(bound, child.noise_in, given, new), child.noise_in
        yield Step(parent, _joined(before), after, *noises, breaks, False, kind, kind)
        # Noise that has been told of is no news further on.
        for own in (child.noise_in, child.noise_out):
            bound = None if bound is None or own is None else max(bound, own)
        was_broken = was_broken or bool(_not_finite((*child.inputs, *child.outputs)))
        before.append(_inner(parent, child))
        given.add(child.outputs)
        last = child.module
    breaks = "" if was_broken else _not_finite(parent.outputs)
    kind = f"{_kind(last)} > output of {_kind(parent.module)}"
    new = [row for row in parent.outputs if not _was_there(row, orders)]
    noises = _received(bound, parent.noise_out, given, new), parent.noise_out
    yield Step(parent, _joined(before), "the output", *noises, breaks, False, kind, kind)


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


def _not_finite(rows: Iterable[Row]) -> str:
    """What only the candidate has that is not finite, in words; empty: nothing."""
    found = [row.nonfinite for row in rows if row.nonfinite is not None]
    if any(counts.new_nan for counts in found):
        return "NaN"
    return "infinities" if any(counts.new_inf for counts in found) else ""


def _kind(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _class_name(call: CallNoise) -> str:
    return (call.outputs or call.inputs)[0].type[0]


def _inner(parent: CallNoise, child: CallNoise) -> str:
    """The child's name within the parent."""
    return shown(child.module.removeprefix(f"{parent.module}."))


def _joined(names: Sequence[str]) -> str:
    shown_names = names if len(names) <= 4 else (names[0], "...", *names[-2:])
    return ", ".join(shown_names)
