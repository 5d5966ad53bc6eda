"""Why modules that are registered were not recorded, each by name: nothing disappears silently."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qvtrace.manifest import Skipped
from qvtrace.patterns import folded
from qvtrace.recording.module_tree import NamedModule

EXCLUDED = "left out by --include or --exclude"
CONTAINER = "only holds other modules"
NEVER_CALLED = "never called"
UNCALLED_WEIGHTS = "never called, with weights of its own: used directly, or not at all"
BYPASSED = "ran without being called (.forward() used directly)"
UNSEEN = "created during forward, not seen"


@dataclass(eq=False)
class HookedModule:
    """A module under the hook, and what became of it."""

    module: NamedModule
    recorded: bool  # False: it is left out, only its calls are counted
    calls: int = 0
    parameters: tuple[str | None, ...] | None = None  # of its forward, once they were asked for


def skipped_modules(
    modules: Sequence[NamedModule],
    hooked: Mapping[int, HookedModule],
    bypassed: Collection[str],
) -> Skipped:
    """How many of the modules were called and recorded, and why the others were not.

    `hooked` are those under the hook, by `id` of the module; `bypassed` the names of those whose
    children were seen to run below a module further up.
    """
    evidence = _Evidence(modules, hooked, bypassed)
    reasons = _reasons(modules, evidence)
    recorded = {key for key, module in hooked.items() if module.recorded and module.calls}
    return Skipped(
        registered=len(modules),
        called=sum(1 for module in modules if evidence.calls_of(module)),
        # Of these: a module that was replaced meanwhile is registered no more.
        recorded=sum(1 for module in modules if id(module.module) in recorded),
        reasons=reasons,
        warnings=_warnings(reasons, len(recorded)),
    )


def _reasons(modules: Sequence[NamedModule], evidence: "_Evidence") -> dict[str, tuple[str, ...]]:
    """Each reason with the modules that it holds for."""
    reasons: dict[str, list[str]] = {}
    for module in modules:
        reason = evidence.reason(module)
        if reason is not None:
            reasons.setdefault(reason, []).append(module.name)
    return {reason: tuple(names) for reason, names in sorted(reasons.items())}


def _warnings(reasons: Mapping[str, Sequence[str]], recorded: int) -> tuple[str, ...]:
    """What a person should know of: modules whose work was not seen."""
    warnings = []
    if not recorded and reasons.get(EXCLUDED):
        warnings.append("no call was recorded: --include and --exclude leave no module that ran")
    elif not recorded:
        warnings.append("no call was recorded: nothing called the model while it was recorded")
    unseen = (BYPASSED, UNCALLED_WEIGHTS, UNSEEN) if recorded else (BYPASSED, UNSEEN)
    for reason in unseen:
        if names := reasons.get(reason):
            places = folded(names)
            more = f" and {len(places) - 3} more" if places[3:] else ""
            named = ", ".join(places[:3]) + more
            warnings.append(f"{len(names)} module{'s' * (len(names) > 1)}: {reason}: {named}")
    return tuple(warnings)


class _Evidence:
    """What tells one reason from another."""

    def __init__(
        self,
        modules: Sequence[NamedModule],
        hooked: Mapping[int, HookedModule],
        bypassed: Collection[str],
    ) -> None:
        self._hooked = hooked
        self._bypassed = bypassed
        called = (module.module for module in modules if self.calls_of(module))
        # A tied weight is at work where it is called, so that its other place is not suspicious.
        self._working = {id(weight) for module in called for weight in _own_parameters(module)}

    def reason(self, module: NamedModule) -> str | None:
        """Why the module was not recorded; None when it was."""
        if module.is_container:
            return CONTAINER
        hooked = self._hooked.get(id(module.module))
        if hooked is None:
            return UNSEEN
        if not hooked.calls:
            return self._why_not_called(module)
        return None if hooked.recorded else EXCLUDED

    def calls_of(self, module: NamedModule) -> int:
        """How often the module was called."""
        hooked = self._hooked.get(id(module.module))
        return 0 if hooked is None else hooked.calls

    def _why_not_called(self, module: NamedModule) -> str:
        if module.name in self._bypassed:
            return BYPASSED
        own = _own_parameters(module.module)
        idle = bool(own) and not any(id(weight) in self._working for weight in own)
        return UNCALLED_WEIGHTS if idle else NEVER_CALLED


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """As they are registered: a method of the user's that lists them may raise."""
    return [weight for weight in module._parameters.values() if weight is not None]
