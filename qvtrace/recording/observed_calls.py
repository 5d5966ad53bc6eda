"""Calls as observers are told of them."""

from typing import Any

from qvtrace.observers import ObservedCall, Watch
from qvtrace.recording.call_stacks import OpenCall
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.values import StoredValues
from qvtrace.trees import Node


class ObservedCalls:
    """Tells a watch of the calls of one recording, with what was just stored of each."""

    def __init__(self, watch: Watch, values: StoredValues, options: RecordOptions) -> None:
        self.watch = watch
        self._values = values
        self._options = options

    def before(
        self,
        call: OpenCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        taken: tuple[Node | None, Node | None],
        step: int,
    ) -> None:
        """A call begins; `taken` are the trees of its inputs and kwargs."""
        module, is_recorded = call.hooked.module, call.number is not None
        contents = self._values.contents
        call.observed = ObservedCall(
            module.module,
            module.name,
            tuple(module.aliases),
            call.index,
            args,
            kwargs,
            is_recorded=is_recorded,
            step=step,
            trees={
                "inputs": taken[0] if is_recorded and self._options.inputs else None,
                "kwargs": taken[1] if is_recorded and self._options.kwargs else None,
            },
            contents=contents,
        )
        self.watch.before(call.observed)
        contents.clear()

    def after(
        self, observed: ObservedCall, output: object, node: Node | None, error: str | None
    ) -> None:
        """A call has ended; `node` is the tree of its output."""
        observed.output, observed.error = output, error
        observed.trees["output"] = node
        observed.contents = contents = self._values.contents
        self.watch.after(observed)
        contents.clear()
