"""How large the reference's numbers are that replayed modules were given, and what they gave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.noise import CallKey, CallNoise, is_float
from qvtrace.comparison.noise_steps import argument
from qvtrace.comparison.rows import Place, Row
from qvtrace.metrics.sizes import Sizes
from qvtrace.trees import TensorLeaf


@dataclass(frozen=True)
class CallSizes:
    """Of a call's first argument and its first output."""

    given: Sizes
    gave: Sizes


def find_sizes(
    calls: Sequence[CallNoise],
    tensors: Mapping[Place, tuple[TensorLeaf, TensorLeaf]],
    contents: ContentPairs,
) -> dict[CallKey, CallSizes]:
    """By call, where both are tensors of floats; of calls that hold no others.

    `tensors` are those of all rows. Elements of the reference are read again.
    """
    known: dict[str, Sizes | None] = {}

    def sizes(rows: Sequence[Row]) -> Sizes | None:
        row = _first_floats(rows)
        leaf = None if row is None or row.place not in tensors else tensors[row.place][0]
        if leaf is None:
            return None
        if leaf.digest not in known:
            known[leaf.digest] = contents.sizes(leaf)
        return known[leaf.digest]

    found = {}
    for call in calls:
        if call.local and not call.held:
            given, gave = sizes(call.inputs), sizes(call.outputs)
            if given is not None and gave is not None:
                found[call.key] = CallSizes(given, gave)
    return found


def _first_floats(rows: Sequence[Row]) -> Row | None:
    floats = (row for row in rows if argument(row) == argument(rows[0]))
    return next((row for row in floats if is_float(row.dtype[0])), None)
