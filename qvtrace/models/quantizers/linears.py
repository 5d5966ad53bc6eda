"""Which Linear modules a quantizer takes, why the others stay float, and how one is replaced."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from qvtrace.errors import ModelError
from qvtrace.models.keep_float import KEPT
from qvtrace.models.quantizers.outcome import Context

GROUP_SIZE = 32  # weights that share a scale, where a scheme has groups


@dataclass(frozen=True)
class Linears:
    """The Linear modules of a model, each by its first name."""

    targets: dict[str, nn.Linear]  # to be quantized
    left: dict[str, str]  # module -> why it stays float; other kinds that hold matrices included

    @property
    def left_float(self) -> dict[str, tuple[str, ...]]:
        """The modules that stay float, by reason."""
        by_reason: dict[str, tuple[str, ...]] = {}
        for name, reason in self.left.items():
            by_reason[reason] = (*by_reason.get(reason, ()), name)
        return by_reason

    def without(self, names: dict[str, str]) -> "Linears":
        """Some of the targets left float after all, each with its reason."""
        targets = {name: linear for name, linear in self.targets.items() if name not in names}
        return Linears(targets, {**self.left, **names})


def find_linears(
    model: nn.Module, context: Context, label: str, *, grouped: bool = False, swapped: bool = False
) -> Linears:
    """The Linear modules that a float forward calls, but for the output head and what is to be
    kept float.

    A Linear whose weight is used without calling it (Mamba's `dt_proj`) fails with a quantized
    weight; the head is left out as transformers does. `grouped`: the scheme needs a multiple of
    GROUP_SIZE inputs. `swapped`: the quantizer puts a module of its own in the place of a Linear,
    which would lose a forward of its own. Raises `ModelError` for weights that are not in memory.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    _check_in_memory(linears, label)
    called = _called(linears, model, context)
    head = _output_head(model)
    left: dict[str, str] = {}
    for name, linear in linears.items():
        if linear is head:
            left[name] = "output head"
        elif name in context.keep_float:
            left[name] = KEPT
        elif name not in called:
            left[name] = "never called as a module"
        elif swapped and not _is_plain(linear):
            left[name] = "a Linear with a forward of its own"
        elif grouped and linear.in_features % GROUP_SIZE:
            left[name] = f"{linear.in_features} inputs are no multiple of {GROUP_SIZE}"
    targets = {name: linear for name, linear in linears.items() if name not in left}
    return Linears(targets, left | dict(other_matrices(model)))


def replace_module(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Put `replacement` wherever the model holds `module`: a shared one has several names."""
    replacement.train(module.training)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is module:
                setattr(parent, name, replacement)


def _called(linears: dict[str, nn.Linear], model: nn.Module, context: Context) -> set[str]:
    """The Linear modules that one float forward calls."""
    called: set[str] = set()

    def remember(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_hook(remember(name)).remove)
        context.run(model)
    return called


def _output_head(model: Any) -> Any:
    try:
        getter = getattr(model, "get_output_embeddings", None)
    except Exception:  # a `__getattr__` of the user's
        return None
    return None if getter is None else getter()


def _is_plain(linear: nn.Linear) -> bool:
    return type(linear).forward is nn.Linear.forward and "forward" not in vars(linear)


def other_matrices(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules that multiply by weights of their own without being Linear, and what they are."""
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if class_name == "Conv1D":
            yield name, "Conv1D, which is no Linear module"
        elif class_name.endswith("Experts"):
            yield name, "fused experts, which are no Linear module"


def _check_in_memory(linears: dict[str, nn.Linear], label: str) -> None:
    for name, linear in linears.items():
        if linear.weight.is_meta:
            raise ModelError(
                f"{label}: cannot quantize {name}, whose weight is not in memory; "
                "leave --device-map out"
            )
