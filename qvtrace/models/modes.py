"""Eval mode, for models that may have a mind of their own about it."""

from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.chatter import one_line


def to_eval_mode(model: nn.Module, label: str) -> None:
    """Switch a model to eval mode; raises `ModelError` when it raises.

    An exported program stays in the mode that it was exported in, whatever its `training` says.
    """
    try:
        model.eval()
    except NotImplementedError:
        return
    except Exception as error:
        raise ModelError(
            f"{label}: eval() raised {one_line(error)}; give a model that can be evaluated"
        ) from error
