"""Where in the tensors of a module their error is, and what of its inputs stands out."""

from collections.abc import Iterable
from dataclasses import dataclass

from qvtrace.comparison.axes import TensorAxes
from qvtrace.comparison.call_leaves import tensors_of
from qvtrace.comparison.contents import ContentPairs
from qvtrace.comparison.leaves import LeafPair
from qvtrace.comparison.rows import COMPARED, Place, Row
from qvtrace.manifest import CallEntry, Manifest
from qvtrace.metrics.names import Undefined
from qvtrace.metrics.spreads import Spread
from qvtrace.trees import TensorLeaf


@dataclass(frozen=True)
class Explanation:
    """How the error of one row, or of what a row's module was given, is spread."""

    place: Place
    sample: int
    shape: tuple[int, ...]  # as the axes of tokens and channels are numbered
    channel_axis: int
    spread: Spread | None
    reason: str | None = None  # why there is none

    @property
    def is_input(self) -> bool:
        """Whether the module was given it."""
        return self.place.path.partition(".")[0] in ("inputs", "kwargs")


class Explainer:
    """Looks at pairs of leaves once more, by token and by channel."""

    def __init__(self, contents: ContentPairs, reference: Manifest) -> None:
        self._contents = contents
        self._axes = TensorAxes(reference)

    def explain(self, places: Iterable[tuple[Row, CallEntry, LeafPair]]) -> tuple[Explanation, ...]:
        """Each pair of tensors of floats among the places of calls."""
        pairs = ((row, call, tensors_of(leaves)) for row, call, leaves in places)
        found = (
            self._explanation(row, call, *tensors)
            for row, call, tensors in pairs
            if tensors is not None
        )
        return tuple(explanation for explanation in found if explanation is not None)

    def _explanation(
        self, row: Row, call: CallEntry, reference: TensorLeaf, candidate: TensorLeaf
    ) -> Explanation | None:
        shape, sample = reference.shape, row.sample or 0
        if row.status in ("exact", "mismatch"):
            return None
        portions = self._contents.portions
        if row.status not in COMPARED or not portions.can_be_read(reference, candidate):
            why = row.undefined.get("max_abs_error") or row.status
            return Explanation(row.place, sample, shape, -1, None, why)
        is_sampled = portions.are_partial(reference, candidate)
        axes = self._axes.of(row.module, row.path, shape)
        axes = axes.sampled() if is_sampled else axes
        kept = self._contents.kept(call, reference, candidate)
        found = self._contents.spread(reference, candidate, axes, kept)
        if found is None:
            if kept is None or kept.any():
                return None
            return Explanation(row.place, sample, shape, -1, None, Undefined.PADDING.value)
        return Explanation(row.place, sample, shape, axes.channels, found)
