"""Who watches a recording: told of each call before it begins and after it has ended.

    with qvtrace.record(model, "fp.st", observers=[qvtrace.PrintCalls(), qvtrace.BreakAt("*.mlp")]):
        model(**inputs)

What an observer raises ends its watch, neither the forward nor the recording.
"""

from qvtrace.observers.observer import ObservedCall, Observer
from qvtrace.observers.watch import Watch

__all__ = ["ObservedCall", "Observer", "Watch"]
