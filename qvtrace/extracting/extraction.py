"""One call of one module, taken out of two archives: `extract`."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import Alignment, Pair, align
from qvtrace.comparison.comparison import Comparison
from qvtrace.comparison.diffing import Source, diff, open_source
from qvtrace.comparison.fusion import fused
from qvtrace.comparison.weight_pairs import WeightPairs, pair_weights
from qvtrace.errors import UsageError
from qvtrace.extracting.folders import check_folder, new_folder
from qvtrace.extracting.tensor_files import write_tensors
from qvtrace.manifest import CallEntry, WeightEntry
from qvtrace.metrics.elements import Array
from qvtrace.patterns import match, shown
from qvtrace.qparams.findings import parameters_of
from qvtrace.qparams.parameters import Parameters
from qvtrace.reports.formatting import counted, listed, printable
from qvtrace.reports.json import comparison_text, strict
from qvtrace.reports.table import TableOptions, comparison_lines
from qvtrace.trees import Json, Node, PlainValue, TensorLeaf, ValueLeaf, leaves, tensor_leaves

_NAMED = 8  # modules of which one may have been meant
_PARAMETERS = ("scale", "zero_point", "minimum", "maximum")
_WIDTH = 100  # of the report


@dataclass(frozen=True)
class Extract:
    """What was written."""

    folder: Path
    module: str
    call: int
    files: tuple[str, ...]
    missing: tuple[str, ...]  # what the archives do not have, and why, a text each


def extract(
    reference: Source,
    candidate: Source,
    module: str,
    folder: str | os.PathLike[str],
    *,
    call: int | None = None,
    sample: int | None = None,
    maps: Sequence[str] = (),
    overwrite: bool = False,
) -> Extract:
    """Write what a bug report on one module needs into a folder, and a script that reproduces it.

    `module` is a name of the reference, or a pattern that one paired module fits; `call` its call
    index, by default the first one, or the first of `sample`. The folder has what the reference
    gave the module, both outputs, weights and quantization parameters of both sides where they are
    stored, the metrics, and `reproduce.py`, which needs torch and safetensors alone.

    Raises `UsageError` for a module or call that is not there on both sides or not one alone, and
    `ExistingFileError` for a folder that is there unless `overwrite` is set and it is an older
    extract.
    """
    target = Path(folder)
    check_folder(target, overwrite=overwrite)
    with ExitStack() as opened:
        archives = open_source(reference, opened), open_source(candidate, opened)
        _refuse_folder_of(archives, target)
        manifests = archives[0].manifest, archives[1].manifest
        alignment = fused(align(*manifests, maps), *manifests)
        pair = _chosen(alignment, module, call, sample)
        name = shown(pair.reference.module)
        comparison = diff(*archives, include=[name], explain=[name], maps=maps, path="all")
        taken = _Taken(archives, pair, _weights(archives, alignment, maps))
        with new_folder(target, overwrite=overwrite) as made:
            written = [*taken.write(made), *_reports(made, _of_call(comparison, pair.reference))]
            about = {**taken.about, "missing": taken.missing}
            _write_json(made / "module.json", about)
            script = files("qvtrace.extracting").joinpath("reproduce.py").read_text("utf-8")
            (made / "reproduce.py").write_text(script, encoding="utf-8")
            written += ["module.json", "reproduce.py"]
            readme = _readme(about, written)
            (made / "README.md").write_text(readme, encoding="utf-8")
    names = tuple(sorted([*written, "README.md"]))
    return Extract(target, pair.reference.module, pair.reference.index, names, tuple(taken.missing))


def _refuse_folder_of(archives: tuple[Archive, Archive], folder: Path) -> None:
    """Raise `UsageError` where an archive would be lost with the folder that is replaced."""
    for archive in archives:
        if archive.file.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"--output {folder}: holds {archive.file}, which is compared; choose another folder"
            )


def _chosen(alignment: Alignment, module: str, call: int | None, sample: int | None) -> Pair:
    """The pair that was asked for."""
    names = {pair.reference.module for pair in alignment.pairs}
    name = _one_name(alignment, names, module)
    pairs = [pair for pair in alignment.pairs if pair.reference.module == name]
    of_sample = [pair for pair in pairs if sample in (None, pair.reference.sample)]
    if not of_sample:
        have = listed([str(one) for one in sorted({p.reference.sample for p in pairs})], _NAMED)
        raise UsageError(f"--sample {sample}: has no call of {shown(name)}; there is {have}")
    found = [pair for pair in of_sample if call in (None, pair.reference.index)]
    if not found:
        have = listed([str(pair.reference.index) for pair in of_sample], _NAMED)
        raise UsageError(f"--call {call}: is no paired call of {shown(name)}; there is {have}")
    return found[0]


def _one_name(alignment: Alignment, names: set[str], module: str) -> str:
    found = sorted(match(names, module))
    if len(found) == 1:
        return found[0]
    if found:
        told = listed([*map(shown, found)], _NAMED)
        raise UsageError(f"MODULE {module!r}: fits {len(found)} modules; name one of {told}")
    alone = ("reference", alignment.only_in_reference), ("candidate", alignment.only_in_candidate)
    for side, calls in alone:
        if match({entry.module for entry in calls}, module):
            raise UsageError(
                f"MODULE {module!r}: is only in the {side}; pair it with "
                "--map 'PATTERN=REPLACEMENT' if the other side has it under another name"
            )
    near = get_close_matches(module, [*map(shown, names)], _NAMED, 0.5)
    remedy = f"did you mean {listed(near, _NAMED)}?" if near else "list them with `qvtrace show`"
    raise UsageError(f"MODULE {module!r}: is none of {counted(len(names), 'module')}; {remedy}")


def _weights(
    archives: tuple[Archive, Archive], alignment: Alignment, maps: Sequence[str]
) -> WeightPairs:
    manifests = archives[0].manifest, archives[1].manifest
    return pair_weights(*manifests, alignment, maps)


def _of_call(comparison: Comparison, call: CallEntry) -> Comparison:
    """The rows of one call, and of the module's weights."""
    rows = tuple(
        row for row in comparison.rows if row.call == call.index or row.path.startswith("weights.")
    )
    explanations = tuple(one for one in comparison.explanations if one.place.call == call.index)
    return replace(comparison, rows=rows, explanations=explanations, complete=False)


class _Taken:
    """Everything of one call that the archives have."""

    def __init__(self, archives: tuple[Archive, Archive], pair: Pair, weights: WeightPairs) -> None:
        self._archives = archives
        self._calls = pair.reference, pair.candidate
        self._weights = weights
        self.missing: list[str] = []
        classes = [
            next((m.class_name for m in archive.manifest.modules if m.name == call.module), "?")
            for archive, call in zip(archives, self._calls, strict=True)
        ]
        self.about: Json = {
            "qvtrace": version("qvtrace"),
            "module": pair.reference.module,
            "candidate_module": pair.candidate.module,
            "class": classes[0],
            "candidate_class": classes[1],
            "call": pair.reference.index,
            "sample": pair.reference.sample,
            "step": pair.reference.step,
            "parameters": list(pair.reference.parameters),
            "archives": [archive.label for archive in archives],
        }

    def write(self, folder: Path) -> Iterator[str]:
        """Write the files, and give the name of each."""
        given = [self._given(side) for side in (0, 1)]
        yield from self._tensors(folder, "inputs", 0, given[0])
        if self._differ(given):
            yield from self._tensors(folder, "candidate_inputs", 1, given[1])
        self.about["values"] = dict(self._plain_values())
        for side, word in enumerate(("reference", "candidate")):
            output = self._archives[side].tree(self._calls[side], "output")
            found = dict(_tensors(output, "output"))
            yield from self._tensors(folder, f"{word}_output", side, found)
            yield from self._tensors(folder, f"{word}_weights", side, self._weights_of(side))
        yield from self._quantization(folder)

    def _given(self, side: int) -> dict[str, TensorLeaf]:
        trees = [
            (part, self._archives[side].tree(self._calls[side], part))
            for part in ("inputs", "kwargs")
        ]
        return {path: leaf for part, tree in trees for path, leaf in _tensors(tree, part)}

    def _differ(self, given: Sequence[Mapping[str, TensorLeaf]]) -> bool:
        digests = [{path: leaf.digest for path, leaf in one.items()} for one in given]
        return digests[0] != digests[1]

    def _plain_values(self) -> Iterator[tuple[str, PlainValue]]:
        """Numbers and switches that the reference's call was given."""
        for part in ("inputs", "kwargs"):
            tree = self._archives[0].tree(self._calls[0], part)
            for path, leaf in () if tree is None else leaves(tree, part):
                if isinstance(leaf, ValueLeaf):
                    yield path, leaf.value

    def _weights_of(self, side: int) -> dict[str, TensorLeaf]:
        """Those of the module and of what is in it: by the reference's names where they are paired,
        else by their own, both without that of the module."""
        named = [
            (pair.module, pair.name, pair.candidate if side else pair.reference)
            for pair in self._weights.everywhere
            if _is_in(pair.module, self._calls[0].module)
        ]
        found = {_below(name, self._calls[0].module, of): entry for name, of, entry in named}
        alone = (self._weights.only_in_reference, self._weights.only_in_candidate)[side]
        own = self._calls[side].module
        others = [entry for entry in alone if _is_in(entry.module, own)]
        found |= {_below(entry.module, own, entry.name): entry for entry in others}
        return {name: leaf for name, entry in found.items() for leaf in _value(entry)}

    def _tensors(
        self, folder: Path, name: str, side: int, found: Mapping[str, TensorLeaf]
    ) -> Iterator[str]:
        """Write one file, unless there is nothing for it."""
        archive = self._archives[side]
        arrays: dict[str, Array] = {}
        for path, leaf in found.items():
            if not archive.has_elements(leaf):
                portion = archive.portion(leaf)
                why = "no elements" if portion is None else portion.portion
                self.missing.append(f"{name} {path}: {why}")
                continue
            arrays[path] = archive.array(leaf)
            if archive.portion(leaf) is not None:
                self.missing.append(
                    f"{name} {path}: {len(arrays[path])} vectors of {list(leaf.shape)} are stored"
                )
        if arrays:
            write_tensors(folder / f"{name}.safetensors", arrays)
            yield f"{name}.safetensors"
        elif not found:
            self.missing.append(f"{name}: {_why_missing(name, archive)}")

    def _quantization(self, folder: Path) -> Iterator[str]:
        """Both sides' parameters as JSON, with their values as tensors where they are stored."""
        report: Json = {}
        for side, word in enumerate(("reference", "candidate")):
            archive = self._archives[side]
            own = self._calls[side].module
            found = [
                (_below(module, own, parameters.of), parameters)
                for module, parameters in parameters_of(archive)
                if _is_in(module, own)
            ]
            report[word] = [{**one.to_json(), "of": name} for name, one in found]
            values = dict(_parameter_values(found))
            if values:
                yield from self._tensors(folder, f"{word}_quantization", side, values)
        if any(report.values()):
            _write_json(folder / "quantization.json", report)
            yield "quantization.json"
        else:
            self.missing.append("quantization: no parameters are known on either side")


def _value(entry: WeightEntry) -> Iterator[TensorLeaf]:
    node = entry.node()
    if isinstance(node, TensorLeaf):
        yield node


def _tensors(tree: Node | None, part: str) -> Iterator[tuple[str, TensorLeaf]]:
    return iter(()) if tree is None else tensor_leaves(tree, part)


def _is_in(module: str, outer: str) -> bool:
    return module == outer or not outer or module.startswith(f"{outer}.")


def _below(module: str, outer: str, name: str) -> str:
    """The name of something in a module, as seen from one around it."""
    inner = module[len(outer) :].lstrip(".")
    return f"{inner}.{name}" if inner else name


def _parameter_values(found: Sequence[tuple[str, Parameters]]) -> Iterator[tuple[str, TensorLeaf]]:
    for of, parameters in found:
        for name in _PARAMETERS:
            summary = getattr(parameters, name)
            if summary is not None and summary.values is not None:
                yield f"{of}.{name}", summary.values


def _why_missing(name: str, archive: Archive) -> str:
    if not name.endswith("_weights"):
        return "no tensor is stored"
    if archive.manifest.weights is None:
        return "no weights are stored; record with --weights"
    return "the archive has weights, and none of this module: it may have none"


def _reports(folder: Path, comparison: Comparison) -> Iterator[str]:
    """The metrics as JSON and as text."""
    metrics = comparison_text(comparison, version("qvtrace"))
    (folder / "metrics.json").write_text(f"{metrics}\n", encoding="utf-8")
    options = TableOptions(width=_WIDTH, everything=True)
    lines = [line.plain.rstrip() for line in comparison_lines(comparison, options)]
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    yield from ("metrics.json", "report.txt")


def _write_json(file: Path, value: Json) -> None:
    file.write_text(json.dumps(strict(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


_TOLD = {
    "inputs.safetensors": "what the reference's module was given",
    "candidate_inputs.safetensors": "what the candidate's was given, where that differs",
    "reference_output.safetensors": "what the reference's module gave",
    "candidate_output.safetensors": "what the candidate's gave",
    "reference_weights.safetensors": "the reference's weights",
    "candidate_weights.safetensors": "the candidate's weights, dequantized, by the same names",
    "quantization.json": "quantization parameters of both sides",
    "reference_quantization.safetensors": "scales and zero points of the reference",
    "candidate_quantization.safetensors": "scales and zero points of the candidate",
    "metrics.json": "every metric",
    "report.txt": "the same for people",
    "module.json": "which module and call this is, and what the archives did not have",
    "reproduce.py": "prints the difference again, and computes the output where it can",
}


def _readme(about: Json, written: Sequence[str]) -> str:
    module = printable(shown(about["module"]))
    lines = [
        f"# {module}: call {about['call']}, {printable(about['class'])} "
        f"against {printable(about['candidate_class'])}",
        "",
        "    python reproduce.py",
        "",
        "needs torch and safetensors. The other files:",
        "",
        *(f"- `{name}`: {_TOLD[name]}" for name in _TOLD if name in written),
    ]
    if about["missing"]:
        lines += ["", "Not at hand:", "", *(f"- {printable(text)}" for text in about["missing"])]
    lines += [
        "",
        "**What these files give away**: elements of the module's inputs, from which a prompt or a "
        "picture may be read back, its outputs and its weights. Look at them before you pass "
        "them on.",
    ]
    return "\n".join(lines) + "\n"
