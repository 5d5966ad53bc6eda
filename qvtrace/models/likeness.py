"""A request and a sample taken from an archive, so that a second recording is like the first.

An archive is not to be trusted: nothing in it makes this code import a function, run code that
comes with a model, or look up a class by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError, UsageError
from qvtrace.manifest import GivenInputs, RootCall
from qvtrace.models.functions import FunctionName
from qvtrace.models.origins import parse_origin
from qvtrace.models.placement import ATTENTIONS, DTYPES
from qvtrace.models.rebuilding import SPARSE, NotRebuiltError, rebuild
from qvtrace.models.request import ModelRequest, Sample
from qvtrace.privacy import is_label
from qvtrace.trees import Node, TensorLeaf, leaves


def resembling(request: ModelRequest, archive: Archive) -> ModelRequest:
    """The request with what it leaves open taken from the archive: model, seed, dtype, attention.

    Raises `UsageError` where the archive's model must be named again.
    """
    recorded = archive.manifest.model
    same = request.model in (None, recorded.name) or archive.is_private
    if request.model is None:
        request = replace(request, model=_trusted_name(archive))
    if same:
        layers = recorded.modifications.get("num_layers")
        layers = layers if isinstance(layers, int) else None
        request = replace(
            request,
            from_config=request.from_config or recorded.modifications.get("from_config") is True,
            num_layers=layers if request.num_layers is None else request.num_layers,
            revision=request.revision or recorded.revision,
        )
    function = isinstance(parse_origin(request.model), FunctionName)
    # A function chose its dtypes itself, which may be several.
    dtype = recorded.modifications.get("dtype") if function else recorded.dtype
    dtype = dtype if dtype in DTYPES else None
    return replace(
        request,
        seed=recorded.seed if request.seed is None else request.seed,
        dtype=request.dtype or dtype,
        attn=request.attn or _attention(archive, request, function=function),
        generate=_steps(archive) if request.generate is None else request.generate,
    )


def rebuild_inputs(archive: Archive) -> tuple[Sample, ...]:
    """What the archive's generation was given, or else the inputs of the first root call of each
    sample.

    Raises `UsageError` for inputs that the archive could not store.
    """
    if archive.is_private:
        raise _cannot(archive, "it is private and holds no inputs")
    given = archive.manifest.inputs.given
    if given is not None:
        return (_rebuilt(archive, given),)
    calls = [call for call in archive.manifest.inputs.root_calls if call.module == ""]
    firsts = {call.sample: call for call in reversed(calls)}
    if not firsts:
        raise _cannot(archive, "it holds no inputs of the whole model")
    first, *others = (_rebuilt(archive, firsts[sample]) for sample in sorted(firsts))
    if len(calls) > len(firsts):
        more = f"{archive.file.name} has {len(calls)} root calls; its first is repeated"
        first = replace(first, warnings=(more, *first.warnings))
    return first, *others


def _rebuilt(archive: Archive, root: RootCall | GivenInputs) -> Sample:
    inputs, kwargs = archive.input_trees(root)
    try:
        args, named = rebuild(inputs, archive, "inputs"), rebuild(kwargs, archive, "kwargs")
    except NotRebuiltError as error:
        raise _cannot(archive, str(error)) from error
    if not isinstance(args, tuple | list) or not isinstance(named, dict):
        raise DamagedArchiveError(
            f"{archive.file}: its inputs are no arguments of a call; record it again"
        )
    source = {**archive.manifest.inputs.source, "like": archive.file.name}
    told = _dequantized((inputs, "inputs"), (kwargs, "kwargs"))
    return Sample(tuple(args), named, source, tuple(told))


def _trusted_name(archive: Archive) -> str:
    name = archive.manifest.model.name
    if name is None:
        raise UsageError(
            f"--like {archive.file}: was recorded from a Python program, which names no model; "
            "name it with --model"
        )
    if archive.is_private and is_label(name):
        raise UsageError(
            f"--like {archive.file}: is private and does not say where its model is; "
            "name it with --model"
        )
    if FunctionName.parse(name) is not None:
        raise UsageError(
            f"--like {archive.file}: its model is the function {name}, which is not run on the "
            f"archive's word; give --model {name}"
        )
    return name


def _attention(archive: Archive, request: ModelRequest, *, function: bool) -> str | None:
    """The attention implementation of the archive, where the model can be told to use it."""
    if function or request.attention_maps:
        return None
    attention = archive.manifest.environment.get("attention")
    return attention if attention in ATTENTIONS else None


def _steps(archive: Archive) -> int | None:
    """How many tokens the archive's generation has; None: it holds none that can be repeated."""
    if archive.manifest.inputs.given is None:
        return None
    return sum(entry.sample == 0 for entry in archive.manifest.steps) or None


def _dequantized(*trees: tuple[Node, str]) -> Iterator[str]:
    for path, leaf in chain.from_iterable(leaves(*tree) for tree in trees):
        kind = leaf.original.class_name if isinstance(leaf, TensorLeaf) and leaf.original else None
        if kind is not None and kind not in SPARSE:
            yield f"{path} was a {kind}; it is given as plain numbers"


def _cannot(archive: Archive, reason: str) -> UsageError:
    return UsageError(
        f"--like {archive.file}: {reason}; give the inputs with --inputs, --prompt or --image"
    )
