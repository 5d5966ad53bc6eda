"""What a report says of a row that pools several samples."""

from qvtrace.comparison.rows import Row
from qvtrace.reports.formatting import number
from qvtrace.reports.styled import Styled, styled

SAMPLE_TITLE = "by sample p50 / p99 / worst"


def by_sample(row: Row, metric: str) -> Styled:
    """A metric over the samples: the median, the 99th percentile, the worst and which has it."""
    figures = None if row.samples is None else row.samples.figures.get(metric)
    if figures is None or row.samples is None:
        return styled("-", "dim")
    values = (figures.median, figures.p99, figures.worst)
    texts = ["-" if value is None else _shown(value, metric) for value in values]
    return styled(f"{' / '.join(texts)} in {figures.worst_sample} of {row.samples.count}")


def _shown(value: float | int, metric: str) -> str:
    return f"{value:.6f}" if metric == "cosine" else number(value)
