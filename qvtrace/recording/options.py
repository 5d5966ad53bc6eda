"""What goes into a recording and what comes out of it, beside the archive."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvtrace.manifest import Manifest, ModelInfo, StepEntry, VariantInfo
from qvtrace.observers import Observer
from qvtrace.privacy import Privacy
from qvtrace.recording.keeping import Share
from qvtrace.trees import Json

if TYPE_CHECKING:
    from qvtrace.recording.recorder import Recording
    from qvtrace.recording.writers import Writer


@dataclass(frozen=True)
class Progress:
    """How far a recording is."""

    modules_done: int
    modules_total: int
    bytes_written: int


@dataclass(frozen=True)
class RecordOptions:
    """What to record, and what the manifest is to say of it."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overwrite: bool = False
    inputs: bool = True
    kwargs: bool = True
    caches: bool = False
    weights: bool = False
    share: Share = field(default_factory=Share)
    privacy: Privacy | None = None  # None: nothing is withheld
    max_bytes: int | None = None  # of the file
    # Runs the model as it will be run, for a recording that counts.
    rehearse: "Callable[[Recording], object] | None" = None
    counts_only: bool = False  # this is that recording
    dry_run: bool = False
    recorded_by: str = "library"
    model: ModelInfo | None = None
    variant: VariantInfo | None = None
    source: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    settings: Json = field(default_factory=dict)
    progress: Callable[[Progress], None] | None = None
    observers: tuple[Observer, ...] = ()
    # What the recording is written to in place of an archive.
    open_writer: "Callable[[Manifest], Writer] | None" = None


def options_like(manifest: Manifest, options: RecordOptions) -> RecordOptions:
    """What is recorded as the trace of a manifest was; what the options ask for stays."""
    settings = manifest.settings
    return replace(
        options,
        include=options.include or _texts(settings.get("include")),
        exclude=options.exclude or _texts(settings.get("exclude")),
        inputs=options.inputs and settings.get("inputs") is not False,
        kwargs=options.kwargs and settings.get("kwargs") is not False,
        caches=options.caches or settings.get("caches") is True,
        weights=options.weights or settings.get("weights") is True,
        share=Share.from_settings(settings) if options.share.is_whole else options.share,
    )


def _texts(value: Any) -> tuple[str, ...]:
    """Patterns that a manifest names; a file may say anything."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


@dataclass(frozen=True)
class RecordingReport:
    """What a recording has done. Bytes of places count equal contents each time they are met."""

    file: Path | None
    size: int  # bytes of the archive
    registered: int
    called: int
    recorded: int
    calls: int
    places: int
    place_bytes: int
    bytes_by_kind: dict[str, int]  # `inputs`, `kwargs`, `output`, and what else there was
    distinct_bytes: int
    reasons: dict[str, tuple[str, ...]]
    opaque: dict[str, int]
    warnings: tuple[str, ...]
    seconds: float
    complete: bool
    error: str | None
    steps: tuple[StepEntry, ...] = ()  # of a generation
