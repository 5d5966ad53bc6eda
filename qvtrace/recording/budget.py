"""How many vectors of each tensor an archive can hold within a number of bytes.

A first forward counts what there is: each distinct content, and everything that is written whole.
Every module then has its share, as many tokens at most as any other.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qvtrace.archive import Tensor
from qvtrace.archive.layout import encode_json, nbytes, tensor_header_entry
from qvtrace.errors import UsageError
from qvtrace.manifest import PortionEntry
from qvtrace.manifest_json import portion_to_json
from qvtrace.recording.keeping import Content, sampled_form
from qvtrace.sampling import FEWEST, count_vectors
from qvtrace.trees import Json

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_SLACK_PER_CALL = 24  # seconds have as many digits as they happen to have
_SLACK = 4096
_SEPARATOR = 2  # a comma and the end of a line, between items of the manifest
_DIGEST = "0" * 32
_STATISTIC = -1.2345678901234567e-100  # as long as a number gets
_COUNT = 10**12


@dataclass(frozen=True)
class Fixed:
    """What the first forward counted that is the same whatever is sampled."""

    calls: int
    size: Callable[[int, int, int], int]  # of further header, manifest and contents: of the file


class Size(int):
    """Bytes, and how they were given."""

    given: str


def parse_size(value: int | str, option: str = "--max-bytes") -> Size:
    """Bytes, from a number with a unit or without: `200MB` is 200e6, `1GiB` 2**30.

    Raises `UsageError` for anything else.
    """
    parsed = _SIZE.fullmatch(str(value).strip())
    if parsed is None:
        raise UsageError(f"{option} {value!r}: is no size; give one, such as 200MB or 1GiB")
    number, unit = float(parsed[1]), (parsed[2] or "").lower()
    factor = (1024 if unit.endswith("i") else 1000) ** _POWERS.get(unit[:1], 0)
    size = Size(number * factor)
    size.given = str(value).strip()
    return size


def tokens_within(budget: int, contents: Iterable[Content], fixed: Fixed) -> int | None:
    """The most vectors of each tensor that make a file of at most `budget` bytes; None: all.

    Raises `UsageError`, which names the least possible size, where even the fewest are too many.
    """
    contents = tuple(contents)

    def size(tokens: int) -> int:
        return _size(tokens, contents, fixed)

    most = max((count_vectors(content.tensor.place_shape) for content in contents), default=0)
    if size(most) <= budget:
        return None
    least = size(FEWEST)
    if least > budget:
        given = budget.given if isinstance(budget, Size) else budget
        what = "the first and last token of each tensor" if contents else "statistics"
        raise UsageError(
            f"--max-bytes {given}: the model's own inputs, the index and {what} take {least} "
            "bytes; give as much, or leave modules out with --exclude"
        )
    within, beyond = FEWEST, most
    while beyond - within > 1:
        middle = (within + beyond) // 2
        if size(middle) <= budget:
            within = middle
        else:
            beyond = middle
    return within


def _size(tokens: int, contents: tuple[Content, ...], fixed: Fixed) -> int:
    header = manifest = data = 0
    counted = set()
    for content in contents:
        tensor, count = content.tensor, count_vectors(content.tensor.place_shape)
        is_whole = count <= tokens
        if not is_whole:
            manifest += len(encode_json(_portion(tensor, tokens))) + _SEPARATOR
            tensor = sampled_form(tensor, tokens)
        # The same vectors may be there in several shapes: they are stored once.
        key = (content.digest, 0 if is_whole else count)
        if key not in counted:
            counted.add(key)
            bytes_ = nbytes(tensor.dtype, tensor.shape)
            data += bytes_
            header += len(tensor_header_entry(tensor.key, tensor.dtype, tensor.shape, 10**15)) + 1
            manifest += len(encode_json(tensor.to_json(_DIGEST))) + _SEPARATOR
    return fixed.size(header, manifest, data) + _SLACK + _SLACK_PER_CALL * fixed.calls


def _portion(tensor: Tensor, tokens: int) -> Json:
    statistics = dict.fromkeys(("mean", "min", "max", "stddev"), _STATISTIC)
    counts = dict.fromkeys(("nan", "positive_inf", "negative_inf", "zeros"), _COUNT)
    return portion_to_json(
        PortionEntry(
            _DIGEST, tensor.place_shape, "sampled", tokens, _DIGEST, {**statistics, **counts}
        )
    )
