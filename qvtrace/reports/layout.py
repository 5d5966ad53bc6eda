"""Lines of a table in the width there is, with nothing cut: cells beside names or under them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from qvtrace.reports.styled import Styled, concatenated, styled

GAP = 2
LABEL_WIDTH = 12
HEADING_STYLE = "bold"


Note: TypeAlias = Styled | tuple[Styled, ...]  # one line, or words that are set in lines


@dataclass(frozen=True)
class Entry:
    """One row of a table: a short key, a name, then cells, or one message in place of them."""

    key: str
    name: Styled
    cells: tuple[Styled, ...] = ()  # one for each title, or none
    message: Styled | None = None
    notes: tuple[Note, ...] = ()  # lines of their own, under the name


@dataclass(frozen=True)
class Table:
    """Entries under titles, and the widths that they need."""

    key_title: str
    name_title: str
    titles: tuple[str, ...]
    entries: tuple[Entry, ...]

    @cached_property
    def indent(self) -> int:
        """Where names begin."""
        return max(len(self.key_title), *(len(entry.key) for entry in self.entries)) + GAP

    @cached_property
    def name_width(self) -> int:
        """What the longest name needs."""
        return max(len(self.name_title), *(entry.name.width for entry in self.entries))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """What the widest cell of each column needs."""
        filled = [entry.cells for entry in self.entries if entry.cells]
        return tuple(
            max([len(title), *(cells[position].width for cells in filled)])
            for position, title in enumerate(self.titles)
        )

    @cached_property
    def width(self) -> int:
        """What one line needs that holds a name and all its cells."""
        return self.indent + self.name_width + sum(GAP + width for width in self.widths)

    @cached_property
    def stacked_width(self) -> int:
        """What one line needs that holds all cells, under the name."""
        return self.indent + sum(GAP + width for width in self.widths) - GAP

    def lines(self, width: int | None) -> Iterator[Styled]:
        """The table in `width` columns; None: however many it takes."""
        if width is None or self.width <= width:
            return self._beside(width)
        return self._stacked(width)

    def _beside(self, width: int | None) -> Iterator[Styled]:
        widths = (self.name_width, *self.widths)
        titles = (heading(self.name_title), *map(heading, self.titles))
        yield self._line(self.key_title, joined(titles, widths))
        for entry in self.entries:
            after = (entry.message,) if entry.message is not None else entry.cells
            yield self._line(entry.key, joined((entry.name, *after), widths))
            yield from self._under(entry.notes, width)

    def _stacked(self, width: int) -> Iterator[Styled]:
        chunks = chunked(self.widths, width - self.indent)
        yield self._line(self.key_title, heading(self.name_title))
        yield from self._cell_lines(tuple(map(heading, self.titles)), chunks)
        for entry in self.entries:
            yield from self._stacked_entry(entry, chunks, width)

    def _stacked_entry(self, entry: Entry, chunks: list[slice], width: int) -> Iterator[Styled]:
        name, message = entry.name, entry.message
        if message is not None:
            beside = joined((name, message), (name.width,))
            if self.indent + beside.width <= width:
                name, message = beside, None
        yield self._line(entry.key, name)
        if message is not None:
            yield from self._under((message,), width)
        elif entry.cells:
            yield from self._cell_lines(entry.cells, chunks)
        yield from self._under(entry.notes, width)

    def _cell_lines(self, cells: Sequence[Styled], chunks: Iterable[slice]) -> Iterator[Styled]:
        for chunk in chunks:
            yield self._line("", joined(cells[chunk], self.widths[chunk]))

    def _line(self, key: str, content: Styled) -> Styled:
        return styled(key.rjust(self.indent - GAP) + " " * GAP, "dim") + content

    def _under(self, notes: Iterable[Note], width: int | None) -> Iterator[Styled]:
        indent = styled(" " * self.indent)
        for note in notes:
            yield from wrapped(indent, indent, note if isinstance(note, tuple) else (note,), width)


def heading(title: str) -> Styled:
    """The title of a column."""
    return styled(title, HEADING_STYLE)


def joined(cells: Iterable[Styled], widths: Iterable[int]) -> Styled:
    """Cells beside each other, each but the last padded to its width."""
    parts: list[Styled] = []
    padding = 0
    for cell, width in zip(cells, (*widths, 0), strict=False):
        parts += [styled(" " * padding), cell]
        padding = max(0, width - cell.width) + GAP
    return concatenated(parts)


def chunked(widths: Sequence[int], room: int) -> list[slice]:
    """Slices of columns that fit into `room` beside each other; one alone may be too wide."""
    chunks: list[slice] = []
    start, used = 0, 0
    for position, width in enumerate(widths):
        if position > start and used + width > room:
            chunks.append(slice(start, position))
            start, used = position, 0
        used += width + GAP
    return [*chunks, slice(start, len(widths))] if widths else []


def labelled(
    label: str, pieces: Iterable[Styled], width: int | None, *, hanging: int = 0
) -> Iterator[Styled]:
    """`label` and its pieces, on as many lines as they need, those after the first `hanging`
    columns further in; a piece is never broken."""
    indent = styled(" " * (LABEL_WIDTH + hanging))
    return wrapped(styled(label.ljust(LABEL_WIDTH), "bold"), indent, pieces, width)


def wrapped(
    begin: Styled, indent: Styled, pieces: Iterable[Styled], width: int | None
) -> Iterator[Styled]:
    """Pieces after `begin`, those that have no room there on further lines after `indent`."""
    line: list[Styled] = []
    used = begin.width
    for piece in pieces:
        if line and width is not None and used + piece.width > width:
            yield begin + concatenated(line)
            begin, line, used = indent, [], indent.width
        line += [styled(" "), piece] if line else [piece]
        used += piece.width + 1
    yield begin + concatenated(line)


def words(text: str, style: str = "") -> list[Styled]:
    """The words of a text, to be set in lines; a number stays with its unit."""
    return [styled(word, style) for word in re.split(" (?!dB\\b)", text)]


def separated(texts: Sequence[str], separator: str) -> list[Styled]:
    """The texts, each but the last followed by the separator."""
    return [styled(text + separator) for text in texts[:-1]] + [styled(texts[-1])] if texts else []
