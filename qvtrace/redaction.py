"""Keeps tokens out of files and messages, and tells an exception of the user's in one line."""

import os
import re

from qvtrace.errors import QvtraceError

_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def without_secrets(text: str, *secrets: str | None) -> str:
    """`text` with each Hugging Face token in it replaced."""
    for secret in (*secrets, *map(os.environ.get, _SECRET_VARIABLES)):
        if secret:
            text = text.replace(secret, "[token]")
    return _SECRET.sub("[token]", text)


def error_text(error: BaseException) -> str:
    """Type and first line of an exception, whatever it is, without tokens: `ValueError: boom`."""
    try:
        lines = str(error).splitlines()
    except Exception:  # an exception of the user's
        lines = []
    name = type(error).__name__
    return f"{name}: {without_secrets(lines[0])[:200]}" if lines else name


def error_line(error: BaseException) -> str:
    """What a manifest says of an exception that ended something."""
    if isinstance(error, QvtraceError) and error.__cause__ is not None:
        error = error.__cause__  # what the model raised, without advice for a terminal
    return error_text(error)
