"""Which rows a report lists, and what becomes of the others."""

from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass

from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.rows import Place, Row
from qvtrace.judging.measures import is_unjudged


@dataclass(frozen=True)
class ListedRows:
    """Which rows are listed, which are folded into those, and how many of each kind are hidden."""

    listed: tuple[Row, ...]
    folded: dict[Place, list[Row]]
    hidden: Counter[str]

    @classmethod
    def of(cls, comparison: Comparison, *, everything: bool) -> "ListedRows":
        """Sort the rows of a comparison."""
        if everything:
            return cls(comparison.rows, {}, Counter())
        asked = comparison.elements  # whoever wants these wants their rows
        kinds = [_hidden_kind(row, asked) for row in comparison.rows]
        seen = [row for row, kind in zip(comparison.rows, kinds, strict=True) if kind is None]
        places = {row.place for row in seen if row.same_as is None}
        listed = []
        folded = defaultdict(list)
        for row in seen:
            if row.same_as is not None and row.same_as in places and row.place not in asked:
                folded[row.same_as].append(row)
            else:
                listed.append(row)
        return cls(tuple(listed), dict(folded), Counter(filter(None, kinds)))

    def hidden_texts(self) -> list[str]:
        """How many rows of which kind are not listed."""
        hidden = [f"{count} {kind}" for kind, count in self.hidden.items()]
        folded = sum(map(len, self.folded.values()))
        return [*hidden, f"{folded} folded into the row above (=)"] if folded else hidden


def _hidden_kind(row: Row, asked: Container[Place]) -> str | None:
    """Why nothing would be learnt from seeing the row; None when it is to be seen."""
    if row.place in asked:
        return None
    if row.status == "identical":
        return "identical"
    if row.status == "exact":
        return "equal integers and values"
    if is_unjudged(row) and not row.failed_alike:
        return "objects of one type, not stored"
    return None
