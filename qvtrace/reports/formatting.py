"""Numbers, sizes and names as people read them."""

import math
import unicodedata
from collections.abc import Sequence

_FIXED = range(-4, 6)  # other powers of ten are written as such
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB")


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey instead of showing.

    Names come from files that are not to be trusted: control and formatting characters (escape
    sequences, line ends, right-to-left overrides), lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(map(_printable_character, text))


def _printable_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def number(value: float | int) -> str:
    """Three significant digits: `0.0412`, `28.1`, `1.23e-5`; integers below a million whole."""
    if isinstance(value, int) and abs(value) < 10**_FIXED.stop:
        return str(int(value))
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    exponent = int(power)
    if exponent not in _FIXED:
        return f"{mantissa}e{exponent}"
    return f"{value:.{max(0, 2 - exponent)}f}"


def byte_size(count: int) -> str:
    """`3.42 MB`: in powers of 1000, three significant digits."""
    power = 0
    size = float(count)
    while size >= 999.5 and power + 1 < len(_UNITS):
        size /= 1000
        power += 1
    return f"{count} bytes" if power == 0 else f"{number(size)} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """`0.83 s`, `2 min 5 s`."""
    if seconds < 99.5:
        return f"{number(float(seconds))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 module`, `2 modules`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], limit: int | None) -> str:
    """The first `limit` of `names`, whole, and how many more there are."""
    shown = list(map(printable, names[:limit]))
    if limit is not None and len(names) > limit:
        shown.append(f"and {len(names) - limit} more")
    return ", ".join(shown)
