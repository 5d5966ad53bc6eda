"""The answer in words: where error comes in first and where then, how much of it these explain, and
what is usual."""

from collections.abc import Iterator, Sequence

from qvtrace.comparison.noise import decibels
from qvtrace.comparison.origins import ADDS, ERRS, Origins, inputs_text
from qvtrace.comparison.row_names import RowNames
from qvtrace.comparison.rows import Place
from qvtrace.patterns import shown

_SHOWN = 3


def answer(
    origins: Origins, name: RowNames, final: float | None, *, is_clear: bool = True, hint: str = ""
) -> tuple[str, ...]:
    """At most six lines, the first of which is the answer; none where nothing differs.

    `final` is the noise of what the model gives, a ratio of powers; None: not known. `is_clear`:
    where no place is told, nothing else is either; `hint` is what that does not mean.
    """
    if origins.level is None:
        return ()
    lines = list(_told(origins, name, final))
    if not origins.known:
        lines.append("where error comes in is not known: of no call it is, what it was given")
    elif lines or not is_clear:
        lines.append(origins.level)
    else:
        nothing = f"{_nothing(origins, name)} adds much more than is usual"
        lines.append("; ".join(filter(None, (nothing, hint, origins.level))))
    return tuple(lines)


def _told(origins: Origins, name: RowNames, final: float | None) -> Iterator[str]:
    told, others = origins.found[:_SHOWN], origins.found[_SHOWN:]
    for number, origin in enumerate(told):
        first = "origin" if origin.evidence == "local" else "first seen"
        place = Place(origin.module, origin.call, origin.path)
        where = f"{shown(origin.module)}{name.call(place)}"
        told_of = f"{where} ({origins.noises[number]}){_beyond_noises(origin.reason)}"
        yield f"{'then' if number else first} at {told_of}"
    if others:
        places = "1 further place" if len(others) == 1 else f"{len(others)} further places"
        yield f"then at {places}, which JSON lists"
    # Of an input that differs, a replay with the right one tells nothing.
    if origins.local and any(origins.alone[:_SHOWN]):
        yield _explained(origins, origins.local, final)


def _beyond_noises(reason: str) -> str:
    """What a reason says that noise in and noise out do not."""
    for plain in (ADDS, ERRS):
        if reason.startswith(plain):
            reason = reason.removeprefix(plain).removeprefix(", ")
    return f": {reason}" if reason else ""


def _nothing(origins: Origins, name: RowNames) -> str:
    """What is not known is not clean."""
    before = origins.before
    if before is None:
        return "no place"
    where = f"{shown(before.module)}{name.call(Place(before.module, before.call, before.path))}"
    reason = before.reason.replace("before it", f"before {where} ({inputs_text(before)})")
    return f"error {reason}; no other place"


def _explained(origins: Origins, everything: float, final: float | None) -> str:
    """An estimate: what later modules do to noise is known so far as both archives bound it."""
    size = "" if final is None else f" ({decibels(final)})"
    share = (
        f"these make about {_share(origins.alone[:_SHOWN], everything)} of the final error{size}"
    )
    if any(origins.alone[_SHOWN:]):
        all_of_them = _share(origins.alone, everything)
        share += f", all {len(origins.found)} places {all_of_them}"
    return f"{share}: by their local noise and how large what they add is in the residual stream"


def _share(noises: Sequence[float], everything: float) -> str:
    return f"{min(1.0, sum(noises) / everything):.0%}"
