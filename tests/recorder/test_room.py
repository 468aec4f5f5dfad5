"""Room for cores, on a real disk."""

import os
from pathlib import Path

import pytest

from services.recorder.core import room
from tests.support.disk import small_disk

MIB = 1024 * 1024


def test_want_of_room_is_told_until_there_is_room_for_such_a_core(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        lack = room.Lack(disk.place, 5)
        disk.fill(8 * MIB)
        assert lack.fault() is None  # no core wanted more yet

        lack.note(20 * MIB)
        assert "no room" in (lack.fault() or "")
        disk.empty()
        assert lack.fault() is None


def test_a_core_that_found_room_ends_the_want_of_it(tmp_path: Path) -> None:
    lack = room.Lack(tmp_path, 5)
    lack.note(1 << 60)
    assert lack.fault()
    lack.note(0)
    assert lack.fault() is None


def test_no_room_for_a_core_where_no_file_can_be_made(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        directory = os.open(disk.place, os.O_RDONLY)
        try:
            assert room.for_new_core(directory, 5) > 32 * MIB
            disk.take_inodes(leaving=0)
            assert room.for_new_core(directory, 5) == 1
        finally:
            os.close(directory)


def test_half_of_the_reserve_stays_free_whoever_writes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk, (disk.place / "core").open("wb") as core:
        reserve = room.Reserve(core.fileno(), 50)
        disk.fill(leaving=25 * MIB)
        for size in range(0, 48 * MIB, MIB):
            reserve.check(size)
        disk.fill(leaving=4 * MIB)
        with pytest.raises(OSError, match="No space left"):
            for size in range(48 * MIB, 64 * MIB, MIB):
                reserve.check(size)


def test_the_reserve_stays_free(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        assert room.for_core(disk.place, 50) < 32 * MIB
        assert room.for_core(disk.place, 99) == 1
