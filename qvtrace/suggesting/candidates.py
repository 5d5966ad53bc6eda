"""Which modules may be kept float, in the order of their local error."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from qvtrace.archive import Archive
from qvtrace.comparison.alignment import unwrapped
from qvtrace.comparison.diffing import diff
from qvtrace.comparison.noise import noise
from qvtrace.comparison.replayed_rows import judged_alike, telling
from qvtrace.comparison.rows import Row
from qvtrace.models.chatter import quiet
from qvtrace.models.request import PreparedModel
from qvtrace.patterns import above, require_matches, select
from qvtrace.replayer import Replay, ReplayOptions
from qvtrace.reports.formatting import counted
from qvtrace.suggesting.suggestion import Candidate

SCALED = "what they take is scaled or turned in the quantized model"
NOT_IN_ARCHIVE = "no call of it is in the reference"


def quantized_modules(
    prepared: PreparedModel, include: Sequence[str], exclude: Sequence[str]
) -> tuple[Candidate, ...]:
    """The modules that the quantizer changed, by the names of the float model.

    Raises `UsageError` for a pattern that fits none of them.
    """
    changed = dict.fromkeys(unwrapped(name) for name in prepared.variant.quantized)
    names = [name for name in changed if name]
    require_matches(names, include, "--include")
    require_matches(names, exclude, "--exclude")
    chosen = select(names, include=include, exclude=exclude)
    holding = {holder for name in names for holder in above(name)}
    return tuple(Candidate(name, holds=name in holding) for name in names if name in chosen)


def with_local_error(
    candidates: Sequence[Candidate],
    prepared: PreparedModel,
    archive: Archive,
    run: Path,
    file: Path,
) -> tuple[Candidate, ...]:
    """Each with the error that it makes by itself on the inputs of the reference.

    `run`: a recording of the quantized model, with inputs; what is a factor off there as it is
    alone, and is made up for, is no error. `file`: where the replay may be written.
    """
    called = {call.module for call in archive.manifest.calls}
    replayed = [one.name for one in candidates if one.name in called]
    if not replayed:
        return tuple(replace(one, reason=NOT_IN_ARCHIVE) for one in candidates)
    options = ReplayOptions(
        include=tuple(replayed),
        overwrite=True,
        model=prepared.info,
        variant=prepared.variant,
        environment=prepared.environment,
    )
    with quiet():
        report = Replay(prepared.model, archive, file, options).run()
    reasons = {name: reason for reason, names in report.skipped.items() for name in names}
    rows: dict[str, list[Row]] = defaultdict(list)
    replayed_rows = diff(archive, file).rows
    own = diff(archive, run, path="all").rows
    for row in telling(own, judged_alike(own, replayed_rows)):
        rows[row.module].append(row)
    for name in {row.module for row in replayed_rows} - rows.keys():
        reasons.setdefault(name, SCALED)
    return tuple(
        _measured(one, rows.get(one.name, ()), reasons.get(one.name, NOT_IN_ARCHIVE))
        for one in candidates
    )


def _measured(candidate: Candidate, rows: Sequence[Row], otherwise: str) -> Candidate:
    if not rows:
        return replace(candidate, reason=otherwise)
    if any(row.status == "nonfinite" for row in rows):
        return replace(candidate, noise=math.inf, reason="not finite")
    noises = [value for row in rows if (value := noise(row)) is not None]
    peirs = [row.metrics.peir for row in rows if row.metrics.peir is not None]
    if not noises:
        return replace(candidate, reason="its outputs cannot be compared")
    return replace(candidate, noise=max(noises), peir=max(peirs, default=None))


def without_local_error(candidates: Sequence[Candidate]) -> Iterator[str]:
    """What is to be said of those that have no number to be ordered by, a line for each reason."""
    counts = Counter(one.reason for one in candidates if one.noise is None)
    for reason, count in counts.items():
        yield (
            f"no local error of {count} of {counted(len(candidates), 'module')}, {reason}: "
            "they come last, in order of execution"
        )


def by_local_error(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Largest first, those without a number last; those that hold others after all of these,
    since what they err is for the most part what is within them."""
    return sorted(candidates, key=lambda one: (one.holds, *_rank(one, _noise(one))))


def by_error_per_byte(
    candidates: Sequence[Candidate], sizes: Callable[[Iterable[str]], int]
) -> list[Candidate]:
    """Those first that cost least for the error that they make."""

    def worth(one: Candidate) -> float:
        return _noise(one) / max(sizes((one.name,)), 1)

    return sorted(candidates, key=lambda one: (one.holds, *_rank(one, worth(one))))


def _rank(one: Candidate, value: float) -> tuple[bool, float, float]:
    return one.noise is None, -value, -(one.peir or 0.0)


def _noise(one: Candidate) -> float:
    return 0.0 if one.noise is None else one.noise
