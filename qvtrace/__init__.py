"""Where a quantized model starts to differ from its float original, module by module.

    with qvtrace.record(model, "fp.st"):
        model(**inputs)
    comparison = qvtrace.diff("fp.st", "quant.st")
    for row in comparison.worst("peir", 5):
        print(row.module, row.path, row.metrics.peir)

Names are loaded when they are first used: recording needs torch, reading and comparing do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvtrace.archive import Archive, load
    from qvtrace.cached import cached_tensor
    from qvtrace.comparison.comparison import Comparison
    from qvtrace.comparison.diffing import diff
    from qvtrace.comparison.results import load_result
    from qvtrace.comparison.rows import Row
    from qvtrace.errors import (
        ArchiveError,
        ModelError,
        QvtraceError,
        RecordingError,
        ResultError,
        UsageError,
    )
    from qvtrace.extracting import Extract, extract
    from qvtrace.inflight.flight import DiffInFlight, diff_in_flight
    from qvtrace.judging.judge import judge
    from qvtrace.merging import merge
    from qvtrace.models.quantizers.listing import quantizers
    from qvtrace.observers import ObservedCall, Observer
    from qvtrace.observers.breaking import BreakAt
    from qvtrace.observers.printing import PrintCalls
    from qvtrace.recording.options import RecordingReport
    from qvtrace.recording.recorder import Recording, record
    from qvtrace.recording.steps import TokenSteps
    from qvtrace.replayer import ReplayReport, replay
    from qvtrace.suggesting import Suggestion, suggest

_HOMES = {
    "Archive": "qvtrace.archive",
    "ArchiveError": "qvtrace.errors",
    "BreakAt": "qvtrace.observers.breaking",
    "Comparison": "qvtrace.comparison.comparison",
    "DiffInFlight": "qvtrace.inflight.flight",
    "Extract": "qvtrace.extracting",
    "ModelError": "qvtrace.errors",
    "ObservedCall": "qvtrace.observers",
    "Observer": "qvtrace.observers",
    "PrintCalls": "qvtrace.observers.printing",
    "QvtraceError": "qvtrace.errors",
    "Recording": "qvtrace.recording.recorder",
    "RecordingError": "qvtrace.errors",
    "RecordingReport": "qvtrace.recording.options",
    "ResultError": "qvtrace.errors",
    "ReplayReport": "qvtrace.replayer",
    "Row": "qvtrace.comparison.rows",
    "Suggestion": "qvtrace.suggesting",
    "TokenSteps": "qvtrace.recording.steps",
    "UsageError": "qvtrace.errors",
    "cached_tensor": "qvtrace.cached",
    "diff": "qvtrace.comparison.diffing",
    "diff_in_flight": "qvtrace.inflight.flight",
    "extract": "qvtrace.extracting",
    "judge": "qvtrace.judging.judge",
    "load": "qvtrace.archive",
    "load_result": "qvtrace.comparison.results",
    "merge": "qvtrace.merging",
    "quantizers": "qvtrace.models.quantizers.listing",
    "record": "qvtrace.recording.recorder",
    "replay": "qvtrace.replayer",
    "suggest": "qvtrace.suggesting",
}

__all__ = [
    "Archive",
    "ArchiveError",
    "BreakAt",
    "Comparison",
    "DiffInFlight",
    "Extract",
    "ModelError",
    "ObservedCall",
    "Observer",
    "PrintCalls",
    "QvtraceError",
    "Recording",
    "RecordingError",
    "RecordingReport",
    "ReplayReport",
    "ResultError",
    "Row",
    "Suggestion",
    "TokenSteps",
    "UsageError",
    "__version__",
    "cached_tensor",
    "diff",
    "diff_in_flight",
    "extract",
    "judge",
    "load",
    "load_result",
    "merge",
    "quantizers",
    "record",
    "replay",
    "suggest",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qvtrace")
    if name not in _HOMES:
        raise AttributeError(f"module 'qvtrace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
