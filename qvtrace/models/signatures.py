"""What the forward of a model takes."""

import inspect
from collections.abc import Iterator
from inspect import Parameter
from typing import Any, get_args

from torch import nn


def parameters(model: nn.Module) -> dict[str, Parameter]:
    """The parameters of `forward`, whatever wraps it; any, where it does not tell them."""
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {"kwargs": Parameter("kwargs", Parameter.VAR_KEYWORD)}


def takes(model: nn.Module, name: str) -> bool:
    """Whether `forward` has a parameter of that name."""
    return name in parameters(model)


def is_transformers_model(model: nn.Module) -> bool:
    """Told by what every PreTrainedModel has, without importing transformers."""
    try:
        return hasattr(model, "main_input_name") and hasattr(model, "config")
    except Exception:  # a property of the user's
        return False


def uses_cache(model: Any, args: tuple[Any, ...]) -> bool:
    """Whether `forward` can be told with `use_cache` to keep a cache or not, beside `args`."""
    own = parameters(model)
    if not is_transformers_model(model) or "use_cache" in list(own)[: len(args)]:
        return False
    if "use_cache" in own:
        return True
    hands_down = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own.values())
    parts = filter(is_transformers_model, model.modules())
    generates = hands_down and hasattr(model, "can_generate") and model.can_generate()
    return generates and any(takes(part, "use_cache") for part in parts)


def accepted_names(model: nn.Module) -> set[str] | None:
    """The names that `forward` does something with; None: any, as far as can be told.

    A transformers model hands its `**kwargs` down to the models in it, and ignores there what it
    does not know; so a name counts as accepted when one of them names it.
    """
    own = parameters(model)
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in own.values()):
        return set(own)
    models = list(filter(is_transformers_model, model.modules()))
    if not models:
        return None
    return {name for module in models for name in _names(module)}


def missing_names(model: nn.Module, args: tuple[Any, ...], names: set[str]) -> list[str]:
    """The parameters without a default that neither `args` nor `names` give."""
    plain = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    own = [parameter for parameter in parameters(model).values() if parameter.kind in plain]
    return [
        parameter.name
        for parameter in own[len(args) :]
        if parameter.default is Parameter.empty and parameter.name not in names
    ]


def _names(module: nn.Module) -> Iterator[str]:
    for parameter in parameters(module).values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            for typed in get_args(parameter.annotation):
                yield from getattr(typed, "__annotations__", ())
        else:
            yield parameter.name
