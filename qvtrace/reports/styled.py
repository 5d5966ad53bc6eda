"""Text with the style that a terminal gives it, light enough for a hundred thousand rows."""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import cell_len


@dataclass(frozen=True, slots=True)
class Styled:
    """Pieces of text, each with the name of a style."""

    pieces: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> str:
        """The text without styles."""
        return "".join(text for text, _ in self.pieces)

    @property
    def width(self) -> int:
        """The columns that the text takes in a terminal."""
        return sum(len(text) if text.isascii() else cell_len(text) for text, _ in self.pieces)

    def __add__(self, other: "Styled") -> "Styled":
        return Styled(self.pieces + other.pieces)


def styled(text: str, style: str = "") -> Styled:
    """One piece of text."""
    return Styled(((text, style),))


def concatenated(parts: Iterable[Styled]) -> Styled:
    """The parts one after the other."""
    return Styled(tuple(piece for part in parts for piece in part.pieces))
