"""Where a model comes from, told from what the user wrote after `--model`."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from qvtrace.errors import UsageError
from qvtrace.models.functions import FunctionName
from qvtrace.models.gguf_files import SUFFIX, gguf_in
from qvtrace.models.hub import is_reachable

EMBEDDED = "qwen3-vl-tiny"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Embedded:
    """The model that comes with qvtrace."""

    name: str = EMBEDDED


@dataclass(frozen=True)
class Checkpoint:
    """A local Hugging Face directory, a hub id, or a GGUF file in a local directory."""

    place: str
    local: bool
    gguf: str | None = None  # name of the file in the directory

    @property
    def name(self) -> str:
        """As the user gave it; relative where it lies below the working folder."""
        if self.gguf is not None:
            return relative(str(self.gguf_file))
        return relative(self.place) if self.local else self.place

    @property
    def gguf_file(self) -> Path:
        """The GGUF file itself."""
        assert self.gguf is not None
        return Path(self.place) / self.gguf

    @cached_property
    def is_out_of_reach(self) -> bool:
        """Whether it is of a hub that cannot be reached: what is cached of it is all there is."""
        return not self.local and not is_reachable()


Origin: TypeAlias = Embedded | Checkpoint | FunctionName


def parse_origin(model: str | None) -> Origin:
    """Where the model `model` comes from; None is the embedded one.

    Raises `UsageError` for what can be none of them.
    """
    if model is None or model == EMBEDDED:
        return Embedded()
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint(str(path), local=True, gguf=gguf_in(path))
    if path.is_file() and path.suffix == SUFFIX:
        return Checkpoint(str(path.parent), local=True, gguf=path.name)
    if path.suffix == SUFFIX:
        raise UsageError(f"--model {model}: there is no such file; check the path")
    function = FunctionName.parse(model)
    if function is not None:
        return function
    if path.is_file():
        raise UsageError(f"--model {model}: is a file; {_remedy(path)}")
    if path.is_absolute() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise UsageError(
            f"--model {model}: there is no such directory; give a Hugging Face directory, "
            f"a hub id, FILE.py:FUNCTION, or {EMBEDDED}"
        )
    return Checkpoint(model, local=False)


def relative(place: str) -> str:
    """A path as the user gave it, relative where it lies below the working folder."""
    path = Path(place)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _remedy(path: Path) -> str:
    if path.suffix == ".py":
        return f"name the function in it that returns the model, {path}:FUNCTION"
    return "give the directory that has config.json and the weights in it, or a .gguf file"
