"""From a request to a model that is ready to run: load, describe, quantize."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version

from torch import nn

from qvtrace.archive import Archive
from qvtrace.errors import ModelError, QvtraceError, UsageError
from qvtrace.manifest import ModelInfo, VariantInfo
from qvtrace.models import gguf_files
from qvtrace.models.calibration import Calibration, make_calibration, run_once
from qvtrace.models.chatter import quiet, silent
from qvtrace.models.checks import check, check_hub_options
from qvtrace.models.generation import (
    Generation,
    check_generates,
    end_tokens,
    tokens_to_feed,
)
from qvtrace.models.inputs import make_inputs, takes_inputs_of_archive
from qvtrace.models.keep_float import names_kept
from qvtrace.models.likeness import resembling
from qvtrace.models.loading import Loaded, attention_of, load_model
from qvtrace.models.modes import to_eval_mode
from qvtrace.models.origins import Checkpoint, Origin, parse_origin
from qvtrace.models.quantizers import Chosen, Context, Quantized, as_quantized, choose, not_chosen
from qvtrace.models.quantizers.checkpoint import hint
from qvtrace.models.quantizers.experts import float_experts
from qvtrace.models.quantizers.function import FunctionQuantizer
from qvtrace.models.request import HINT, ModelRequest, PreparedModel, Sample
from qvtrace.models.seeds import DEFAULT_SEED, seeded
from qvtrace.models.signatures import is_transformers_model
from qvtrace.patterns import folded
from qvtrace.recording.identity import Questions, describe_model
from qvtrace.redaction import without_secrets
from qvtrace.trees import Json

_HINT_IF_GUESSED = "its inputs were made from its configuration: give others with --inputs FILE"


def prepare(request: ModelRequest, like: Archive | None = None) -> PreparedModel:
    """Load the model, make its inputs, and quantize it for the variant `quant`.

    `like`: an archive that says what the request leaves open. The same request gives the same model
    and inputs, bit for bit. Raises `UsageError` for a request that cannot be met and `ModelError`
    for a model that cannot be loaded or quantized, each in one line without the hub token.
    """
    with _without_token(request.hf_token), quiet(), _model_of(like, request):
        asked = request
        if like is not None:
            request = resembling(request, like)
        seed = DEFAULT_SEED if request.seed is None else request.seed
        request = replace(request, seed=seed)
        origin = parse_origin(request.model)
        check_hub_options(asked, origin)
        check(request, origin)
        chosen = _choose(request)
        with seeded(seed):
            loaded = load_model(origin, request)
        generation = _generation(loaded.model, request, origin, like)
        samples = make_inputs(origin, loaded, request, like)
        questions = Questions()
        modifications = _modifications(asked, request, like)
        info = _info(origin, loaded, request, modifications, questions)
        prepared = _unquantized(loaded, samples, info, request)
        prepared.warnings += tuple(questions.warnings)
        if chosen is not None:
            prepared.warnings += tuple(not_chosen(chosen))
        prepared = replace(prepared, generation=generation)
        if like is not None and generation is not None and generation.feed is None:
            free = f"no tokens of {like.file} are fed, the text is the model's own"
            prepared = replace(prepared, warnings=(*prepared.warnings, free))
        if chosen is None:
            return prepared
        if loaded.quantization is not None:
            _refuse_keep_float(request, origin)
            quantized = _already_quantized(prepared, origin, loaded.quantization)
        else:
            calibration = make_calibration(origin, loaded, request, prepared)
            quantized = _quantized(prepared, chosen, calibration, request)
        if generation is not None:
            label = quantized.variant.quantizer
            check_generates(quantized.model, f"{origin.name} as {label} leaves it")
        return quantized


@contextmanager
def _model_of(like: Archive | None, request: ModelRequest) -> Iterator[None]:
    """Blame the archive for the model that it names, not an option that nobody gave."""
    try:
        yield
    except (UsageError, ModelError) as error:
        fault = str(error).removeprefix("--model ")
        if like is None or request.model is not None or fault == str(error):
            raise
        raise type(error)(
            f"--like {like.file}: its model {fault}; if it is of another folder, name it with "
            "--model"
        ) from error.__cause__


def _choose(request: ModelRequest) -> Chosen | None:
    if request.variant != "quant":
        return None
    chosen = choose(request.quantizer)
    chosen.check(
        calibration=request.calibration,
        wrap_only=request.no_quantize,
        keep_float=request.keep_float,
    )
    return chosen


def _refuse_keep_float(request: ModelRequest, origin: Origin) -> None:
    if request.keep_float:
        raise UsageError(
            f"--keep-float {request.keep_float[0]!r}: {origin.name} is already quantized; quantize "
            "its float original with --quantizer"
        )


def _generation(
    model: nn.Module, request: ModelRequest, origin: Origin, like: Archive | None
) -> Generation | None:
    """The generation that was asked for, fed by the archive that is followed where its inputs are
    taken as well."""
    if request.generate is None:
        return None
    check_generates(model, origin.name)
    feed = None
    if like is not None and takes_inputs_of_archive(request):
        feed = tokens_to_feed(like, request.generate)
    fed_from = None if like is None or feed is None else str(like.file)
    return Generation(request.generate, feed, fed_from, end_tokens(model))


def _modifications(asked: ModelRequest, request: ModelRequest, like: Archive | None) -> Json:
    """What makes the model another than its name says; the same for a recording and one like it."""
    inherited = {} if like is None else like.manifest.model.modifications
    modifications = {
        "from_config": request.from_config or None,
        "num_layers": request.num_layers,
        "attention": attention_of(asked) or inherited.get("attention"),
        "dtype": asked.dtype or inherited.get("dtype"),
    }
    return {name: value for name, value in modifications.items() if value is not None}


def _info(
    origin: Origin,
    loaded: Loaded,
    request: ModelRequest,
    modifications: Json,
    questions: Questions,
) -> ModelInfo:
    config = questions.ask("revision", lambda: getattr(loaded.model, "config", None))
    info = describe_model(loaded.model, questions, weights=loaded.quantization is None)
    if isinstance(origin, Checkpoint) and origin.gguf is not None:
        # It was put together from the file's metadata: that of the original says more.
        info = replace(info, config_digest=None)
    return replace(
        info,
        name=origin.name,
        revision=request.revision or getattr(config, "_commit_hash", None),
        seed=request.seed,
        modifications=modifications,
    )


def _unquantized(
    loaded: Loaded, samples: Sequence[Sample], info: ModelInfo, request: ModelRequest
) -> PreparedModel:
    sample, *more = samples
    told = dict.fromkeys(warning for each in samples for warning in each.warnings)
    return PreparedModel(
        model=loaded.model,
        args=sample.args,
        kwargs=dict(sample.kwargs),
        info=info,
        variant=VariantInfo(name=request.variant),
        source=sample.source,
        environment=_environment(loaded.model, request),
        warnings=(*loaded.warnings, *told),
        hint=_HINT_IF_GUESSED if sample.guessed else HINT,
        more=tuple(more),
    )


def _environment(model: nn.Module, request: ModelRequest) -> Json:
    environment: Json = {}
    if is_transformers_model(model):
        environment["transformers"] = version("transformers")
        environment["attention"] = getattr(model.config, "_attn_implementation", None)
    if request.device_map is not None:
        environment["accelerate"] = version("accelerate")
        environment["device_map"] = request.device_map
        devices = getattr(model, "hf_device_map", {}).values()
        environment["device"] = ", ".join(sorted({str(device) for device in devices}))
    return {name: value for name, value in environment.items() if value}


def _already_quantized(prepared: PreparedModel, origin: Origin, settings: Json) -> PreparedModel:
    label = f"checkpoint:{settings.get('quant_method', 'unnamed')}"
    if isinstance(origin, Checkpoint) and origin.gguf is not None:
        outcome = gguf_files.as_quantized(prepared.model, origin.gguf_file, settings, origin.name)
    else:
        outcome = as_quantized(prepared.model, settings)
        prepared = replace(prepared, hint=f"{hint(settings)}; {prepared.hint}")
    return _described(prepared, outcome, label)


def _quantized(
    prepared: PreparedModel, chosen: Chosen, calibration: Calibration, request: ModelRequest
) -> PreparedModel:
    """`prepared` with its model quantized by `chosen`."""
    seed = DEFAULT_SEED if request.seed is None else request.seed
    context = _context(prepared, calibration, request)
    with seeded(seed), _silent(chosen):
        outcome = chosen.quantizer.apply(prepared.model, chosen.scheme, context)
    settings = dict(outcome.settings)
    if calibration.used:
        settings["calibration"] = calibration.settings
    elif request.calibration is not None:
        raise UsageError(
            f"--calibration {request.calibration}: {chosen.label} ran no model on it; "
            "leave the option out"
        )
    if request.no_quantize:
        settings["no_quantize"] = True
    if request.keep_float:
        settings["keep_float"] = list(request.keep_float)
    return _described(prepared, replace(outcome, settings=settings), chosen.label)


def _described(prepared: PreparedModel, outcome: Quantized, label: str) -> PreparedModel:
    """`prepared` with the model of `outcome`, and with what is to be said of it."""
    to_eval_mode(outcome.model, label)
    settings = {**outcome.settings, "left_float": _counted(outcome)}
    if outcome.otherwise:
        settings["otherwise"] = list(outcome.otherwise)
    warnings = [*prepared.warnings, *_nothing_changed(outcome, label)]
    experts = float_experts(outcome.model)
    if experts is not None:
        settings["float_experts"] = experts
        warnings.append(_about_experts(experts, label))
    return replace(
        prepared,
        model=outcome.model,
        variant=VariantInfo(
            name="quant",
            quantizer=label,
            settings=settings,
            quantized=outcome.quantized,
            left_float=tuple(name for names in outcome.left_float.values() for name in names),
        ),
        environment={**prepared.environment, **outcome.versions},
        warnings=tuple(warnings),
    )


def _context(prepared: PreparedModel, calibration: Calibration, request: ModelRequest) -> Context:
    recorded = Sample(prepared.args, prepared.kwargs, prepared.source)
    inputs = recorded.kwargs, *(sample.kwargs for sample in calibration.samples)

    def run(model: nn.Module) -> None:
        run_once(replace(prepared, model=model), recorded)

    kept = names_kept(prepared.model, request.keep_float)
    return Context(run, calibration, inputs, request.no_quantize, kept)


def _silent(chosen: Chosen) -> AbstractContextManager[object]:
    """Nothing of what a package's quantizer prints reaches the terminal; a user's function may
    speak."""
    return nullcontext() if isinstance(chosen.quantizer, FunctionQuantizer) else silent()


def _nothing_changed(outcome: Quantized, label: str) -> Iterator[str]:
    if outcome.quantized or outcome.settings.get("no_quantize"):
        return
    if outcome.otherwise:
        yield f"{label} quantized no module that is known: {'; '.join(outcome.otherwise)}"
    else:
        yield f"{label} CHANGED NOTHING, the model is still float: {_why_nothing(outcome)}"


def _about_experts(experts: Json, label: str) -> str:
    modules = ", ".join(folded(experts["modules"]))
    return (
        f"fused experts stay float, {experts['share']:.0%} of the weights: they are parameters, "
        f"no modules that {label} could quantize: {modules}"
    )


def _counted(outcome: Quantized) -> dict[str, int]:
    return {reason: len(names) for reason, names in outcome.left_float.items()}


def _why_nothing(outcome: Quantized) -> str:
    reasons = [f"{count} left ({reason})" for reason, count in _counted(outcome).items()]
    return ", ".join(reasons) or "it has no module of a kind that can be quantized"


@contextmanager
def _without_token(token: str | None) -> Iterator[None]:
    """Take the hub token out of what is raised."""
    try:
        yield
    except QvtraceError as error:
        cause = error.__cause__
        said = f"{error}{cause}"
        if without_secrets(said, token) == said:
            raise
        told = type(error)(without_secrets(str(error), token))
    else:
        return
    raise told
