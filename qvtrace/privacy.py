"""Keyed digests in place of what a recording is not to give away.

Whoever has the key can tell whether two recordings were given the same; whoever has not can neither
read what is withheld nor test a guess of it. Each digest begins with that of the key itself, so
that digests of two keys are never taken for different contents.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvtrace.errors import UsageError
from qvtrace.manifest import PRIVATE, Manifest, Skipped
from qvtrace.redaction import without_secrets
from qvtrace.trees import Container, Json, Node, OpaqueLeaf, ValueLeaf

KEY_VARIABLE = "QVTRACE_PRIVATE_KEY"

_FEWEST = 16  # bytes of a key
_KEY_DIGITS = 8  # of a digest, which tell the key
_DIGITS = 24
_IN_TEXT = 16
_LABEL = "[private "
# Python values that tell nothing of what a model was asked.
_HARMLESS = frozenset({"None", "bool", "dtype", "device", "layout", "memory_format"})
_PLAIN_KEY = re.compile(r"[A-Za-z_]\w{0,63}|\d{1,9}")
_ABSOLUTE = re.compile(r"file:/\S+|(?<![\w.~:/\]-])~?/[^\s'\",;:()\[\]{}<>]+")
_RAISED = re.compile(r"(raised [\w.]+): .*", re.DOTALL)
_ERROR_NAME = re.compile(r"[A-Za-z_][\w.]*")


class Privacy:
    """Digests under one key."""

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.blake2b(key, digest_size=32, person=b"qvtrace").digest()
        self.key_digest = self._hash("key", _KEY_DIGITS)

    def to_json(self) -> Json:
        """What the manifest says of it among the settings."""
        return {"private": {"key": self.key_digest}}

    def digest(self, text: str) -> str:
        """32 hexadecimal digits; those of a tensor are of the digest of its contents."""
        return self.key_digest + self._hash(f"content {text}", _DIGITS)

    def label(self, text: str) -> str:
        """What stands for a text that is not to be shown; one that was replaced stays as it is."""
        return text if is_label(text) else f"{_LABEL}{self.digest(text)[:_IN_TEXT]}]"

    def component(self, plain: str, *, is_given: bool) -> str:
        """What stands in a path for a component of it: where it is a name or a number itself,
        unless it is one that was given."""
        if not is_given and _PLAIN_KEY.fullmatch(plain):
            return plain
        return f"private_{self.digest(plain)[:_IN_TEXT]}"

    def redacted(self, node: Node) -> Node:
        """The tree with plain values as keyed digests, and without reasons that may quote them."""
        match node:
            case ValueLeaf() if node.class_name not in _HARMLESS:
                digest = self.digest(f"{node.class_name} {node.value!r}")
                return OpaqueLeaf(node.class_name, PRIVATE, digest)
            case OpaqueLeaf():
                return OpaqueLeaf(node.class_name)
            case Container():
                items = tuple((name, self.redacted(child)) for name, child in node.items)
                return replace(node, items=items)
        return node

    def scrubbed(self, manifest: Manifest) -> Manifest:
        """What a manifest says of itself without prompts, absolute paths and words of exceptions.

        Trees are not looked at: they are redacted when they are taken.
        """
        variant = manifest.variant
        return replace(
            manifest,
            error=_error_name(manifest.error),
            model=replace(
                manifest.model,
                name=None if manifest.model.name is None else self._text(manifest.model.name),
                modifications=self._scrubbed(manifest.model.modifications, self._text),
            ),
            variant=replace(
                variant,
                quantizer=None if variant.quantizer is None else self._text(variant.quantizer),
                settings=self._scrubbed(variant.settings, self._text),
            ),
            inputs=replace(manifest.inputs, source=self.source(manifest.inputs.source)),
            environment=self._scrubbed(manifest.environment, self._text),
            settings=self._scrubbed(manifest.settings, self._text),
            steps=(),
            skipped=self._skipped(manifest.skipped),
        )

    def source(self, source: Json) -> Json:
        """How inputs were made, without a word of them."""
        return {
            name: value if name == "kind" else self._scrubbed(value, self.label)
            for name, value in source.items()
        }

    def _skipped(self, skipped: Skipped) -> Skipped:
        opaque: dict[str, int] = {}
        for reason, count in skipped.opaque.items():
            class_name = reason.partition(":")[0]
            opaque[class_name] = opaque.get(class_name, 0) + count
        warnings = (_RAISED.sub(r"\1", self._text(text)) for text in skipped.warnings)
        return replace(skipped, opaque=opaque, warnings=tuple(warnings))

    def _scrubbed(self, value: Any, text: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, list | tuple):
            return [self._scrubbed(item, text) for item in value]
        if isinstance(value, dict):
            return {
                text(name) if "/" in name else name: self._scrubbed(item, text)
                for name, item in value.items()
            }
        return value

    def _text(self, text: str) -> str:
        """A text with each absolute path in it replaced; one that is a path is replaced whole."""
        text = without_secrets(text)
        if text.startswith(("/", "~/")):
            return self.label(text)
        for folder in _own_folders():
            text = text.replace(folder, self.label(folder))
        return _ABSOLUTE.sub(lambda found: self.label(found[0]), text)

    def _hash(self, text: str, digits: int) -> str:
        hasher = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._key)
        return hasher.hexdigest()[:digits]


def is_label(text: str) -> bool:
    """Whether a text stands for another one that is not shown."""
    return text.startswith(_LABEL)


def same_key(digest: str, other: str) -> bool:
    """Whether two keyed digests can be held against each other."""
    return digest[:_KEY_DIGITS] == other[:_KEY_DIGITS]


def load_privacy(file: str | os.PathLike[str] | None = None) -> Privacy:
    """Digests under the key in a file; else that of the environment, else the user's own, which is
    made where there is none.

    Raises `UsageError` for a key that cannot be read, or that can be guessed.
    """
    if file is not None:
        return Privacy(_checked(_read(Path(file), "--private-key"), f"--private-key {file}"))
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return Privacy(_checked(given.encode(), KEY_VARIABLE))
    own = _own_file()
    if not own.exists():
        _make(own)
    return Privacy(_checked(_read(own, str(own)), str(own)))


def _own_file() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME")
    folder = Path(configured) if configured else Path.home() / ".config"
    return folder / "qvtrace" / "private.key"


def _make(file: Path) -> None:
    """A key for all recordings of this user, that only this user can read."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:  # another process was first
        return
    except OSError as error:
        raise UsageError(
            f"--private: the key {file} cannot be written: {error.strerror}; "
            f"give one with --private-key FILE or in {KEY_VARIABLE}"
        ) from error
    with os.fdopen(descriptor, "w") as output:
        output.write(secrets.token_hex(32) + "\n")


def _read(file: Path, option: str) -> bytes:
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise UsageError(
            f"{option}: {file} cannot be read: {error.strerror}; name a file with a key in it"
        ) from error


def _checked(key: bytes, option: str) -> bytes:
    if len(key) < _FEWEST:
        raise UsageError(
            f"{option}: a key of {len(key)} bytes can be guessed; "
            f"give at least {_FEWEST} random ones, such as `openssl rand -hex 32` writes"
        )
    return key


def _own_folders() -> list[str]:
    """The user's home and the working folder, however they stand in a text; and the home as it is
    seen from a working folder above it."""
    folders = []
    for find in (Path.home, Path.cwd):
        try:
            folders.append(find())
        except (OSError, RuntimeError):
            continue
    names = [str(folder) for folder in folders]
    if len(folders) > 1 and folders[1] in folders[0].parents:
        names.append(str(folders[0].relative_to(folders[1])))
    return sorted((name for name in names if len(name) > 1), key=len, reverse=True)


def _error_name(error: str | None) -> str | None:
    """The name of an exception without what it says."""
    if error is None:
        return None
    name = _ERROR_NAME.match(error)
    return name[0] if name is not None and ": " in error else error
