"""The tokenizer, image processor and feature extractor that lie beside a model's weights."""

from functools import cached_property
from pathlib import Path
from typing import Any

from qvtrace.errors import ModelError
from qvtrace.models.chatter import one_line
from qvtrace.models.checkpoints import source_options
from qvtrace.models.gguf_files import has_tokenizer
from qvtrace.models.origins import Checkpoint
from qvtrace.models.request import ModelRequest

# Without one of these, transformers makes up a tokenizer with an empty vocabulary.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class Processors:
    """What turns text, pictures and sound into inputs; each is None where the place has none."""

    def __init__(self, checkpoint: Checkpoint, request: ModelRequest) -> None:
        self._checkpoint = checkpoint
        self._options = source_options(checkpoint, request)
        self._trust = request.trust_remote_code

    @cached_property
    def tokenizer(self) -> Any:
        """Raises `ModelError` when there is one that cannot be loaded."""
        return self._load("AutoTokenizer", "tokenizer", _TOKENIZER_FILES)

    @cached_property
    def image_processor(self) -> Any:
        """Raises `ModelError` when there is one that cannot be loaded."""
        return self._load("AutoImageProcessor", "image processor", _PROCESSOR_FILES)

    @cached_property
    def feature_extractor(self) -> Any:
        """Raises `ModelError` when there is one that cannot be loaded."""
        return self._load("AutoFeatureExtractor", "feature extractor", _PROCESSOR_FILES)

    @cached_property
    def processor(self) -> Any:
        """All of them in one; None also where a library that it needs is missing."""
        try:
            return self._load("AutoProcessor", "processor", _PROCESSOR_FILES)
        except ModelError:
            return None

    def _load(self, auto_class: str, what: str, files: tuple[str, ...]) -> Any:
        import transformers

        if not (self._is_in_gguf(auto_class) or any(map(self._has, files))):
            return None
        auto = getattr(transformers, auto_class)
        try:
            return auto.from_pretrained(
                self._checkpoint.place, trust_remote_code=self._trust, **self._options
            )
        except Exception as error:
            raise ModelError(
                f"{self._checkpoint.name}: its {what} cannot be loaded, {one_line(error)}; "
                "repair it, or give ready tensors with --inputs"
            ) from error

    def _is_in_gguf(self, auto_class: str) -> bool:
        if self._checkpoint.gguf is None or auto_class != "AutoTokenizer":
            return False
        return has_tokenizer(self._checkpoint.gguf_file, self._checkpoint.name)

    def _has(self, file: str) -> bool:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        if self._checkpoint.local:
            return (Path(self._checkpoint.place) / file).is_file()
        try:
            hf_hub_download(self._checkpoint.place, file, **self._options)
        except (EntryNotFoundError, OSError, ValueError):
            return False
        return True
