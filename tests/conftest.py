"""What several tests share."""

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where an archive is to be written; there is nothing yet."""
    return tmp_path / "fp.st"
