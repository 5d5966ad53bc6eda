"""What several tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from model_fixtures import Saved

# Tiny models gain nothing by threads, and those of several test processes wait for each other.
# Before torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where an archive is to be written; there is nothing yet."""
    return tmp_path / "fp.st"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> "Saved":
    """The directory of a tiny model; written once, not to be changed."""
    from model_fixtures import save  # imports transformers, which most tests do without

    root = tmp_path_factory.mktemp("models")

    def directory(name: str) -> Path:
        return root / name if (root / name).exists() else save(name, root / name)

    return directory


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Also where the tests run in the background: a shell then has them ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
