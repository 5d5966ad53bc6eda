"""What libraries say while they load and run, kept from the terminal; their errors pass."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from io import StringIO
from types import FrameType
from typing import Any

from qvtrace.redaction import without_secrets

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "compressed_tensors",
    "huggingface_hub",
    "importlib",
    "optimum",
    "tico",
    "tokenizers",
    "torch",
    "torchao",
    "transformers",
)
# Read by a library that is imported while these are set.
_AT_IMPORT = {
    "LOGURU_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_LONGEST = 400


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and progress bars of LIBRARIES from the terminal.

    Errors pass, and so does whatever the user's own code says. torch must have been imported: its
    import sets the levels of its loggers.
    """
    with ExitStack() as undo, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(max(logger.level, logging.ERROR))
        for name in _AT_IMPORT.keys() - os.environ.keys():
            os.environ[name] = _AT_IMPORT[name]
            undo.callback(os.environ.pop, name, None)
        if "transformers" in sys.modules:
            _hide_bars(undo)
        _hide_tqdm(undo)
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Drop what is written to Python's standard output and standard error."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _hide_bars(undo: ExitStack) -> None:
    from transformers.utils import logging as bars

    if bars.is_progress_bar_enabled():
        bars.disable_progress_bar()
        undo.callback(bars.enable_progress_bar)


def _hide_tqdm(undo: ExitStack) -> None:
    """Disable what LIBRARIES show by tqdm: some of their bars have no switch of their own."""
    from tqdm.std import tqdm

    start: Any = tqdm.__init__

    @wraps(start)
    def start_unseen(bar: Any, *arguments: Any, **options: Any) -> None:
        if _caller() in LIBRARIES:
            options["disable"] = True
        start(bar, *arguments, **options)

    undo.callback(setattr, tqdm, "__init__", start)
    tqdm.__init__ = start_unseen


def _caller() -> str:
    """The package whose code made the bar that is about to start."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package != "tqdm":
            return package
        frame = frame.f_back
    return ""


def one_line(error: BaseException, *secrets: str | None) -> str:
    """Type and message of a foreign exception in one line, without tokens."""
    text = without_secrets(" ".join(str(error).split()), *secrets).rstrip(".")
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
