"""Everything that qvtrace raises on purpose.

QvtraceError                 one line: what, what is wrong, what to do
├── UsageError               an option, an argument or a pattern that cannot be used
├── ModelError               a model that cannot be loaded, quantized or run
├── RecordingError           a recording that could not be finished
├── ResultError              a file that cannot be read as the result of a comparison
└── ArchiveError             a file that cannot be read or written as an archive
    ├── MissingArchiveError      there is no such file
    ├── NotSafetensorsError      the file is something else
    ├── CutShortError            the file ends before its header says so
    ├── NotAnArchiveError        safetensors, but written by another tool
    ├── NewerFormatError         written by a newer qvtrace
    ├── UnfinishedArchiveError   left by a recording that was killed, `recover` helps
    ├── DamagedArchiveError      contents that contradict themselves
    ├── NotAtHandError           contents of a trace that is not stored
    └── ExistingFileError        writing would overwrite a file
"""

import errno

# The numbers of an `OSError` that says that there is no more room.
DISK_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})


class QvtraceError(Exception):
    """Base of all; the message is one line, `FILE or OPTION: what is wrong; what to do`."""


class UsageError(QvtraceError):
    """An option, an argument or a pattern that cannot be used."""


class ModelError(QvtraceError):
    """A model that cannot be loaded, quantized or run."""


class RecordingError(QvtraceError):
    """A recording that could not be finished; what there is stays in the `.partial` file."""


class ResultError(QvtraceError):
    """A file that cannot be read as the result of a comparison, or is not all of one."""


class ArchiveError(QvtraceError):
    """A file that cannot be read or written as an archive."""


class MissingArchiveError(ArchiveError):
    """There is no such file."""


class NotSafetensorsError(ArchiveError):
    """The file is no safetensors file."""


class CutShortError(ArchiveError):
    """The file ends before the place where its header says that it ends."""


class NotAnArchiveError(ArchiveError):
    """A safetensors file that no qvtrace has written."""


class NewerFormatError(ArchiveError):
    """The file was written by a newer qvtrace in a format that this one does not know."""


class UnfinishedArchiveError(ArchiveError):
    """The recording was killed before it could write the header; `qvtrace recover` can."""


class DamagedArchiveError(ArchiveError):
    """What the file says contradicts itself: offsets, digests, shapes or the manifest."""


class NotAtHandError(ArchiveError):
    """A trace that is compared while it happens has contents only as they pass by."""


class ExistingFileError(ArchiveError):
    """Writing would overwrite a file that is already there."""
