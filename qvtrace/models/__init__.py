"""Models to record: loaded, given inputs, quantized. The only importers of transformers."""

from qvtrace.models.preparation import prepare
from qvtrace.models.request import ModelRequest, PreparedModel

__all__ = ["ModelRequest", "PreparedModel", "prepare"]
