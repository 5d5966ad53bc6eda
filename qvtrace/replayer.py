"""An archive and a model -> an archive: modules run one by one on the inputs recorded for them.

What a module of a quantized model gives for the inputs that its float original received differs
from what that gave by the module's own error: nothing was handed on to it. The archive has the
calls of the original, by its names, so that `diff` compares it as any other.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvtrace import trees
from qvtrace.archive import Archive, ArchiveWriter
from qvtrace.archive.destinations import place_of
from qvtrace.archive.dry_run import DryWriter
from qvtrace.archive.overwriting import InputFile, refuse_overwriting_by_archive
from qvtrace.archive.writer import Tensor
from qvtrace.comparison.alignment import COMPILED, WRAPPED, unwrapped
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import (
    CallEntry,
    InputsInfo,
    Manifest,
    ModelInfo,
    ModuleEntry,
    Skipped,
    VariantInfo,
)
from qvtrace.models.rebuilding import NotRebuiltError, rebuild
from qvtrace.models.rebuilt_caches import Caches
from qvtrace.models.request import map_tensors
from qvtrace.patterns import require_matches, select, shown
from qvtrace.recording.budget import Fixed, parse_size, tokens_within
from qvtrace.recording.compilation import eager_stance
from qvtrace.recording.identity import Questions, describe_environment, describe_model, version
from qvtrace.recording.keeping import Keeper, Share
from qvtrace.recording.module_tree import walk_modules
from qvtrace.recording.options import Progress
from qvtrace.recording.snapshots import Snapshots
from qvtrace.redaction import error_line
from qvtrace.trees import Json

_NO_INPUTS = "their inputs were not stored"
_NO_MODULE = "the model has no such module"
_MOST_OF_STATE = 2**16  # elements of a buffer: larger ones are weights, which no call changes


@dataclass(frozen=True)
class ReplayOptions:
    """Which modules are replayed, and what the manifest is to say of the model."""

    include: tuple[str, ...] = ()  # patterns on module names, blocks too
    exclude: tuple[str, ...] = ()
    depth: int | None = None  # blocks with so many components in their names, not leaves
    overwrite: bool = False
    share: Share = field(default_factory=Share)
    max_bytes: int | None = None  # of the file
    model: ModelInfo | None = None
    variant: VariantInfo = field(default_factory=VariantInfo)
    environment: Json = field(default_factory=dict)
    progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class ReplayReport:
    """What a replay has done."""

    file: Path
    size: int  # bytes of the archive
    modules: int  # replayed
    calls: int
    chosen: int  # modules that were to be replayed
    skipped: dict[str, tuple[str, ...]]  # why not -> modules
    seconds: float


def replay(
    model: nn.Module,
    archive: Archive | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    depth: int | None = None,
    overwrite: bool = False,
    sample_tokens: int | None = None,
    stats_only: bool = False,
    max_bytes: int | str | None = None,
) -> ReplayReport:
    """Run modules of `model` on the inputs and kwargs that `archive` holds for them.

    Modules without calls of others in them, unless `include` names others or `depth` says how many
    components the names of blocks have. What cannot be replayed is counted with its reason. One
    call is in memory at a time. `sample_tokens`, `stats_only` and `max_bytes` are those of
    `record`, of the archive that is written; for a budget everything is replayed twice. A module of
    whose inputs `archive` has only a part is not replayed.

    Raises `UsageError` for a pattern that fits no module, `ExistingFileError` when there is such a
    file and `overwrite` is not set, and children of `ArchiveError` for files that cannot be used.
    """
    options = ReplayOptions(
        include=tuple(include),
        exclude=tuple(exclude),
        depth=depth,
        overwrite=overwrite,
        share=Share(sample_tokens, stats_only),
        max_bytes=None if max_bytes is None else parse_size(max_bytes, "max_bytes"),
        variant=VariantInfo(name=variant),
    )
    if isinstance(archive, Archive):
        return Replay(model, archive, place_of(path), options).run()
    with Archive.open(archive) as opened:
        return Replay(model, opened, place_of(path), options).run()


class Replay:
    """One replay of one model."""

    def __init__(
        self, model: nn.Module, archive: Archive, path: Path, options: ReplayOptions
    ) -> None:
        """`run` does it."""
        refuse_overwriting_by_archive(path, [InputFile(archive.file, "is replayed")])
        refuse_private(archive)
        self._model = model
        self._archive = archive
        self._path = path
        self._options = options
        self._skipped: dict[str, dict[str, None]] = defaultdict(dict)
        self._calls: dict[str, int] = defaultdict(int)
        self._questions = Questions()
        self._caches = Caches(archive, getattr(model, "config", None))

    def run(self) -> ReplayReport:
        """Replay, write the archive, and say what was done."""
        started = time.perf_counter()
        manifest = self._archive.manifest
        chosen = _chosen(manifest.calls, self._options)
        modules = by_reference_name(self._model)
        if self._options.max_bytes is not None:
            self._rehearse(self._options.max_bytes, chosen, modules)
        writer = ArchiveWriter(
            self._path, self._beginning(chosen, modules), overwrite=self._options.overwrite
        )
        try:
            self._replay_all(writer, Keeper(writer, self._options.share), chosen, modules)
        except BaseException as error:
            remains = writer.close(self._ending(chosen, modules, error_line(error)))
            if remains.file is not None:
                error.add_note(f"what was replayed until then is in {remains.file}")
            raise
        ending = writer.close(self._ending(chosen, modules, None))
        return ReplayReport(
            file=ending.file or self._path,
            size=writer.size,
            modules=len(self._calls),
            calls=sum(self._calls.values()),
            chosen=len(chosen),
            skipped={reason: tuple(names) for reason, names in self._skipped.items()},
            seconds=time.perf_counter() - started,
        )

    def _rehearse(self, budget: int, chosen: set[str], modules: dict[str, nn.Module]) -> None:
        """Replay everything once to count, and settle how many vectors there is room for."""
        writer = DryWriter(self._beginning(chosen, modules))
        keeper = Keeper(writer, self._options.share, counts_only=True)
        self._replay_all(writer, keeper, chosen, modules)
        writer.close(self._ending(chosen, modules, None))
        fixed = Fixed(sum(self._calls.values()), writer.size_with)
        share = self._options.share.at_most(tokens_within(budget, keeper.listed, fixed))
        self._options = replace(self._options, share=share)
        self._skipped.clear()
        self._calls.clear()

    def _replay_all(
        self,
        writer: ArchiveWriter | DryWriter,
        keeper: Keeper,
        chosen: set[str],
        modules: dict[str, nn.Module],
    ) -> None:
        self._writer = writer
        self._snapshots = Snapshots(keeper.keep)
        self._copy_root_calls()
        with torch.no_grad(), eager_stance():
            for call in self._archive.manifest.calls:
                if call.module in chosen:
                    self._replay(call, modules.get(call.module))
                    self._show_progress(len(chosen))

    def _replay(self, call: CallEntry, module: nn.Module | None) -> None:
        if module is None:
            self._skipped[_NO_MODULE][call.module] = None
            return
        device = _device(module)
        try:
            args, kwargs = self._arguments(call, device)
        except NotRebuiltError as error:
            self._skipped[str(error)][call.module] = None
            return
        args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(device))
        place = f"{trees.key_name(call.module)}#{call.index}/"
        number = self._writer.begin_call(
            {
                "module": call.module,
                "index": call.index,
                "sample": call.sample,
                "step": call.step,
                "parent": None,
                "parameters": list(call.parameters),
                "inputs": self._taken(call, "inputs", args),
                "kwargs": self._taken(call, "kwargs", kwargs),
            }
        )
        output, raised, seconds = _run(module, args, kwargs)
        node = None if raised else trees.to_json(self._snapshots.take(output, place, "output"))
        self._writer.end_call(
            number, {"output": node, "seconds": round(seconds, 6), "error": raised}
        )
        if raised is None:
            self._calls[call.module] += 1
        else:
            self._skipped[f"raised {raised}"][call.module] = None

    def _taken(self, call: CallEntry, part: str, value: object) -> trees.Json:
        """What a call is given, as it is stored: of a Cache what the archive has of it, which is
        what a step added."""
        place = f"{trees.key_name(call.module)}#{call.index}/"
        tree = self._archive.tree(call, part)
        if tree is None or not _holds_cache(tree):
            return trees.to_json(self._snapshots.take(value, place, part))
        self._copy(tree, f"{place}{part}")
        return trees.to_json(tree)

    def _copy(self, tree: trees.Node, place: str) -> None:
        """Store the tensors of a tree of the archive."""
        for path, leaf in trees.tensor_leaves(tree, place):
            contents = memoryview(self._archive.contents(leaf))
            self._writer.add_tensor(contents, Tensor(path, leaf.file_dtype, leaf.file_shape))

    def _arguments(
        self, call: CallEntry, device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def build(node: trees.Container, path: str) -> Any:
            return self._caches.build(node, call, path, device)

        inputs, kwargs = (self._archive.tree(call, part) for part in ("inputs", "kwargs"))
        if inputs is None or kwargs is None:
            raise NotRebuiltError(_NO_INPUTS)
        args = rebuild(inputs, self._archive, "inputs", build)
        named = rebuild(kwargs, self._archive, "kwargs", build)
        if not isinstance(args, tuple | list) or not isinstance(named, dict):
            raise DamagedArchiveError(
                f"{self._archive.file}: the inputs of {shown(call.module)} are no arguments of a "
                "call; record it again"
            )
        return tuple(args), named

    def _copy_root_calls(self) -> None:
        """The inputs of the model itself tell what a trace can be compared with."""
        for call in self._archive.manifest.inputs.root_calls:
            for part, tree in zip(
                ("inputs", "kwargs"), self._archive.input_trees(call), strict=True
            ):
                self._copy(tree, f"{trees.key_name(call.module)}#{call.index}/{part}")
            self._writer.add_root_call(call)

    def _show_progress(self, total: int) -> None:
        if self._options.progress is not None:
            done = len(self._calls)
            self._options.progress(Progress(done, total, self._writer.distinct_bytes))

    def _beginning(self, chosen: set[str], modules: dict[str, nn.Module]) -> Manifest:
        options, manifest = self._options, self._archive.manifest
        model = options.model or describe_model(self._model, self._questions, weights=False)
        return Manifest(
            qvtrace=version(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            complete=False,
            error=None,
            recorded_by="replay",
            model=model,
            variant=options.variant,
            inputs=InputsInfo(source=manifest.inputs.source),
            contains=manifest.contains,
            environment={
                **describe_environment(self._model, self._questions),
                **options.environment,
            },
            settings={
                "include": list(options.include),
                "exclude": list(options.exclude),
                "inputs": True,
                "kwargs": True,
                "caches": manifest.settings.get("caches") is True,
                **options.share.to_json(),
                "replayed": {"file": self._archive.file.name, "created": manifest.created},
            },
            modules=self._entries(chosen, modules),
            calls=(),
            tensors=(),
            skipped=Skipped(),
        )

    def _entries(self, chosen: set[str], modules: dict[str, nn.Module]) -> tuple[ModuleEntry, ...]:
        return tuple(
            replace(
                entry,
                class_name=type(modules[entry.name]).__name__,
                calls=self._calls.get(entry.name, 0),
                quantization=None,
            )
            for entry in self._archive.manifest.modules
            if entry.name in chosen and entry.name in modules
        )

    def _ending(
        self, chosen: set[str], modules: dict[str, nn.Module], error: str | None
    ) -> Manifest:
        return replace(
            self._beginning(chosen, modules),
            complete=error is None,
            error=error,
            skipped=Skipped(
                registered=len(chosen),
                called=len(self._calls),
                recorded=len(self._calls),
                reasons={reason: tuple(names) for reason, names in self._skipped.items()},
                opaque=dict(sorted(self._snapshots.opaque.items())),
                warnings=tuple(self._questions.warnings),
            ),
        )


def refuse_private(archive: Archive) -> None:
    """Raise `UsageError` for an archive that holds nothing that a module could be given."""
    if archive.is_private:
        raise UsageError(
            f"{archive.file}: is private, and holds no inputs that modules could be given; "
            "replay a recording made without --private"
        )


def _chosen(calls: Sequence[CallEntry], options: ReplayOptions) -> set[str]:
    """The names of the modules to replay."""
    called = {call.module for call in calls}
    require_matches(called, options.include, "--include")
    require_matches(called, options.exclude, "--exclude")
    holding = {call.parent[0] for call in calls if call.parent is not None}
    if options.include:
        wanted = called
    elif options.depth is None:
        wanted = called - holding
    else:
        wanted = {
            name
            for name in called
            if _depth(name) == options.depth
            or (_depth(name) < options.depth and name not in holding)
        }
        if not any(_depth(name) == options.depth for name in wanted):
            there = ", ".join(map(str, sorted(set(map(_depth, called)))))
            raise UsageError(
                f"--depth {options.depth}: no recorded module has so many components in its name; "
                f"there are modules with {there}"
            )
    chosen = select(wanted, include=options.include, exclude=options.exclude)
    if wanted and not chosen:
        raise UsageError("--include and --exclude: leave no recorded module; widen them")
    return chosen


def _holds_cache(node: trees.Node) -> bool:
    if not isinstance(node, trees.Container):
        return False
    return node.kind == "cache" or any(_holds_cache(child) for _, child in node.items)


def _depth(name: str) -> int:
    return name.count(".") + bool(name)


def by_reference_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that the float original has for them: the outermost wrapper first."""
    named: dict[str, nn.Module] = {}
    walked = walk_modules(model)
    for module in walked:
        for name in (module.name, *module.aliases):
            named.setdefault(name, module.module)
    # `module.` is taken off last: TICO's wrappers also keep the float original, under that name.
    for module in walked:
        named.setdefault(unwrapped(module.name, (COMPILED, WRAPPED)), module.module)
    for module in walked:
        for name in filter(None, (module.float_name, unwrapped(module.name))):
            named.setdefault(name, module.module)
    return named


def _run(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[object, str | None, float]:
    """What the call returns, or what it raises in a line, and its seconds. State that the module
    keeps in buffers is left as it was."""
    state = [
        (holder, name, buffer, buffer.clone())
        for holder in module.modules()
        for name, buffer in holder._buffers.items()
        if type(buffer) is torch.Tensor and not buffer.is_meta and buffer.numel() <= _MOST_OF_STATE
    ]
    started = time.perf_counter()
    try:
        output = module(*args, **kwargs)
    except (Exception, SystemExit, GeneratorExit) as error:
        return None, error_line(error), time.perf_counter() - started
    finally:
        for holder, name, buffer, before in state:
            buffer.copy_(before)
            holder._buffers[name] = buffer
    return output, None, time.perf_counter() - started


def _device(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), next(module.buffers(), None))
    if tensor is None or tensor.device.type == "meta":
        return torch.device("cpu")
    return tensor.device
