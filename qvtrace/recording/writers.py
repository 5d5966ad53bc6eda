"""What a recording is written to: an archive, nothing that counts, or whoever looks on."""

from pathlib import Path
from typing import TypeAlias

from qvtrace.archive import ArchiveWriter
from qvtrace.archive.dry_run import DryWriter
from qvtrace.archive.passing import PassingWriter
from qvtrace.manifest import Manifest
from qvtrace.recording.identity import process_place
from qvtrace.recording.options import RecordOptions

Writer: TypeAlias = ArchiveWriter | DryWriter | PassingWriter


def open_writer(path: Path | None, manifest: Manifest, options: RecordOptions) -> Writer:
    """The writer that the options ask for; without a path nothing is written."""
    if options.open_writer is not None:
        return options.open_writer(manifest)
    if options.dry_run or path is None:
        return DryWriter(manifest)
    return ArchiveWriter(path, manifest, overwrite=options.overwrite)


def path_of_process(path: Path | None) -> Path | None:
    """Under torch.distributed each process writes its own file."""
    place = process_place()
    if path is None or place is None or not path.name:
        return path
    rank, size = place
    return path.with_name(f"{path.stem}.rank{rank}-of-{size}{path.suffix}")
