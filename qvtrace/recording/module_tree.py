"""The modules of a model: every name that each one has, and what it is without being run."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from inspect import getattr_static, unwrap

from torch import nn

from qvtrace.errors import ModelError
from qvtrace.patterns import shown

MAX_NAMES = 1_000_000  # modules that share modules that share modules have names without end


@dataclass(eq=False)
class NamedModule:
    """One module, however many names it has."""

    name: str
    module: nn.Module
    parent: "NamedModule | None"
    aliases: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that the module has."""
        return (self.name, *self.aliases)

    @property
    def class_name(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def float_name(self) -> str | None:
        """The name of the float module that it was made from, which TICO's wrappers carry."""
        name = vars(self.module).get("fp_name")
        return name if isinstance(name, str) else None

    @property
    def is_container(self) -> bool:
        """Whether it only holds other modules: a `ModuleList` has no forward to be called."""
        forward = vars(self.module).get("forward") or getattr_static(
            type(self.module), "forward", None
        )
        forward = unwrap(forward)  # what moves weights around wraps forward, of containers too
        return getattr(forward, "__func__", forward) in (None, nn.Module.forward)


def walk_modules(root: nn.Module) -> list[NamedModule]:
    """Every module below `root`, itself first, in the order of `named_modules`.

    Unlike there, the further names of a shared module are kept, and one that contains itself is not
    followed into itself.
    """
    found: dict[int, NamedModule] = {}
    for name, module, parent in _names(root):
        known = found.get(id(module))
        if known is None:
            above = found[id(parent)] if parent is not None else None
            found[id(module)] = NamedModule(name, module, above)
        else:
            known.aliases.append(name)
    return list(found.values())


def all_names(modules: Iterable[NamedModule]) -> list[str]:
    """Every name of all of them."""
    return [name for module in modules for name in module.names]


def refuse_shared_names(modules: Iterable[NamedModule]) -> None:
    """Raise `ModelError` where two modules have one name, and their calls could not be told apart:
    an entry `""` of the root's `_modules`, or one with a dot in it."""
    known: dict[str, NamedModule] = {}
    for module in modules:
        for name in module.names:
            other = known.setdefault(name, module)
            if other is not module:
                raise ModelError(
                    f"{shown(name)}: is the name of two modules, {other.class_name} and "
                    f"{module.class_name}; register one of them under another name"
                )


def _names(root: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Every name with its module and the module that holds it; a cycle is not followed."""
    yield "", root, None
    path = [("", root, _children(root))]
    budget = MAX_NAMES
    while path and budget:
        prefix, parent, children = path[-1]
        component, child = next(children, ("", None))
        if child is None:
            path.pop()
        elif all(child is not above for _, above, _ in path):
            name = f"{prefix}.{component}" if prefix else component
            budget -= 1
            yield name, child, parent
            path.append((name, child, _children(child)))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children, those under a second name included (`named_children` leaves them out)."""
    registered = module.__dict__.get("_modules")
    named = registered.items() if isinstance(registered, dict) else module.named_children()
    return iter([(name, child) for name, child in named if isinstance(child, nn.Module)])
