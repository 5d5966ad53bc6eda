"""Seeded valid inputs, made from nothing but a model's configuration."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LENGTH = 16  # tokens
DECODER_LENGTH = 8
_IMAGE_SIZE = 224
_RATE = 16_000  # samples of a second of sound
_HOP = 160  # samples from one frame of a spectrogram to the next


def text_config(config: Any) -> Any:
    """The part of a configuration that says what the tokens are."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def image_token(config: Any) -> int | None:
    """The id that stands for a piece of an image in a text; None: there is none."""
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return None


def token_ids(config: Any, seed: int, length: int = LENGTH) -> Tensor:
    """Ids [1, length] within the vocabulary, none of them special."""
    text = text_config(config)
    special = set(_special_ids(config)) | set(_special_ids(text))
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    plain = [token for token in range(text.vocab_size) if token not in special] or [0]
    choice = torch.randint(len(plain), (1, length), generator=_generator(seed))
    return torch.tensor(plain)[choice]


def decoder_ids(config: Any, ids: Tensor) -> Tensor:
    """Ids [1, at most DECODER_LENGTH] for a decoder: its start token, then `ids`."""
    text = text_config(config)
    candidates = [
        getattr(part, name, None)
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        for part in (config, text)
    ]
    start = next((token for token in candidates if isinstance(token, int)), 0)
    return torch.cat([torch.full((1, 1), start), ids[:1, : DECODER_LENGTH - 1]], dim=1)


def pixel_values(config: Any, seed: int) -> Tensor:
    """An image [1, channels, height, width], or frames of a video [1, frames, channels, ...]."""
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(vision, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(vision, "num_channels", None) or 3
    frames = [vision.num_frames] if hasattr(vision, "num_frames") else []
    return torch.randn(1, *frames, channels, height, width, generator=_generator(seed))


def image_patches(config: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Patches [patches, values] and their grid [1, 3], for models of pictures of any size."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", 2)
    grid = torch.tensor([[1, 3 * merge, 4 * merge]])
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    values = channels * getattr(vision, "temporal_patch_size", 2) * vision.patch_size**2
    patches = torch.randn(int(grid.prod()), values, generator=_generator(seed))
    return patches, grid


def audio_features(config: Any, seed: int) -> Tensor | None:
    """Log-mel features [1, bins, frames] of a waveform, as Whisper's own extractor makes them
    of any sound; None where the sizes are not known."""
    from transformers import WhisperFeatureExtractor

    bins = getattr(config, "num_mel_bins", None)
    positions = getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        return None
    frames = 2 * positions
    seconds = -(-frames * _HOP // _RATE)
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=seconds, hop_length=_HOP)
    sound = waveform(seed, seconds * _RATE)
    features = extractor(sound.numpy(), sampling_rate=_RATE, return_tensors="pt")
    return features["input_features"][:, :, :frames]  # type: ignore[no-any-return]


def audio_values(config: Any, seed: int) -> Tensor:
    """One second of sound [1, samples] at 16 kHz, or a spectrogram [1, frames, bins]."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(1, config.max_length, config.num_mel_bins, generator=_generator(seed))
    return waveform(seed, _RATE)[None]


def waveform(seed: int, samples: int) -> Tensor:
    """A sound [samples] at 16 kHz: three tones that the seed chooses, under noise."""
    generator = _generator(seed)
    seconds = torch.arange(samples) / _RATE
    pitches = 200 + 1800 * torch.rand(3, 1, generator=generator)
    tones = torch.sin(2 * torch.pi * pitches * seconds).sum(dim=0)
    return 0.2 * tones + 0.05 * torch.randn(samples, generator=generator)


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")):
            for token in value if isinstance(value, list) else [value]:
                if isinstance(token, int):
                    yield token


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
