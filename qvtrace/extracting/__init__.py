"""What a bug report on one module needs, taken out of two archives into a folder."""

from qvtrace.extracting.extraction import Extract, extract

__all__ = ["Extract", "extract"]
