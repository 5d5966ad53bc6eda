"""What a quantizer that does not say so has changed: each module compared with what it was."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from qvtrace.comparison.alignment import unwrapped
from qvtrace.errors import ModelError
from qvtrace.models.quantizers.fingerprints import Fingerprint, fingerprint, global_hooks
from qvtrace.models.quantizers.outcome import Context, Quantized, checked
from qvtrace.models.quantizers.wrappers import handing_on
from qvtrace.patterns import folded
from qvtrace.reports.formatting import counted, listed

_NAMED = 3  # kinds of names in a sentence


def observed(
    model: nn.Module,
    quantize: Callable[[], object],
    label: str,
    context: Context,
    versions: dict[str, str] | None = None,
) -> Quantized:
    """Call `quantize`, which returns `model` quantized or another model.

    What it returns as `Quantized` is taken at its word where it names modules. Raises `ModelError`
    when it returns anything else than a model.
    """
    before, hooks = fingerprint(model), global_hooks()
    returned = quantize()
    told = checked(returned, label) if isinstance(returned, Quantized) else None
    quantized = returned if told is None else told.model
    if not isinstance(quantized, nn.Module):
        raise ModelError(
            f"{label}: returned {type(quantized).__name__}; return the quantized model"
        )
    if told is not None and told.quantized:
        return told
    changes = _compared(before, fingerprint(quantized))
    pure = handing_on(quantized, changes.wrappers, context.run)
    changed = [*changes.changed, *(name for name in changes.wrappers if name not in pure)]
    within = {changes.wrappers[name] for name in changed if name in changes.wrappers}
    kept = changes.kept - within
    left = tuple(
        name
        for name, module in quantized.named_modules()
        if isinstance(module, nn.Linear) and name in kept
    )
    outcome = Quantized(
        quantized,
        {},
        tuple(name for name, _ in quantized.named_modules() if name in changed),
        {"left as it was": left} if left else {},
        versions or {},
        (*_about_wrappers(pure), *changes.otherwise(), *_about_hooks(hooks)),
    )
    if told is None:
        return outcome
    return replace(told, quantized=outcome.quantized, otherwise=outcome.otherwise)


@dataclass
class _Changes:
    """How a model differs from what it was, by the names that its modules have now."""

    changed: list[str] = field(default_factory=list)
    wrappers: dict[str, str] = field(default_factory=dict)  # to what is in them as it was
    kept: set[str] = field(default_factory=set)  # as they were, in wrappers or not
    with_attributes: list[str] = field(default_factory=list)  # that are others
    unread: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def otherwise(self) -> Iterator[str]:
        """What is known beside the modules that changed, and may change what is computed."""
        for what, names in (
            ("added", self.added),
            ("removed", self.removed),
            ("with attributes that differ", self.with_attributes),
            ("whose weights cannot be read", self.unread),
        ):
            if names:
                yield _counted(names, what)


def _about_wrappers(names: list[str]) -> Iterator[str]:
    if names:
        yield _counted(names, "wrapped without computing anything else")


def _about_hooks(before: tuple[object, ...]) -> Iterator[str]:
    if global_hooks() != before:
        yield "hooks on all modules of the process"


def _counted(names: list[str], what: str) -> str:
    return f"{counted(len(names), 'module')} {what} ({listed(folded(names), _NAMED)})"


def _compared(before: Fingerprint, after: Fingerprint) -> _Changes:
    changes, waiting, seen = _Changes(), [(before, after)], set()
    floats: dict[str, Fingerprint] = {}  # the outermost of each name of the float model
    for node in (after, *after.below()):
        floats.setdefault(unwrapped(node.name), node)
    while waiting:
        pair = waiting.pop()
        if tuple(map(id, pair)) in seen:
            continue
        seen.add(tuple(map(id, pair)))
        one, other = pair
        if not other.is_like(one):
            held = next((inner for inner in other.below() if inner.is_like(one)), None)
            if held is None:
                changes.changed.append(other.name)
            else:
                changes.wrappers[other.name] = held.name
                other = held
        elif other.attributes != one.attributes:
            changes.with_attributes.append(other.name)
        elif other.unread:
            changes.unread.append(other.name)
        if other.is_like(one):
            changes.kept.add(other.name)
        waiting += reversed(list(_children(one, other, changes, floats)))
    return changes


def _children(
    before: Fingerprint,
    after: Fingerprint,
    changes: _Changes,
    floats: Mapping[str, Fingerprint],
) -> Iterator[tuple[Fingerprint, Fingerprint]]:
    """The modules that both have; those of one side are noted, but for what came into a module
    that itself changed."""
    for name, child in before.children.items():
        found = after.children.get(name) or floats.get(child.name)
        if found is not None:
            yield child, found
        else:
            changes.removed.append(child.name)
    if after.name not in changes.changed:
        changes.added += [
            child.name for name, child in after.children.items() if name not in before.children
        ]
