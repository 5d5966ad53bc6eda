"""The manifest as JSON, written and read."""

from dataclasses import asdict, replace
from typing import cast, get_args

from qvtrace.json_fields import Fields, texts_of
from qvtrace.manifest import (
    CallEntry,
    GivenInputs,
    InputsInfo,
    Manifest,
    ModelInfo,
    ModuleEntry,
    Portion,
    PortionEntry,
    RootCall,
    Skipped,
    StepEntry,
    TensorEntry,
    VariantInfo,
    WeightEntry,
)
from qvtrace.trees import Json

_JSON_NAMES = {"class_name": "class"}


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
    for name in ("placement", "head_widths"):
        if json[name] is None:
            del json[name]
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
    """The manifest that a file holds; raises `ValueError` where it holds anything else."""
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
        _head_widths_from_json(fields.optional_section("head_widths")),
    )


def _head_widths_from_json(fields: Fields | None) -> dict[str, int] | None:
    if fields is None:
        return None
    widths = {part: fields.count(part) for part in fields.json}
    if 0 in widths.values():
        raise ValueError("a head without channels")
    return widths


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
