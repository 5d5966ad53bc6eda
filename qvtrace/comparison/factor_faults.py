"""Factors that nothing takes out again, as reasons of the places where they come in."""

from collections.abc import Sequence
from dataclasses import replace

from qvtrace.comparison.noise import is_output
from qvtrace.comparison.origins import Origin, Origins
from qvtrace.comparison.rows import Row
from qvtrace.metrics.factors import factor_text


def factor_faults(rows: Sequence[Row]) -> list[Row]:
    """The rows that are scaled, with what is around them scaled too."""
    return [row for row in rows if row.scale_factor is not None and not row.is_made_up_for]


def scaled_text(row: Row) -> str:
    """What a factor makes of the reference, in words."""
    assert row.scale_factor is not None
    return f"the reference times {factor_text(row.scale_factor)}"


def with_factors(origins: Origins, faults: Sequence[Row]) -> Origins:
    """The origins, those of a scaled output with the factor as a reason."""
    scaled = {(row.module, row.call): row for row in reversed(faults) if is_output(row)}

    def reasoned(origin: Origin) -> Origin:
        row = scaled.get((origin.module, origin.call))
        if row is None or origin.path != "output":
            return origin
        return replace(origin, reason=f"{origin.reason}, its output is {scaled_text(row)}")

    return replace(origins, found=tuple(map(reasoned, origins.found)))
