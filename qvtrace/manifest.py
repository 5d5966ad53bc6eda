"""What a trace says of itself: the manifest, as dataclasses and as JSON.

The manifest is the index of an archive: what was run, how, and which tensor stands at which place.
Trees of calls stay JSON until somebody asks for them, so that a hundred thousand calls load
quickly.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Final, Literal, cast, get_args

from qvtrace import trees
from qvtrace.json_fields import Fields, texts_of
from qvtrace.trees import Json, Node

# 1 - the first
FORMAT_VERSION = 1

DID_NOT_RETURN = "did not return"  # the error of a call that was left, or still runs
# In what a file `contains`.
PROMPTS = "prompts"
KEYED_DIGESTS = "keyed digests of inputs"

PRIVATE: Final = "private"  # in place of what is known by its keyed digest alone

Portion = Literal["sampled", "statistics only", "private"]


@dataclass(frozen=True)
class ModelInfo:
    """Which model ran. What is not known is None."""

    name: str | None = None  # id, folder or function as the user gave it
    class_name: str | None = None
    revision: str | None = None
    dtype: str | None = None
    seed: int | None = None
    config_digest: str | None = None  # of the configuration but for quantization
    weights_digest: str | None = None  # of the float weights, before quantizing
    training: bool = False
    modifications: Json = field(default_factory=dict)  # `from_config`, `num_layers`, `attention`


@dataclass(frozen=True)
class VariantInfo:
    """Which variant of the model ran."""

    name: str | None = None  # `fp`, `quant`, or what the user called it
    quantizer: str | None = None  # `torchao:int8-dynamic`; None for a float model
    settings: Json = field(default_factory=dict)
    quantized: tuple[str, ...] = ()  # modules that the quantizer changed
    left_float: tuple[str, ...] = ()  # modules of a kind it quantizes, left as they were


@dataclass(frozen=True)
class RootCall:
    """The inputs of one outermost call: stored whatever the filters, since two runs are told
    comparable by them."""

    module: str
    index: int
    inputs: Json
    kwargs: Json
    digest: str
    sample: int = 0

    def input_trees(self) -> tuple[Node, Node]:
        """The trees of the positional and of the keyword inputs."""
        return trees.from_json(self.inputs), trees.from_json(self.kwargs)


@dataclass(frozen=True)
class GivenInputs:
    """What a generation was given: its root calls are steps, which hold more than that."""

    inputs: Json
    kwargs: Json
    digest: str

    def input_trees(self) -> tuple[Node, Node]:
        """The trees of the positional and of the keyword inputs."""
        return trees.from_json(self.inputs), trees.from_json(self.kwargs)


@dataclass(frozen=True)
class InputsInfo:
    """How the inputs were made, and what they were."""

    source: Json = field(default_factory=dict)  # `{"kind": "crafted", ...}`, prompt, files
    root_calls: tuple[RootCall, ...] = ()
    given: GivenInputs | None = None  # where a generation was recorded that knows it


@dataclass(frozen=True)
class StepEntry:
    """The end of one step of a generation: a token for each sequence of the batch."""

    sample: int
    step: int
    chosen: tuple[int, ...]  # the model's own: the highest logit
    taken: tuple[int, ...]  # what the text went on with; another one where tokens were fed


@dataclass(frozen=True)
class ModuleEntry:
    """One module of the model."""

    name: str  # "" is the root
    class_name: str
    parent: str | None  # None for the root
    aliases: tuple[str, ...] = ()  # further names of the same module
    calls: int = 0
    quantization: Json | None = None  # scheme, dtype, granularity, summaries
    float_name: str | None = None  # of the float module that it stands for, where it says so
    placement: Json | None = None  # what of it this process holds, where others hold the rest


@dataclass(frozen=True)
class WeightEntry:
    """One weight as the model computes with it. `value` is a tree as JSON: a tensor, or an opaque
    leaf where its values are not stored."""

    module: str  # that holds it
    name: str  # `weight`, `bias`
    class_name: str  # of the tensor before it was dequantized
    aliases: tuple[str, ...]  # further full names, of a tied weight or a shared module
    value: Json

    def node(self) -> Node:
        """The tree of its value; raises `ValueError` where the file holds something else."""
        return trees.from_json(self.value)


@dataclass(frozen=True, slots=True)
class CallEntry:
    """One call of one module. `inputs`, `kwargs` and `output` are trees as JSON; None: not
    stored."""

    module: str
    index: int
    sample: int
    step: int
    parent: tuple[str, int] | None  # module and index of the call that made this one
    inputs: Json | None
    kwargs: Json | None
    output: Json | None
    parameters: tuple[str | None, ...]  # names of the positional inputs in forward's signature
    seconds: float | None
    error: str | None = None  # the call raised, or had not returned when the recording ended
    # Places of tensors that it has edited in place itself; None: not known.
    edited: tuple[str, ...] | None = None

    def tree(self, part: str) -> Node | None:
        """The tree of `inputs`, `kwargs` or `output`; None where it was not stored.

        Raises `ValueError` where the file holds something else.
        """
        json = getattr(self, part)
        return None if json is None else trees.from_json(json)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored content: the key, dtype and shape of its first place, and its digest."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class PortionEntry:
    """What the file holds of a content that it does not hold whole, as a tensor of one shape.

    Its places name it by the digest of all of it, whatever is stored.
    """

    digest: str  # of the whole content
    shape: tuple[int, ...]  # of the whole tensor
    portion: Portion
    vectors: int = 0  # stored, along the last dimension; 0: no element is
    stored: str | None = None  # the digest of those
    statistics: Json | None = None  # of the whole tensor


@dataclass(frozen=True)
class Skipped:
    """What was registered and not recorded, and why."""

    registered: int = 0
    called: int = 0
    recorded: int = 0
    reasons: dict[str, tuple[str, ...]] = field(default_factory=dict)  # reason -> module names
    opaque: dict[str, int] = field(default_factory=dict)  # why a leaf was not stored -> how often
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The whole index of an archive."""

    qvtrace: str
    created: str  # ISO 8601, UTC
    complete: bool
    error: str | None
    recorded_by: str  # `record`, `run` or `library`
    model: ModelInfo
    variant: VariantInfo
    inputs: InputsInfo
    contains: tuple[str, ...]  # `inputs`, `prompts`, `elements`, `paths`
    environment: Json
    settings: Json  # filters and what else was asked of the recorder
    modules: tuple[ModuleEntry, ...]
    calls: tuple[CallEntry, ...]
    tensors: tuple[TensorEntry, ...]
    skipped: Skipped
    steps: tuple[StepEntry, ...] = ()  # of a generation, in order
    weights: tuple[WeightEntry, ...] | None = None  # None: they were not recorded
    portions: tuple[PortionEntry, ...] = ()  # of what is not stored whole
    format: int = FORMAT_VERSION


def head_to_json(manifest: Manifest) -> Json:
    """The manifest but for what may be long: modules, calls, tensors, weights and root calls are
    empty, and portions are not there."""
    json = asdict(
        replace(
            manifest,
            inputs=replace(manifest.inputs, root_calls=(), given=None),
            modules=(),
            calls=(),
            tensors=(),
            portions=(),
            weights=None if manifest.weights is None else (),
        )
    )
    del json["portions"]
    if json["weights"] is None:
        del json["weights"]
    for section in ("model", "variant"):
        json[section] = _renamed(json[section], _JSON_NAMES)
    given = manifest.inputs.given
    if given is not None:  # its trees as they are: of a hostile file they may be deep
        json["inputs"]["given"] = vars(given)
    return json


def module_to_json(entry: ModuleEntry) -> Json:
    """One module as it stands in the manifest."""
    json = _renamed(vars(entry), _JSON_NAMES)
    if entry.placement is None:
        del json["placement"]
    return json


def weight_to_json(entry: WeightEntry) -> Json:
    """One weight as it stands in the manifest."""
    return _renamed(vars(entry), _JSON_NAMES)


def portion_to_json(entry: PortionEntry) -> Json:
    """One portion as it stands in the manifest."""
    json: Json = {"digest": entry.digest, "shape": list(entry.shape), "portion": entry.portion}
    if entry.stored is not None:
        json |= {"vectors": entry.vectors, "stored": entry.stored}
    if entry.statistics is not None:
        json["statistics"] = entry.statistics
    return json


def has_several_samples(manifest: Manifest) -> bool:
    """Whether calls are of more than one sample."""
    samples = (call.sample for call in manifest.calls)
    first = next(samples, None)
    return any(sample != first for sample in samples)


def root_call_to_json(call: RootCall) -> Json:
    """One root call's inputs as they stand in the manifest."""
    return {
        "module": call.module,
        "index": call.index,
        "inputs": call.inputs,
        "kwargs": call.kwargs,
        "digest": call.digest,
        "sample": call.sample,
    }


def manifest_from_json(json: object) -> Manifest:
    """The manifest that a file holds; raises `ValueError` where it contradicts this module."""
    fields = Fields(json, "manifest")
    inputs = fields.section("inputs")
    return Manifest(
        qvtrace=fields.text("qvtrace"),
        created=fields.text("created"),
        complete=fields.flag("complete"),
        error=fields.optional_text("error"),
        recorded_by=fields.text("recorded_by"),
        model=_model_from_json(fields.section("model")),
        variant=_variant_from_json(fields.section("variant")),
        inputs=InputsInfo(
            inputs.free_object("source"),
            tuple(map(_root_call_from_json, inputs.list("root_calls"))),
            _given_from_json(inputs.optional_section("given")),
        ),
        contains=fields.texts("contains"),
        environment=fields.free_object("environment"),
        settings=fields.free_object("settings"),
        modules=tuple(map(_module_from_json, fields.list("modules"))),
        calls=tuple(map(call_from_json, fields.list("calls"))),
        tensors=tuple(map(_tensor_from_json, fields.list("tensors"))),
        skipped=_skipped_from_json(fields.section("skipped")),
        steps=tuple(map(_step_from_json, fields.optional_list("steps"))),
        weights=_weights_from_json(fields),
        portions=tuple(map(_portion_from_json, fields.optional_list("portions"))),
        format=fields.count("format"),
    )


_JSON_NAMES = {"class_name": "class"}


def _renamed(json: Json, names: dict[str, str]) -> Json:
    return {names.get(name, name): value for name, value in json.items()}


def _model_from_json(fields: Fields) -> ModelInfo:
    return ModelInfo(
        name=fields.optional_text("name"),
        class_name=fields.optional_text("class"),
        revision=fields.optional_text("revision"),
        dtype=fields.optional_text("dtype"),
        seed=None if fields.json.get("seed") is None else fields.count("seed"),
        config_digest=fields.optional_text("config_digest"),
        weights_digest=fields.optional_text("weights_digest"),
        training=fields.flag("training"),
        modifications=fields.free_object("modifications"),
    )


def _variant_from_json(fields: Fields) -> VariantInfo:
    return VariantInfo(
        name=fields.optional_text("name"),
        quantizer=fields.optional_text("quantizer"),
        settings=fields.free_object("settings"),
        quantized=fields.texts("quantized"),
        left_float=fields.texts("left_float"),
    )


def _root_call_from_json(json: object) -> RootCall:
    fields = Fields(json, "root call")
    return RootCall(
        fields.text("module"),
        fields.count("index"),
        fields.object("inputs"),
        fields.object("kwargs"),
        fields.text("digest"),
        fields.count("sample") if "sample" in fields.json else 0,
    )


def _given_from_json(fields: Fields | None) -> GivenInputs | None:
    if fields is None:
        return None
    return GivenInputs(fields.object("inputs"), fields.object("kwargs"), fields.text("digest"))


def _step_from_json(json: object) -> StepEntry:
    fields = Fields(json, "step")
    return StepEntry(
        fields.count("sample"),
        fields.count("step"),
        fields.counts("chosen"),
        fields.counts("taken"),
    )


def _module_from_json(json: object) -> ModuleEntry:
    fields = Fields(json, "module")
    return ModuleEntry(
        fields.text("name"),
        fields.text("class"),
        fields.optional_text("parent"),
        fields.texts("aliases"),
        fields.count("calls"),
        fields.optional_object("quantization"),
        fields.optional_text("float_name"),
        fields.optional_object("placement"),
    )


def _weights_from_json(fields: Fields) -> tuple[WeightEntry, ...] | None:
    if fields.json.get("weights") is None:
        return None
    return tuple(map(_weight_from_json, fields.list("weights")))


def _weight_from_json(json: object) -> WeightEntry:
    fields = Fields(json, "weight")
    return WeightEntry(
        fields.text("module"),
        fields.text("name"),
        fields.text("class"),
        fields.texts("aliases"),
        fields.object("value"),
    )


def call_from_json(json: object) -> CallEntry:
    """One call as it stands in the manifest; raises `ValueError` for anything else."""
    fields = Fields(json, "call")
    parameters = fields.list("parameters")
    if not all(isinstance(name, str | None) for name in parameters):
        raise ValueError("the parameters of a call are not names")
    return CallEntry(
        module=fields.text("module"),
        index=fields.count("index"),
        sample=fields.count("sample"),
        step=fields.count("step"),
        parent=_parent_from_json(fields.json.get("parent")),
        inputs=fields.optional_object("inputs"),
        kwargs=fields.optional_object("kwargs"),
        output=fields.optional_object("output"),
        parameters=tuple(parameters),
        seconds=fields.optional_number("seconds"),
        error=fields.optional_text("error"),
        edited=None if fields.json.get("edited") is None else fields.texts("edited"),
    )


def _parent_from_json(json: object) -> tuple[str, int] | None:
    if json is None:
        return None
    if not (isinstance(json, list) and len(json) == 2):
        raise ValueError("the parent of a call is not a module and an index")
    fields = Fields({"module": json[0], "index": json[1]}, "parent of a call")
    return fields.text("module"), fields.count("index")


def _tensor_from_json(json: object) -> TensorEntry:
    fields = Fields(json, "tensor")
    shape = fields.counts("shape")
    return TensorEntry(fields.text("key"), fields.text("dtype"), shape, fields.text("digest"))


def _portion_from_json(json: object) -> PortionEntry:
    fields = Fields(json, "portion")
    portion, stored = fields.text("portion"), fields.optional_text("stored")
    if portion not in get_args(Portion):
        raise ValueError(f"a portion that is {portion!r}")
    if (stored is None) != (portion != "sampled"):
        raise ValueError(f"a portion that is {portion} and stores {stored}")
    return PortionEntry(
        fields.text("digest"),
        fields.counts("shape"),
        cast(Portion, portion),
        0 if stored is None else fields.count("vectors"),
        stored,
        fields.optional_object("statistics"),
    )


def _skipped_from_json(fields: Fields) -> Skipped:
    reasons = fields.object("reasons")
    opaque = fields.section("opaque")
    return Skipped(
        registered=fields.count("registered"),
        called=fields.count("called"),
        recorded=fields.count("recorded"),
        reasons={reason: texts_of(names, reason) for reason, names in reasons.items()},
        opaque={reason: opaque.count(reason) for reason in opaque.json},
        warnings=fields.texts("warnings"),
    )
