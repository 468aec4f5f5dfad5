"""Recorders of the real service, one at a time: core_pattern is the machine's."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.support.core_pattern import core_pattern_kept
from tests.support.recorder import RecorderService


class MakeRecorder(Protocol):
    """Makes a recorder that is removed at the end of the test; start it yourself."""

    def __call__(self, **settings: object) -> RecorderService: ...


@pytest.fixture(scope="module")
def readable_directory() -> Iterator[Path]:
    """A directory that everyone can read, as the unwinder's user has to.

    Those of pytest are closed to others again whenever another pytest starts.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def recorder_with() -> Iterator[MakeRecorder]:
    made = []

    def make(**settings: object) -> RecorderService:
        made.append(RecorderService(**settings))
        return made[-1]

    with core_pattern_kept():
        yield make
        for recorder in made:
            recorder.close()
