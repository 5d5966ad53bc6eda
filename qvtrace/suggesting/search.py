"""Which modules to keep float: few of those with the largest local error, each set really run.

Modules are taken in one order, and the shortest beginning of it that reaches the target is looked
for by halving, on the assumption that more float modules do no harm. What is left over of the runs
is spent on leaving out some of what was found, and on the parts of blocks in place of these. The
set of fewest bytes that reached the target was run itself, whatever became of the assumption.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qvtrace.patterns import above
from qvtrace.suggesting.suggestion import Figure, Step

Sizes = Callable[[Iterable[str]], int]  # extra bytes of modules kept float
Counts = Callable[[Iterable[str]], int]  # how many modules are float then
Measure = Callable[[Step], Step]  # runs it: the step with its figure


class _OutOfRuns(Exception):  # noqa: N818 (no error)
    """No further run is allowed."""


@dataclass(frozen=True)
class Order:
    """Modules, those that are to be kept first."""

    names: tuple[str, ...]
    why: str
    complete: bool  # these are all that are quantized: nothing has left any out
    what: str = "as many as the budget allows"


@dataclass
class Search:
    """One search; `steps` grows by each run."""

    orders: Callable[[], Iterable[Order]]  # asked once something must be kept; each is tried until
    # all that is in one is enough
    sizes: Sizes
    counts: Counts
    measure: Measure
    max_runs: int
    steps: list[Step] = field(default_factory=list)
    minimal: bool = False
    exhausted: bool = False  # it ended for want of runs
    everything: Step | None = None  # with all that may be kept, where that was not enough

    def run(self) -> Step:
        """The step with the smallest set that reaches the target, or the best one."""
        try:
            self._search()
        except _OutOfRuns:
            self.exhausted = True
        return self.best

    @property
    def best(self) -> Step:
        """Of the steps that reach the target that with fewest bytes, else the nearest to it."""
        return min(self.steps, key=_rank)

    @property
    def reached(self) -> bool:
        """Whether any step reaches the target."""
        return any(step.figure.ok for step in self.steps)

    def _search(self) -> None:
        if self._try("nothing kept", ()).figure.ok:
            self.minimal = True
            return
        for order in self.orders():
            step = self._all(order)
            if step.figure.ok:
                self._leave_out(self._shortest(order))
                self._split(order)
                return
            if order.complete:
                self.everything = step

    def _all(self, order: Order) -> Step:
        if order.complete:
            return self._try("all that may be kept", order.names)
        return self._try(f"{order.what}, {order.why}", order.names)

    def _shortest(self, order: Order) -> tuple[str, ...]:
        """The shortest beginning of an order that reaches the target, as far as halving tells.

        The middle is the geometric one: a few are more often enough than half of all.
        """
        missed, reached = 0, len(order.names)
        while reached - missed > 1:
            middle = math.isqrt((missed + 1) * (reached + 1)) - 1
            middle = min(max(middle, missed + 1), reached - 1)
            ok = self._try(f"first {middle}, {order.why}", order.names[:middle]).figure.ok
            missed, reached = (missed, middle) if ok else (middle, reached)
        return order.names[:reached]

    def _leave_out(self, kept: tuple[str, ...]) -> None:
        """Without the last of them the target was missed; leave out of the others what can be,
        the smallest local error first, and several at once where runs are few."""
        kept = outermost(kept)
        others = list(reversed(kept[:-1]))
        if not others:
            self.minimal = True
            return
        left = self.max_runs - len(self.steps)
        if left < 1:
            raise _OutOfRuns
        most = max(1, len(others) // 4)  # more at once are hardly ever dispensable
        size = min(math.ceil(len(others) / left), most)
        for start in range(0, len(others), size):
            without = others[start : start + size]
            fewer = tuple(name for name in kept if name not in without)
            told = without[0] if len(without) == 1 else f"{len(without)} of them"
            if self._try(f"without {told}", fewer).figure.ok:
                kept = fewer
        self.minimal = size == 1

    def _split(self, order: Order) -> None:
        """In place of a block that is kept, what is in it, as far as that is needed."""
        tried: set[str] = set()
        minimal, self.minimal = self.minimal, False
        while parts := self._next_parts(order, tried):
            block, inner = parts
            tried.add(block)
            kept = tuple(name for name in self.best.kept if name != block)
            if not self._try(f"of {block} what is in it", (*inner, *kept)).figure.ok:
                continue
            for name in sorted(inner, key=lambda one: self.sizes((one,)), reverse=True):
                fewer = tuple(one for one in inner if one != name)
                if self._try(f"without {name}", (*fewer, *kept)).figure.ok:
                    inner = fewer
        self.minimal = minimal

    def _next_parts(self, order: Order, tried: set[str]) -> tuple[str, tuple[str, ...]] | None:
        """A block that is kept and not tried yet, the least telling first, with what is in it."""
        for block in reversed(self.best.kept):
            inner = outermost([name for name in order.names if block in above(name)])
            if inner and block not in tried:
                return block, inner
        return None

    def _try(self, why: str, kept: tuple[str, ...]) -> Step:
        kept = outermost(kept)
        known = next((step for step in self.steps if set(step.kept) == set(kept)), None)
        if known is not None:
            return known
        if len(self.steps) >= self.max_runs:
            raise _OutOfRuns
        figure = Figure(None, ok=False)
        step = self.measure(
            Step(len(self.steps) + 1, why, kept, figure, self.sizes(kept), self.counts(kept))
        )
        self.steps.append(step)
        return step


def _rank(step: Step) -> tuple[bool, tuple[int, float], int, int]:
    """Best first: fewest bytes where the target is reached, then modules; else the nearest."""
    nearness = (0, 0.0) if step.figure.ok else step.figure.badness
    return not step.figure.ok, nearness, step.extra_bytes, step.modules


def outermost(names: Sequence[str]) -> tuple[str, ...]:
    """The names but for those of modules within another one, which is kept with all that it has."""
    chosen = set(names)
    return tuple(name for name in names if chosen.isdisjoint(above(name)))


def within(names: Sequence[str], budget: int | None, sizes: Sizes) -> tuple[str, ...]:
    """The names, in their order, but for those that no longer fit into the budget."""
    if budget is None:
        return tuple(names)
    kept: tuple[str, ...] = ()
    for name in names:
        if sizes((*kept, name)) <= budget:
            kept = (*kept, name)
    return kept
