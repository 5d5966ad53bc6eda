"""The noise floor of a comparison, measured by a third archive."""

from collections.abc import Sequence
from dataclasses import replace

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import align
from qvtrace.comparison.comparability import inputs_agree
from qvtrace.comparison.row_building import RowBuilder
from qvtrace.comparison.rows import Row
from qvtrace.errors import UsageError

_MEASURED = ("ok", "identical")


def with_floor(rows: Sequence[Row], reference: Archive, floor: Archive, path: str) -> list[Row]:
    """The rows, each with the metrics of the same place of `floor` against the reference, where
    that could be compared and is finite.

    Raises `UsageError` for an archive of other inputs: its differences are no noise.
    """
    if not inputs_agree(reference, floor):
        raise UsageError(
            f"--floor {floor.file}: measures no noise: its inputs are others than those of "
            f"{reference.file}; record it --like that"
        )
    modules = {row.module for row in rows}
    pairs = align(reference.manifest, floor.manifest, ()).pairs
    built = RowBuilder(reference, floor, path, pairs)
    for pair in pairs:
        if pair.reference.module in modules:
            built.add(pair)
    built.compare()
    found = {row.place: row.metrics for row in built.rows if row.status in _MEASURED}
    return [replace(row, floor=found.get(row.place)) for row in rows]
