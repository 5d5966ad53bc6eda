"""The inputs of a model: from a file, an archive, its function, or the sample that suits it."""

from dataclasses import replace

from torch import Tensor, nn

from qvtrace.archive import Archive
from qvtrace.errors import UsageError
from qvtrace.models.embedded import embedded_sample
from qvtrace.models.functions import FunctionName
from qvtrace.models.generation import starting_point
from qvtrace.models.input_files import read_inputs, read_samples
from qvtrace.models.likeness import rebuild_inputs
from qvtrace.models.loading import Loaded
from qvtrace.models.origins import Checkpoint, Embedded, Origin
from qvtrace.models.placement import DTYPES
from qvtrace.models.processors import Processors
from qvtrace.models.request import ModelRequest, Sample, map_tensors
from qvtrace.models.samples import SampleMaker
from qvtrace.models.signatures import is_transformers_model, uses_cache
from qvtrace.recording.identity import model_dtype

_MADE = ("crafted", "processed", "function")  # kinds of samples that nobody has to give


def make_inputs(
    origin: Origin, loaded: Loaded, request: ModelRequest, like: Archive | None
) -> Sample:
    """What the request names, else what `like` holds, else what suits the model.

    Raises `UsageError` where nothing is named and nothing can be guessed.
    """
    model, asked = loaded.model, request.prompt is not None or bool(request.images)
    recorded = like is not None and takes_inputs_of_archive(request) and not can_be_made_again(like)
    if request.inputs_file is not None:
        sample = read_inputs(request.inputs_file, model)
    elif like is not None and recorded:
        sample = rebuild_inputs(like)
    elif isinstance(origin, Embedded):
        sample = embedded_sample(model, request)
    elif loaded.given is not None and not asked:
        sample = loaded.given
    else:
        sample = _craft(origin, model, request)
    sample = _with_options(sample, model, request, recorded=recorded)
    return _placed(sample, origin, model, request)


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
    if request.generate is None and uses_cache(model, sample.args):
        if request.use_cache:
            kwargs["use_cache"] = True
        elif not recorded:
            kwargs.setdefault("use_cache", False)
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
