"""How much of a tensor is error, by token, and how much of that a call received or added.

The noise of a pair is its noise-to-signal ratio, a ratio of powers: the median over tokens of
sum (r-c)^2 / sum r^2. One attention-sink token holds most of a tensor's energy, so that the largest
error beside the interval, or sums over all tokens, say little of what happens to the others.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qvtrace.comparison.call_leaves import has_arguments
from qvtrace.comparison.rows import COMPARED, Row
from qvtrace.manifest import CallEntry
from qvtrace.metrics.names import LOCAL_METRICS, NOISE_METRICS, Metrics, Undefined

CallKey = tuple[str, int]  # module and index, of the reference
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_MOST_ROUNDING = 1e-4  # even of bfloat16
_MOST_DECIBELS = 3080.0  # of a ratio that a float64 holds
_ENOUGH_TOKENS = 20  # of which the worst twentieth is one at least
_NO_NUMBER = frozenset({"exact", "mismatch", "opaque"})
_OTHER_KIND = frozenset({"structure", "shape"})


@dataclass(frozen=True)
class CallNoise:
    """What one call received and what it gave.

    Noise is the worst of all places; None: not known, which is never the same as none.
    """

    module: str
    call: int
    parent: CallKey | None
    noise_in: float | None
    noise_out: float | None
    inputs: tuple[Row, ...]
    outputs: tuple[Row, ...]
    held: int  # calls that the reference made in this one, compared or not
    local: float | None  # noise out of a replay, in which none came in; None: not replayed

    @property
    def key(self) -> CallKey:
        """Module and index."""
        return self.module, self.call


def noise(row: Row) -> float | None:
    """The noise-to-signal ratio of one pair; None where it has none or cannot be known.

    Of a pair that is equal up to a factor that is made up for, it is that of what the factor
    leaves, over all tokens together; of one whose vectors are turned, of what that leaves. Where
    most tokens are equal but not all, the median tells nothing, and it is that of all together: in
    an image of channels, rows of pixels are what stands for tokens.
    """
    if row.status == "identical":
        return 0.0
    if row.transform is not None and row.residual is not None:
        return noise_of(row.residual.metrics, row.residual.undefined)
    if row.is_made_up_for:
        return _of_decibels(row.residual_sqnr) if row.residual_sqnr is not None else 0.0
    return noise_of(row.metrics, row.undefined)


class GivenTokens:
    """The noise of the worst of the tokens that were there for a call to take.

    A pooler takes one token, and most may be better than that, as the median tells.
    """

    def __init__(self) -> None:
        self._worst: dict[tuple[int, int], float] = {}  # by channels and number of tokens

    def add(self, rows: Iterable[Row]) -> None:
        """Take in what a call received or gave."""
        for row in rows:
            rest = row.residual if row.is_made_up_for else None
            value = (row.metrics if rest is None else rest.metrics).token_sqnr_min
            if value is not None and row.shape[0]:
                key = row.shape[0][-1], math.prod(row.shape[0][:-1])
                self._worst[key] = max(self._worst.get(key, 0.0), _of_decibels(value))

    def worst_for(self, rows: Iterable[Row]) -> float:
        """How noisy what is taken may be since it is fewer of these tokens."""
        taken = [(row.shape[0][-1], math.prod(row.shape[0][:-1])) for row in rows if row.shape[0]]
        return max(
            (
                noise
                for (channels, count), noise in self._worst.items()
                if any(channels == own and count > of for own, of in taken)
            ),
            default=0.0,
        )


def noise_of(metrics: Metrics, undefined: Mapping[str, str]) -> float | None:
    """The same by the metrics of one pair."""
    for metric in ("token_sqnr_p50", "sqnr"):
        value = getattr(metrics, metric)
        if value is not None:
            return _of_decibels(value)
    # Of the last one: where that is equal, all tokens are.
    return 0.0 if undefined.get(metric) == Undefined.IDENTICAL else None


def _of_decibels(sqnr: float) -> float:
    """Float64 errors may be larger than their reference by more than the square root of the largest
    float: that is the largest noise there is."""
    return float(10.0 ** (min(-sqnr, _MOST_DECIBELS) / 10.0))


def rounding_noise(rows: Iterable[Row]) -> float:
    """What rounding alone may make of the dtype that most pairs have, a module or two on."""
    epsilons = Counter(
        max(_EPSILON.get(dtype, 0.0) for dtype in row.dtype if dtype is not None)
        for row in rows
        if row.dtype != (None, None)
    )
    del epsilons[0.0]
    return rounding_of(max(epsilons, key=lambda epsilon: epsilons[epsilon], default=0.0))


def rounding_of(epsilon: float) -> float:
    """The same by the epsilon of a dtype."""
    return min(64.0 * epsilon * epsilon, _MOST_ROUNDING)


def added(noise_in: float, noise_out: float) -> float:
    """The noise beyond what came in, which an exact module hands on beside the signal: its gain is
    that of the reference on both."""
    return max(0.0, noise_out - noise_in)


def gain(noise_in: float, noise_out: float) -> float | Undefined:
    """Noise out over noise in, in dB; no noise out is as good as can be."""
    if not noise_out:
        return Undefined.IDENTICAL
    if not noise_in:
        return Undefined.NO_NOISE_IN
    return 10.0 * (math.log10(noise_out) - math.log10(noise_in))


def with_noise(rows: Iterable[Row], calls: Iterable[CallNoise]) -> list[Row]:
    """The rows with the noise of their calls among their metrics."""
    noise_in = {call.key: call.noise_in for call in calls}
    return [_with_noise(row, noise_in.get((row.module, row.call))) for row in rows]


def with_local(rows: Iterable[Row], replayed: Iterable[Row]) -> list[Row]:
    """The rows with what a replay says of the same places, on whose inputs no error was."""
    local = {row.place: row for row in replayed}
    return [_with_local(row, local.get(row.place)) for row in rows]


def _with_local(row: Row, local: Row | None) -> Row:
    own = None if local is None else noise(local)
    if local is None or own is None:
        undefined = dict.fromkeys(LOCAL_METRICS, Undefined.NOT_REPLAYED.value)
        return replace(row, undefined=undefined | row.undefined)
    # Of what is made up for, both are of what is left.
    rest = local.residual if local.is_made_up_for and local.residual is not None else local
    metrics = replace(row.metrics, local_noise=own, local_peir=rest.metrics.peir)
    undefined = {name: row.undefined[name] for name in row.undefined if name not in LOCAL_METRICS}
    if rest.metrics.peir is None:
        undefined["local_peir"] = rest.undefined["peir"]
    return replace(row, metrics=metrics, undefined=undefined)


def _with_noise(row: Row, received: float | None) -> Row:
    if "gain" in row.undefined:  # nothing can be measured there
        return row
    if row.undefined.get("peir") == Undefined.INTEGER:
        undefined = dict.fromkeys(NOISE_METRICS, Undefined.INTEGER.value)
        return replace(row, undefined=row.undefined | undefined)
    outcomes = _outcomes(received, noise(row), is_input=not is_output(row))
    values: dict[str, Any] = {
        name: value for name, value in outcomes.items() if not isinstance(value, Undefined)
    }
    undefined = {
        name: value.value for name, value in outcomes.items() if isinstance(value, Undefined)
    }
    return replace(row, metrics=replace(row.metrics, **values), undefined=row.undefined | undefined)


def _outcomes(
    received: float | None, own: float | None, *, is_input: bool
) -> dict[str, float | Undefined]:
    unknown = Undefined.NOISE_NOT_KNOWN
    if is_input:
        outcomes: dict[str, float | Undefined] = dict.fromkeys(NOISE_METRICS, Undefined.INPUT)
        return outcomes | {"noise_in": unknown if own is None else own}
    both = None if received is None or own is None else (received, own)
    return {
        "noise_in": unknown if received is None else received,
        "noise_out": unknown if own is None else own,
        "added": unknown if both is None else added(*both),
        "gain": unknown if both is None else gain(*both),
    }


def is_float(dtype: str | None) -> bool:
    """Whether a pair of that dtype can have noise."""
    return dtype is not None and "float" in dtype


def is_output(row: Row) -> bool:
    """Whether a row is of what a call gave."""
    return is_of_output(row.path)


def is_of_output(path: str) -> bool:
    """Whether a path leads into what a call gave."""
    return path.partition(".")[0] == "output"


def in_few_tokens(call: CallNoise) -> CallNoise:
    """The same call by the noise of the worst twentieth of its tokens."""
    inputs, outputs = (tuple(map(_in_few_tokens, rows)) for rows in (call.inputs, call.outputs))
    noise_in = None if call.noise_in is None else _worst_input(inputs)
    noise_out = None if call.noise_out is None else _worst(_but_chosen(outputs))
    return replace(call, inputs=inputs, outputs=outputs, noise_in=noise_in, noise_out=noise_out)


def _in_few_tokens(row: Row) -> Row:
    """The row with the figure of few tokens as that of most, where there are enough to tell.

    What a factor leaves of an input is known of all tokens only: for few, it is all that comes in.
    """
    few, shape = row.metrics.token_sqnr_p5, row.shape[0]
    if few is None or not shape or math.prod(shape[:-1]) < _ENOUGH_TOKENS:
        return row
    judgement = row.judgement if is_output(row) else None
    return replace(row, metrics=replace(row.metrics, token_sqnr_p50=few), judgement=judgement)


def calls_around(call: CallNoise, called: Mapping[CallKey, CallNoise]) -> Iterator[CallNoise]:
    """The calls that a call was made in, from the inside out; `called` are all of them."""
    met = {call.key}
    above = call.parent
    while above is not None and above in called and above not in met:  # a file may hold a circle
        met.add(above)
        yield called[above]
        above = called[above].parent


def call_noises(
    rows: Sequence[Row],
    calls: Sequence[CallEntry],
    replayed: Iterable[Row] = (),
    without_inputs: Collection[CallKey] = (),
) -> list[CallNoise]:
    """The noise of each call that has rows, in order of execution.

    `rows` are those of all paths, `calls` the reference's, `replayed` the outputs of a replay; of
    those `without_inputs` the candidate did not store what they were given.
    """
    with_cache = _with_unseen_cache(rows, calls)
    local: dict[CallKey, list[Row]] = defaultdict(list)
    for row in replayed:
        local[row.module, row.call].append(row)
    held = Counter(call.parent for call in calls if call.parent is not None)
    places: dict[CallKey, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for row in rows:
        places[row.module, row.call][is_output(row)].append(row)
    found = []
    for call in calls:
        key = call.module, call.index
        if key in places:
            inputs, outputs = places[key]
            is_known = has_arguments(call) and key not in without_inputs
            is_known = is_known and not any(_is_unseen(row, with_cache) for row in inputs)
            found.append(
                CallNoise(
                    call.module,
                    call.index,
                    call.parent,
                    _worst_input(inputs) if is_known else None,
                    _worst(_but_chosen(outputs)) if outputs else None,
                    tuple(inputs),
                    tuple(outputs),
                    held[key],
                    _worst(local[key]) if key in local else None,
                )
            )
    return found


def _with_unseen_cache(rows: Sequence[Row], calls: Sequence[CallEntry]) -> set[CallKey]:
    """The calls in one that was given a Cache with something in it that was not stored. What is
    empty at first holds what calls within have given, of which each has its own."""
    unseen = (row for row in rows if row.unseen and row.status != "opaque" and not is_output(row))
    given = {(row.module, row.call) for row in unseen}
    if not given:
        return set()
    parents = {(call.module, call.index): call.parent for call in calls}
    return {key for key in parents if _outermost(key, parents) in given}


def _outermost(key: CallKey, parents: Mapping[CallKey, CallKey | None]) -> CallKey:
    met = set[CallKey]()
    while (parent := parents.get(key)) is not None and key not in met:
        met.add(key)
        key = parent
    return key


def _is_unseen(row: Row, with_cache: Collection[CallKey]) -> bool:
    return row.unseen and (row.status == "opaque" or (row.module, row.call) in with_cache)


def differs_in_kind(row: Row) -> bool:
    """Whether it is something else on the two sides, of which no noise can be told."""
    if row.status == "nonfinite":
        return row.nonfinite is not None and row.nonfinite.sentinel_mismatches > 0
    return row.status in _OTHER_KIND or _is_of_nothing(row)


def first_in_kind(inputs: Iterable[Row]) -> Row | None:
    """The first input that no noise can be told of, since it is something else."""
    return next(filter(_is_cause, inputs), None)


def other_values(outputs: Iterable[Row]) -> Row | None:
    """The first tensor of integers that a call gives with other values."""
    return next((row for row in outputs if row.status == "mismatch" and row.shape[0]), None)


def _is_cause(row: Row) -> bool:
    return row.status == "mismatch" or differs_in_kind(row)


def _is_of_nothing(row: Row) -> bool:
    """Whether there is no signal in the reference that its error could be held against, as in a
    mask that is added; what a call gave follows from that call."""
    came_from = None if row.same_as is None else row.same_as.path.partition(".")[0]
    zero = row.undefined.get("sqnr") == Undefined.ZERO_REFERENCE
    return zero and row.status == "ok" and came_from != "output" and not is_output(row)


def _worst_input(rows: Sequence[Row]) -> float | None:
    """That of inputs of one kind: others are causes of their own."""
    alike = [row for row in rows if not _is_cause(row)]
    return _worst(alike) if alike or not rows else None


def _but_chosen(rows: Sequence[Row]) -> list[Row]:
    """Without what belongs to choices that came out otherwise, as the weights of a router's experts
    do: they are of other things on the two sides."""
    chosen = {row.shape[0] for row in rows if row.status == "mismatch"}
    return [row for row in rows if row.status == "mismatch" or row.shape[0] not in chosen]


def _worst(rows: Sequence[Row]) -> float | None:
    """None where a place that should have a number has none, or nothing has."""
    worst = 0.0
    without = [row for row in rows if row.status in _NO_NUMBER and not row.has_no_elements]
    if len(without) == len(rows) and not all(map(_is_equal, rows)):
        return None
    for row in rows:
        if any(row is other for other in without):
            continue
        value = noise(row) if row.status in COMPARED else None
        if value is None:
            return None
        worst = max(worst, value)
    return worst


def _is_equal(row: Row) -> bool:
    return row.status == "exact" or (row.status == "opaque" and not row.unseen)


def decibels(noise: float) -> str:
    """A noise as it is shown."""
    return f"{10.0 * math.log10(noise):.0f} dB" if noise else "none"
