"""Which files a command reads, by the flags that name them: none of them is written over."""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from qvtrace.archive.overwriting import InputFile

if TYPE_CHECKING:
    from qvtrace.cli.comparison_flags import GateFlags, RowFlags
    from qvtrace.cli.model_flags import ModelFlags
    from qvtrace.cli.recording_flags import StorageFlags

# What transformers reads of a directory; an archive or a report there is nothing of it.
_CHECKPOINT_FILES = (
    "*config.json",
    "*.index.json",
    "*tokenizer*",
    "*tokens*.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.pt",
    "*.py",
)


def named(*files: tuple[str, str | Path | None]) -> Iterator[InputFile]:
    """Files by the option that names each; an option that was not given names none."""
    for option, file in files:
        if file is not None:
            yield InputFile(Path(file), f"{option} names")


def compared(*archives: str | Path | None) -> Iterator[InputFile]:
    """Archives that are compared, or given modules' inputs from."""
    yield from (InputFile(Path(archive)) for archive in archives if archive is not None)


def of_model(model: "ModelFlags", archive: str | None = None) -> Iterator[InputFile]:
    """Those of a model and its sample; `archive` says of which model where `model` does not."""
    yield from named(
        ("--like", model.like),
        ("--calibration", model.calibration),
        ("--keep-float-file", model.keep_float_file),
        ("--inputs", model.inputs),
        *(("--image", image) for image in model.image),
    )
    like = model.like or archive
    place = model.model or (None if like is None else _model_of(like))
    for option, text in (("--model", place), ("--quantizer", model.quantizer)):
        if text is not None:
            yield from _of_code_or_checkpoint(option, text)


def of_storage(storage: "StorageFlags") -> Iterator[InputFile]:
    """The key of private archives."""
    yield from named(("--private-key", storage.private_key))


def of_rows(rows: "RowFlags") -> Iterator[InputFile]:
    """What says which rows there are, and how they are compared."""
    yield from named(
        ("--floor", rows.floor), ("--map-file", rows.map_file), ("--transform", rows.transform)
    )


def of_gates(gates: "GateFlags") -> Iterator[InputFile]:
    """The configuration."""
    from qvtrace.judging.configuration import configuration_files

    if gates.config is not None:
        yield InputFile(gates.config, "--config names")
    else:
        yield from (InputFile(file, "has the configuration") for file in configuration_files())


def _model_of(archive: str) -> str | None:
    from qvtrace.archive import Archive

    with Archive.open(archive) as opened:
        return opened.manifest.model.name


def _of_code_or_checkpoint(option: str, text: str) -> Iterator[InputFile]:
    from qvtrace.models.functions import FunctionName

    function = FunctionName.parse(text)
    if function is not None:
        yield from (InputFile(file, f"{option} names") for file in function.files)
        return
    place = Path(text).expanduser()
    if place.is_file():
        yield InputFile(place, f"{option} names")
    elif place.is_dir():
        files = (file for file in place.iterdir() if file.is_file())
        yield from (InputFile(file, f"is of the model {text}") for file in _checkpoint(files))


def _checkpoint(files: Iterable[Path]) -> Iterator[Path]:
    from qvtrace.archive import recorded_by

    for file in files:
        is_read = any(fnmatchcase(file.name, pattern) for pattern in _CHECKPOINT_FILES)
        if is_read and recorded_by(file) is None:
            yield file
