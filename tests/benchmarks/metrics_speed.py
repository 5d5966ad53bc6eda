"""How fast two arrays are compared, against the arithmetic of TICO in torch on the same pairs.

TICO computes five numbers of each pair; ours are all metrics. Its side counts every place of a
trace of a 12-layer Llama, ours each distinct pair of contents once. Both have two threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qvtrace.metrics.comparing import compare, compare_all

LAYERS = 12
HIDDEN, INTERMEDIATE, VOCABULARY = (1, 512, 768), (1, 512, 2048), (1, 512, 32000)
KEYS, HEADS = (1, 512, 256), (1, 12, 512, 64)
# shape -> (distinct contents, places), as recorded with sdpa attention and without a cache
TRACE = {
    HIDDEN: (8 * LAYERS + 2, 19 * LAYERS + 6),
    INTERMEDIATE: (4 * LAYERS, 5 * LAYERS),
    VOCABULARY: (1, 2),
    KEYS: (2 * LAYERS, 2 * LAYERS),
}


@dataclass(frozen=True)
class Pair:
    """One pair of tensors, in memory, seen by torch and by numpy."""

    reference: torch.Tensor
    candidate: torch.Tensor
    arrays: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, shape: tuple[int, ...], generator: torch.Generator) -> "Pair":
        """Normal values and normal noise of one percent."""
        reference = torch.randn(shape, generator=generator)
        candidate = reference + 0.01 * torch.randn(shape, generator=generator)
        return cls(reference, candidate, (reference.numpy(), candidate.numpy()))

    @property
    def nbytes(self) -> int:
        """Of both sides."""
        return 2 * self.reference.nbytes


def tico_arithmetic(pair: Pair) -> tuple[float, ...]:
    """The five numbers of TICO's comparison."""
    error = (pair.reference - pair.candidate).abs().float()
    numbers = error.mean(), error.min(), error.max(), error.std()
    interval = pair.reference.max() - pair.reference.min()
    return (*(number.item() for number in numbers), interval.item())


def seconds(work: Callable[[], object]) -> float:
    """How long one run takes."""
    time.sleep(0.02)  # torch's threads spin for a while after their work
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved_medians(
    first: Callable[[], object], second: Callable[[], object], repetitions: int
) -> tuple[float, float]:
    """The median seconds of both, run in turn."""
    times = [(seconds(first), seconds(second)) for _ in range(repetitions)]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def report_shapes(repetitions: int) -> None:
    """One line for each shape: the ratio for equal bytes."""
    generator = torch.Generator().manual_seed(0)
    for shape in (HIDDEN, INTERMEDIATE, VOCABULARY, HEADS):
        pair = Pair.of(shape, generator)
        theirs, ours = interleaved_medians(
            lambda pair=pair: tico_arithmetic(pair),
            lambda pair=pair: compare(*pair.arrays),
            repetitions,
        )
        rates = f"{pair.nbytes / theirs / 1e9:5.2f} GB/s, ours {pair.nbytes / ours / 1e9:5.2f} GB/s"
        print(f"{shape!s:18} TICO's arithmetic {rates}: {theirs / ours:.2f} times as fast")


def report_trace(repetitions: int) -> None:
    """The whole trace: every place against each distinct pair once."""
    generator = torch.Generator().manual_seed(0)
    places: list[Pair] = []
    distinct: list[Pair] = []
    for shape, (contents, uses) in TRACE.items():
        pairs = [Pair.of(shape, generator) for _ in range(contents)]
        distinct += pairs
        places += [pairs[use % contents] for use in range(uses)]
    theirs, ours = interleaved_medians(
        lambda: [tico_arithmetic(pair) for pair in places],
        lambda: compare_all(pair.arrays for pair in distinct),
        repetitions,
    )
    sizes = [sum(pair.nbytes for pair in pairs) / 2e6 for pairs in (places, distinct)]
    print(f"trace: {sizes[0]:.0f} MB of places a side, {sizes[1]:.0f} MB distinct")
    print(f"TICO's arithmetic {theirs:.3f} s, ours {ours:.3f} s: {theirs / ours:.2f} times as fast")


def main() -> None:
    """Print both reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(2)
    report_shapes(4 * repetitions)
    report_trace(repetitions)


if __name__ == "__main__":
    main()
