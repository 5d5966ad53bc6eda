"""How much of two archives was compared."""

from dataclasses import dataclass

from qvtrace.alignment import Alignment
from qvtrace.rows import COMPARED, Place, RowBuilder


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


def cover(built: RowBuilder, alignment: Alignment) -> Coverage:
    """Count what was built from an alignment, or from a part of it."""
    compared = [row for row in built.rows if row.status in COMPARED]
    in_reference = {place.module for place in built.only_in_reference}
    in_candidate = {place.module for place in built.only_in_candidate}
    reference_wrappers = in_reference & alignment.reference_wrappers
    candidate_wrappers = in_candidate & alignment.candidate_wrappers
    rows_of = {row.module for row in built.rows}
    return Coverage(
        modules_reference=len(rows_of | (in_reference - reference_wrappers)),
        modules_candidate=len(built.candidate_modules | (in_candidate - candidate_wrappers)),
        modules_compared=len({row.module for row in compared}),
        pairs=len(built.rows),
        compared=len(compared),
        identical=sum(row.status == "identical" for row in built.rows),
        not_comparable=len(built.rows) - len(compared),
        only_in_reference=tuple(built.only_in_reference),
        only_in_candidate=tuple(built.only_in_candidate),
        wrappers=tuple(sorted(reference_wrappers | candidate_wrappers)),
    )
