"""Whether wrappers around modules compute anything themselves."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvtrace.digests import Hasher
from qvtrace.errors import ModelError
from qvtrace.models.quantizers.fingerprints import add_tensor, is_plain, tensors_digest


def handing_on(
    model: nn.Module, wrappers: Mapping[str, str], run: Callable[[nn.Module], None]
) -> list[str]:
    """Those of the `wrappers` that hand on what they are given, and what the module in them gives,
    bit for bit, while the weights in that are what they are: seen in one forward.

    `wrappers`: the name of each, and of the module in it. The model is afterwards as it was.
    """
    if not wrappers:
        return []
    watches = {
        name: _Watch(tensors_digest(model.get_submodule(inner))) for name, inner in wrappers.items()
    }
    with ExitStack() as undo:
        undo.enter_context(_as_it_was(model))
        for name, watch in watches.items():
            outer, inner = model.get_submodule(name), model.get_submodule(wrappers[name])
            for hook in watch.hooks_on(outer, inner):
                undo.callback(hook.remove)
        try:
            run(model)
        except ModelError:  # it will raise again where that is told
            return []
    return [name for name, watch in watches.items() if watch.handed_on and not watch.computed]


@dataclass
class _Watch:
    """What one wrapper was seen to do."""

    weights: str  # digest of those in the inner module
    given: list[str] = field(default_factory=list)  # digests, of calls that are under way
    result: str | None = None  # of the inner module
    handed_on: bool = False
    computed: bool = False

    def hooks_on(self, outer: nn.Module, inner: nn.Module) -> Iterator[Any]:
        """Hooks that see what the wrapper is given before all others and its output after them."""
        yield outer.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        yield inner.register_forward_pre_hook(self._enter_inner, with_kwargs=True)
        yield inner.register_forward_hook(self._leave_inner, prepend=True)
        yield outer.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.given.append(_digest((args, kwargs)))
        self.result = None

    def _enter_inner(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        same = self.given and self.given[-1] == _digest((args, kwargs)) and self.result is None
        if not same or tensors_digest(module) != self.weights:
            self.computed = True

    def _leave_inner(self, module: nn.Module, args: Any, output: Any) -> None:
        self.result = _digest(output)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given.pop()
        self.handed_on = True
        if self.result != _digest(output):
            self.computed = True


def _digest(value: Any) -> str:
    """Of what is in a value, whatever holds it and in whatever order."""
    return " ".join(sorted(map(_leaf_digest, _leaves(value))))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):  # a ModelOutput is one
        value = value.values()
    elif not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _leaf_digest(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf) if isinstance(leaf, bool | int | float | str) else str(id(leaf))
    hasher = Hasher()
    add_tensor(hasher, "", leaf)
    return str(hasher.hexdigest())


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what a forward leaves in fields and buffers, as observers keep what they see."""
    # What TorchScript holds is no field of Python's.
    modules = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
    fields = [dict(vars(module)) for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if is_plain(buffer)]
    held = [dict(module._buffers) for module in modules]
    try:
        yield
    finally:
        for module, before, its_buffers in zip(modules, fields, held, strict=True):
            vars(module).clear()
            vars(module).update(before)
            module._buffers.update(its_buffers)
        for buffer, copy in buffers:
            if not buffer.is_meta and (buffer.shape != copy.shape or not buffer.equal(copy)):
                buffer.data = copy
