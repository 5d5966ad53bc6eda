"""Gates on what a language model says as a whole: one number each, over all scored tokens."""

from qvtrace.comparison.logits import Logits

END_TO_END = ("kl", "top1")  # the mean divergence in nats; the share of tokens that agree
HIGHER_END_TO_END = frozenset({"top1"})


def end_to_end(subject: str, logits: Logits) -> float | None:
    """The number that a gate of this subject is about; None where no token has one."""
    if subject == "kl":
        return None if logits.kl is None else logits.kl.mean
    return None if logits.top1 is None else logits.top1.share


def doubt(logits: Logits) -> str | None:
    """What takes away from such a number."""
    counted = "1 token" if logits.tokens == 1 else f"{logits.tokens} tokens"
    if logits.nonfinite:
        counted = f"{logits.nonfinite} of {counted} not finite"
    elif not logits.too_few:
        return None
    return f"{counted}: too few to judge" if logits.too_few else counted
