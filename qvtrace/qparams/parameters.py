"""Quantization parameters as they stand in the manifest, with each module that has them.

The first that a module has are the object itself, which is its weight's where it has a weight; the
further ones (of its inputs, its output) are in `also`. Values are tensors of the file; here is
their summary.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from qvtrace.manifest import Manifest
from qvtrace.trees import Json, TensorLeaf, from_json, to_json

WEIGHT = "weight"
INPUT = "input"
OUTPUT = "output"

_WRAPPED = "wrapped"  # the module within a wrapper: one thing to a person


@dataclass(frozen=True)
class Summary:
    """The values of one parameter: a number, or as many as there are channels or groups."""

    count: int
    minimum: float | None  # of those that are finite
    maximum: float | None
    zeros: int = 0
    nonfinite: int = 0
    values: TensorLeaf | None = None  # None where they were not stored

    def to_json(self) -> Json:
        """The summary as it stands in the manifest."""
        json: Json = {
            "count": self.count,
            "min": self.minimum,
            "max": self.maximum,
            "zeros": self.zeros,
            "nonfinite": self.nonfinite,
        }
        return json if self.values is None else {**json, "values": to_json(self.values)}

    @classmethod
    def from_json(cls, json: object) -> "Summary":
        """What `to_json` wrote; raises `ValueError` for anything else."""
        fields = _object(json, "a summary")
        values = fields.get("values")
        node = None if values is None else from_json(values)
        return cls(
            _count(fields, "count"),
            _number(fields, "min"),
            _number(fields, "max"),
            _count(fields, "zeros"),
            _count(fields, "nonfinite"),
            node if isinstance(node, TensorLeaf) else None,  # else it was lost with a full disk
        )


@dataclass(frozen=True)
class Range:
    """What can be represented: from the lowest value of any channel or group to the highest."""

    minimum: float
    maximum: float
    excluding_zero: int = 0  # of so many channels or groups the range does not hold zero
    not_covering: int = 0  # of so many it does not hold what their observer saw

    def to_json(self) -> Json:
        """The range as it stands in the manifest."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "excluding_zero": self.excluding_zero,
            "not_covering": self.not_covering,
        }

    @classmethod
    def from_json(cls, json: object) -> "Range":
        """What `to_json` wrote; raises `ValueError` for anything else."""
        fields = _object(json, "a range")
        minimum, maximum = _number(fields, "min"), _number(fields, "max")
        if minimum is None or maximum is None:
            raise ValueError("a range without ends")
        counts = _count(fields, "excluding_zero"), _count(fields, "not_covering")
        return cls(minimum, maximum, *counts)


@dataclass(frozen=True)
class Parameters:
    """How one tensor of a module is quantized. What is not known is None."""

    of: str  # `weight`, `input`, `output`, or the name of what has them
    class_name: str  # of the quantized tensor, its observer or its scheme
    dtype: str | None = None  # of the quantized values: `int8`, `uint4`, `float8_e4m3fn`, `nf4`
    scheme: str | None = None  # `symmetric`, `affine`, `float`, `codebook`
    granularity: str | None = None  # `tensor`, `channel`, `group`, `token`, `block`
    group_size: int | None = None  # elements along the last dimension
    axis: int | None = None  # of the channels
    dynamic: bool = False  # computed anew for each call, so that there are no values
    scale: Summary | None = None
    zero_point: Summary | None = None
    minimum: Summary | None = None  # what the observer saw
    maximum: Summary | None = None
    range: Range | None = None
    observer: bool = False  # the module is an observer: this is about the module that holds it

    def to_json(self) -> Json:
        """The parameters as they stand in the manifest; what is not known is left out."""
        json: Json = {"of": self.of, "class": self.class_name}
        for name in ("dtype", "scheme", "granularity", "group_size", "axis"):
            if getattr(self, name) is not None:
                json[name] = getattr(self, name)
        if self.dynamic:
            json["dynamic"] = True
        if self.observer:
            json["observer"] = True
        for name, key in _SUMMARIES.items():
            summary: Summary | Range | None = getattr(self, name)
            if summary is not None:
                json[key] = summary.to_json()
        return json

    @classmethod
    def from_json(cls, json: object) -> "Parameters":
        """What `to_json` wrote; raises `ValueError` for anything else."""
        fields = _object(json, "quantization parameters")
        of = _text(fields, "of")
        found = fields.get("range")
        return cls(
            of=WEIGHT if of is None else of,
            class_name=_text(fields, "class") or "?",
            dtype=_text(fields, "dtype"),
            scheme=_text(fields, "scheme"),
            granularity=_text(fields, "granularity"),
            group_size=_integer(fields, "group_size"),
            axis=_integer(fields, "axis"),
            dynamic=fields.get("dynamic") is True,
            observer=fields.get("observer") is True,
            range=None if found is None else Range.from_json(found),
            **{
                name: None if fields.get(key) is None else Summary.from_json(fields[key])
                for name, key in _SUMMARIES.items()
                if name != "range"
            },
        )

    @property
    def described(self) -> str:
        """dtype, scheme and granularity in words."""
        parts = [part for part in (self.dtype, self.scheme) if part is not None]
        if self.granularity is not None:
            size = "" if self.group_size is None else f" of {self.group_size}"
            parts.append(f"per {self.granularity}{size}")
        return " ".join([*parts, "dynamic"] if self.dynamic else parts)


_SUMMARIES = {
    "scale": "scale",
    "zero_point": "zero_point",
    "minimum": "min",
    "maximum": "max",
    "range": "range",
}


def all_to_json(found: list[Parameters]) -> Json | None:
    """What a module has, as its entry in the manifest says it; None where it has nothing."""
    if not found:
        return None
    first, *further = found
    json = first.to_json()
    return {**json, "also": [other.to_json() for other in further]} if further else json


def all_from_json(json: Json | None) -> list[Parameters]:
    """What `all_to_json` wrote; raises `ValueError` for anything else."""
    if json is None:
        return []
    also = json.get("also", [])
    if not isinstance(also, list):
        raise ValueError("quantization parameters that are no list")
    return [Parameters.from_json(json), *map(Parameters.from_json, also)]


class ModuleParameters:
    """The quantization parameters of a trace, by module.

    Those of an observer are about the module that holds it, and those of a module within a wrapper
    are the wrapper's too.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Raises `ValueError` where the file holds something else."""
        self._own = {entry.name: all_from_json(entry.quantization) for entry in manifest.modules}
        self._below: dict[str, list[str]] = {}
        for name, found in self._own.items():
            for above in _holders(name, found):
                self._below.setdefault(above, []).append(name)

    def of(self, module: str) -> list[Parameters]:
        """Everything that is about the module."""
        return self.about(module, ())

    def about(self, module: str, shown: Collection[str]) -> list[Parameters]:
        """What is about the module but for what stands with modules that are `shown` themselves."""
        below = (name for name in self._below.get(module, ()) if name not in shown)
        return [found for name in (module, *below) for found in self._own.get(name, ())]

    def __iter__(self) -> Iterator[tuple[str, Parameters]]:
        """Each with the module that it is about, once."""
        for name, found in self._own.items():
            for parameters in found:
                yield (_parent(name) if parameters.observer else name), parameters


def _holders(name: str, found: list[Parameters]) -> Iterator[str]:
    """The modules above that these parameters are about."""
    if not found:
        return
    if found[0].observer and name:
        name = _parent(name)
        yield name
    while name and name.rpartition(".")[2] == _WRAPPED:
        name = _parent(name)
        yield name


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _object(json: object, what: str) -> Json:
    if not isinstance(json, dict):
        raise ValueError(f"{what} that is {type(json).__name__}, not an object")
    return json


def _value(json: Json, name: str, kind: Any) -> Any:
    value = json.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{name!r} of quantization parameters is {type(value).__name__}")
    return value


def _text(json: Json, name: str) -> str | None:
    value: str | None = _value(json, name, str)
    return value


def _integer(json: Json, name: str) -> int | None:
    value: int | None = _value(json, name, int)
    return value


def _count(json: Json, name: str) -> int:
    value = _integer(json, name)
    if value is None or value < 0:
        raise ValueError(f"{name!r} of quantization parameters is no count")
    return value


def _number(json: Json, name: str) -> float | None:
    value = _value(json, name, int | float)
    try:
        return None if value is None else float(value)
    except OverflowError as error:
        raise ValueError(f"{name!r} of quantization parameters is beyond every float") from error
