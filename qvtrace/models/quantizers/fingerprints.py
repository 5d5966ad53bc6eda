"""What makes a module compute what it does, as far as that can be told: a tree of fingerprints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from qvtrace.digests import Hasher

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
_FORWARD = "forward"
# Looked at by themselves, or of no effect on what is computed in eval mode.
_OTHER_FIELDS = frozenset({*vars(nn.Module()), "_compiled_call_impl", _FORWARD})
_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_DEPTH = 3  # of lists and dicts within each other


@dataclass
class Fingerprint:
    """One module of a model, by one of its names, and the modules in it."""

    name: str
    forward: object  # that of its class, which may be replaced
    makeup: tuple[object, ...]  # class, hooks, a forward of its own
    tensors: str  # digest of its own parameters and buffers
    attributes: dict[str, object]  # everything else, objects by their type
    children: dict[str, "Fingerprint"] = field(default_factory=dict)
    unread: bool = False  # a tensor of it is of a class of its own, or not in memory

    def is_like(self, other: "Fingerprint") -> bool:
        """Whether both compute the same but for their attributes and what is in them."""
        return (
            self.forward is other.forward
            and self.makeup == other.makeup
            and self.tensors == other.tensors
        )

    def below(self) -> Iterator["Fingerprint"]:
        """All modules in this one, the outermost first."""
        waiting, seen = [*self.children.values()], {id(self)}
        for node in waiting:
            if id(node) not in seen:
                seen.add(id(node))
                waiting += node.children.values()
                yield node


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of a model and everything in it."""
    known: dict[int, Fingerprint] = {}
    for name, module in model.named_modules():
        known[id(module)] = _of_module(name, module)
    for module in model.modules():
        known[id(module)].children = {
            name: known[id(child)] for name, child in module._modules.items() if child is not None
        }
    return known[id(model)]


def global_hooks() -> tuple[object, ...]:
    """Those that all modules of this process have."""
    return tuple(_hooks(vars(torch_modules)[name]) for name in _GLOBAL_HOOKS)


def tensors_digest(module: nn.Module) -> str:
    """Of all parameters and buffers of a module and of those in it."""
    hasher = Hasher()
    for inner in module.modules():
        _add_tensors(hasher, inner)
    return str(hasher.hexdigest())


def _of_module(name: str, module: nn.Module) -> Fingerprint:
    fields, kind = vars(module), type(module)
    hasher = Hasher()
    unread = _add_tensors(hasher, module)
    own_forward = _told(fields.get(_FORWARD))
    return Fingerprint(
        name,
        forward=getattr_static(kind, _FORWARD, None),
        makeup=(f"{kind.__module__}.{kind.__qualname__}", own_forward, *map(_hooks, _held(module))),
        tensors=str(hasher.hexdigest()),
        attributes={name: _told(value) for name, value in fields.items() if _tells(name)},
        unread=unread,
    )


def _add_tensors(hasher: Any, module: nn.Module) -> bool:
    """Whether there is one whose contents cannot be told."""
    told = True
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(recurse=False):
            told &= add_tensor(hasher, name, tensor)
    return not told


def add_tensor(hasher: Any, name: str, tensor: Tensor) -> bool:
    """Add name, kind and contents of a tensor; whether its contents can be told."""
    kind = f"{name} {type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}"
    hasher.update(kind.encode())
    if not is_plain(tensor) or tensor.is_meta:
        return False
    if tensor.numel():
        contents = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        hasher.update(contents.view(torch.uint8).numpy().data)
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether its bytes are its elements."""
    own = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return own and not tensor.is_quantized and tensor.layout is torch.strided


def _held(module: nn.Module) -> Iterator[Mapping[int, object]]:
    yield from (vars(module).get(name, {}) for name in _HOOKS)


def _hooks(hooks: Mapping[int, object]) -> tuple[object, ...]:
    return tuple(map(_told, hooks.values()))


def _tells(name: str) -> bool:
    return name not in _OTHER_FIELDS


def _told(value: Any, depth: int = 0) -> object:
    """What can be held against the value of a copy of the module."""
    if type(value) in _PLAIN_VALUES:
        return repr(value)
    if isinstance(value, FunctionType):
        return value
    if isinstance(value, MethodType):
        return value.__func__
    if isinstance(value, Tensor):
        hasher = Hasher()
        add_tensor(hasher, "", value)
        return hasher.hexdigest()
    if type(value) in (list, tuple) and depth < _DEPTH:
        return type(value), *(_told(item, depth + 1) for item in value)
    if type(value) is dict and depth < _DEPTH:
        return dict, *(_told(each, depth + 1) for each in value.items())
    return type(value)
