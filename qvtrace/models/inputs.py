"""The inputs of a model: from a file, an archive, its function, or the sample that suits it."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.errors import UsageError
from qvtrace.models.embedded import embedded_sample
from qvtrace.models.functions import FunctionName
from qvtrace.models.generation import starting_point
from qvtrace.models.input_files import (
    as_sample,
    holds_several,
    read_inputs,
    read_lines,
    read_samples,
)
from qvtrace.models.likeness import rebuild_inputs
from qvtrace.models.loading import Loaded
from qvtrace.models.origins import Checkpoint, Embedded, Origin, relative
from qvtrace.models.placement import DTYPES
from qvtrace.models.processors import Processors
from qvtrace.models.request import ModelRequest, Sample, map_tensors
from qvtrace.models.samples import SampleMaker
from qvtrace.models.signatures import is_transformers_model, uses_cache
from qvtrace.recording.identity import model_dtype

_MADE = ("crafted", "processed", "function")  # kinds of samples that nobody has to give
_PROMPT_KEYS = frozenset({"prompt", "image"})  # of a sample that is no ready tensors


def make_inputs(
    origin: Origin, loaded: Loaded, request: ModelRequest, like: Archive | None
) -> tuple[Sample, ...]:
    """What the request names, else what `like` holds, else what suits the model: one sample or
    more.

    Raises `UsageError` where nothing is named and nothing can be guessed.
    """
    model, file = loaded.model, request.inputs_file
    asked = request.prompt is not None or bool(request.images)
    recorded = like is not None and takes_inputs_of_archive(request) and not can_be_made_again(like)
    samples: tuple[Sample, ...]
    if file is not None and holds_several(file):
        samples = _from_lines(file, origin, model, request)
    elif request.samples is not None:
        raise UsageError(
            f"--samples {request.samples}: is of a file of several samples; give one with "
            "--inputs FILE.jsonl"
        )
    elif file is not None:
        samples = (read_inputs(file, model),)
    elif like is not None and recorded:
        samples = rebuild_inputs(like)
    elif loaded.given is not None and not asked:
        samples = (loaded.given,)
    else:
        samples = (_suitable(origin, model, request),)
    if request.generate is not None and len(samples) > 1:
        raise UsageError(
            f"--generate {request.generate}: starts from one sample, there are {len(samples)}; "
            "record each on its own"
        )
    return tuple(
        _placed(_with_options(sample, model, request, recorded=recorded), origin, model, request)
        for sample in samples
    )


def _from_lines(
    file: str, origin: Origin, model: nn.Module, request: ModelRequest
) -> tuple[Sample, ...]:
    """The first so many samples of a file, each ready tensors, or a prompt and pictures."""
    lines = read_lines(file)
    wanted = len(lines) if request.samples is None else request.samples
    if not 1 <= wanted <= len(lines):
        raise UsageError(
            f"--samples {wanted}: {file} has {len(lines)} samples; give 1 to {len(lines)}"
        )
    source = {"kind": "file", "file": relative(file), "samples": wanted}
    found = []
    for number, line in enumerate(lines[:wanted]):
        if _PROMPT_KEYS.issuperset(line):
            sample = _from_prompt(line, f"--inputs {file}: sample {number}", origin, model, request)
        else:
            sample = as_sample(line, file, "--inputs", model)
        found.append(replace(sample, source=source))
    return tuple(found)


def _from_prompt(
    line: dict[str, Any], label: str, origin: Origin, model: nn.Module, request: ModelRequest
) -> Sample:
    prompt, images = line.get("prompt"), line.get("image", [])
    images = [images] if isinstance(images, str) else images
    texts = [*([] if prompt is None else [prompt]), *(images if isinstance(images, list) else [0])]
    if prompt == "" or not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f'{label} has no text; write {{"prompt": "..."}}, and "image" as a path')
    asked = replace(request, prompt=prompt, images=tuple(images), inputs_file=None)
    return _suitable(origin, model, asked)


def _suitable(origin: Origin, model: nn.Module, request: ModelRequest) -> Sample:
    if isinstance(origin, Embedded):
        return embedded_sample(model, request)
    return _craft(origin, model, request)


def can_be_made_again(like: Archive) -> bool:
    """Whether an archive holds no inputs, but those that its model is given where none are named
    may be the same."""
    return like.is_private and like.manifest.inputs.source.get("kind") in _MADE


def takes_inputs_of_archive(request: ModelRequest) -> bool:
    """Whether the request leaves it to the archive that is followed what the inputs are."""
    return request.prompt is None and not request.images and request.inputs_file is None


def calibration_inputs(
    file: str, origin: Origin, model: nn.Module, request: ModelRequest
) -> tuple[Sample, ...]:
    """The samples in a calibration file, called as the recorded one is.

    Raises `UsageError` for a file that cannot be read or does not fit the model.
    """
    samples = read_samples(file, model, "--calibration")
    options = (_with_options(sample, model, request, recorded=False) for sample in samples)
    return tuple(_placed(sample, origin, model, request) for sample in options)


def _craft(origin: Checkpoint | FunctionName, model: nn.Module, request: ModelRequest) -> Sample:
    if not is_transformers_model(model):
        for option, given in (("--prompt", request.prompt), ("--image", request.images)):
            if given:
                raise UsageError(
                    f"{option}: {type(model).__name__} is no transformers model, of which is known "
                    "what it takes; give ready tensors with --inputs"
                )
        raise UsageError(
            f"--model {origin.name}: no inputs can be guessed for {type(model).__name__}; "
            "return (model, inputs) or give --inputs FILE"
        )
    processors = Processors(origin, request) if isinstance(origin, Checkpoint) else None
    return SampleMaker(model, origin.name, processors, request).make()


def _with_options(
    sample: Sample, model: nn.Module, request: ModelRequest, *, recorded: bool
) -> Sample:
    """With the keyword arguments that ask for maps, and for a forward with or without a cache."""
    kwargs = dict(sample.kwargs)
    if request.generate is not None:
        kwargs = starting_point(model, sample.args, kwargs)
        sample = replace(sample, args=())
    if request.attention_maps:
        if not is_transformers_model(model):
            raise UsageError(
                f"--attention-maps: {type(model).__name__} is no transformers model; "
                "leave the option out"
            )
        kwargs["output_attentions"] = True
    if request.generate is not None:  # it keeps a cache anyway
        return replace(sample, kwargs=kwargs)
    if uses_cache(model, sample.args):
        if request.use_cache:
            kwargs["use_cache"] = True
        elif not recorded:
            kwargs.setdefault("use_cache", False)
    elif request.use_cache:
        raise UsageError(
            f"--use-cache: {type(model).__name__} takes no use_cache; leave the option out"
        )
    return replace(sample, kwargs=kwargs)


def _placed(sample: Sample, origin: Origin, model: nn.Module, request: ModelRequest) -> Sample:
    """On the model's device and in its dtype; what a function made keeps its own unless asked."""
    from_function = isinstance(origin, FunctionName)
    parameter = next(model.parameters(), None)
    device = None if parameter is None or parameter.is_meta else parameter.device
    if from_function and request.device is None:
        device = None
    dtype = DTYPES.get((request.dtype if from_function else model_dtype(model)) or "")

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.dtype in DTYPES.values() else None)

    args, kwargs = map_tensors((sample.args, dict(sample.kwargs)), place)
    return replace(sample, args=args, kwargs=kwargs)
