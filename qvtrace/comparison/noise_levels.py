"""How much noise is usual for each place: by the run's own places of one kind, or by a floor.

Without a floor, the same name but for the numbers in it is one kind; where there are too few of
these, the same class. A floor is another run that differs by noise alone, which tells of each place
what is usual there.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from statistics import median, median_high, median_low
from types import MappingProxyType

from qvtrace.comparison.additions import Addition
from qvtrace.comparison.causes import cause_of
from qvtrace.comparison.local_levels import ENOUGH_ALIKE, LocalLevels
from qvtrace.comparison.noise import CallKey, CallNoise, added, decibels
from qvtrace.comparison.noise_steps import Step
from qvtrace.comparison.replayed_sizes import CallSizes
from qvtrace.patterns import kind_of

LEAST_EXCESS = 10.0**0.6  # a ratio of powers: 6 dB more than what came in and is usually added
_LEAST_OF_MODULE = 10.0**0.4  # than its like make, where nothing came in
_LEAST_OF_CLASS = 10.0**0.9  # than a class adds: its kinds differ by some dB
_IN_BETWEEN = "", False  # the form of all gaps: hardly anything is quantized between calls
_LEAST_OF_TWO = 10.0**1.5  # than two places of a class add
MOST_OF_QUANTIZATION = 10.0**-1.2  # a ratio of powers: one module in 4 bits makes some -20 dB
_NOTHING_COMPUTED = 10.0
_EIGHT_BITS = 1e-4  # what rounding weights and inputs to these makes of most modules
_WITH_WEIGHTS = "Linear", "Conv", "Embedding"  # in the names of classes that are quantized
_FEW_CHANNELS = 6.0  # of which it hangs on the weights how much of what came in they show
_ENOUGH_TOKENS = 8  # whose median is told from that of other calls
_VARIES = 10.0**0.8  # a ratio of powers, by which the noise of a single token is nothing special
_ROUNDED_OFTEN = 100.0  # times the noise of rounding: what long sums may make of it
_NO_ERROR = 1e-10  # noise that is no error to anybody
_TINY = 1e-30  # less noise than that of any dtype: keeps ratios finite
_LEAST_DECIBELS = 0.2  # above a floor, however well that agrees
_SPREADS = 3.0  # typical distances from a floor that are nothing special
_PLAUSIBLE_GAIN = 10.0**1.5  # of powers, by which a place may amplify what came in
_PLAUSIBLE_GAIN_BETWEEN = 100.0  # of powers, by functional operations, as a softmax is one
_TIMES_USUAL = 3.0  # of what gaps of one kind make of what came in
_HARDLY = 1e-3  # the share of what is added that counts where it may be all amplified
_REPEATED = 1e-6  # relative: noise so close to a floor's is that very noise
_LEAST_AFTER_REPEATED = 10.0**0.01  # then so little on top is news


@dataclass(frozen=True)
class Excess:
    """What one place gives beyond what came in and is usual there."""

    ratio: float = 0.0  # of powers; 0: not known
    importance: float = 0.0  # by which those that are told are sorted
    is_told: bool = False  # whether it is so much that the place is named
    clean: float = 0.0  # noise up to which inputs agree
    # What comes first among those that are told: inputs that repeat the noise of a floor to the
    # last digit leave no doubt, inputs that agree with it hardly any.
    rank: int = 0
    above_floor: tuple[float, float] | None = None  # dB of what came in, and of what came out
    may_be_usual: bool = False  # nothing tells whether quantization alone gives as much
    on_top: Addition | None = None  # what tells of it, where that was measured by itself
    may_be_amplified: bool = False  # whether all of it may be made of what came in


class OwnLevels:
    """How much noise is usual for each kind of place in the run itself."""

    def __init__(
        self,
        steps: Sequence[Step],
        rounding: float,
        quantized: Collection[str] = (),
        sizes: Mapping[CallKey, CallSizes] = MappingProxyType({}),
    ) -> None:
        """`quantized` are modules that are known to be, `sizes` those of calls that were
        replayed."""
        self.rounding = rounding
        self._quantized = quantized
        self._by_kind: dict[str, list[float]] = defaultdict(list)
        self._between: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._by_class: dict[str, list[float]] = defaultdict(list)
        self._exact: dict[tuple[str, bool], list[Step]] = defaultdict(list)
        self._by_form: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
        self._on_top: dict[str, list[float]] = defaultdict(list)
        self._given: dict[str, dict[CallKey, float]] = defaultdict(dict)
        self._calls: dict[tuple[str, str, bool], list[Step]] = defaultdict(list)
        for step in steps:
            self._calls[step.kind_of_call].append(step)
            if step.call.noise_out is not None:
                self._given[kind_of(step.call.module)][step.call.key] = step.call.noise_out
            if step.noise_in is not None and step.noise_out is not None:
                self._by_kind[step.kind].append(step.noise_out)
                self._by_class[step.class_name].append(step.noise_out)
                likes = self._by_form[self._form(step) if not step.after else _IN_BETWEEN]
                likes.append((step.noise_in, step.noise_out))
                if step.after:
                    self._between[step.kind].append((step.noise_in, step.noise_out))
                if not step.is_local and self._is_exact(step.noise_in):
                    self._exact[self._form(step)].append(step)
            if step.on_top is not None:
                self._on_top[step.kind].append(step.on_top.noise)
        for noises in self._by_form.values():
            noises.sort()
        self._local = LocalLevels(steps, sizes)
        kinds = sorted(map(_usual, self._by_kind.values()))
        self.usual = max(rounding, kinds[len(kinds) // 2]) if kinds else rounding

    @property
    def text(self) -> str:
        """The usual noise in words."""
        least = f"{10 * math.log10(LEAST_EXCESS):.0f} dB above"
        if self._local.is_known:
            least += f", {10 * math.log10(_LEAST_OF_MODULE):.0f} dB where it was replayed"
        return f"usual noise of a place {decibels(self.usual)}, told is what is {least}"

    def excess(self, step: Step) -> Excess:
        """Noise out over the noise that came in and is usually added."""
        on_top = self._ratio_on_top(step)
        ratio = on_top if step.is_all_on_top else max(on_top, self._ratio(step))
        is_on_top = 0.0 < on_top == ratio
        is_measured = step.is_local or is_on_top
        certain = step.alone({}) if is_measured else _certainly_added(step, self.rounding)
        return Excess(
            ratio,
            max(certain, 0.0 if is_measured else _HARDLY * (step.added or 0.0)),
            self._is_told(step, ratio),
            LEAST_EXCESS * self.usual,
            may_be_usual=self._may_be_first_quantized(step),
            on_top=step.on_top if is_on_top else None,
            may_be_amplified=not certain,
        )

    def _is_told(self, step: Step, ratio: float) -> bool:
        """The noise of a few tokens varies widely: where a module is called again and again, as
        each step of a generation calls it with one, most calls tell, or one by far more; where it
        is called once, it has to be more the fewer they are."""
        calls = self._calls[step.kind_of_call]
        least = _LEAST_OF_MODULE if step.is_local else LEAST_EXCESS * self._amplifying(step)
        if ratio < least or step.tokens >= _ENOUGH_TOKENS:
            return ratio >= least
        if len(calls) < 2:
            if not self._is_exact(step.noise_in or 0.0):
                least *= math.pow(_VARIES, 1.0 / max(step.tokens, 1))
            return ratio >= least
        typical = median_low([self._ratio(call) for call in calls])
        return max(typical, ratio / _VARIES) >= least

    def _amplifying(self, step: Step) -> float:
        """By how much more few numbers may show of what came in than many do."""
        if step.after or not step.channels or self._is_exact(step.noise_in or 0.0):
            return 1.0
        return 1.0 + (_FEW_CHANNELS / step.channels) ** 2

    def is_usual(self, call: CallNoise) -> bool:
        """Whether what a call gives is no noisier than is usual for its kind."""
        given = list(self._given[kind_of(call.module)].values())
        level = _usual(given) if len(given) >= ENOUGH_ALIKE else self.usual
        return (call.noise_out or 0.0) <= LEAST_EXCESS * max(level, self.rounding)

    def _may_be_first_quantized(self, step: Step) -> bool:
        """Whether it may be noisy only since nothing before it is quantized: it is the one place of
        its like behind exact inputs, and what is quantized is not known."""
        if (step.noise_out or 0.0) > MOST_OF_QUANTIZATION:
            return False
        if step.source:
            return True
        is_exact = step.noise_in is not None and self._is_exact(step.noise_in)
        is_alone = len(self._exact[self._form(step)]) == 1
        return is_exact and is_alone and not step.is_local and not self._quantized

    def _ratio(self, step: Step) -> float:
        if step.noise_in is None or step.noise_out is None:
            return 0.0
        alike = self._by_kind[step.kind]
        if step.is_local:
            least = _EIGHT_BITS if self._is_quantized(step.call) else 0.0
            level = max(self._local.usual(step, without_like=least), self.rounding, _TINY)
            return (step.noise_out + self.rounding) / level
        if len(alike) < (2 if step.after else ENOUGH_ALIKE):
            alike = self._by_class[step.class_name]
        level = max(self.rounding, self._of_alike(step, alike), _TINY)
        if self._is_exact(step.noise_in) and not self._is_exact(step.noise_out):
            level = self._exact_level(step, level)
        noises = step.noise_in, step.noise_out
        ratio = (step.noise_out + level) / (step.noise_in + level)
        if step.after and ratio >= LEAST_EXCESS:  # of less, nothing is told anyway
            ratio /= self._usual_amplification(step, level)
        return max(ratio, self._ratio_to_class(step, *noises), self._ratio_by_gain(step, *noises))

    def _usual_amplification(self, step: Step, level: float) -> float:
        """By how much more a gap has to stand out since others of its kind amplify as well, as the
        softmax of attention does: three times what is usual for these, at least."""
        others = [
            (gave + level) / (came_in + level)
            for came_in, gave in self._between[step.kind]
            if (came_in, gave) != (step.noise_in, step.noise_out)
        ]
        if len(others) < ENOUGH_ALIKE:
            return 1.0
        return max(1.0, _TIMES_USUAL * median(others) / LEAST_EXCESS)

    def _ratio_by_gain(self, step: Step, noise_in: float, noise_out: float) -> float:
        """Of a gap that makes far more of what came in than any other of its kind does, and gives
        far more than one that received about as much: behind an early fault all others are noisy,
        but amplify no more. 0: nothing that is worth telling."""
        if not step.after or self._is_exact(noise_in) or noise_out < _LEAST_OF_TWO * noise_in:
            return 0.0
        others = list(self._between[step.kind])
        if len(others) <= ENOUGH_ALIKE:
            return 0.0
        others.remove((noise_in, noise_out))
        most = noise_out / _LEAST_OF_TWO
        gains = [gave / came_in for came_in, gave in others if not self._is_exact(came_in)]
        peers = [
            gave for came_in, gave in others if LEAST_EXCESS * came_in >= noise_in and gave <= most
        ]
        if not peers or len(gains) < ENOUGH_ALIKE:
            return 0.0
        ratio = noise_out / noise_in
        return ratio if ratio >= _LEAST_OF_TWO * max(1.0, *gains) else 0.0

    def _of_alike(self, step: Step, alike: Sequence[float]) -> float:
        """What is usual by places of one kind or class; a call of which there is no other is taken
        to be as noisy as others are, up to what eight bits explain."""
        if len(alike) > 1:
            return _usual(alike)
        return 0.0 if step.after else min(_EIGHT_BITS, self.usual)

    def _ratio_to_class(self, step: Step, noise_in: float, noise_out: float) -> float:
        """By those of its class that received so little that they would show as much: behind an
        early fault all of its own kind are noisy. Gaps are of one class. 0: nothing that is worth
        telling."""
        if noise_out < _LEAST_OF_CLASS * noise_in:
            return 0.0
        noises = self._by_form[self._form(step) if not step.after else _IN_BETWEEN]
        count = bisect_right(noises, noise_out / _LEAST_OF_CLASS, key=itemgetter(0))
        given_out = sorted(given for _, given in noises[:count])
        given_out.remove(noise_out)
        if len(given_out) < 2:
            return 0.0
        level = max(self.rounding, given_out[len(given_out) * 3 // 4], _TINY)
        ratio = (noise_out + level) / (noise_in + level)
        # In a gap, attention makes more of the noise of its scores than a module would.
        is_sure = len(given_out) >= ENOUGH_ALIKE and not step.after
        least = _LEAST_OF_CLASS if is_sure else _LEAST_OF_TWO
        return ratio if ratio >= least else 0.0

    def _ratio_on_top(self, step: Step) -> float:
        """Of what comes in between, over what does at places of its kind, and over a good part of
        what a module adds: where nothing is computed, less is remarkable."""
        if step.on_top is None:
            return 0.0
        alike = self._on_top[step.kind]
        level = median_low(alike) if len(alike) > 1 else 0.0
        level = max(level, self._local.typical / _NOTHING_COMPUTED)
        return step.on_top.noise / max(level, self.rounding, _TINY)

    def _is_exact(self, noise: float) -> bool:
        return noise <= LEAST_EXCESS * self.rounding

    def _is_quantized(self, call: CallNoise) -> bool:
        """Whether a module is known to be, or may be by its class, which somebody has replaced."""
        if call.module in self._quantized:
            return True
        replaced = (row.type[0] for row in call.outputs if row.type[0] != row.type[1])
        return any(part in name for name in replaced for part in _WITH_WEIGHTS)

    def _form(self, step: Step) -> tuple[str, bool]:
        """Places that are quantized alike."""
        return step.class_name, step.call.module in self._quantized

    def _exact_level(self, step: Step, level: float) -> float:
        """What is usual behind exact inputs; `level`: for others.

        Others may have no noise of their own, but what an early fault hands on to all of them. What
        is as early tells: whether its like are noisy at all, or else, whether it is quantized.
        """
        alike = self._exact[self._form(step)]
        peers = [peer.noise_out or 0.0 for peer in alike if peer is not step]
        if peers:
            typical = max(self.rounding, median_high(peers), _TINY)
            if self._is_exact(typical):
                return typical
            # Few that err alike may do so for one reason: no quantizer makes so much noise.
            most = math.inf if len(peers) >= ENOUGH_ALIKE else MOST_OF_QUANTIZATION / LEAST_EXCESS
            return min(max(level, typical), most)
        if step.call.module in self._quantized:
            return min(max(level, self.usual, _EIGHT_BITS), MOST_OF_QUANTIZATION / LEAST_EXCESS)
        if self._is_quantized(step.call):
            return _EIGHT_BITS  # others are as noisy as this hands on to them
        is_small = (step.noise_out or 0.0) <= min(_EIGHT_BITS, LEAST_EXCESS * self.usual)
        if is_small and not step.recast:
            return self.usual  # as all others are, by all that can be told
        return min(level, max(_ROUNDED_OFTEN * self.rounding, _TINY))


class FloorLevels:
    """How much noise a floor has at each place; what it lacks is judged by the run itself."""

    def __init__(
        self, steps: Sequence[Step], floor: Sequence[Step], own: OwnLevels, *, file: str
    ) -> None:
        self._own = own
        self._rounding = rounding = max(own.rounding, _TINY)
        self._file = file
        self._noises = {
            step.place: (step.noise_in, step.noise_out)
            for step in floor
            if step.noise_in is not None and step.noise_out is not None
        }
        levels = sorted(noise for _, noise in self._noises.values() if noise)
        self.usual = max(rounding, levels[len(levels) // 2]) if levels else rounding
        self._least = self._least_excess(map(self._as_in_floor, steps))
        self._given = {step.call.key: step.call.noise_out for step in floor}

    @property
    def text(self) -> str:
        """The usual noise in words."""
        least = f"{10 * math.log10(self._least):.2g} dB"
        return (
            f"noise level of each place from {self._file}, usually {decibels(self.usual)}, told is "
            f"what is {least} above"
        )

    def excess(self, step: Step) -> Excess:
        """How many times the floor's noise comes out, over how many times that came in; where more
        came in than in the floor, what is known of the place alone."""
        whole = self._as_in_floor(step)
        ratios = self._ratios(whole)
        if ratios is None:
            return self._own.excess(step)
        excess = self._above(whole, *ratios)
        is_known = step.is_all_on_top or (step.is_local and not whole.is_local)
        # Where no more than the floor's came in, nothing hides what a place adds.
        return (
            self._alone(step, *self._noises[whole.place])
            if is_known and not excess.rank
            else excess
        )

    def _above(self, step: Step, came_in: float, came_out: float) -> Excess:
        ratio = came_out / max(came_in, 1.0)
        clean = self._least * max(self._noises[step.place][0], self._rounding)
        above = 10.0 * math.log10(came_in), 10.0 * math.log10(came_out)
        if step.noise_in and abs(came_in - 1.0) <= _REPEATED:
            return Excess(ratio, ratio, ratio >= _LEAST_AFTER_REPEATED, clean, 2, above)
        agrees = came_in <= self._least
        # Between calls, less may come out of all that was there than before, and nothing in.
        may_add = above[0] <= _LEAST_DECIBELS or not step.after or bool(step.added)
        is_told = may_add and ratio >= self._least
        return Excess(ratio, ratio, is_told, clean, int(agrees), above)

    def _alone(self, step: Step, came_in: float, came_out: float) -> Excess:
        """What a place has of its own: what it adds in the floor is usual there; all that it gives
        there is more than it adds."""
        excess = self._own.excess(step)
        if step.after:
            is_told = excess.is_told
        else:
            noise, level = step.noise_out or 0.0, max(came_out, self._rounding)
            is_above = self._least < LEAST_EXCESS and noise >= _LEAST_OF_MODULE * level
            is_told = is_above or (excess.is_told and noise > added(came_in, came_out))
        return replace(excess, importance=excess.ratio, is_told=is_told, rank=int(is_told))

    def is_usual(self, call: CallNoise) -> bool:
        """Whether what a call gives is no noisier than in the floor."""
        level = self._given.get(call.key)
        if level is None:
            return self._own.is_usual(call)
        return (call.noise_out or 0.0) <= self._least * max(level, self._rounding)

    def _as_in_floor(self, step: Step) -> Step:
        """A call that was replayed, as it was in the candidate, where the floor is no replay."""
        whole = replace(
            step, is_local=False, noise_in=step.call.noise_in, noise_out=step.call.noise_out
        )
        is_known = step.place in self._noises or whole.place not in self._noises
        return step if is_known or not step.is_local else whole

    def _ratios(self, step: Step) -> tuple[float, float] | None:
        """Noise in and noise out over that of the floor; None where either has no number."""
        level = self._noises.get(step.place)
        if level is None or step.noise_in is None or step.noise_out is None:
            return None
        return (
            (step.noise_in + self._rounding) / (level[0] + self._rounding),
            (step.noise_out + self._rounding) / (level[1] + self._rounding),
        )

    def _least_excess(self, steps: Iterable[Step]) -> float:
        """A floor of the same quantization agrees to a fraction of a decibel where nothing is
        wrong; one in another dtype is a level, no more."""
        ratios = [ratios for step in steps if (ratios := self._ratios(step)) is not None]
        # What follows from other inputs; a place of the same inputs may be the fault itself.
        distances = [
            abs(10.0 * math.log10(came_out))
            for came_in, came_out in ratios
            if abs(came_in - 1.0) > _REPEATED
        ]
        spread = _SPREADS * median(distances) if distances else 0.0
        least: float = 10.0 ** (max(spread, _LEAST_DECIBELS) / 10.0)
        return min(LEAST_EXCESS, least)


def nothing(rounding: float) -> float:
    """The noise up to which nothing is left of an error: what rounding makes, in long sums of
    float32 and finer dtypes as well."""
    return max(LEAST_EXCESS * rounding, min(_ROUNDED_OFTEN * rounding, _NO_ERROR))


def _certainly_added(step: Step, rounding: float) -> float:
    """The noise of a place beyond what it may have made of what came in; of a call that an input
    makes err, beyond what else came in."""
    came_in, gave, gain = step.noise_in, step.noise_out, 1.0
    if came_in is None or gave is None:
        return 0.0
    cause = cause_of(step, LEAST_EXCESS * max(came_in, rounding))
    if cause is None:
        gain = _PLAUSIBLE_GAIN_BETWEEN if step.after else _PLAUSIBLE_GAIN
    elif cause.noises[1] is not None:
        gave = cause.noises[1]
    return max(gave - gain * came_in, 0.0)


def _usual(noises: Sequence[float]) -> float:
    """The lower quartile: behind a fault, most places hand on and amplify what they received."""
    return sorted(noises)[(len(noises) - 1) // 4]
