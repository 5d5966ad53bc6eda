"""Models that `torch.compile` has compiled, or compiles while they are recorded."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

_COMPILER = "torch._dynamo"


@contextmanager
def eager_stance() -> Iterator[None]:
    """What `torch.compile` has compiled runs eagerly, or its modules would never be called.

    Nothing is compiled in a process that has not loaded the compiler, and loading it takes seconds:
    where it is not there yet, it is told as soon as somebody else loads it.
    """
    with ExitStack() as stack:
        if _COMPILER in sys.modules:
            stack.enter_context(_forced())
        else:
            loading = _Loading(lambda: stack.enter_context(_forced()))
            sys.meta_path.insert(0, loading)
            stack.callback(loading.close)
        yield


def _forced() -> AbstractContextManager[object]:
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


class _Loading(MetaPathFinder):
    """Finds the compiler as Python does, and tells when it has been loaded."""

    def __init__(self, loaded: Callable[[], object]) -> None:
        self._loaded = loaded
        self._is_open = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The compiler's own, but for what is told at its end; of anything else, nothing."""
        if fullname != _COMPILER:
            return None
        self._look_no_more()
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                if self._is_open:
                    self._loaded()

            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec

    def close(self) -> None:
        """From now on nothing is told; another thread may be loading it still."""
        self._is_open = False
        self._look_no_more()

    def _look_no_more(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
