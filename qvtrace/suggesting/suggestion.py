"""What a search has found, and each run on the way to it: plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

from qvtrace.suggesting.targets import Target


@dataclass(frozen=True)
class Figure:
    """What the target's metric was in one run."""

    value: float | None  # the worst; None: undefined, or as good as can be where it is `ok`
    ok: bool  # the target is reached
    excess: float | None = None  # how far it is beyond the target, in units of the metric
    module: str | None = None  # where it is worst
    reason: str | None = None  # what stands in place of a number, or takes away from it

    @property
    def badness(self) -> tuple[int, float]:
        """A key that sorts worst last: no number at all is worse than any."""
        if self.excess is None:
            return (-1 if self.ok else 2), 0.0
        return (0 if self.ok else 1), self.excess


@dataclass(frozen=True)
class Step:
    """One real run with some modules kept float."""

    run: int  # from 1 on
    why: str  # how these modules were chosen
    kept: tuple[str, ...]  # largest local error first
    figure: Figure
    extra_bytes: int
    modules: int  # that are float then: of these and of those within them, what may be kept
    seconds: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A module that was quantized and may be kept float."""

    name: str  # the float model's
    noise: float | None = None  # its own noise-to-signal ratio of powers; None: not replayed
    peir: float | None = None
    reason: str | None = None  # why there is no number
    holds: bool = False  # further candidates within it
    extra_bytes: int | None = None  # as float, beyond what it takes quantized; None: not looked at


@dataclass(frozen=True)
class Suggestion:
    """The smallest set that was seen to reach the target, or the best that was seen."""

    reference: str  # file
    quantizer: str
    target: Target
    modules: tuple[str, ...]  # whose outputs the target is about
    reached: bool
    reason: str  # how it ended, in words
    keep_float: tuple[str, ...]  # largest local error first
    extra_bytes: int  # of these as float, beyond what they take quantized
    figure: Figure
    steps: tuple[Step, ...]
    max_runs: int
    budget: int | None  # extra bytes
    minimal: bool  # each was left out in a run, which then missed the target
    candidates: tuple[Candidate, ...]  # in the order in which they were considered
    left_float: tuple[str, ...]  # these, and what the quantizer leaves float anyway
    seconds: float
    warnings: Sequence[str] = ()
