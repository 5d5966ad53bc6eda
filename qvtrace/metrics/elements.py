"""What the elements of an array are: their kind, their masking constants, their values as float64
and as JSON."""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.floating[Any]]  # float32 or float64
Flags: TypeAlias = NDArray[np.bool_]
Kind = Literal["float", "integer", "complex"]

ELEMENTS_LIMIT = 1000  # written of one tensor: as many as torch and numpy print
_ROOT_OF_LARGEST = math.sqrt(sys.float_info.max)
# Real activations can be larger than half of float16's largest value, so only its ends are masks.
_SENTINEL_FROM_HALF = frozenset({"float32", "bfloat16", "float64"})


@dataclass(frozen=True, slots=True)
class Format:
    """What one dtype can hold. Of a complex dtype: its parts; a bool is an integer."""

    kind: Kind
    name: str  # of the dtype
    largest: float = 0.0  # of floats
    epsilon: float = 0.0
    sentinel: float = math.inf  # magnitudes from here on are masking constants

    @property
    def is_wide(self) -> bool:
        """Whether the square of a value may leave the range of float64."""
        return self.largest > _ROOT_OF_LARGEST

    @property
    def fits_float32(self) -> bool:
        """Whether every value is one of float32, and as quickly read."""
        return self.name in ("float32", "bfloat16")

    def sentinels(self, values: Floats) -> Flags:
        """Which finite values are masking constants."""
        magnitude = np.abs(values)
        return np.isfinite(magnitude) & (magnitude >= self.sentinel)


@lru_cache
def format_of(dtype: np.dtype[Any]) -> Format:
    """What `dtype` can hold. Raises `TypeError` when it is no dtype of numbers."""
    if dtype.kind in "biu":
        return Format("integer", dtype.name)
    if dtype.kind == "c":
        part = format_of(_part_dtype(dtype))
        return Format("complex", dtype.name, part.largest, part.epsilon, part.sentinel)
    try:
        limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        return _small_integer(dtype)
    largest = float(limits.max)
    sentinel = math.inf
    if dtype.name in _SENTINEL_FROM_HALF:
        sentinel = largest / 2
    elif dtype.name == "float16":
        sentinel = largest
    return Format("float", dtype.name, largest, float(limits.eps), sentinel)


def _small_integer(dtype: np.dtype[Any]) -> Format:
    try:
        ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]
    except ValueError:
        raise TypeError(f"{dtype} is no dtype of numbers") from None
    return Format("integer", dtype.name)


def _part_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"f{dtype.itemsize // 2}")


@dataclass(frozen=True, slots=True)
class Computed(ABC):
    """What is read as an array is, without being one; each element comes of those of an array."""

    array: "Readable"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all of it."""
        return self.array.shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.array.size

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """The elements from one flat index to another."""


@dataclass(frozen=True, slots=True)
class Rearranged(Computed):
    """An array that is read in another order and shape, without a copy of the whole."""

    array: Array  # with its axes in the order in which they are read
    read_shape: tuple[int, ...]  # of as many elements

    @property
    def shape(self) -> tuple[int, ...]:
        """The one in which it is read."""
        return self.read_shape

    def read(self, start: int, stop: int) -> Array:
        """The elements from one flat index to another."""
        return _range(self.array, start, stop)


Readable: TypeAlias = Array | Computed
Reader: TypeAlias = Callable[[int, int], Array]


def reader(array: Readable) -> Reader:
    """A function from a range of flat indices to the elements there, a view where possible."""
    if not isinstance(array, np.ndarray | np.generic):  # numpy makes scalars of some arrays
        return array.read
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        return lambda start, stop: flat[start:stop]
    return lambda start, stop: _range(array, start, stop)


def _range(array: Array, start: int, stop: int) -> Array:
    """As `array.flat[start:stop]`, whole slices at a time: many times as fast."""
    if array.ndim <= 1:
        return np.ascontiguousarray(array.reshape(-1)[start:stop])
    inner = array.size // len(array)
    first, last = -(-start // inner), stop // inner  # whole slices
    if first > last:
        return _range(array[last], start - last * inner, stop - last * inner)
    pieces = [array[first:last].reshape(-1)]
    if start < first * inner:
        pieces.insert(0, _range(array[first - 1], start - (first - 1) * inner, inner))
    if last * inner < stop:
        pieces.append(_range(array[last], 0, stop - last * inner))
    return np.concatenate(pieces)


def part_reader(array: Readable) -> Reader:
    """A reader of an array as complex numbers; each is two reals, so that indices are doubled."""
    read = reader(array)

    def read_parts(start: int, stop: int) -> Array:
        elements = read(start // 2, stop // 2)
        if elements.dtype.kind != "c":
            elements = elements.astype(np.float64).astype(np.complex128)
        return elements.view(_part_dtype(elements.dtype))

    return read_parts


def upcast(elements: Array, into: Floats) -> None:
    """Write one-dimensional elements into a wider float (exact, but for integers beyond 2^53)."""
    if elements.dtype.itemsize == 1 and elements.dtype.kind not in "biu":
        # ml_dtypes converts one element at a time; a table of 256 is seven times as fast.
        np.take(_values_of_bytes(elements.dtype), elements.view(np.uint8), out=into, mode="clip")
    else:
        np.copyto(into, elements)


@lru_cache
def _values_of_bytes(dtype: np.dtype[Any]) -> Floats:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


JsonNumber: TypeAlias = int | float | str


def number_json(value: float) -> JsonNumber:
    """The number itself, or `NaN`, `Infinity` or `-Infinity` as text: JSON has no other way."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


@dataclass(frozen=True, slots=True)
class ElementsJson:
    """Elements as JSON: nested as the array is, or a flat list of the first ones where `cut` says
    how many were left out. A complex element is a pair."""

    values: Any
    cut: int = 0

    def to_json(self) -> dict[str, Any]:
        """`values`, and in `values_cut` how many more there are."""
        return {"values": self.values} | ({"values_cut": self.cut} if self.cut else {})


def elements_json(array: Array, limit: int | None) -> ElementsJson:
    """The elements of `array`, at most `limit` of them."""
    if limit is None or array.size <= limit:
        return ElementsJson(nested_json(_python_values(array)))
    return ElementsJson(nested_json(_python_values(reader(array)(0, limit))), array.size - limit)


def _python_values(array: Array) -> Any:
    if format_of(array.dtype).kind == "float":
        array = array.astype(np.float64)
    elif array.dtype.kind == "V":
        array = array.astype(np.int64)
    return array.tolist()


def nested_json(values: Any) -> Any:
    """Numbers in nested lists as JSON can say them."""
    if isinstance(values, list):
        return [nested_json(value) for value in values]
    if isinstance(values, complex):
        return [number_json(values.real), number_json(values.imag)]
    return number_json(values)
