"""Typed access to JSON of a file that is not to be trusted."""

from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, cast

from qvtrace.trees import Json

_MAX_FREE_DEPTH = 32


class Fields:
    """An object of the file: each method raises `ValueError` for a value of another kind."""

    def __init__(self, json: object, what: str) -> None:
        if not isinstance(json, dict):
            raise ValueError(f"the {what} is {type(json).__name__}, not an object")
        self.json = json
        self.what = what

    def _get(self, name: str, kind: type | UnionType) -> Any:
        value = self.json.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name!r} of the {self.what} is {type(value).__name__}")
        return value

    def text(self, name: str) -> str:
        return cast(str, self._get(name, str))

    def optional_text(self, name: str) -> str | None:
        return cast(str | None, self._get(name, str | None))

    def flag(self, name: str) -> bool:
        return cast(bool, self._get(name, bool))

    def count(self, name: str) -> int:
        value = cast(int, self._get(name, int))
        if value < 0:
            raise ValueError(f"{name!r} of the {self.what} is negative")
        return value

    def number(self, name: str) -> float:
        return cast(float, self._get(name, int | float))

    def optional_number(self, name: str) -> float | None:
        return cast(float | None, self._get(name, int | float | None))

    def object(self, name: str) -> Json:
        return cast(Json, self._get(name, dict))

    def free_object(self, name: str) -> Json:
        """An object of any content, but not so deep that nobody could walk it."""
        value = self.object(name)
        level: Sequence[Any] = [value]
        for _ in range(_MAX_FREE_DEPTH):
            level = [child for item in level for child in _children(item)]
            if not level:
                return value
        raise ValueError(f"{name!r} of the {self.what} is nested too deeply")

    def optional_object(self, name: str) -> Json | None:
        return cast(Json | None, self._get(name, dict | None))

    def optional_list(self, name: str) -> list[Any]:
        """Empty where an older file does not have it."""
        return self.list(name) if name in self.json else []

    def list(self, name: str) -> list[Any]:
        return cast("list[Any]", self._get(name, list))

    def counts(self, name: str) -> tuple[int, ...]:
        values = self.list(name)
        if not all(type(value) is int and value >= 0 for value in values):
            raise ValueError(f"{name!r} of the {self.what} is not a list of counts")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        return texts_of(self._get(name, list), name)

    def section(self, name: str) -> "Fields":
        return Fields(self.object(name), name)

    def optional_section(self, name: str) -> "Fields | None":
        return None if self.json.get(name) is None else self.section(name)


def _children(value: object) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def texts_of(values: object, name: str) -> tuple[str, ...]:
    """A list of texts; raises `ValueError` for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name!r} is not a list of texts")
    return tuple(values)
