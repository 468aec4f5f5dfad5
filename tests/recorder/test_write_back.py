"""The disk begins with a large core while that is being copied, and keeps nobody waiting."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from services.recorder.core import core_pages, write_back
from services.recorder.core.core_head import Load
from services.recorder.core.core_memory import Kept
from services.recorder.handover.hold import Hold
from tests.support.requirements import need_linux
from tests.support.wait import until

MIB = 1024 * 1024
SIZE = 64 * MIB
_CACHESTAT = 451
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "core", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a core count as large that a test can bear."""
    monkeypatch.setattr(write_back, "_pays", lambda size: size >= SIZE)


def copy(core: int) -> int:
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    hold = Hold(ours, 20)
    memory = Kept([(0, memoryview(os.urandom(MIB) * (SIZE // MIB)))])
    try:
        found = memory.pieces(iter([Load(0, 0, SIZE)]))
        return core_pages.copy(hold, memory, found, core, SIZE)
    finally:
        hold.close()
        os.close(theirs)


def waits_for_disk(core: int) -> int:
    """Return how many bytes of a file nobody has begun to write, cachestat(2)."""
    pages, everything = (ctypes.c_uint64 * 5)(), (ctypes.c_uint64 * 2)(0, 0)
    assert _libc.syscall(_CACHESTAT, core, everything, pages, 0) == 0
    return pages[1] * 4096


def left_of(core: int) -> list[str]:
    """Return the threads that write early, and the other descriptors of a core."""
    mine = os.fstat(core).st_ino
    threads = [one.name for one in threading.enumerate() if one.name == write_back.NAME]
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed meanwhile
            if one.stat().st_ino == mine and one.name != str(core):
                threads.append(one.name)
    return threads


async def test_large_core_is_on_its_way_to_the_disk_as_soon_as_it_is_copied(
    core: int, large: None
) -> None:
    need_linux((6, 5), "cachestat")

    assert copy(core) == SIZE

    # By itself the kernel begins after 30 s: vm.dirty_expire_centisecs.
    await until(lambda: waits_for_disk(core) < SIZE // 2, 10)


def test_copy_does_not_wait_for_a_disk_that_is_dead(
    core: int, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, answer = threading.Event(), threading.Event()

    def dead(*_: object) -> None:
        stuck.set()
        answer.wait(60)

    monkeypatch.setattr(write_back, "_write", dead)
    try:
        assert copy(core) == SIZE
        assert stuck.wait(20)
    finally:
        answer.set()


async def test_nothing_is_left_behind(core: int, large: None) -> None:
    copy(core)

    await until(lambda: not left_of(core), 20)


def test_only_a_core_that_the_kernel_would_throttle_is_written_early() -> None:
    assert not write_back._pays(0)
    assert write_back._pays(1 << 50)
