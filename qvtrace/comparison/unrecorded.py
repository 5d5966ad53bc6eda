"""Noise that comes in before a call, where what gave it was not recorded or was left out.

Of a call within a call that has rows, the gaps of that one tell. Of any other nobody knows what its
inputs were made of: they are held against all that is known of the calls before it.
"""

from collections import defaultdict
from collections.abc import Sequence

from qvtrace.comparison.noise import CallKey, CallNoise, calls_around
from qvtrace.comparison.noise_steps import Step, not_finite
from qvtrace.patterns import kind_of

_NOTHING = "(nothing)"  # comes before the first


def unrecorded_steps(calls: Sequence[CallNoise], *, narrowed: bool) -> list[Step]:
    """The inputs of calls of which nothing is known that holds them, in order of execution; none
    where no noise comes in there. `narrowed`: calls were left out on purpose."""
    source = "what was left out" if narrowed else "what was not recorded"
    bound: float | None = 0.0
    was_broken, last = False, _NOTHING
    steps = []
    for call, held in _outermost(calls):
        if call.module:
            kind = f"{kind_of(last)} > {kind_of(call.module)}, {source}"
            breaks = "" if was_broken else not_finite(call.inputs)
            words = "what is known before it" if last != _NOTHING else "", "its inputs"
            noises = bound, call.noise_in
            steps.append(Step(call, *words, *noises, breaks, False, kind, kind, source=source))
        for own in (noise for each in held for noise in (each.noise_in, each.noise_out)):
            bound = None if bound is None or own is None else max(bound, own)
        rows = [row for each in held for row in (*each.inputs, *each.outputs)]
        was_broken = was_broken or bool(not_finite(rows))
        last = call.module
    return steps if any(step.added or step.breaks for step in steps) else []


def _outermost(calls: Sequence[CallNoise]) -> list[tuple[CallNoise, list[CallNoise]]]:
    """The calls that are in no other, in order, each with itself and all that are in it."""
    called = {call.key: call for call in calls}
    held: dict[CallKey, list[CallNoise]] = defaultdict(list)
    for call in calls:
        *_, outermost = (call, *calls_around(call, called))
        held[outermost.key].append(call)
    return [(called[key], inner) for key, inner in held.items()]
