"""What is told of a core that is still being copied: never more than is final."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import unfinished
from services.recorder.core import core_pages
from services.recorder.core.core_memory import LiveMemory, Piece
from services.recorder.handover.hold import Hold

MIB = 1024 * 1024
SIZE = 48 * MIB


@pytest.fixture
def hold() -> Iterator[Hold]:
    ours, theirs = socket.socketpair()
    made = Hold(ours.detach(), 20)
    yield made
    made.close()
    theirs.close()


class Copying:
    """A copy of a file that stands for a process's memory, watched at each piece."""

    def __init__(self, place: Path, there: int = SIZE) -> None:
        self.content = b"".join(os.urandom(16) * (MIB // 16) for _ in range(SIZE // MIB))
        (place / "memory").write_bytes(self.content[:there])
        self._memory = os.open(place / "memory", os.O_RDONLY)
        self.memory = LiveMemory(self._memory)
        self.core = os.open(place / "core", os.O_RDWR | os.O_CREAT, 0o600)
        self._reader = os.open(place / "core", os.O_RDONLY)
        self.told: list[int] = []

    def pieces(self) -> Iterator[Piece]:
        for offset in range(0, SIZE, MIB):
            self.look()
            yield Piece(offset, offset, MIB, True)

    def look(self) -> None:
        final = unfinished.final_bytes(self._reader)
        assert final is not None
        assert os.pread(self._reader, final, 0) == self.content[:final]
        self.told.append(final)

    def close(self) -> None:
        for descriptor in (self._memory, self.core, self._reader):
            os.close(descriptor)


def test_more_and_more_of_a_core_is_final_until_all_is(hold: Hold, tmp_path: Path) -> None:
    copying = Copying(tmp_path)

    end = core_pages.copy(hold, copying.memory, copying.pieces(), copying.core, SIZE)
    copying.look()

    assert end == SIZE
    assert copying.told == sorted(copying.told)
    assert copying.told[0] == 0
    assert copying.told[-1] == SIZE
    assert any(0 < told < SIZE for told in copying.told)
    copying.close()


def test_nothing_behind_the_end_of_a_cut_core_was_ever_final(hold: Hold, tmp_path: Path) -> None:
    copying = Copying(tmp_path, there=SIZE // 2)  # killed meanwhile: there is no more memory

    end = core_pages.copy(hold, copying.memory, copying.pieces(), copying.core, SIZE)
    copying.look()

    assert end == SIZE // 2
    assert copying.told[-1] == end
    copying.close()


def test_lock_goes_with_its_writer_and_no_second_descriptor_drops_it(tmp_path: Path) -> None:
    core = os.open(tmp_path / "core", os.O_RDWR | os.O_CREAT, 0o600)
    reader = os.open(tmp_path / "core", os.O_RDONLY)
    assert unfinished.final_bytes(reader) is None

    unfinished.begin(core)
    assert unfinished.final_bytes(reader) == 0
    unfinished.finished(core, 5 * MIB)
    os.close(os.open(tmp_path / "core", os.O_RDONLY))
    assert unfinished.final_bytes(reader) == 5 * MIB

    os.close(core)
    assert unfinished.final_bytes(reader) is None
    os.close(reader)
