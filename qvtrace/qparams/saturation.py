"""What share of recorded values is beyond the range of the quantization parameters: saturation."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Pair
from qvtrace.comparison.contents import ContentPairs
from qvtrace.manifest import CallEntry
from qvtrace.metrics.elements import Array
from qvtrace.qparams.findings import Finding, range_text
from qvtrace.qparams.parameters import INPUT, OUTPUT, ModuleParameters, Parameters
from qvtrace.trees import TensorLeaf, tensor_leaves

SATURATED_SHARE = (
    0.01  # of values beyond the range: what a percentile calibration leaves out is less
)

_PARTS = {INPUT: "inputs", OUTPUT: "output"}
_BLOCK = 1 << 20
_Side: TypeAlias = tuple[Archive, TensorLeaf]
_Look: TypeAlias = Callable[[Hashable, Callable[[], tuple[int, int]]], tuple[int, int]]

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


def saturated(archive: Archive, parameters: ModuleParameters) -> list[Finding]:
    """Modules that were given, or gave, values beyond the range of their own parameters.

    What has been clipped lies at the ends of the range: it is counted where an end is not zero and
    no observer saw values up to it.
    """
    tallies = _Tallies()
    for call in archive.manifest.calls:
        for found in _static(parameters, call.module):
            leaf = _first_float(archive, call, _PARTS[found.of])
            if leaf is not None and archive.has_elements(leaf):
                tallies.add(call.module, found, [(archive, leaf)])
    return tallies.findings()


def saturated_pairs(
    contents: ContentPairs, pairs: Iterable[Pair], parameters: ModuleParameters
) -> list[Finding]:
    """Modules of the candidate, whose `parameters` these are, whose range is too small.

    Of an input what the candidate was given counts, before it quantizes it; of an output what is at
    an end of the range where the reference is beyond it.
    """
    reference, candidate = contents.reference, contents.candidate
    tallies = _Tallies(contents.count_beyond)
    for pair in pairs:
        for found in _static(parameters, pair.candidate.module):
            leaf = _first_float(candidate, pair.candidate, _PARTS[found.of])
            if leaf is None or not candidate.has_elements(leaf):
                continue
            sides = [(candidate, leaf)]
            if found.of == OUTPUT:
                other = _first_float(reference, pair.reference, _PARTS[found.of])
                if other is None or other.shape != leaf.shape:
                    continue
                if _stored(reference, other) != _stored(candidate, leaf):
                    continue
                sides.append((reference, other))
            tallies.add(pair.candidate.module, found, sides)
    return tallies.findings()


@dataclass
class _Tally:
    """Values counted over all calls of a module."""

    found: Parameters
    beyond: int = 0
    total: int = 0


class _Tallies:
    """Counts values beyond ranges; contents that several modules hold are looked at once."""

    def __init__(self, look: _Look = lambda _, count: count()) -> None:
        """`look` counts, or knows what counting has found before."""
        self._look = look
        self._of_module: dict[tuple[str, str], _Tally] = {}
        self._counted: dict[Hashable, tuple[int, int]] = {}

    def add(self, module: str, found: Parameters, sides: Sequence[_Side]) -> None:
        """Count the values of `sides[0]` in one call of a module.

        With a second side the first has been clipped, and the second says from what.
        """
        contents = tuple((leaf.digest, leaf.dtype) for _, leaf in sides)
        key = contents, found.range, found.scale, found.minimum is None
        if key not in self._counted:
            self._counted[key] = self._look(
                key, lambda: _count([archive.array(leaf) for archive, leaf in sides], found)
            )
        beyond, total = self._counted[key]
        tally = self._of_module.setdefault((module, found.of), _Tally(found))
        tally.beyond += beyond
        tally.total += total

    def findings(self) -> list[Finding]:
        """The modules of which too large a share is beyond."""
        return [
            Finding(
                module,
                of,
                f"{100 * tally.beyond / tally.total:.3g} % of the values are beyond its range "
                f"{range_text(tally.found)}",
            )
            for (module, of), tally in self._of_module.items()
            if tally.beyond > SATURATED_SHARE * tally.total
        ]


def _static(parameters: ModuleParameters, module: str) -> Iterator[Parameters]:
    """Those of which one range, known beforehand, holds for a whole input or output."""
    for found in parameters.of(module):
        one = found.scale is not None and found.scale.count == 1
        if found.of in _PARTS and one and found.range is not None:
            yield found


def _first_float(archive: Archive, call: CallEntry, part: str) -> TensorLeaf | None:
    node = archive.tree(call, part)
    leaves = () if node is None else tensor_leaves(node, part)
    return next((leaf for _, leaf in leaves if leaf.dtype in _FLOATS), None)


def _stored(archive: Archive, leaf: TensorLeaf) -> tuple[str, int] | None:
    """What the archive holds of a tensor: None for all of it; samples of one size are alike."""
    portion = archive.portion(leaf)
    return None if portion is None else (portion.portion, portion.vectors)


def _count(sides: Sequence[Array], found: Parameters) -> tuple[int, int]:
    """How many finite values lie beyond the range, and how many there are; masking constants are
    no values."""
    beyond = total = 0
    flat = [side.reshape(-1) for side in sides]
    for start in range(0, flat[0].size, _BLOCK):
        values = [_wide(side[start : start + _BLOCK]) for side in flat]
        finite = np.abs(values[-1]) < np.finfo(values[-1].dtype).max / 2
        total += int(np.count_nonzero(finite))
        beyond += int(np.count_nonzero(finite & _is_beyond(values, found)))
    return beyond, total


def _wide(block: Array) -> Array:
    return block if block.dtype == np.float64 else block.astype(np.float32)


def _is_beyond(values: Sequence[Array], found: Parameters) -> Array:
    assert found.range is not None
    assert found.scale is not None
    low, high = found.range.minimum, found.range.maximum
    half = abs(found.scale.maximum or 0.0) / 2
    if len(values) > 1:
        clipped, reference = values
        below = (reference < low - half) & (clipped <= low + half)
        return below | ((reference > high + half) & (clipped >= high - half))
    ends_count = found.of == OUTPUT and found.minimum is None
    below = values[0] < (low + half if ends_count and low < -2 * half else low - half)
    return below | (values[0] > (high - half if ends_count and high > 2 * half else high + half))
