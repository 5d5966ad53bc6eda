"""Hugging Face directories and user files on disk, as the commands are given them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models

from qvtrace.archive import Archive
from qvtrace.models import ModelRequest, PreparedModel, prepare
from qvtrace.models.chatter import quiet
from qvtrace.recording.options import RecordOptions
from qvtrace.recording.recorder import Recording

TOY = """
import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x, scale=1.0):
        return self.second(self.first(x)) * scale


def model():
    return Toy()


def with_dict():
    return Toy(), {"x": torch.ones(2, 32), "scale": 2.0}


def with_tuple():
    return Toy(), (torch.ones(2, 32), 3.0)


def with_tensor():
    return Toy(), torch.ones(2, 32)


def halve(model):
    assert isinstance(model, Toy)
    with torch.no_grad():
        model.first.weight.mul_(0.5)
    return model


def keep(model):
    return model


def forget(model):
    pass


def raising():
    raise KeyError("no such thing")


def model_that_raises():
    toy = Toy()
    toy.forward = None
    return toy, torch.ones(2, 32)


ready = Toy()
"""

VISION_TRANSFORMER = """
import torch
from torch import nn


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, kernel_size=8, stride=8)
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, 64))
        self.first = nn.Parameter(torch.zeros(1, 1, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.first.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(hidden + self.position))[:, 0])


def vision_transformer():
    generator = torch.Generator().manual_seed(1)
    return VisionTransformer(), torch.randn(2, 3, 32, 32, generator=generator)
"""


def save(name: str, directory: Path) -> Path:
    """Write a tiny model as `save_pretrained` does."""
    model: Any
    model, _ = tiny_models.build(name)
    with quiet():
        model.save_pretrained(directory)
    return directory


def change_config(directory: Path, **changes: object) -> None:
    """Overwrite settings in a directory's config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def record(prepared: PreparedModel, file: Path) -> Path:
    """Run a prepared model under the recorder."""
    options = RecordOptions(
        model=prepared.info,
        variant=prepared.variant,
        source=prepared.source,
        environment=prepared.environment,
    )
    with Recording(prepared.model, file, options):
        prepared.run()
    return file


def prepare_like(file: Path, **request: Any) -> PreparedModel:
    """Prepare what the archive in `file` says, with these options."""
    with Archive.open(file) as archive:
        return prepare(ModelRequest(**request), archive)


Saved = Callable[[str], Path]
