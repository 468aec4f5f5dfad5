"""What the tests of commands share."""

from pathlib import Path

import pytest


@pytest.fixture
def delivered(tmp_path: Path) -> Path:
    directory = tmp_path / "delivered"
    directory.mkdir()
    return directory
