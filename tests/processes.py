"""Runs a function in a process of its own, for tests in which that process dies."""

import multiprocessing
from collections.abc import Callable

_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(["torch", "qvtrace.recording.recorder"])  # once for all tests


def run_apart(function: Callable[..., object], *arguments: object, seconds: float = 60) -> int:
    """The exit code of a process that calls a function of a test module; negative: a signal."""
    process = _FORK_SERVER.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__name__} has not ended within {seconds} seconds")
    return process.exitcode
