"""`diff` of two archives against the arithmetic of a plain comparison in torch, in one run.

    python tests/benchmarks/diff_speed.py [--pairs 7]

The plain side has every tensor of both traces in memory and computes, for each place, the
absolute difference, its mean, minimum, maximum and standard deviation, and the reference's
interval. `diff` reads two files and computes every metric, each distinct pair of contents once.
Prints the median ratio of their times over interleaved pairs, the memory of `diff` without mapped
pages, and the time of a `diff` of one archive with itself against the time of its imports.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record_speed import build, forward

import qvtrace
from qvtrace.trees import tensor_leaves

MEMORY = """
import sys, threading, time
import qvtrace
def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
peak, done = 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
qvtrace.diff(sys.argv[1], sys.argv[2], path="all")
done = True
thread.join()
print(peak)
"""
IMPORTS = "import qvtrace; qvtrace.diff; import rich.console, rich.table, typer, numpy"


def record_both(folder: Path) -> tuple[Path, Path]:
    model, ids = build()
    files = folder / "reference.st", folder / "candidate.st"
    for file in files:
        with qvtrace.record(model, file):
            forward(model, ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.001 * parameter.std() * torch.randn_like(parameter)
    return files


def places(file: Path) -> list[torch.Tensor]:
    """Every float tensor of a trace, once for each place; equal ones share memory."""
    loaded: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    found = []
    with qvtrace.load(file) as archive:
        for call in archive.manifest.calls:
            for part in ("inputs", "kwargs", "output"):
                for _, leaf in tensor_leaves(call.tree(part), part):
                    key = leaf.digest, leaf.shape
                    if key not in loaded:
                        loaded[key] = torch.from_numpy(archive.array(leaf).copy())
                    found.append(loaded[key])
    return [tensor for tensor in found if tensor.is_floating_point()]


def plain(references: list[torch.Tensor], candidates: list[torch.Tensor]) -> None:
    for reference, candidate in zip(references, candidates, strict=True):
        difference = (reference - candidate).abs().float()
        difference.mean().item()
        difference.min().item()
        difference.max().item()
        difference.std().item()
        (reference.max() - reference.min()).item()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        files = record_both(Path(folder))
        references, candidates = map(places, files)
        plain(references, candidates)
        comparison = qvtrace.diff(*files, path="all")
        size = sum(tensor.nbytes for tensor in references)
        print(f"{len(references)} float places of {size / 1e6:.0f} MB, {len(comparison.rows)} rows")
        times = [
            (
                seconds(lambda: plain(references, candidates)),
                seconds(lambda: qvtrace.diff(*files, path="all")),
            )
            for _ in range(pairs)
        ]
        ratio = statistics.median(theirs / ours for theirs, ours in times)
        print(
            f"plain {statistics.median(t for t, _ in times):.3f} s, "
            f"diff {statistics.median(o for _, o in times):.3f} s: {ratio:.2f} times as fast"
        )
        print(f"memory of diff without mapped pages: {float(run(MEMORY, *files)):.0f} MiB")
        same = "import sys; from qvtrace.cli import main; sys.argv[0] = 'qvtrace'; main()"
        command = [sys.executable, "-c", same, "diff", str(files[0]), str(files[0])]
        identical, imports = [], []
        for _ in range(pairs):
            imports.append(seconds(lambda: run(IMPORTS)))
            identical.append(
                seconds(lambda: subprocess.run(command, check=True, capture_output=True))
            )
        print(
            f"diff of an archive with itself {statistics.median(identical):.2f} s, "
            f"imports alone {statistics.median(imports):.2f} s"
        )


if __name__ == "__main__":
    main()
