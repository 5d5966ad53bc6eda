"""What an observer is, and what it is told."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qvtrace.trees import Node


@dataclass(eq=False)
class ObservedCall:
    """One call of one module, as it is at this moment: the same object before and after it."""

    module: "nn.Module"
    name: str
    aliases: tuple[str, ...]
    index: int
    inputs: tuple[Any, ...]  # what the module is given and returns, not copies of it
    kwargs: dict[str, Any]
    output: Any = None
    error: str | None = None  # the call raised, or did not return
    edited: Sequence[str] = ()  # places of what it is known to have edited in place itself
    is_recorded: bool = True
    step: int = 0  # of a generation
    # `inputs` and `kwargs` before the call and `output` after it, as they are recorded; a part that
    # is not is None.
    trees: "dict[str, Node | None]" = field(default_factory=dict)
    # The tensors of these trees by digest, in the form that is stored: only while an observer is
    # told of them.
    contents: "dict[str, Tensor]" = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the module has."""
        return (self.name, *self.aliases)


class Observer:
    """Watches a recording. A method that a subclass leaves out does nothing.

    `before` and `after` run inside the model's forward, in the thread that runs it.
    """

    @property
    def label(self) -> str:
        """What an error message calls it."""
        return type(self).__name__

    def begin(self, names: Collection[str]) -> None:
        """The recording begins; `names` are those of all modules, aliases included.

        May raise `UsageError`: then nothing is recorded.
        """

    def before(self, call: ObservedCall) -> None:
        """A call begins: its inputs are known."""

    def after(self, call: ObservedCall) -> None:
        """A call has returned or raised; of calls within each other, the inner one comes first."""
