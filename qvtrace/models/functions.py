"""A user's `file.py:function` or `package.module:function`: found, imported, called."""

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from qvtrace.digests import digest_bytes
from qvtrace.errors import ModelError, QvtraceError, UsageError
from qvtrace.models.chatter import one_line

_MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class FunctionName:
    """The name of a user's function, taken apart."""

    place: str  # file or module
    attribute: str

    @property
    def name(self) -> str:
        """As the user gave it; a file is relative where it lies below the working folder."""
        path = Path(self.place)
        if self.is_file and path.resolve().is_relative_to(Path.cwd()):
            path = path.resolve().relative_to(Path.cwd())
        return f"{path if self.is_file else self.place}:{self.attribute}"

    @property
    def files(self) -> tuple[Path, ...]:
        """The file with its code; of a module, each that it may be in."""
        if self.is_file:
            return (Path(self.place).expanduser(),)
        parts = self.place.split(".")
        folders = [Path(entry, *parts) for entry in ("", *sys.path)]
        return tuple(
            file
            for folder in folders
            for file in (folder.with_suffix(".py"), folder / "__init__.py")
            if file.is_file()
        )

    @property
    def is_file(self) -> bool:
        """Whether the place is a file, not a module."""
        return self.place.endswith(".py")

    @classmethod
    def parse(cls, text: str) -> "FunctionName | None":
        """The function that `text` names; None where it has not the form of one."""
        place, colon, attribute = text.rpartition(":")
        if not colon or not attribute.isidentifier():
            return None
        named = cls(place, attribute)
        return named if named.is_file or _MODULE_NAME.fullmatch(place) else None

    def load(self, option: str, *, reuse: bool = False) -> Callable[..., Any]:
        """Import the place and get the function.

        A file is run anew, unless `reuse` and its unchanged text has been run before: a model and
        its quantizer from one file then share its classes. Raises `UsageError` when there is no
        such place or function, `ModelError` when the import raises.
        """
        module = self._import(option, reuse=reuse)
        function = getattr(module, self.attribute, None)
        if not callable(function) or isinstance(function, nn.Module):
            raise UsageError(f"{option} {self.name}: {_what_is_there(module, self.attribute)}")
        return _importing_from(function, self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.place).expanduser().resolve().parent if self.is_file else Path.cwd()

    def _import(self, option: str, *, reuse: bool) -> ModuleType:
        with _importable(self._folder), _foreign_code(f"{self.place}: importing it raised"):
            return self._run_file(option, reuse) if self.is_file else self._import_module(option)

    def _run_file(self, option: str, reuse: bool) -> ModuleType:
        # Not through the import system: its cached bytecode misses an edit within the same second.
        path = Path(self.place).expanduser().resolve()
        if not path.is_file():
            raise UsageError(f"{option} {self.name}: there is no file {self.place}; check the path")
        source = path.read_bytes()
        name = f"qvtrace_function_{path.stem}_{digest_bytes(bytes(path) + source)[:8]}"
        if reuse and name in sys.modules:
            return sys.modules[name]
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(path)
        exec(compile(decode_source(source), str(path), "exec"), module.__dict__)
        return module

    def _import_module(self, option: str) -> ModuleType:
        try:
            return importlib.import_module(self.place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.place}.".startswith(f"{error.name}."):
                raise
            raise UsageError(
                f"{option} {self.name}: there is no module {error.name}; "
                "check the name, or give FILE.py:FUNCTION"
            ) from error


def call(function: Callable[..., Any], label: str, *arguments: Any, **named: Any) -> Any:
    """What a user's function returns; raises `ModelError` naming it when it raises."""
    check_call(function, label, *arguments, **named)
    with _foreign_code(f"{label}: raised"):
        return function(*arguments, **named)


def check_call(
    function: Callable[..., Any], label: str, *arguments: object, **named: object
) -> None:
    """Raise `UsageError` where a function does not take so many arguments."""
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise UsageError(
            f"{label}: cannot be called with {len(arguments)} arguments ({error}); "
            "give its other parameters defaults"
        ) from error
    except ValueError:
        pass  # a builtin without a signature


@contextmanager
def _foreign_code(message: str) -> Iterator[None]:
    try:
        yield
    except QvtraceError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{message} {one_line(error)}; --traceback shows where") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules beside the user's file be imported."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _importing_from(function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def importing(*arguments: Any, **named: Any) -> Any:
        with _importable(folder):
            return function(*arguments, **named)

    return importing


def _what_is_there(module: ModuleType, attribute: str) -> str:
    if hasattr(module, attribute):
        kind = type(getattr(module, attribute)).__name__
        return f"is no function but of type {kind}; give a function that returns a model"
    functions = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    there = f"there are {', '.join(functions)}" if functions else "it defines no function"
    return f"has no function {attribute}; {there}"
