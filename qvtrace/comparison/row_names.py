"""Names of rows: module, call and step where there are several, and path where it tells."""

from collections.abc import Iterable

from qvtrace.comparison.rows import Place, Row
from qvtrace.patterns import shown


class RowNames:
    """What tells the rows of one comparison apart."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = tuple(rows)
        self._steps = {(row.module, row.call): row.step for row in rows}
        calls = {(row.module, row.sample or 0, row.step, row.call) for row in rows}
        samples = {(row.module, row.call): row.sample for row in rows if row.sample is not None}
        self._samples = samples if len(set(samples.values())) > 1 else {}
        self._stepped = any(step for _, _, step, _ in calls)
        self._several = {module for module, _, _, call in calls if call}
        if self._stepped or self._samples:
            steps: dict[tuple[str, int, int], int] = {}
            for module, sample, step, _ in calls:
                steps[module, sample, step] = steps.get((module, sample, step), 0) + 1
            self._several = {module for (module, _, _), count in steps.items() if count > 1}

    def call(self, row: Row | Place) -> str:
        """`#2`, ` step 3`, or `#5 step 3` where a module is called more than once in a step; with
        the sample where they are not pooled."""
        call = f"#{row.call}" if row.module in self._several else ""
        sample = self._samples.get((row.module, row.call))
        call += "" if sample is None else f" sample {sample}"
        step = self._steps.get((row.module, row.call))
        return call if step is None or not self._stepped else f"{call} step {step}"

    def __call__(self, row: Row | Place) -> str:
        """The whole name."""
        path = f" {row.path}" if row.path != "output" else ""
        return f"{shown(row.module)}{self.call(row)}{path}"
