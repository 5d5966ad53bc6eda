"""Arrays cut into blocks, and the threads that work on them."""

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import numpy as np

# Elements. In smaller blocks, threads wait for the interpreter's lock more than they work.
BLOCK = 512 * 1024
_SMALL = 64 * 1024  # a smaller block is not worth a second thread
_MOST_THREADS = 4  # memory is the limit long before
_HUGE_PAGE = 2 * 1024 * 1024  # bytes; numpy asks for such pages, and aligned arrays gain a tenth


@dataclass(frozen=True, slots=True)
class Block:
    """A range of flat indices: `rows` whole rows, or a piece of one."""

    start: int
    stop: int
    rows: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start


def cut(rows: int, length: int) -> list[Block]:
    """The blocks of `rows` times `length` elements, in order; every row gives equally many pieces.

    Where the borders lie depends on nothing but the two numbers, so that sums over blocks are the
    same on every machine.
    """
    size = rows * length
    if size <= BLOCK:
        return [Block(0, size, rows)] if size else []
    if length > BLOCK:
        step = -(-length // -(-length // BLOCK))
        step += step % 2  # both parts of a complex number in one block
        return [
            Block(row * length + start, row * length + min(start + step, length), 1)
            for row in range(rows)
            for start in range(0, length, step)
        ]
    step = min(-(-rows // -(-size // BLOCK)), BLOCK // length)
    return [
        Block(start * length, min(start + step, rows) * length, min(step, rows - start))
        for start in range(0, rows, step)
    ]


Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Job(Protocol[Result_co]):
    """Something to compute from blocks, in any order and on several threads."""

    @property
    def blocks(self) -> list[Block]:
        """The blocks; none when there is nothing to read."""

    def part(self, block: Block) -> Any:
        """What one block says."""

    def result(self, parts: Sequence[Any]) -> Result_co:
        """What all of them say, given in the order of the blocks."""


def run(jobs: Sequence[Job[Result]]) -> list[Result]:
    """The result of each job. It does not depend on the number of threads or on their timing."""
    return _Run(jobs).results()


class _Run:
    """Jobs under way: large blocks are shared among threads, small ones are done by the first."""

    def __init__(self, jobs: Sequence[Job[Any]]) -> None:
        self._jobs = jobs
        self._parts: list[list[Any]] = [[None] * len(job.blocks) for job in jobs]
        self._missing = [len(job.blocks) for job in jobs]
        self._results: list[Any] = [None] * len(jobs)
        self._lock = threading.Lock()
        self._large: deque[tuple[int, int]] = deque()
        self._small: deque[tuple[int, int]] = deque()
        for index, job in enumerate(jobs):
            for number, block in enumerate(job.blocks):
                (self._large if block.size > _SMALL else self._small).append((index, number))

    def results(self) -> list[Any]:
        """Do everything."""
        helpers = min(_thread_count(), len(self._large)) - 1
        futures = [_pool().submit(self._drain, self._large) for _ in range(helpers)]
        try:
            self._drain(self._large)
            self._drain(self._small)
        finally:
            self._large.clear()
            wait(futures)
        for future in futures:
            future.result()
        for index, job in enumerate(self._jobs):
            if not job.blocks:
                self._results[index] = job.result(())
        return self._results

    def _drain(self, tasks: deque[tuple[int, int]]) -> None:
        while tasks:
            try:
                index, number = tasks.popleft()
            except IndexError:  # another thread took the last one
                return
            job, parts = self._jobs[index], self._parts[index]
            parts[number] = job.part(job.blocks[number])
            with self._lock:
                self._missing[index] -= 1
                is_last = not self._missing[index]
            if is_last:
                self._results[index] = job.result(parts)
                parts.clear()


@cache
def _thread_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    return min(os.cpu_count() or 1, _MOST_THREADS)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_thread_count() - 1, thread_name_prefix="qvtrace-blocks")


class _Scratch(threading.local):
    """Arrays of this thread for one block, made once; what they hold is left from before.

    Either `wide` and `error64` are in use, or `narrow`, `error32` and `error64`: memory is shared.
    """

    def __init__(self) -> None:
        elements = _HUGE_PAGE // 8
        memory = np.empty(3 * BLOCK + elements)
        start = -memory.ctypes.data // 8 % elements
        first, second, third = memory[start : start + 3 * BLOCK].reshape(3, BLOCK)
        self.wide = first, second
        singles = first.view(np.float32)
        self.narrow = singles[:BLOCK], singles[BLOCK:]
        self.error32 = second.view(np.float32)[:BLOCK]
        self.error64 = third


scratch = _Scratch()
