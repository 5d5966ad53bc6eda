"""What a model is to reach: one figure of some outputs, and on which side of a number it must be.

A target is the other way to write a gate: `peir 0.02 @ lm_head` is reached where the gate
`peir>0.02 @ lm_head` holds.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from qvtrace.errors import UsageError
from qvtrace.judging.end_to_end import END_TO_END, HIGHER_END_TO_END
from qvtrace.judging.gates import Gate, finite_number
from qvtrace.metrics.names import HIGHER_IS_BETTER, LOCAL_METRICS, METRICS
from qvtrace.patterns import ROOT, match, shown

# What is measured of outputs alone: of inputs nothing is recorded while searching.
MEASURED = tuple(
    name for name in METRICS if name not in ("noise_in", "added", "gain", *LOCAL_METRICS)
)
_HIGHER = HIGHER_IS_BETTER | HIGHER_END_TO_END
# Between which numbers each can be, where not from 0 up.
_RANGES = {
    "mean_error": (-math.inf, math.inf),
    "sqnr": (-math.inf, math.inf),
    "token_sqnr_p50": (-math.inf, math.inf),
    "token_sqnr_p5": (-math.inf, math.inf),
    "token_sqnr_min": (-math.inf, math.inf),
    "cosine": (-1.0, 1.0),
    "top1": (0.0, 1.0),
}


@dataclass(frozen=True)
class Target:
    """`METRIC NUMBER [@ PATTERN]`, parsed."""

    text: str
    metric: str  # of `MEASURED`, or `kl` or `top1`
    number: float
    pattern: str | None  # on module names; None: the output of the model, whose name is empty

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises `UsageError` for what is no target."""
        condition, at, pattern = (part.strip() for part in text.partition("@"))
        words = condition.split()
        if len(words) != 2:
            raise _faulty(
                text, "is no 'METRIC NUMBER [@ PATTERN]'; write, for example, 'peir 0.02 @ lm_head'"
            )
        metric, number = words[0], finite_number(words[1])
        if metric not in (*MEASURED, *END_TO_END):
            known = ", ".join((*MEASURED, *END_TO_END))
            raise _faulty(text, f"{metric!r} is not known; choose one of {known}")
        if number is None:
            raise _faulty(text, f"{words[1]!r} is no finite number; give one, such as 0.02")
        least, most = _RANGES.get(metric, (0.0, math.inf))
        if not least <= number <= most:
            told = f"{least:g} or more" if most == math.inf else f"between {least:g} and {most:g}"
            raise _faulty(text, f"{metric} is never {words[1]}; give a number {told}")
        if at and not pattern:
            raise _faulty(text, "has no pattern after '@'; give one, or leave '@' out")
        if metric in END_TO_END and at:
            raise _faulty(text, f"{metric} is of the whole model; leave '@ {pattern}' out")
        return cls(text.strip(), metric, number, pattern or None)

    @property
    def higher_is_better(self) -> bool:
        """Whether the number is the least that will do."""
        return self.metric in _HIGHER

    @property
    def is_end_to_end(self) -> bool:
        """Whether it is about the logits of the whole model."""
        return self.metric in END_TO_END

    @property
    def gate(self) -> Gate:
        """What must not be."""
        operator = "<" if self.higher_is_better else ">"
        pattern = "" if self.is_end_to_end else f" @ {self.pattern or ROOT}"
        return Gate.parse(f"{self.metric}{operator}{self.number!r}{pattern}", "--target")

    @property
    def described(self) -> str:
        """In words: `peir at most 0.02 at lm_head`."""
        where = "" if self.is_end_to_end else f" at {self.pattern or shown('')}"
        most = "at least" if self.higher_is_better else "at most"
        return f"{self.metric} {most} {self.number:.15g}{where}"

    def modules(self, called: Collection[str], file: str) -> set[str]:
        """The modules whose output it is about, of those that were called in the reference.

        Raises `UsageError` where there is none.
        """
        found = match(called, self.pattern or ROOT)
        if not found and self.pattern is None:
            raise _faulty(
                self.text,
                f"the output of the model is not in {file}; name modules with '@ PATTERN'",
            )
        if not found:
            raise _faulty(
                self.text,
                f"the pattern {self.pattern!r} matches none of {len(called)} modules in {file}; "
                "list them with `qvtrace show ARCHIVE`",
            )
        return found


def _faulty(text: str, fault: str) -> UsageError:
    return UsageError(f"--target {text!r}: {fault}")
