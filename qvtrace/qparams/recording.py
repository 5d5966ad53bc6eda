"""Reads the quantization parameters of a model's modules and stores their values.

Read when a module is first seen, which is before its first forward: some quantizers unpack their
weights in it. Nothing here may fail a recording: what cannot be read is absent, and counted.
"""

from collections.abc import Iterable, Set

import torch
from torch import nn

from qvtrace.errors import ArchiveError
from qvtrace.patterns import shown
from qvtrace.qparams.found import Found, Values
from qvtrace.qparams.modules import may_be_quantized, read_module
from qvtrace.qparams.parameters import Parameters, Range, Summary, all_to_json
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.snapshots import Snapshots
from qvtrace.trees import Json, TensorLeaf, key_name, path_component

_NAMED = 3
_PARTS = ("scale", "zero_point", "minimum", "maximum")
_COVERED = 1e-3  # of the range: what rounding a zero point and a scale may cost beyond half a step


class ParameterRecorder:
    """What is known of each module's quantization."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        # Beside the module itself, so that no other one gets its id.
        self._known: dict[int, tuple[nn.Module, Json | None]] = {}
        self._unread: dict[str, list[str]] = {}
        self._keys: set[str] = set()

    def read(self, modules: Iterable[NamedModule], recorded: Set[str]) -> None:
        """Read modules that are new; only of the `recorded` ones the values are stored.

        Raises only what the store raises as `OSError` or `ArchiveError`.
        """
        for module in modules:
            if id(module.module) not in self._known:
                stored = any(name in recorded for name in (module.name, *module.aliases))
                self._known[id(module.module)] = module.module, self._read(module, stored)

    def of(self, module: nn.Module) -> Json | None:
        """The parameters of a module as they stand in the manifest."""
        known = self._known.get(id(module))
        return None if known is None else known[1]

    @property
    def found_any(self) -> bool:
        """Whether any module has parameters."""
        return any(json is not None for _, json in self._known.values())

    def warnings(self) -> tuple[str, ...]:
        """What could not be read."""
        return tuple(
            f"quantization parameters of {len(names)} module{'s' * (len(names) > 1)} "
            f"{reason}: {', '.join(names[:_NAMED])}{' and more' * (len(names) > _NAMED)}"
            for reason, names in self._unread.items()
        )

    def _read(self, module: NamedModule, stored: bool) -> Json | None:
        try:
            if not may_be_quantized(module.module):
                return None
            with torch.no_grad():
                found = read_module(module.name, module.module)
                return all_to_json([self._parameters(module, one, stored) for one in found])
        except (OSError, ArchiveError):
            raise
        except Exception as error:  # another library's objects may raise anything
            self._note(module, f"cannot be read ({type(error).__name__})")
            return None

    def _note(self, module: NamedModule, reason: str) -> None:
        names = self._unread.setdefault(reason, [])
        if shown(module.name) not in names:
            names.append(shown(module.name))

    def _parameters(self, module: NamedModule, found: Found, stored: bool) -> Parameters:
        parts = {name: _tensor(getattr(found, name)) for name in _PARTS}
        if any(part is not None and part.is_meta for part in parts.values()):
            self._note(module, "are not at hand (on the meta device or offloaded)")
            parts = dict.fromkeys(_PARTS)
        place = f"{key_name(module.name)}/quantization.{path_component(found.of)}"
        while place in self._keys:  # the module took another's place, or has two of a name
            place += "'"
        self._keys.add(place)
        summaries = {
            name: None if part is None else self._summary(part, f"{place}.{name}", stored)
            for name, part in parts.items()
        }
        return Parameters(
            of=found.of,
            class_name=found.class_name,
            dtype=found.dtype,
            scheme=found.scheme,
            granularity=found.granularity,
            group_size=found.group_size,
            axis=found.axis,
            dynamic=found.dynamic,
            observer=found.observer,
            range=_range(found, parts),
            **summaries,
        )

    def _summary(self, values: torch.Tensor, key: str, stored: bool) -> Summary:
        node = self._snapshots.take(values, key, "") if stored else None
        wide = values.detach().double()
        finite = wide[torch.isfinite(wide)]
        return Summary(
            count=wide.numel(),
            minimum=float(finite.min()) if finite.numel() else None,
            maximum=float(finite.max()) if finite.numel() else None,
            zeros=int((wide == 0).sum()),
            nonfinite=wide.numel() - finite.numel(),
            values=node if isinstance(node, TensorLeaf) else None,
        )


def _tensor(values: Values) -> torch.Tensor | None:
    """A number as a tensor; a subclass (a scale that is itself quantized) as a plain one."""
    if values is None:
        return None
    if not isinstance(values, torch.Tensor):
        return torch.tensor(values, dtype=None if isinstance(values, int) else torch.float64)
    values = values.detach()
    if type(values) in (torch.Tensor, nn.Parameter, nn.Buffer):
        return values
    local = getattr(values, "to_local", values.dequantize if values.is_quantized else None)
    return values.as_subclass(torch.Tensor) if local is None else local()


def _range(found: Found, parts: dict[str, torch.Tensor | None]) -> Range | None:
    """What can be represented; None where it is not known."""
    if parts["scale"] is None or found.quant_min is None or found.quant_max is None:
        return None
    scale = parts["scale"].double()
    zero_point = _beside(parts["zero_point"], scale)
    low = (found.quant_min - zero_point) * scale
    high = (found.quant_max - zero_point) * scale
    known = torch.isfinite(low) & torch.isfinite(high)
    if not bool(known.any()):
        return None
    lower, upper = torch.minimum(low, high), torch.maximum(low, high)
    return Range(
        float(lower[known].min()),
        float(upper[known].max()),
        excluding_zero=int((known & ((lower > 0) | (upper < 0))).sum()),
        not_covering=_count_not_covering(parts, lower, upper, scale.abs()),
    )


def _beside(zero_point: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """Zero points in the shape of their scales."""
    if zero_point is None:
        return torch.zeros_like(scale)
    zero_point = zero_point.to(scale.device).double()
    return zero_point if zero_point.numel() == 1 else zero_point.reshape(scale.shape)


def _count_not_covering(
    parts: dict[str, torch.Tensor | None],
    lower: torch.Tensor,
    upper: torch.Tensor,
    step: torch.Tensor,
) -> int:
    minimum, maximum = parts["minimum"], parts["maximum"]
    if minimum is None or maximum is None or minimum.numel() not in (1, lower.numel()):
        return 0
    seen = [
        part.double().to(lower.device).reshape(lower.shape if part.numel() > 1 else ())
        for part in (minimum, maximum)
    ]
    slack = step + _COVERED * (upper - lower).abs()
    return int(((seen[0] < lower - slack) | (seen[1] > upper + slack)).sum())
