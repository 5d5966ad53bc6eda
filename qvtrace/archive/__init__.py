"""The archive: the only code that knows the file."""

from qvtrace.archive.reader import Archive
from qvtrace.archive.recovery import Recovery, recover
from qvtrace.archive.writer import ArchiveWriter, Tensor

__all__ = ["Archive", "ArchiveWriter", "Recovery", "Tensor", "recover"]
