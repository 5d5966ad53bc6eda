"""Real runs of a quantized model with some modules kept float, and what the target is in each."""

import gc
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from qvtrace import trees
from qvtrace.archive import Archive
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.language_models import is_head
from qvtrace.errors import UsageError
from qvtrace.judging.gates import GateResult
from qvtrace.manifest import CallEntry, VariantInfo
from qvtrace.models.chatter import quiet
from qvtrace.models.preparation import prepare
from qvtrace.models.request import ModelRequest, PreparedModel
from qvtrace.patterns import shown
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording
from qvtrace.replayer import by_reference_name
from qvtrace.suggesting.suggestion import Figure, Step
from qvtrace.suggesting.targets import Target


@dataclass
class Trials:
    """Runs one request again and again, like `archive`, each time with other modules kept float.

    What the target is about is recorded, in one file that the next run replaces.
    """

    request: ModelRequest
    archive: Archive
    target: Target
    modules: tuple[str, ...]  # whose outputs are compared, by the reference's names
    file: Path
    variant: VariantInfo = field(default_factory=VariantInfo)  # of the last run

    def run(self, step: Step, look: Callable[[PreparedModel], None] | None = None) -> Step:
        """The step with its figure and seconds; `look` is shown the model after its run, of
        which then everything is recorded.

        Raises `ModelError` for a model that cannot be quantized or raises, and `UsageError` where
        there is nothing to compare.
        """
        started = time.perf_counter()
        gc.collect()  # the model before is full of cycles
        prepared = prepare(replace(self.request, keep_float=step.kept), self.archive)
        self.variant = prepared.variant
        self._record(prepared, everything=look is not None)
        if look is not None:
            look(prepared)
        figure = self._figure()
        return replace(step, figure=figure, seconds=time.perf_counter() - started)

    def _record(self, prepared: PreparedModel, everything: bool) -> None:
        names = () if everything else sorted(_names_of(self.modules, prepared.model))
        options = RecordOptions(
            include=tuple(names),
            overwrite=True,
            inputs=everything,
            kwargs=everything,
            recorded_by="suggest",
            model=prepared.info,
            variant=prepared.variant,
            source=prepared.source,
            environment=prepared.environment,
        )
        recording = Recording(prepared.model, self.file, options)
        with quiet(), recording:
            prepared.run(recording)

    def _figure(self) -> Figure:
        include = () if self.target.is_end_to_end else self.modules
        comparison = diff(self.archive, self.file, include=include, fail_on=[self.target.gate])
        if not comparison.comparable.ok:
            raise UsageError(
                f"{self.archive.file}: another model or other inputs than those of the runs "
                f"({'; '.join(comparison.comparable.differences)}); record the reference anew"
            )
        (result,) = comparison.verdict.gates
        if not result.rows:
            raise UsageError(
                f"--target {self.target.text!r}: {result.note}; choose other modules or another "
                "metric"
            )
        return _figure_of(result)


def target_modules(target: Target, archive: Archive) -> tuple[str, ...]:
    """The modules that are to be recorded for a target.

    Raises `UsageError` where the archive has none of them.
    """
    called = {call.module for call in archive.manifest.calls if call.output is not None}
    if target.is_end_to_end:
        heads = {call.module for call in archive.manifest.calls if is_head(call)}
        found = called & {"", *heads}
        if found:
            _refuse_statistics(found, archive)
            return tuple(sorted(found))
    found = target.modules(called, str(archive.file))
    _refuse_statistics(found, archive)
    if not any(
        _has_tensor(call, archive) for call in archive.manifest.calls if call.module in found
    ):
        raise UsageError(
            f"--target {target.text!r}: no output that it covers has a tensor; "
            "choose other modules with '@ PATTERN'"
        )
    return tuple(sorted(found))


def _has_tensor(call: CallEntry, archive: Archive) -> bool:
    tree = archive.tree(call, "output")
    return tree is not None and any(True for _ in trees.tensor_leaves(tree, "output"))


def _refuse_statistics(modules: Collection[str], archive: Archive) -> None:
    """Raise `UsageError` where of an output no element is there to compare with."""
    for call in archive.manifest.calls:
        tree = archive.tree(call, "output") if call.module in modules else None
        leaves = () if tree is None else trees.tensor_leaves(tree, "output")
        if not all(archive.has_elements(leaf) for _, leaf in leaves):
            raise UsageError(
                f"{archive.file}: has only statistics of {shown(call.module)}, which tell of no "
                "target; record it without --stats-only"
            )


def _names_of(modules: Collection[str], model: nn.Module) -> set[str]:
    """What a quantized model calls these modules of its float original, wrappers included."""
    wanted = {id(module) for name, module in by_reference_name(model).items() if name in modules}
    return {name or "(root)" for name, module in model.named_modules() if id(module) in wanted}


def _figure_of(result: GateResult) -> Figure:
    worst = result.failures[0] if result.failures else result.worst
    if worst is None:
        return Figure(None, result.ok, reason="identical" if result.ok else result.note)
    return Figure(worst.value, result.ok, worst.excess, worst.place.module, worst.reason)
