"""The noise floor of a comparison, measured by a third archive."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import align
from qvtrace.comparison.comparability import inputs_agree
from qvtrace.comparison.noise import CallNoise, call_noises
from qvtrace.comparison.options import DiffOptions
from qvtrace.comparison.origin_search import Floor
from qvtrace.comparison.rotating import Declared
from qvtrace.comparison.row_building import RowBuilder
from qvtrace.comparison.rows import Place, Row
from qvtrace.errors import UsageError
from qvtrace.metrics.names import Metrics

_MEASURED = ("ok", "identical")


@dataclass(frozen=True)
class Measured:
    """What a floor has at the places of the reference."""

    metrics: dict[Place, Metrics]
    calls: Sequence[CallNoise]
    file: str

    @property
    def levels(self) -> Floor:
        """What an origin is above."""
        return Floor(self.calls, self.file)

    def on(self, rows: Iterable[Row]) -> list[Row]:
        """The rows, each with the metrics of the floor at the same place."""
        return [replace(row, floor=self.metrics.get(row.place)) for row in rows]


def measure_floor(
    modules: set[str],
    reference: Archive,
    floor: Archive | None,
    options: DiffOptions,
    rotations: Declared | None = None,
) -> Measured | None:
    """What `floor` differs from the reference by in these modules, where that could be compared and
    is finite; None without a floor.

    Raises `UsageError` for an archive of other inputs, whose differences are no noise, and for one
    that shares no place of these modules.
    """
    if floor is None:
        return None
    if not inputs_agree(reference, floor):
        raise UsageError(
            f"--floor {floor.file}: measures no noise: its inputs are others than those of "
            f"{reference.file}; record it --like that"
        )
    pairs = align(reference.manifest, floor.manifest, ()).pairs
    built = RowBuilder(
        reference,
        floor,
        options.path,
        pairs,
        rotations=rotations,
        per_sample=options.per_sample,
    )
    for pair in pairs:
        if pair.reference.module in modules:
            built.add(pair)
    built.compare()
    rows = [*built.rows, *built.aside]
    if not any(row.status in _MEASURED for row in built.rows or rows):
        raise UsageError(
            f"--floor {floor.file}: measures no noise: nothing of it can be compared with "
            f"{reference.file}; give a second run of the same model, such as one in bfloat16"
        )
    # The noise of a replay is each module's own, and a level for that of others.
    replayed = rows if floor.manifest.recorded_by == "replay" else ()
    return Measured(
        {row.place: row.metrics for row in built.rows if row.status in _MEASURED},
        call_noises(rows, built.calls, replayed),
        floor.label,
    )
