"""Quantizers that other packages bring, what `qvtrace quantizers` lists, and calibration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import invoke
from model_fixtures import Saved, record

import qvtrace
from qvtrace.errors import ModelError, UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare

PLUGIN = """
import sys
import torch
from qvtrace.models.quantizers import Quantized


class Rounding:
    schemes = ("tenths", "halves")
    calibrated = ("halves",)

    def apply(self, model, scheme, context):
        if scheme == "halves":
            context.calibrate(model)
        steps = {"tenths": 10, "halves": 2}[scheme]
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_((module.weight * steps).round() / steps)
        return model


def zeroing(model):
    print("zeroing", file=sys.stderr)
    model.lm_head.weight.data.zero_()
    return model


def telling(model, calibrate):
    calibrate(model)
    return Quantized(model, {"by": "telling"}, ("lm_head",), {"for no reason": ("model.norm",)})


def failing(model):
    raise RuntimeError("out of luck")


number = 3


def declaring(**attributes):
    def apply(self, model, scheme, context):
        return model
    return type("Declaring", (), {"apply": apply, **attributes})


def raising(self):
    raise RuntimeError("not known yet")


number_of_schemes = declaring(schemes=3)
numbers = declaring(schemes=[1, 2])
word = declaring(schemes="int8")
nameless = declaring(schemes=("",))
raises = declaring(schemes=property(raising))
always = declaring(schemes=("int8",), calibrated=True)
other = declaring(schemes=("int8",), calibrated=("int4",))
perhaps = declaring(wraps="perhaps")
no_method = declaring(apply=3)
listing = declaring(schemes=["int8", "int4"], calibrated={"int4"}, keeps_float=True)


class Leaving:
    def apply(self, model, scheme, context):
        sys.exit(0)


class Telling:
    def __init__(self, **told):
        self.told = told

    def apply(self, model, scheme, context):
        return Quantized(**{"model": model, "quantized": ("lm_head",), **self.told})


no_model = Telling(model=3)
no_names = Telling(quantized="lm_head")
no_json = Telling(settings={"by": torch.float32})
modest = Telling(quantized=())
"""
LEAVING = """
import sys
print("on my way out")
sys.exit(0)
"""
ENTRY_POINTS = """
[qvtrace.quantizers]
rounding = rounding_quantizers:Rounding
zeroing = rounding_quantizers:zeroing
telling = rounding_quantizers:telling
failing = rounding_quantizers:failing
number = rounding_quantizers:number
broken = no_such_module:quantize
torchao = rounding_quantizers:zeroing
number_of_schemes = rounding_quantizers:number_of_schemes
numbers = rounding_quantizers:numbers
word = rounding_quantizers:word
nameless = rounding_quantizers:nameless
raises = rounding_quantizers:raises
always = rounding_quantizers:always
other = rounding_quantizers:other
perhaps = rounding_quantizers:perhaps
no_method = rounding_quantizers:no_method
listing = rounding_quantizers:listing
leaving = rounding_quantizers:Leaving
no_model = rounding_quantizers:no_model
no_names = rounding_quantizers:no_names
no_json = rounding_quantizers:no_json
modest = rounding_quantizers:modest
exiting = exiting_quantizers:anything
"""
MISTAKEN = {
    "number": "it names a int, which is no function and no class with `apply`",
    "broken": "ModuleNotFoundError: No module named 'no_such_module'",
    "exiting": "its import ends the program with 0",
    "number_of_schemes": "its `schemes` is 3, no tuple of names",
    "numbers": "its `schemes` is [1, 2], no tuple of names",
    "word": "its `schemes` is 'int8', no tuple of names",
    "nameless": "its `schemes` is ('',), no tuple of names",
    "raises": "RuntimeError: not known yet",
    "always": "its `calibrated` is True, no tuple of names",
    "other": "its `calibrated` has 'int4', which is none of its schemes",
    "perhaps": "its `wraps` is 'perhaps', neither True nor False",
    "no_method": "its `apply` is a int, no method",
}


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution with entry points, as pip leaves it in a folder of packages."""
    site = tmp_path / "site"
    metadata = site / "rounding_quantizers-1.2.dist-info"
    metadata.mkdir(parents=True)
    (site / "rounding_quantizers.py").write_text(PLUGIN)
    (site / "exiting_quantizers.py").write_text(LEAVING)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rounding\nVersion: 1.2\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(site))
    return "rounding"


def quantize(saved: Saved, quantizer: str, **request: Any) -> PreparedModel:
    return prepare(
        ModelRequest(model=str(saved("llama")), variant="quant", quantizer=quantizer, **request)
    )


@pytest.mark.parametrize(
    ("quantizer", "label"),
    [("rounding", "rounding:tenths"), ("rounding:halves", "rounding:halves")],
    ids=["default", "named"],
)
def test_a_class_behind_an_entry_point_is_a_quantizer(
    quantizer: str, label: str, distribution: str, saved: Saved
) -> None:
    prepared = quantize(saved, quantizer)

    assert prepared.variant.quantizer == label
    assert "model.layers.0.mlp.up_proj" in prepared.variant.quantized
    assert "model.norm" not in prepared.variant.quantized
    assert prepared.environment[distribution] == "1.2"
    assert ("calibration" in prepared.variant.settings) == (label == "rounding:halves")


def test_a_function_behind_an_entry_point_is_a_quantizer_and_a_silent_one(
    distribution: str, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = quantize(saved, "zeroing").variant

    assert capsys.readouterr() == ("", "")
    assert (variant.quantizer, variant.quantized) == ("zeroing", ("lm_head",))
    assert "model.layers.0.mlp.up_proj" in variant.left_float


def test_what_a_quantizer_says_of_its_work_is_recorded(distribution: str, saved: Saved) -> None:
    variant = quantize(saved, "telling").variant

    assert variant.quantized == ("lm_head",)
    assert variant.left_float == ("model.norm",)
    assert variant.settings["by"] == "telling"
    assert variant.settings["calibration"]["source"] == "sample"


@pytest.mark.parametrize(
    ("quantizer", "match"),
    [
        ("failing", "raised RuntimeError: out of luck; --traceback shows where"),
        ("leaving", "raised SystemExit: 0; --traceback shows where"),
        ("no_model", "returned int; return the quantized model"),
        ("no_names", "says of its work what cannot be recorded, TypeError: 'lm_head' is no tuple"),
        ("no_json", "says of its work what cannot be recorded, TypeError: Object of type dtype"),
    ],
)
def test_what_goes_wrong_in_a_quantizer_is_told_by_its_name(
    quantizer: str, match: str, distribution: str, saved: Saved
) -> None:
    with pytest.raises(ModelError, match=f"^--quantizer {quantizer}: {match}"):
        quantize(saved, quantizer)


@pytest.mark.parametrize("quantizer", MISTAKEN)
def test_an_entry_point_that_cannot_be_used_is_one_line_and_a_marked_row(
    quantizer: str, distribution: str, saved: Saved
) -> None:
    recorded = invoke(
        "record", "--model", saved("llama"), "--variant", "quant", "--quantizer", quantizer
    )
    listed = {one.name: one for one in qvtrace.quantizers() if one.origin == distribution}

    said = recorded.stderr
    assert recorded.exit_code == 2
    assert said.startswith(f"qvtrace: --quantizer {quantizer}: rounding cannot be used, ")
    assert MISTAKEN[quantizer] in said
    assert said.endswith("; mend or uninstall it\n")
    assert said.count("\n") == 1
    assert not listed[quantizer].installed
    assert MISTAKEN[quantizer] in (listed[quantizer].remedy or "")
    assert listed["rounding"].installed


def test_an_import_that_prints_or_exits_leaves_the_list_as_json(distribution: str) -> None:
    result = invoke("quantizers", "--json")

    listed = {one["name"]: one for one in json.loads(result.stdout)}
    assert result.exit_code == 0
    assert not listed["exiting"]["installed"]
    assert (listed["listing"]["schemes"], listed["listing"]["calibrated"]) == (
        ["int8", "int4"],
        ["int4"],
    )


def test_modules_that_a_quantizer_does_not_name_are_looked_for(
    distribution: str, saved: Saved
) -> None:
    prepared = quantize(saved, "modest")

    assert prepared.variant.quantized == ()
    assert any("modest CHANGED NOTHING" in warning for warning in prepared.warnings)


@pytest.mark.parametrize(
    ("quantizer", "match"),
    [
        ("rounding:thirds", "rounding has no scheme thirds; there are tenths, halves"),
        ("zeroing:all", "zeroing has no scheme all; it has none, write zeroing"),
        ("zeroing:", "names no scheme after the colon; it has none, write zeroing"),
        ("torchao:", "torchao:: names no scheme after the colon; there are int8-dynamic, int8-w"),
        ("rouding", "rouding: is unknown; there are torchao:int8-dynamic, .*rounding"),
        ("rouding:tenths", "rouding:tenths: is unknown; there are torchao:int8-dynamic, .*round"),
    ],
    ids=["scheme", "no schemes", "none of none", "none of some", "name", "name with scheme"],
)
def test_a_mistyped_name_lists_what_there_is(
    quantizer: str, match: str, distribution: str, saved: Saved
) -> None:
    with pytest.raises(UsageError, match=match):
        quantize(saved, quantizer)


def test_a_name_of_ones_own_is_not_taken_over(distribution: str, saved: Saved) -> None:
    prepared = quantize(saved, "torchao")

    assert prepared.variant.quantizer == "torchao:int8-dynamic"
    assert (
        "the quantizer torchao of rounding is not used: qvtrace's own has its name"
        in prepared.warnings
    )
    assert not quantize(saved, "rounding").warnings
    foreign = [q for q in qvtrace.quantizers() if q.origin == distribution and q.name == "torchao"]
    assert foreign[0].remedy == "its name is that of one of qvtrace's own"


def test_quantizers_lists_name_schemes_installation_and_calibration(distribution: str) -> None:
    result = invoke("quantizers")

    lines = [line.strip() for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert "int8-dynamic (default), int8-weight, int4-weight, int8-int4, float8-weight" in lines
    cells = {line.split()[0]: line.split()[1:] for line in reversed(lines) if line}
    assert cells["torchao"][-1] == "no"
    assert cells["quanto"][-2:] == ["for", "w8a8"]
    assert cells["tico"][-1] == "yes"
    assert cells["rounding"] == ["1.2,", "from", "rounding", "for", "halves"]
    assert " ".join(cells["broken"]) == "1.2, CANNOT BE USED, from rounding -"
    assert any(line.startswith("--quantizer broken: rounding cannot be used, ") for line in lines)


def test_quantizers_as_json_is_what_the_library_lists(distribution: str) -> None:
    result = invoke("quantizers", "--json")

    listed = json.loads(result.stdout)
    assert [(q["name"], tuple(q["schemes"]), q["installed"]) for q in listed] == [
        (q.name, q.schemes, q.installed) for q in qvtrace.quantizers()
    ]
    rounding = next(quantizer for quantizer in listed if quantizer["name"] == "rounding")
    assert (rounding["calibrated"], rounding["version"]) == (["halves"], "1.2")


@pytest.fixture
def calibrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's quantizer, which keeps the input ids that it was calibrated on."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def static(model, calibrate):\n"
        "    seen = []\n"
        "    keep = lambda module, args, kwargs: seen.append(kwargs['input_ids'].tolist())\n"
        "    handle = model.register_forward_pre_hook(keep, with_kwargs=True)\n"
        "    calibrate(model)\n"
        "    handle.remove()\n"
        "    model.seen = seen\n"
        "    model.lm_head.weight.data.zero_()\n"
        "    return model\n"
        "def blind(model):\n"
        "    return static(model, lambda model: None)\n"
    )
    monkeypatch.chdir(tmp_path)
    return "own.py:static"


def head(archive: Path, reference: Path) -> str:
    return (
        invoke("diff", str(reference), str(archive)).stdout.split("verdict")[0].replace("\n", " ")
    )


@pytest.fixture
def reference(saved: Saved, tmp_path: Path) -> Path:
    return record(prepare(ModelRequest(model=str(saved("llama")))), tmp_path / "fp.st")


def test_the_recorded_sample_calibrates_by_default_and_every_diff_says_so(
    calibrating: str, saved: Saved, reference: Path, tmp_path: Path
) -> None:
    prepared = quantize(saved, calibrating)
    archive = record(prepared, tmp_path / "quant.st")

    model: Any = prepared.model
    assert model.seen == [prepared.kwargs["input_ids"].tolist()]
    assert "calibrated on the test input" in head(archive, reference)
    report = json.loads(invoke("diff", str(reference), str(archive), "--format", "json").stdout)
    assert report["candidate"]["calibration"] == "calibrated on the test input"
    assert "calibration" not in report["reference"]


def test_a_file_of_several_samples_calibrates_and_its_digest_is_recorded(
    calibrating: str, saved: Saved, reference: Path, tmp_path: Path
) -> None:
    samples = [{"input_ids": [[5, 6, 7]]}, {"input_ids": [[8, 9, 10, 11]]}]
    (tmp_path / "calibration.json").write_text(json.dumps(samples))

    prepared = quantize(saved, calibrating, calibration="calibration.json")
    archive = record(prepared, tmp_path / "quant.st")

    model: Any = prepared.model
    assert model.seen == [[[5, 6, 7]], [[8, 9, 10, 11]]]
    calibration = prepared.variant.settings["calibration"]
    assert (calibration["file"], calibration["samples"]) == ("calibration.json", 2)
    told = f"calibrated on calibration.json (2 samples, digest {calibration['digest'][:8]})"
    assert told in " ".join(head(archive, reference).split())


def test_a_file_that_holds_the_test_input_is_not_taken_for_another(
    calibrating: str, saved: Saved, reference: Path, tmp_path: Path
) -> None:
    kwargs = prepare(ModelRequest(model=str(saved("llama")))).kwargs
    sample = {name: v.tolist() for name, v in kwargs.items() if isinstance(v, torch.Tensor)}
    (tmp_path / "same.json").write_text(json.dumps([sample, {"input_ids": [[5, 6, 7]]}]))

    archive = record(quantize(saved, calibrating, calibration="same.json"), tmp_path / "quant.st")

    assert "calibrated on the test input, which is in same.json" in " ".join(
        head(archive, reference).split()
    )


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        ("[]", r"--calibration file.json: is empty"),
        ("[3]", r"--calibration file.json: is no object"),
        ('{"ids": [[1]]}', r"--calibration file.json: ids is unknown to LlamaForCausalLM"),
        ("{", r"--calibration file.json: is no JSON"),
    ],
    ids=["empty", "no object", "unknown name", "no JSON"],
)
def test_a_calibration_file_that_does_not_fit_is_named(
    contents: str, match: str, calibrating: str, saved: Saved, tmp_path: Path
) -> None:
    (tmp_path / "file.json").write_text(contents)

    with pytest.raises(UsageError, match=match):
        quantize(saved, calibrating, calibration="file.json")


def test_calibration_on_which_the_model_raises_names_the_file_and_where_to_look_once(
    calibrating: str, saved: Saved, tmp_path: Path
) -> None:
    (tmp_path / "beyond.json").write_text('{"input_ids": [[100000]]}')

    with pytest.raises(ModelError) as raised:
        quantize(saved, calibrating, calibration="beyond.json")

    said = str(raised.value)
    assert said.startswith("--quantizer own.py:static: --calibration beyond.json: ")
    assert said.endswith(
        ": the model raised IndexError: index out of range in self; --traceback shows where"
    )


@pytest.mark.parametrize(
    ("quantizer", "match"),
    [
        ("torchao", "torchao:int8-dynamic needs none; leave the option out"),
        ("own.py:blind", "own.py:blind ran no model on it; leave the option out"),
    ],
    ids=["known", "found out"],
)
def test_calibration_for_a_quantizer_that_does_not_calibrate_is_refused(
    quantizer: str, match: str, calibrating: str, saved: Saved, tmp_path: Path
) -> None:
    (tmp_path / "file.json").write_text('{"input_ids": [[5, 6, 7]]}')

    with pytest.raises(UsageError, match=f"--calibration file.json: {match}"):
        quantize(saved, quantizer, calibration="file.json")


@pytest.mark.parametrize(
    "option", [{"calibration": "x.json"}, {"no_quantize": True}], ids=["calibration", "off"]
)
def test_the_float_variant_takes_no_option_of_a_quantizer(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the variant fp is not quantized; add --variant quant"):
        prepare(ModelRequest(**option))


def test_ranges_differ_with_the_calibration_inputs(saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto")
    file = tmp_path / "calibration.json"
    file.write_text('{"input_ids": [[5, 6, 7]]}')

    on_sample = quantize(saved, "quanto:w8a8").model
    on_file = quantize(saved, "quanto:w8a8", calibration=str(file)).model

    name = "model.layers.0.mlp.up_proj"
    scales: list[Any] = [model.get_submodule(name).input_scale for model in (on_sample, on_file)]
    assert scales[0] != scales[1]
