"""Which part of a model one of several processes holds. Nothing here asks another process."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from qvtrace.recording.module_tree import NamedModule
from qvtrace.trees import Json, Placement

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def placement_of(tensor: Any) -> Placement | None:
    """The placement of a distributed tensor; None for any other."""
    placements = getattr(tensor, "placements", None)
    mesh = getattr(tensor, "device_mesh", None)
    if placements is None or mesh is None:
        return None
    return Placement(tuple(map(_described, placements)), tuple(mesh.shape), tuple(tensor.shape))


def module_placement(module: NamedModule, plan: dict[str, str]) -> Json | None:
    """The placement of a module's own weights, and the style that a plan of tensor parallelism
    gives it; None where it has neither."""
    parameters = module.module.__dict__.get("_parameters", {})
    weights = {
        name: placement.to_json()
        for name, parameter in parameters.items()
        if (placement := placement_of(parameter)) is not None
    }
    style = plan.get(module.name) if weights or _is_replaced(module.module) else None
    if not weights and style is None:
        return None
    return ({"weights": weights} if weights else {}) | ({"style": style} if style else {})


def parallel_plan(modules: Iterable[NamedModule]) -> dict[str, str]:
    """The style that transformers' plan of tensor parallelism has for each module."""
    named = list(modules)
    plan: dict[str, str] = {}
    for root in named:
        patterns = _patterns(root.module)
        prefix = f"{root.name}." if root.name else ""
        for module in named if patterns else ():
            if module.name.startswith(prefix):
                style = patterns.get(_NUMBER.sub("*", module.name.removeprefix(prefix)))
                if style is not None:
                    plan.setdefault(module.name, style)
    return plan


def _patterns(module: nn.Module) -> dict[str, str]:
    patterns = module.__dict__.get("_tp_plan")
    if not isinstance(patterns, dict):
        return {}
    return {str(name): str(style) for name, style in patterns.items()}


def _is_replaced(module: nn.Module) -> bool:
    """Every model of transformers has a plan; a module follows it once its forward is wrapped."""
    forward = module.__dict__.get("forward")
    return "tp_forward" in getattr(forward, "__qualname__", "")


def _described(placement: Any) -> str:
    name = type(placement).__name__
    if name == "Shard":
        return f"Shard({placement.dim})"
    if name == "Partial":
        return f"Partial({placement.reduce_op})"
    return name if name == "Replicate" else repr(placement)
