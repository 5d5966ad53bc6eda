"""What is known of modules without their calls: how they are quantized, their weights, and which
part of them this process holds."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qvtrace.manifest import ModuleEntry
from qvtrace.qparams.recording import ParameterRecorder
from qvtrace.recording.heads import head_widths
from qvtrace.recording.identity import process_place
from qvtrace.recording.module_tree import NamedModule
from qvtrace.recording.placement import module_placement, parallel_plan
from qvtrace.recording.values import StoredValues
from qvtrace.recording.weight_recording import WeightRecorder
from qvtrace.recording.writers import Writer


class ModuleEntries:
    """Reads modules before any of them runs. Raises only what the store raises, as `OSError` or
    `ArchiveError`."""

    def __init__(self, writer: Writer, values: StoredValues) -> None:
        self._writer = writer
        self._values = values
        self._qparams = ParameterRecorder(values.snapshots)
        self._weights = WeightRecorder(values.snapshots, writer.add_weight)
        self._plan: dict[str, str] = {}

    def begin(self, modules: list[NamedModule], chosen: set[str], *, weights: bool) -> None:
        """Read all modules; of the `chosen` ones also the weights, where they are asked for."""
        self.read(modules, chosen)
        self._plan = parallel_plan(modules) if process_place() is not None else {}
        if self._qparams.found_any or process_place() is not None:
            self._writer.add_modules(self.of(modules))
        if weights:
            self._values.begin_kind("weights")
            self._weights.record(modules, chosen)

    def read(self, modules: list[NamedModule], chosen: set[str]) -> None:
        """Read the quantization parameters of modules that are new."""
        self._values.begin_kind("quantization parameters")
        self._qparams.read(modules, chosen)

    def finish(self) -> None:
        """Read the weights that are only there once the model has run."""
        self._values.begin_kind("weights")
        self._weights.finish()

    def of(
        self, modules: Iterable[NamedModule], calls: Mapping[int, int] | None = None
    ) -> tuple[ModuleEntry, ...]:
        """Modules as they stand in the manifest; `calls` by `id` of the module."""
        return tuple(
            replace(
                plain_entry(module),
                calls=0 if calls is None else calls.get(id(module.module), 0),
                quantization=self._qparams.of(module.module),
                placement=module_placement(module, self._plan),
            )
            for module in modules
        )

    def warnings(self) -> tuple[str, ...]:
        """What could not be read."""
        return (*self._qparams.warnings(), *self._weights.warnings())


def plain_entry(module: NamedModule) -> ModuleEntry:
    """A module of which no more than its place is known."""
    parent = None if module.parent is None else module.parent.name
    return ModuleEntry(
        module.name,
        module.class_name,
        parent,
        tuple(module.aliases),
        float_name=module.float_name,
        head_widths=head_widths(module),
    )
