"""Fixtures of the detector's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.detector.watching import Watch
from tests.support.requirements import need_btf, need_root


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A detector with default settings that runs all through the tests."""
    need_root()
    need_btf()
    watching = Watch(tmp_path_factory.mktemp("watch"))
    yield watching
    watching.close()


@pytest.fixture
def quick_watch(tmp_path: Path) -> Iterator[Watch]:
    """A detector that watches SIGINT too, and takes 0.2 s without a signal for quiet."""
    need_root()
    need_btf()
    watching = Watch(tmp_path / "quick", signals="SIGINT,SEGV", handled_quiet=0.2)
    yield watching
    watching.close()
