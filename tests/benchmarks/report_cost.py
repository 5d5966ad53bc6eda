"""`diff` with an HTML report against `diff` alone: 1000 modules, all contents different, 2 GB.

    python tests/benchmarks/report_cost.py [--pairs 5] [--modules 1000] [--side 512]

Prints the median time of both as commands, interleaved, their ratio and the size of the page.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import qvtrace


class Noise(nn.Module):
    """Returns seeded noise of the shape of its input, whatever that holds."""

    def __init__(self, seed: int, error: float) -> None:
        super().__init__()
        self.seed, self.error = seed, error

    def forward(self, hidden: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(hidden.shape, generator=generator)
        return noise + self.error * torch.randn(hidden.shape, generator=generator)


def record(file: Path, modules: int, side: int, error: float) -> Path:
    model = nn.Sequential(*(Noise(seed, error) for seed in range(modules)))
    with qvtrace.record(model, file), torch.no_grad():
        model(torch.zeros(1, side, side))
    return file


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "qvtrace", "diff", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--modules", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [
            str(record(folder / f"{error}.st", given.modules, given.side, error))
            for error in (0.0, 0.01)
        ]
        page = folder / "report.html"
        html = ("--format", "html", "-o", str(page))
        seconds(*files)
        times = [(seconds(*files), seconds(*files, *html)) for _ in range(given.pairs)]
        plain, with_page = (statistics.median(side) for side in zip(*times, strict=True))
        print(f"diff {plain:.2f} s, with html {with_page:.2f} s: {with_page / plain:.2f} times")
        print(f"page {page.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
