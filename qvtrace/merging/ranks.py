"""Whether files are those of all processes of one run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qvtrace.archive import Archive
from qvtrace.errors import UsageError


def in_order(archives: Sequence[Archive]) -> list[Archive]:
    """The archives by rank; raises `UsageError` unless each rank of one run is there once."""
    first = archives[0]
    size = _place(first)[1]
    of_rank: dict[int, Archive] = {}
    for archive in archives:
        rank, its_size = _place(archive)
        if its_size != size:
            raise UsageError(
                f"{archive.file}: is of a run of {its_size} processes, and {first.file} of one of "
                f"{size}; name the files of one run"
            )
        if rank in of_rank:
            raise UsageError(
                f"{archive.file}: has rank {rank}, as {of_rank[rank].file} has; "
                "name the file of each rank once"
            )
        of_rank[rank] = archive
        _require_same_run(first, archive)
    missing = [rank for rank in range(size) if rank not in of_rank]
    if missing:
        ranks = ", ".join(map(str, missing))
        raise UsageError(
            f"{first.file}: rank{'s' * (len(missing) > 1)} {ranks} of {size} "
            f"{'are' if len(missing) > 1 else 'is'} missing; name the files of all ranks"
        )
    return [of_rank[rank] for rank in range(size)]


def _place(archive: Archive) -> tuple[int, int]:
    environment = archive.manifest.environment
    rank, size = environment.get("rank"), environment.get("world_size")
    if not (isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
        raise UsageError(
            f"{archive.file}: was recorded by one process alone; "
            "merge takes the files of all ranks of one run, such as fp.rank0-of-2.st"
        )
    return rank, size


def _require_same_run(first: Archive, other: Archive) -> None:
    facts = dict(_facts(first))
    for name, value in _facts(other):
        if facts[name] != value:
            raise UsageError(
                f"{other.file}: is of another run than {first.file}: {name} {value} against "
                f"{facts[name]}; name the files of one run"
            )


def _facts(archive: Archive) -> Iterator[tuple[str, Any]]:
    """What every process of a run says alike."""
    manifest = archive.manifest
    model, variant = manifest.model, manifest.variant
    yield "model", model.name
    yield "class", model.class_name
    yield "configuration", model.config_digest
    yield "seed", model.seed
    yield "variant", variant.name
    yield "quantizer", variant.quantizer
    yield "root calls", len(manifest.inputs.root_calls)
    yield "weights recorded", manifest.weights is not None
    for name in ("include", "exclude", "inputs", "kwargs", "caches"):
        yield name, manifest.settings.get(name)


def merged_name(first: Path) -> Path | None:
    """`fp.st` for `fp.rank0-of-2.st`; None for a name of another form."""
    stem, dot, place = first.stem.rpartition(".")
    ranks = place.removeprefix("rank").split("-of-")
    is_ranked = place.startswith("rank") and len(ranks) == 2 and all(map(str.isdecimal, ranks))
    return first.with_name(f"{stem}{first.suffix}") if dot and is_ranked else None
