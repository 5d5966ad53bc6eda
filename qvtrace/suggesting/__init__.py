"""What would help: few modules to keep float, so that a quantized model reaches a target."""

from qvtrace.suggesting.suggesting import suggest
from qvtrace.suggesting.suggestion import Suggestion

__all__ = ["Suggestion", "suggest"]
