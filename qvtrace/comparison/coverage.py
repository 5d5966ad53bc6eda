"""How much of two archives was compared."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from qvtrace.comparison.alignment import Alignment
from qvtrace.comparison.row_building import RowBuilder
from qvtrace.comparison.rows import COMPARED, FailedCall, Place, Row


@dataclass(frozen=True)
class Coverage:
    """What was compared and what was not, within the filters that were asked for.

    Modules are counted that have something at the places asked for; those that only wrap, or are
    wrapped by, a compared one are no further modules.
    """

    modules_reference: int
    modules_candidate: int
    modules_compared: int
    pairs: int  # rows
    compared: int  # rows that are `ok`, `identical`, `nonfinite`, `exact` or `mismatch`
    identical: int
    not_comparable: int
    only_in_reference: tuple[Place, ...] = ()
    only_in_candidate: tuple[Place, ...] = ()
    # Modules among the latter two that wrap a compared one, or that a quantizer added.
    wrappers: tuple[str, ...] = ()
    failed: tuple[FailedCall, ...] = ()  # calls of both sides that raised or did not return

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        only_in_reference: Sequence[Place],
        only_in_candidate: Sequence[Place],
        *,
        candidate_modules: Collection[str] | None = None,
        wrappers: Collection[str] = (),
    ) -> "Coverage":
        """Count these; the candidate's names in the rows are the reference's unless given."""
        compared = [row for row in rows if row.status in COMPARED]
        reference_modules = {row.module for row in rows}
        candidate_modules = reference_modules if candidate_modules is None else candidate_modules
        unmatched = [
            {place.module for place in places} for places in (only_in_reference, only_in_candidate)
        ]
        return cls(
            modules_reference=len(reference_modules | unmatched[0].difference(wrappers)),
            modules_candidate=len(unmatched[1].difference(wrappers).union(candidate_modules)),
            modules_compared=len({row.module for row in compared}),
            pairs=len(rows),
            compared=len(compared),
            identical=sum(row.status == "identical" for row in rows),
            not_comparable=len(rows) - len(compared),
            only_in_reference=tuple(only_in_reference),
            only_in_candidate=tuple(only_in_candidate),
            wrappers=tuple(sorted(unmatched[0].union(unmatched[1]).intersection(wrappers))),
        )


def cover(built: RowBuilder, alignment: Alignment) -> Coverage:
    """Count what was built from an alignment, or from a part of it."""
    coverage = Coverage.of(
        built.rows,
        built.only_in_reference,
        built.only_in_candidate,
        candidate_modules=built.candidate_modules,
        wrappers=alignment.reference_wrappers | alignment.candidate_wrappers,
    )
    return replace(coverage, failed=tuple(built.failed))
