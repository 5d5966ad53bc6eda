"""Models that `torch.compile` has compiled."""

import sys
from contextlib import AbstractContextManager, nullcontext

import torch


def eager_stance() -> AbstractContextManager[object]:
    """What `torch.compile` has compiled runs eagerly, or its modules would never be called.

    Nothing is compiled in a process that has not loaded the compiler, and loading it takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
