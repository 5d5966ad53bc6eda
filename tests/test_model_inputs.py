"""The inputs of a model: crafted, through its processors, from a file, and like an archive's."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from model_fixtures import TOY, change_config, prepare_like, record, save
from PIL import Image
from recordings import quantized
from safetensors.torch import save_file
from torch import nn

from qvtrace.archive import Archive
from qvtrace.errors import UsageError
from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.models.chatter import quiet
from qvtrace.models.input_files import read_inputs
from qvtrace.models.likeness import rebuild_inputs
from qvtrace.recording.recorder import record as record_model

BYTES = 256  # ids of the tokenizer below: one a byte, then these
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
IMAGE = BYTES + 1 + SPECIAL.index("<|image_pad|>")  # after the tokenizer's own <|endoftext|>
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that is no crafted one."""
    Image.new("RGB", (100, 70), (200, 10, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A directory without a tokenizer."""
    return save("llama", tmp_path / "llama")


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A directory with an image processor."""
    directory = save("vit", tmp_path / "vit")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def qwen3_vl(tmp_path: Path) -> Path:
    """A directory with a tokenizer, a chat template and an image processor."""
    directory = save("qwen3_vl", tmp_path / "qwen3_vl")
    with quiet():
        from tokenizers.pre_tokenizers import ByteLevel
        from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil

        alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
        tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[])
        tokenizer.add_tokens(SPECIAL, special_tokens=True)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(directory)
        Qwen2VLImageProcessorPil(patch_size=16, merge_size=2).save_pretrained(directory)
    change_config(directory, image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    return directory


def write(file: Path, text: str) -> str:
    file.write_text(text)
    return str(file)


def refused(match: str, **request: Any) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        prepare(ModelRequest(**request))
    assert "\n" not in str(caught.value)


def leaves(prepared: PreparedModel) -> list[Any]:
    values: list[Any] = torch.utils._pytree.tree_leaves((prepared.args, prepared.kwargs))
    return values


def assert_same_inputs(first: PreparedModel, second: PreparedModel) -> None:
    assert first.kwargs.keys() == second.kwargs.keys()
    assert len(leaves(first)) == len(leaves(second))
    for one, other in zip(leaves(first), leaves(second), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_crafted_ids_are_within_the_vocabulary_and_follow_the_seed(llama: Path) -> None:
    first, second, other = (
        prepare(ModelRequest(model=str(llama), seed=seed)).kwargs["input_ids"] for seed in (1, 1, 2)
    )

    assert first.min() >= 0
    assert first.max() < 256
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_another_prompt_of_the_embedded_model_is_made_of_its_bytes_and_says_so() -> None:
    default, hello = prepare(ModelRequest()), prepare(ModelRequest(prompt="Hello"))

    hello.run()
    ids, default_ids = (prepared.kwargs["input_ids"][0].tolist() for prepared in (hello, default))
    assert ids != default_ids
    assert ids[75:80] == [256 + byte for byte in b"Hello"]
    assert hello.source["prompt"] == "Hello"
    assert "made from its bytes" in hello.warnings[0]


def test_a_picture_for_the_embedded_model_has_as_many_tokens_as_its_patches_need(
    picture: Path,
) -> None:
    prepared = prepare(ModelRequest(images=(str(picture), str(picture))))

    prepared.run()
    patches = int(prepared.kwargs["image_grid_thw"].prod(dim=1).sum())
    assert prepared.kwargs["pixel_values"].shape == (patches, 1536)
    assert int((prepared.kwargs["input_ids"] == 998).sum()) == patches // 4
    assert len(prepared.source["images"]) == 2


def test_a_huge_picture_does_not_make_the_embedded_model_huge(tmp_path: Path) -> None:
    Image.new("L", (4000, 3000)).save(tmp_path / "huge.png")

    prepared = prepare(ModelRequest(images=(str(tmp_path / "huge.png"),)))

    assert prepared.kwargs["input_ids"].shape[1] < 300


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    refused("--image .*missing.png: there is no such file", images=("missing.png",))
    refused("is no picture", images=(write(tmp_path / "text.png", "no picture"),))


def test_a_picture_goes_through_the_models_own_image_processor(vit: Path, picture: Path) -> None:
    prepared = prepare(ModelRequest(model=str(vit), images=(str(picture),)))

    prepared.run()
    assert prepared.kwargs["pixel_values"].shape == (1, 3, 32, 32)
    assert prepared.kwargs["pixel_values"][0, :, 0, 0].tolist() == pytest.approx(
        [200 / 127.5 - 1, 10 / 127.5 - 1, 30 / 127.5 - 1], abs=1e-5
    )


def test_an_image_model_without_a_picture_sees_the_crafted_one(vit: Path) -> None:
    prepared = prepare(ModelRequest(model=str(vit)))

    assert prepared.source == {"kind": "processed", "images": ["gradient 224x320"]}


def test_text_and_pictures_meet_in_the_chat_template(qwen3_vl: Path, picture: Path) -> None:
    prepared = prepare(
        ModelRequest(model=str(qwen3_vl), images=(str(picture),) * 2, prompt="What is it?")
    )

    prepared.run()
    ids = prepared.kwargs["input_ids"]
    patches = int(prepared.kwargs["image_grid_thw"].prod(dim=1).sum())
    image_token = prepared.model.config.image_token_id  # type: ignore[union-attr]
    assert int((ids == image_token).sum()) == patches // 4
    assert torch.equal(prepared.kwargs["mm_token_type_ids"], (ids == image_token).long())
    assert prepared.source["prompt"] == "What is it?"


def test_an_empty_tokenizer_is_not_taken_for_the_models_own(tmp_path: Path) -> None:
    directory = save("clip", tmp_path / "clip")

    prepared = prepare(ModelRequest(model=str(directory)))

    assert prepared.source == {"kind": "crafted"}
    refused("clip has no tokenizer", model=str(directory), prompt="a cat")


def test_sound_goes_through_the_models_own_feature_extractor(tmp_path: Path) -> None:
    directory = save("whisper", tmp_path / "whisper")
    with quiet():
        from transformers import WhisperFeatureExtractor

        WhisperFeatureExtractor(chunk_length=1).save_pretrained(directory)

    prepared = prepare(ModelRequest(model=str(directory)))

    prepared.run()
    assert prepared.kwargs["input_features"].shape == (1, 80, 100)
    assert prepared.source["audio"] == "one second of a rising tone"


def test_what_a_model_has_no_use_for_is_refused(llama: Path, vit: Path, picture: Path) -> None:
    refused("takes no text", model=str(vit), prompt="a cat")
    refused("takes no image", model=str(llama), images=(str(picture),))
    refused("has no tokenizer", model=str(llama), prompt="a cat")
    refused("is empty", prompt="")
    refused("one or the other", prompt="a cat", inputs_file="inputs.json")


def test_an_image_without_a_processor_is_refused(tmp_path: Path, picture: Path) -> None:
    directory = save("vit", tmp_path / "plain")

    refused("has no image processor", model=str(directory), images=(str(picture),))


def test_tensors_of_a_safetensors_file_are_keyword_arguments(llama: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    save_file({"input_ids": ids}, tmp_path / "inputs.safetensors")

    prepared = prepare(
        ModelRequest(model=str(llama), inputs_file=str(tmp_path / "inputs.safetensors"))
    )

    prepared.run()
    assert torch.equal(prepared.kwargs["input_ids"], ids)
    assert prepared.source["kind"] == "file"


def test_lists_of_a_json_file_are_tensors_and_the_rest_is_itself(
    llama: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "in.json", '{"input_ids": [[5, 6]], "output_hidden_states": true}')

    prepared = prepare(ModelRequest(model=str(llama), inputs_file=file))

    prepared.run()
    assert prepared.kwargs["input_ids"].tolist() == [[5, 6]]
    assert prepared.kwargs["output_hidden_states"] is True


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("in.json", "{nope", "is no JSON"),
        ("in.json", "[[1, 2]]", "is no object"),
        ("in.json", "{}", "is empty"),
        ("in.json", '{"input_ids": [[1], [2, 3]]}', "input_ids is no array of numbers"),
        ("in.json", '{"input_ids": ["one"]}', "input_ids is no array of numbers"),
        ("in.json", '{"input_id": [[1]]}', "input_id is unknown .* takes input_ids"),
        ("in.json", '{"zzz": [[1]]}', "zzz is unknown .* takes input_ids, attention_mask"),
        ("in.safetensors", "no tensors", "is no whole safetensors file"),
        ("in.st", "", "is neither .safetensors nor .json"),
    ],
    ids=["JSON", "object", "empty", "ragged", "words", "typo", "name", "safetensors", "suffix"],
)
def test_a_file_of_inputs_that_cannot_be_used_says_why(
    name: str, text: str, match: str, llama: Path, tmp_path: Path
) -> None:
    refused(match, model=str(llama), inputs_file=write(tmp_path / name, text))


def test_an_argument_that_a_file_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "toy.py", TOY)
    monkeypatch.chdir(tmp_path)

    refused(
        "x missing", model="toy.py:model", inputs_file=write(tmp_path / "i.json", '{"scale":1}')
    )
    refused("y is unknown", model="toy.py:model", inputs_file=write(tmp_path / "i.json", '{"y":1}'))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 1, "attn": "sdpa", "seed": 7, "dtype": "bf16"},
        {"attention_maps": True},
    ],
    ids=["embedded", "changed", "maps"],
)
def test_a_model_like_an_archive_is_the_same_model_with_the_same_inputs(
    options: dict[str, Any], tmp_path: Path
) -> None:
    reference = prepare(ModelRequest(**options))
    file = record(reference, tmp_path / "fp.st")

    candidate = prepare_like(file, variant="quant")

    candidate.run()
    assert candidate.info == reference.info
    assert candidate.environment["attention"] == reference.environment["attention"]
    assert candidate.variant.quantized
    assert_same_inputs(reference, candidate)


def test_a_directory_and_its_prompt_are_taken_from_the_archive(
    qwen3_vl: Path, tmp_path: Path
) -> None:
    reference = prepare(ModelRequest(model=str(qwen3_vl), prompt="What is it?", num_layers=1))
    file = record(reference, tmp_path / "fp.st")

    candidate = prepare_like(file)

    assert candidate.info == reference.info
    assert candidate.source == {**reference.source, "like": "fp.st"}
    assert_same_inputs(reference, candidate)


def test_an_explicit_option_wins_over_the_archive(tmp_path: Path) -> None:
    file = record(prepare(ModelRequest(seed=7)), tmp_path / "fp.st")

    candidate = prepare_like(file, seed=8, prompt="Hello", attn="sdpa", dtype="fp16")

    assert candidate.info.seed == 8
    assert candidate.info.dtype == "float16"
    assert candidate.environment["attention"] == "sdpa"
    assert candidate.source["prompt"] == "Hello"


def test_a_function_is_not_imported_on_the_archives_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "toy.py", TOY)
    monkeypatch.chdir(tmp_path)
    reference = prepare(ModelRequest(model="toy.py:with_tuple"))
    file = record(reference, tmp_path / "fp.st")
    write(tmp_path / "toy.py", "raise SystemExit('it ran')")

    with pytest.raises(UsageError, match=r"not run on the archive's word; give --model toy\.py"):
        prepare_like(file)

    write(tmp_path / "toy.py", TOY)
    candidate = prepare_like(file, model="toy.py:with_tuple")
    assert candidate.info == reference.info
    assert_same_inputs(reference, candidate)


def test_an_attention_kernel_is_not_fetched_on_the_archives_word(tmp_path: Path) -> None:
    prepared = prepare(ModelRequest())
    prepared = replace(prepared, environment={**prepared.environment, "attention": "evil/kernel"})
    file = record(prepared, tmp_path / "fp.st")

    assert prepare_like(file).environment["attention"] == "eager"


def test_an_archive_recorded_from_a_program_asks_for_the_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with record_model(model, tmp_path / "fp.st"):
        model(torch.ones(1, 3))

    with pytest.raises(UsageError, match=r"recorded from a Python program.*--model"):
        prepare_like(tmp_path / "fp.st")


class Pair(NamedTuple):
    """A named tuple of the user's."""

    left: torch.Tensor
    right: torch.Tensor


class Anything(torch.nn.Module):
    """Takes whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(1)


@pytest.fixture
def rebuilt(tmp_path: Path) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """What comes back of the inputs of a call."""

    def rebuild(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        file = tmp_path / "inputs.st"
        file.unlink(missing_ok=True)
        model = Anything()
        with record_model(model, file):
            model(*args, **kwargs)
        with Archive.open(file) as archive:
            (sample,) = rebuild_inputs(archive)
        return sample.args, dict(sample.kwargs)

    return rebuild


def test_nested_inputs_come_back_from_an_archive_as_they_were(
    rebuilt: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    args = (1, -2.5, "text", None, True, [2, (3,)], 2**70)
    kwargs = {
        "nested": {"a.b/c#d\\e": 1, 7: 2, "[0]": 3, ("x", 1): 4},
        "kinds": (torch.float16, torch.device("cpu"), range(2, 9, 3), torch.strided),
        "infinite": float("-inf"),
        "empty": [(), {}, []],
    }

    assert rebuilt(*args, **kwargs) == (args, kwargs)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)], ids=str)
def test_tensors_come_back_from_an_archive_as_they_were(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    rebuilt: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    tensor = torch.arange(6).float()[: torch.Size(shape).numel()].reshape(shape).to(dtype)

    (back,), _ = rebuilt(tensor)

    assert back.dtype is dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.to(torch.complex128), tensor.to(torch.complex128))


def test_a_named_tuple_comes_back_with_its_fields(
    rebuilt: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    (back,), _ = rebuilt(Pair(torch.ones(2), torch.zeros(3)))

    assert back._fields == ("left", "right")
    assert torch.equal(back.left, torch.ones(2))


def test_an_input_that_was_not_stored_is_named(
    rebuilt: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    with pytest.raises(UsageError, match=r"kwargs\.thing was a .*; give the inputs with --inputs"):
        rebuilt(thing=threading.Lock())


class Passing(torch.nn.Module):
    """Returns what it is given."""

    def forward(self, value: object) -> object:
        return value


LAYOUTS = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
}
PACKED = {
    "float4": torch.float4_e2m1fn_x2,
    "uint4": torch.uint4,
    "float8": torch.float8_e4m3fn,
}


def built_again(file: Path, given: torch.Tensor) -> torch.Tensor:
    with record_model(model := Passing(), file):
        model(given)
    with Archive.open(file) as archive:
        (tensor,) = rebuild_inputs(archive)[0].args
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.mark.filterwarnings("ignore:Sparse CS")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_input_is_sparse_again(tmp_path: Path, layout: str) -> None:
    given = LAYOUTS[layout]()

    tensor = built_again(tmp_path / "fp.st", given)

    assert tensor.layout is given.layout
    assert torch.equal(tensor.to_dense(), given.to_dense())


@pytest.mark.filterwarnings("ignore:Sparse BSR")
def test_a_sparse_input_of_blocks_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--like .*inputs\.0 was a sparse_bsr, which cannot be"):
        built_again(tmp_path / "fp.st", torch.eye(4).to_sparse_bsr((2, 2)))


@pytest.mark.parametrize("dtype", PACKED)
def test_an_input_of_packed_elements_is_the_same_again(tmp_path: Path, dtype: str) -> None:
    given = torch.arange(16, dtype=torch.uint8).view(PACKED[dtype]).reshape(2, 8)

    tensor = built_again(tmp_path / "fp.st", given)

    assert (tensor.dtype, tensor.shape) == (given.dtype, given.shape)
    assert torch.equal(tensor.view(torch.uint8), given.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_complex32_input_is_the_same_again(tmp_path: Path) -> None:
    given = torch.full((2, 3), 0.5 - 2j, dtype=torch.complex32)

    tensor = built_again(tmp_path / "fp.st", given)

    assert tensor.dtype is torch.complex32
    assert torch.equal(torch.view_as_real(tensor), torch.view_as_real(given))


def test_an_input_that_was_quantized_is_told_to_be_given_as_plain_numbers(tmp_path: Path) -> None:
    file = tmp_path / "fp.st"
    with record_model(model := Passing(), file):
        model(quantized(torch.ones(3), 0.5, 0))

    with Archive.open(file) as archive:
        (sample,) = rebuild_inputs(archive)

    assert sample.warnings == ("inputs.0 was a quint8; it is given as plain numbers",)
    assert sample.args[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"x": [[NaN, 1]]}', "is no JSON (NaN is no number there)"),
        ('{"x": [[-1e400, 1]]}', "is no JSON (-1e400 is no number there)"),
        ('{"x": [[1]], "x": [[2]]}', "is no JSON ('x' is there twice)"),
    ],
    ids=["nan", "beyond", "twice"],
)
def test_json_that_says_something_else_than_it_seems_is_refused(
    tmp_path: Path, text: str, fault: str
) -> None:
    file = tmp_path / "inputs.json"
    file.write_text(text)

    with pytest.raises(UsageError, match=re.escape(f"--inputs {file}: {fault}")):
        read_inputs(str(file), nn.Identity())


@pytest.mark.parametrize("option", ["--inputs", "--calibration"])
def test_a_folder_of_inputs_is_called_one(tmp_path: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} {tmp_path}: is a folder"):
        read_inputs(str(tmp_path), nn.Identity(), option)


def test_a_model_that_only_the_archive_names_is_blamed_on_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save("llama", Path("here/there/llama"))
    record(prepare(ModelRequest(model="here/there/llama")), tmp_path / "fp.st")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    blamed = r"^--like .*fp\.st: its model here/there/llama: .*name it with --model"
    with Archive.open(tmp_path / "fp.st") as like, pytest.raises(UsageError, match=blamed):
        prepare(ModelRequest(), like)
