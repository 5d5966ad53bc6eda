"""Which quantization parameters are suspect, from the manifest alone: a scale that is zero or not
finite, a range that excludes zero, a range that does not hold what its observer saw."""

from collections.abc import Iterator
from dataclasses import dataclass

from qvtrace.archive import Archive
from qvtrace.errors import DamagedArchiveError
from qvtrace.patterns import shown
from qvtrace.qparams.parameters import ModuleParameters, Parameters, Summary


@dataclass(frozen=True)
class Finding:
    """What is wrong with the quantization of one tensor of a module."""

    module: str
    of: str  # `weight`, `input`, `output`, or the name of an observer
    text: str

    def __str__(self) -> str:
        return f"{shown(self.module)} {self.of}: {self.text}"


def parameters_of(archive: Archive) -> ModuleParameters:
    """The quantization parameters of an archive; raises `DamagedArchiveError`."""
    try:
        return ModuleParameters(archive.manifest)
    except ValueError as error:
        raise DamagedArchiveError(
            f"{archive.file}: the quantization parameters are damaged ({error}); record again"
        ) from error


def suspect(parameters: ModuleParameters) -> list[Finding]:
    """What the parameters show by themselves, in the order of the modules."""
    return [
        Finding(module, found.of, text)
        for module, found in parameters
        for text in _suspicions(found)
    ]


def _suspicions(found: Parameters) -> Iterator[str]:
    scale, limits = found.scale, found.range
    if scale is not None and scale.zeros:
        yield f"scale is 0{_share(scale.zeros, scale)}"
    if scale is not None and scale.nonfinite:
        yield f"scale is not finite{_share(scale.nonfinite, scale)}"
    if limits is not None and limits.excluding_zero:
        yield f"range {range_text(found)} excludes zero{_share(limits.excluding_zero, scale)}"
    elif limits is not None and limits.not_covering:
        yield (
            f"range {range_text(found)} does not hold what was observed, {_seen_text(found)}"
            f"{_share(limits.not_covering, scale)}: {_values_text(found)}{_why(found)}"
        )


def _share(count: int, scale: Summary | None) -> str:
    return "" if scale is None or scale.count == 1 else f" in {count} of {scale.count}"


def range_text(found: Parameters) -> str:
    """`[-0.0887, 0.0880]`, of parameters whose range is known."""
    assert found.range is not None
    return f"[{_number(found.range.minimum)}, {_number(found.range.maximum)}]"


def _seen(found: Parameters) -> tuple[float | None, float | None]:
    """From the lowest value that an observer saw to the highest."""
    low, high = found.minimum, found.maximum
    return low.minimum if low else None, high.maximum if high else None


def _seen_text(found: Parameters) -> str:
    return f"[{', '.join('?' if end is None else _number(end) for end in _seen(found))}]"


def _values_text(found: Parameters) -> str:
    parts = {"scale": found.scale, "zero point": found.zero_point}
    return ", ".join(f"{name} {summary_text(part)}" for name, part in parts.items() if part)


def _why(found: Parameters) -> str:
    """An observed range that excludes zero has no zero point in reach, which is then clamped."""
    low, high = _seen(found)
    excludes = (low is not None and low > 0) or (high is not None and high < 0)
    return "; what was observed excludes zero" if excludes else ""


def summary_text(summary: Summary) -> str:
    """`0.0241`, or `0.00028 to 0.00068` where there are several values."""
    low, high = summary.minimum, summary.maximum
    if low is None or high is None:
        return "not finite" if summary.nonfinite else "none"
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    return f"{value:.3g}"
