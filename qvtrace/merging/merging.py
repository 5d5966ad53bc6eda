"""Writes the archive that the archives of all ranks add up to."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from qvtrace import trees
from qvtrace.archive import Archive, ArchiveWriter
from qvtrace.archive.destinations import place_of
from qvtrace.archive.overwriting import InputFile, refuse_overwriting_by_archive
from qvtrace.digests import digest_json
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import (
    CallEntry,
    Manifest,
    ModuleEntry,
    RootCall,
    WeightEntry,
)
from qvtrace.merging.joining import Counts, Joiner, Whole
from qvtrace.merging.ranks import in_order, merged_name
from qvtrace.patterns import shown
from qvtrace.qparams.parameters import all_from_json
from qvtrace.trees import Container, Json, Node, Placement, TensorLeaf, key_name, path_component

_NAMED = 3
_PARTS = ("inputs", "kwargs", "output")


@dataclass(frozen=True)
class Merge:
    """What became of the files of a run."""

    file: Path
    size: int
    ranks: int
    calls: int
    counts: Counts
    warnings: tuple[str, ...]


def merge(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Merge:
    """Join the archives of all ranks of one run into one, `fp.st` unless `output` names another.

    A tensor that is spread over the ranks is joined along its dimension, one that all have alike is
    kept once, and what cannot be joined is kept apart. Raises `UsageError` unless each rank of one
    run is there once, `ExistingFileError` where the archive would overwrite another, and children
    of `ArchiveError` for files that cannot be read.
    """
    if not files:
        raise UsageError("merge: no file; name the files of all ranks, such as fp.rank0-of-2.st")
    with ExitStack() as opened:
        archives = [opened.enter_context(Archive.open(file)) for file in files]
        for archive in archives:
            if archive.manifest.portions:
                raise UsageError(
                    f"{archive.file}: does not hold its tensors whole, and parts cannot be joined; "
                    "record the ranks without --sample-tokens, --stats-only and --private"
                )
        archives = in_order(archives)
        target = _target(archives[0].file, output)
        ranks = (InputFile(archive.file, "is merged") for archive in archives)
        refuse_overwriting_by_archive(target, ranks)
        return _Merging(archives, target, overwrite=overwrite).run()


def _target(first: Path, output: str | os.PathLike[str] | None) -> Path:
    target = merged_name(first) if output is None else place_of(output)
    if target is None:
        raise UsageError(f"{first}: has no rank in its name; say with --output what to write")
    return target


class _Merging:
    """One merge, from the first byte to the last."""

    def __init__(self, archives: list[Archive], target: Path, *, overwrite: bool) -> None:
        self._archives = archives
        self._manifests = [archive.manifest for archive in archives]
        self._entries = [{entry.name: entry for entry in m.modules} for m in self._manifests]
        # Those that only further ranks have come last.
        self._modules = {n: e for entries in reversed(self._entries) for n, e in entries.items()}
        self._modules = {n: self._modules[n] for n in _names(self._entries)}
        self._parents = {entry.parent for entry in self._modules.values()}
        self._warnings: list[str] = []
        self._manifest = self._beginning()
        self._writer = ArchiveWriter(target, self._manifest, overwrite=overwrite)
        self._joiner = Joiner(archives, self._writer)

    def run(self) -> Merge:
        """Write everything; nothing is left of a merge that fails."""
        try:
            self._add_parameters()
            self._add_weights()
            self._add_root_calls()
            calls = self._add_calls()
        except BaseException:
            self._writer.discard()
            raise
        self._note_apart()
        skipped = self._manifest.skipped
        skipped = replace(skipped, warnings=(*skipped.warnings, *self._warnings))
        ending = self._writer.close(replace(self._manifest, skipped=skipped))
        return Merge(
            ending.file or self._writer.file,
            self._writer.size,
            len(self._archives),
            calls,
            self._joiner.counts,
            tuple(self._warnings),
        )

    def _beginning(self) -> Manifest:
        first = self._manifests[0]
        environment = {name: v for name, v in first.environment.items() if name != "rank"}
        incomplete = [m for m in self._manifests if not m.complete]
        return replace(
            first,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            complete=not incomplete,
            error=incomplete[0].error or "a rank is incomplete" if incomplete else None,
            recorded_by="merge",
            environment=environment,
            settings={**first.settings, "merged": [a.file.name for a in self._archives]},
            inputs=replace(first.inputs, root_calls=()),
            modules=tuple(_without_parts(entry) for entry in self._modules.values()),
            calls=(),
            tensors=(),
            weights=None if first.weights is None else (),
        )

    def _note_apart(self) -> None:
        places = self._joiner.apart
        if places:
            named = ", ".join(places[:_NAMED]) + " and more" * (len(places) > _NAMED)
            self._warnings.append(
                f"{len(places)} place{'s' * (len(places) > 1)} kept apart by rank, since nothing "
                f"says how they belong together: {named}"
            )

    def _add_parameters(self) -> None:
        """Quantization parameters are kept where all ranks have the same."""
        entries, differing = [], []
        for name, entry in self._modules.items():
            found = [entries.get(name) for entries in self._entries]
            kept = entry.quantization
            if any(other is not None and other.quantization != kept for other in found):
                differing.append(shown(name))
                kept = None
            self._copy_values(name, kept)
            entries.append(replace(_without_parts(entry), quantization=kept))
        if differing:
            named = ", ".join(differing[:_NAMED]) + " and more" * (len(differing) > _NAMED)
            self._warnings.append(
                f"quantization parameters of {len(differing)} modules differ from rank to rank, "
                f"and stay in the files of the ranks: {named}"
            )
        self._manifest = replace(self._manifest, modules=tuple(entries))
        self._writer.add_modules(self._manifest.modules)

    def _copy_values(self, name: str, json: Json | None) -> None:
        try:
            found = all_from_json(json)
        except ValueError as error:
            raise self._damaged(
                0, f"the quantization parameters of {shown(name)}", error
            ) from error
        rank = self._rank_of(name)
        for number, parameters in enumerate(found):
            for part in ("scale", "zero_point", "minimum", "maximum"):
                summary = getattr(parameters, part)
                if summary is not None and summary.values is not None:
                    place = f"{key_name(name)}/quantization.{path_component(parameters.of)}"
                    key = f"{place}{number or ''}.{part}"
                    self._joiner.copy(summary.values, rank, key, "")

    def _rank_of(self, module: str) -> int:
        """The first rank that has a module."""
        ranks = enumerate(self._entries)
        return next(rank for rank, entries in ranks if module in entries)

    def _add_weights(self) -> None:
        named: dict[tuple[str, str], dict[int, WeightEntry]] = {}
        for rank, manifest in enumerate(self._manifests):
            for weight in manifest.weights or ():
                named.setdefault((weight.module, weight.name), {})[rank] = weight
        for (module, name), weights in named.items():
            place = f"{key_name(module)}/"
            path = f"weights.{path_component(name)}"
            what = f"the weight {name} of {shown(module)}"
            nodes = {rank: self._node(rank, weight.value, what) for rank, weight in weights.items()}
            node = self._together(nodes, place, path, None)
            first = next(iter(weights.values()))
            self._writer.add_weight(replace(first, value=trees.to_json(node)))

    def _add_root_calls(self) -> None:
        for calls in zip(*(m.inputs.root_calls for m in self._manifests), strict=True):
            first = calls[0]
            place = f"{key_name(first.module)}#{first.index}/"
            what = f"the inputs of {shown(first.module)}, call {first.index}"
            joined = []
            for part in ("inputs", "kwargs"):
                nodes = {
                    rank: self._node(rank, getattr(call, part), what)
                    for rank, call in enumerate(calls)
                }
                joined.append(trees.to_json(self._together(nodes, place, part, None)))
            inputs, kwargs = joined
            digest = digest_json([inputs, kwargs])
            call = RootCall(first.module, first.index, inputs, kwargs, digest, first.sample)
            self._writer.add_root_call(call)

    def _add_calls(self) -> int:
        by_key = [{(c.module, c.index): c for c in m.calls} for m in self._manifests]
        keys = dict.fromkeys(key for calls in by_key for key in calls)
        for key in keys:
            self._add_call({rank: c[key] for rank, c in enumerate(by_key) if key in c})
        return len(keys)

    def _add_call(self, calls: dict[int, CallEntry]) -> None:
        first = next(iter(calls.values()))
        place = f"{key_name(first.module)}#{first.index}/"
        values_of: dict[str, dict[int, Node] | None] = {}
        for part in _PARTS:
            what = f"the {part} of {shown(first.module)}, call {first.index}"
            values = {rank: getattr(call, part) for rank, call in calls.items()}
            known = None not in values.values()
            values_of[part] = (
                {rank: self._node(rank, value, what) for rank, value in values.items()}
                if known
                else None
            )
        hints = self._hints(first.module, values_of)
        joined = {
            part: None
            if nodes is None
            else trees.to_json(self._together(nodes, place, part, hints.get(part)))
            for part, nodes in values_of.items()
        }
        self._write_call(first, list(calls.values()), joined)

    def _write_call(
        self, first: CallEntry, calls: list[CallEntry], joined: dict[str, Json | None]
    ) -> None:
        number = self._writer.begin_call(
            {
                "module": first.module,
                "index": first.index,
                "sample": first.sample,
                "step": first.step,
                "parent": None if first.parent is None else list(first.parent),
                "parameters": list(first.parameters),
                "inputs": joined["inputs"],
                "kwargs": joined["kwargs"],
            }
        )
        seconds = [call.seconds for call in calls if call.seconds is not None]
        errors = [call.error for call in calls if call.error is not None]
        end: Json = {
            "output": joined["output"],
            "seconds": max(seconds, default=None),
            "error": errors[0] if errors else None,
        }
        edited = {call.edited for call in calls}
        if len(edited) == 1 and first.edited is not None:  # else it is not known of the whole
            end["edited"] = list(first.edited)
        self._writer.end_call(number, end)

    def _together(self, nodes: dict[int, Node], place: str, path: str, whole: Whole | None) -> Node:
        """The value, where all ranks have it; else that of the first which does."""
        if len(nodes) == len(self._archives):
            return self._joiner.join(list(nodes.values()), place, path, whole)
        rank, node = next(iter(nodes.items()))
        if any(other != node for other in nodes.values()):
            self._warnings.append(f"{place}{path} is that of rank {rank}: not all ranks have it")
        return self._joiner.copy(node, rank, place, path)

    def _hints(self, module: str, parts: dict[str, dict[int, Node] | None]) -> dict[str, Whole]:
        """What is known of the placement of a module's inputs and output."""
        entry = self._modules.get(module)
        placement = None if entry is None else entry.placement
        if entry is not None and placement is not None:
            return dict(self._by_weights(entry, placement))
        return self._by_inputs(module, parts)

    def _by_weights(self, entry: ModuleEntry, placement: Json) -> Iterator[tuple[str, Whole]]:
        """A linear layer that holds rows of its weight gives a part of the output's channels; one
        that holds columns is given a part of the input's."""
        weights = placement.get("weights")
        weight = weights.get("weight") if isinstance(weights, dict) else None
        if weight is None:
            yield from _by_style(placement.get("style"))
            return
        try:
            placed = Placement.from_json(weight)
        except ValueError as error:
            raise self._damaged(0, f"the placement of {shown(entry.name)}", error) from error
        if len(placed.shape) != 2 or placed.mesh != (len(self._archives),):
            return
        rows, columns = placed.shape
        is_table = "Embedding" in entry.class_name
        if placed.of == ("Shard(0)",) and not is_table:
            yield "output", Whole(-1, rows)
        elif placed.of == ("Shard(1)",):
            yield ("output" if is_table else "inputs"), Whole(-1, columns)

    def _by_inputs(self, module: str, parts: dict[str, dict[int, Node] | None]) -> dict[str, Whole]:
        """A module without modules and weights of its own, such as an activation, returns what it
        is given in the same parts, if in the same shapes."""
        given, returned = parts["inputs"], parts["output"]
        if given is None or returned is None or module in self._parents:
            return {}
        first = [node for nodes in given.values() for node in _first_of(nodes)]
        if len(first) != len(self._archives) or _shapes(first) != _shapes(returned.values()):
            return {}
        dimension = self._joiner.dimension_of(first)
        return {} if dimension is None else {"output": Whole(dimension, None)}

    def _node(self, rank: int, json: object, what: str) -> Node:
        try:
            return trees.from_json(json)
        except ValueError as error:
            raise self._damaged(rank, what, error) from error

    def _damaged(self, rank: int, what: str, error: ValueError) -> DamagedArchiveError:
        file = self._archives[rank].file
        return DamagedArchiveError(f"{file}: {what}: {error}; the file is damaged, record again")


def _names(entries: Sequence[dict[str, ModuleEntry]]) -> dict[str, None]:
    return dict.fromkeys(name for named in entries for name in named)


def _without_parts(entry: ModuleEntry) -> ModuleEntry:
    """A module of which the whole is there."""
    return replace(entry, placement=None)


def _by_style(style: object) -> Iterator[tuple[str, Whole]]:
    """What a plan says of a layer whose weights do not (a packed weight is no distributed one)."""
    if not isinstance(style, str) or "gather" in style or "rep" in style:
        return
    if style.startswith("colwise"):
        yield "output", Whole(-1, None)
    elif style.startswith("rowwise") and "split" not in style:
        yield "inputs", Whole(-1, None)


def _first_of(inputs: Node) -> list[Node]:
    return [inputs.items[0][1]] if isinstance(inputs, Container) and inputs.items else []


def _shapes(nodes: Iterable[Node]) -> list[tuple[int, ...] | None]:
    return [node.shape if isinstance(node, TensorLeaf) else None for node in nodes]
