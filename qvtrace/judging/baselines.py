"""Whether an earlier comparison is of the same as a later one: what got worse means nothing else.

What an older qvtrace did not write is not known, and neither decides nor is it passed over.
"""

from collections.abc import Callable, Iterator

from qvtrace.comparison.comparison import Comparison, Side

_DIGESTS = {
    "another configuration": "config_digest",
    "other float weights": "weights_digest",
}


def why_unlike(earlier: Comparison, now: Comparison) -> str | None:
    """Why the earlier of two comparisons is no baseline of the later; None where it is one, as far
    as is known."""
    classes = [one.reference.model.get("class") for one in (earlier, now)]
    if None not in classes and classes[0] != classes[1]:
        return f"it is of another model, {classes[0]}, and this of {classes[1]}"
    modules = [{row.module for row in one.rows} for one in (earlier, now)]
    common = len(modules[0] & modules[1])
    fewer = min(map(len, modules))
    if 2 * common < fewer:
        return f"it is of another model, which has {common} of {fewer} modules"
    if _are_crossed(earlier, now, _variant) or _are_crossed(earlier, now, _file):
        return "its reference and its candidate are the other way round"
    return _why_other_inputs(earlier, now)


def differences(earlier: Comparison, now: Comparison) -> Iterator[str]:
    """What is other in the earlier of two comparisons, or not known of one, and does not decide."""
    file = earlier.file or "the baseline"
    unknown = _why_unknown_inputs(earlier, now)
    if unknown is not None:
        yield f"whether {file} had the same inputs is not known: {unknown}"
    for what, name in _DIGESTS.items():
        digests = [one.reference.model.get(name) for one in (earlier, now)]
        if None not in digests and digests[0] != digests[1]:
            yield f"{file} had {what}"


def _why_other_inputs(earlier: Comparison, now: Comparison) -> str | None:
    samples = _samples(earlier), _samples(now)
    if samples[0] != samples[1]:
        return f"it has other inputs: {samples[0]} samples against {samples[1]} here"
    if earlier.inputs is None or now.inputs is None or _why_unknown_inputs(earlier, now):
        return None
    same = earlier.inputs.get("digest") == now.inputs.get("digest")
    return None if same else "it has other inputs"


def _samples(comparison: Comparison) -> int:
    """How many the rows are of: those of an older result tell that as well."""
    pooled = (row.samples.count for row in comparison.rows if row.samples is not None)
    apart = {row.sample for row in comparison.rows if row.sample is not None}
    return max(len(apart), *pooled, 1)


def _why_unknown_inputs(earlier: Comparison, now: Comparison) -> str | None:
    if earlier.inputs is None:
        return "it does not say"
    if now.inputs is None:
        return "this result does not say"
    if earlier.inputs.get("key") != now.inputs.get("key"):
        return "they are private, not under one key"
    return None


def _are_crossed(
    earlier: Comparison, now: Comparison, what: Callable[[Side], tuple[object, ...]]
) -> bool:
    """Whether the reference of each is what the candidate of the other is."""
    before = what(earlier.reference), what(earlier.candidate)
    return before[0] != before[1] and before == (what(now.candidate), what(now.reference))


def _variant(side: Side) -> tuple[object, ...]:
    variant = side.variant
    return variant.get("name"), variant.get("quantizer"), bool(variant.get("quantized"))


def _file(side: Side) -> tuple[object, ...]:
    return (side.file,)
