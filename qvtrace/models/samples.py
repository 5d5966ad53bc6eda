"""The sample that suits a model: image and text, text, image, or audio."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from qvtrace.errors import ModelError, UsageError
from qvtrace.models import crafted
from qvtrace.models.chatter import one_line
from qvtrace.models.origins import relative
from qvtrace.models.pictures import CRAFTED_SIZE, crafted_picture, open_pictures
from qvtrace.models.processors import Processors
from qvtrace.models.request import ModelRequest, Sample
from qvtrace.models.seeds import DEFAULT_SEED
from qvtrace.models.signatures import takes

PROMPT = "The quick brown fox jumps over the lazy dog."
IMAGE_PROMPT = "Describe the image."


@dataclass
class SampleMaker:
    """Makes the inputs of one transformers model, with its own processors where it has them."""

    model: nn.Module
    label: str  # of the model, in messages
    processors: Processors | None  # None: the model comes from no directory
    request: ModelRequest

    def make(self) -> Sample:
        """The inputs; what was asked for is in them, the rest is crafted.

        Raises `UsageError` for a prompt or picture that the model has no use for, and where nothing
        can be guessed.
        """
        self._check_prompt()
        token = crafted.image_token(self._config)
        if token is not None and takes(self.model, "image_grid_thw"):
            return self._patches_and_text(token)
        if token is not None and takes(self.model, "pixel_values"):
            return self._image_in_text(token)
        return self._parts()

    @property
    def _seed(self) -> int:
        return DEFAULT_SEED if self.request.seed is None else self.request.seed

    @property
    def _config(self) -> Any:
        return self.model.config

    @cached_property
    def _tokenizer(self) -> Any:
        return None if self.processors is None else self.processors.tokenizer

    @cached_property
    def _image_processor(self) -> Any:
        return None if self.processors is None else self.processors.image_processor

    def _check_prompt(self) -> None:
        if self.request.prompt is None:
            return
        if not takes(self.model, "input_ids"):
            raise UsageError(f"--prompt: {self.label} takes no text; leave it out")
        if self._tokenizer is None:
            raise UsageError(
                f"--prompt: {self.label} has no tokenizer; give ready tensors with --inputs"
            )

    def _parts(self) -> Sample:
        """Text, image and audio side by side, as far as the model takes them."""
        main = getattr(self.model, "main_input_name", "input_ids")
        kwargs: dict[str, Any] = {}
        source: dict[str, Any] = {}
        if main == "input_ids" and takes(self.model, "input_ids"):
            self._add_text(kwargs, source)
        if main == "pixel_values" or hasattr(self._config, "vision_config"):
            self._add_image(kwargs, source)
        elif self.request.images:
            raise UsageError(f"--image: {self.label} takes no image; leave it out")
        if main in ("input_features", "input_values"):
            self._add_audio(main, kwargs, source)
        if getattr(self._config, "is_encoder_decoder", False):
            ids = kwargs.get("input_ids")
            ids = crafted.token_ids(self._config, self._seed) if ids is None else ids
            start = crafted.decoder_ids(self._config, ids)
            kwargs["decoder_input_ids"] = start[:, :1] if self.request.generate else start
        if not kwargs:
            raise UsageError(
                f"--model {self.label}: no inputs can be guessed for "
                f"{type(self.model).__name__}; give them with --inputs FILE"
            )
        return self._sample(kwargs, source)

    def _add_text(self, kwargs: dict[str, Any], source: dict[str, Any]) -> None:
        if self._tokenizer is None:
            kwargs["input_ids"] = crafted.token_ids(self._config, self._seed)
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
            return
        source["prompt"] = self.request.prompt or PROMPT
        kwargs.update(self._tokenizer(source["prompt"], return_tensors="pt"))

    def _add_image(self, kwargs: dict[str, Any], source: dict[str, Any]) -> None:
        if self._image_processor is None:
            self._refuse_images("image processor")
            kwargs["pixel_values"] = crafted.pixel_values(self._config, self._seed)
        else:
            kwargs.update(self._image_processor(images=self._pictures(source), return_tensors="pt"))

    def _add_audio(self, main: str, kwargs: dict[str, Any], source: dict[str, Any]) -> None:
        extractor = None if self.processors is None else self.processors.feature_extractor
        if extractor is not None:
            source["audio"] = "one second of a rising tone"
            rate = extractor.sampling_rate
            kwargs.update(extractor(_tone(rate), sampling_rate=rate, return_tensors="pt"))
        elif main == "input_values":
            kwargs[main] = crafted.audio_values(self._config, self._seed)
        else:
            features = crafted.audio_features(self._config, self._seed)
            if features is not None:
                kwargs[main] = features

    def _patches_and_text(self, token: int) -> Sample:
        """Qwen-VL's family: patches of pictures of any size, and as many tokens in the text.

        Put together here, since their own processors need torchvision for videos.
        """
        if self._image_processor is None or self._image_mark(token) is None:
            self._refuse_images(f"image processor and tokenizer with the token {token}")
            return self._crafted_patches_and_text(token)
        source: dict[str, Any] = {"prompt": self.request.prompt or IMAGE_PROMPT}
        pictures = self._pictures(source)
        kwargs = dict(self._image_processor(images=pictures, return_tensors="pt"))
        merge = self._image_processor.merge_size**2
        counts = (kwargs["image_grid_thw"].prod(dim=1) // merge).tolist()
        text = self._chat(source["prompt"], self._image_mark(token), counts)
        kwargs.update(self._tokenizer(text, return_tensors="pt"))
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == token).long()
        return self._sample(kwargs, source)

    def _image_mark(self, token: int) -> Any:
        return self._tokenizer and self._tokenizer.convert_ids_to_tokens(token)

    def _chat(self, prompt: str, mark: str, counts: list[int]) -> str:
        """The prompt in the tokenizer's chat template, with `counts` marks for each picture."""
        text = mark * len(counts) + prompt
        if self._tokenizer.chat_template:
            content = [*[{"type": "image"}] * len(counts), {"type": "text", "text": prompt}]
            message = {"role": "user", "content": content}
            chat = self._tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            text = chat if chat.count(mark) == len(counts) else text
        pieces = text.split(mark)
        marks = [mark * count for count in counts]
        return pieces[0] + "".join(a + b for a, b in zip(marks, pieces[1:], strict=True))

    def _crafted_patches_and_text(self, token: int) -> Sample:
        patches, grid = crafted.image_patches(self._config, self._seed)
        merge = getattr(self._config.vision_config, "spatial_merge_size", 2) ** 2
        start = getattr(self._config, "vision_start_token_id", None)
        end = getattr(self._config, "vision_end_token_id", None)
        ids = crafted.token_ids(self._config, self._seed)[0].tolist()
        image = [token] * (int(grid.prod()) // merge)
        marks = [[mark] if isinstance(mark, int) else [] for mark in (start, end)]
        tokens = torch.tensor([[*ids[:4], *marks[0], *image, *marks[1], *ids[4:]]])
        kwargs = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (tokens == token).long(),
        }
        return self._sample(kwargs, {})

    def _image_in_text(self, token: int) -> Sample:
        """Other models that take images in their text: by their own processor, or crafted."""
        processor = None if self.processors is None else self.processors.processor
        if processor is None:
            self._refuse_images("processor that can be loaded")
            return self._crafted_image_in_text(token)
        source: dict[str, Any] = {"prompt": self.request.prompt or IMAGE_PROMPT}
        pictures = self._pictures(source)
        try:
            return self._sample(_process(processor, source["prompt"], pictures), source)
        except Exception as error:
            raise ModelError(
                f"{self.label}: its processor cannot make inputs, {one_line(error)}; "
                "give ready tensors with --inputs"
            ) from error

    def _crafted_image_in_text(self, token: int) -> Sample:
        """An image and as many tokens as the model makes of it; text alone where it does not tell,
        or where there is a prompt, whose place for an image only a processor knows."""
        image = crafted.pixel_values(self._config, self._seed)
        count = None if self.request.prompt is not None else _image_tokens(self.model, image)
        kwargs: dict[str, Any] = {}
        source: dict[str, Any] = {}
        if count is None:
            self._add_text(kwargs, source)
            return self._sample(
                kwargs, source, ("there is no image in the sample: no processor can be loaded",)
            )
        ids = crafted.token_ids(self._config, self._seed)
        tokens = torch.full((1, count), token)
        kwargs["input_ids"] = torch.cat([ids[:, :4], tokens, ids[:, 4:]], dim=1)
        kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        kwargs["pixel_values"] = image
        return self._sample(kwargs, source)

    def _pictures(self, source: dict[str, Any]) -> list[Image.Image]:
        source["images"] = [*map(relative, self.request.images)] or [
            f"gradient {CRAFTED_SIZE[0]}x{CRAFTED_SIZE[1]}"
        ]
        return open_pictures(self.request.images) or [crafted_picture()]

    def _refuse_images(self, what: str) -> None:
        if self.request.images:
            raise UsageError(
                f"--image: {self.label} has no {what}; give ready tensors with --inputs"
            )

    def _sample(
        self, kwargs: dict[str, Any], source: dict[str, Any], warnings: tuple[str, ...] = ()
    ) -> Sample:
        """Without what `forward` does not name: a tokenizer returns more than some models take."""
        kwargs = {name: value for name, value in kwargs.items() if takes(self.model, name)}
        kind = "processed" if source else "crafted"
        return Sample((), kwargs, {"kind": kind, **source}, warnings, guessed=not source)


def _image_tokens(model: Any, image: torch.Tensor) -> int | None:
    """How many tokens of its text a model replaces by an image; None where it does not tell."""
    try:
        weight = next(model.parameters())
        device = None if weight.is_meta else weight.device
        with torch.no_grad():
            features = model.get_image_features(pixel_values=image.to(device, weight.dtype))
        features = getattr(features, "pooler_output", features)
        parts = features if isinstance(features, list | tuple) else [features]
        hidden = int(crafted.text_config(model.config).hidden_size)
        return int(sum(part.numel() for part in parts)) // hidden
    except Exception:  # a model of another kind, or one that needs more than an image
        return None


def _process(processor: Any, prompt: str, pictures: list[Image.Image]) -> dict[str, Any]:
    if getattr(processor, "chat_template", None):
        images = [{"type": "image", "image": picture} for picture in pictures]
        message = {"role": "user", "content": [*images, {"type": "text", "text": prompt}]}
        return dict(
            processor.apply_chat_template(
                [message],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    mark = getattr(processor, "image_token", None) or "<image>"
    text = mark * len(pictures) + prompt
    return dict(processor(text=[text], images=pictures, return_tensors="pt"))


def _tone(rate: int) -> Any:
    """One second that rises from 200 Hz to 2 kHz."""
    seconds = np.arange(rate) / rate
    return np.sin(2 * np.pi * (200 * seconds + 900 * seconds**2)).astype(np.float32)
