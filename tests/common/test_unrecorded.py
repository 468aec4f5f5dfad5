"""What is said of crashes without a record is kept apart, whoever says it at the same time."""

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crashbus import layout
from services.common.unrecorded import Unrecorded, is_noted, is_unrecorded
from tests.support.notes import packed

_NOTE = {"crash": b"77 77 11 1795396543\n"}
_THREADS = 4
_CRASHES = 6000  # of each


def test_pid_that_came_again_is_not_taken_until_the_first_has_its_record(tmp_path: Path) -> None:
    ours = Unrecorded(tmp_path)
    assert ours.begin(77, packed(_NOTE))

    assert not ours.begin(77, packed({}))

    assert is_unrecorded(tmp_path, 77) and is_noted(tmp_path, 77, 1795396543, 1)
    ours.end(77)
    assert not is_unrecorded(tmp_path, 77)
    assert ours.begin(77, packed({}))


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns at almost every step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_file_that_is_removed_meanwhile_leaves_nothing_where_it_does_not_belong(
    tmp_path: Path, eager_threads: None
) -> None:
    """Its number must not be used when it has become another file's."""
    ours, place = Unrecorded(tmp_path), tmp_path / layout.UNRECORDED
    others = tmp_path / "others"
    others.touch()
    done = threading.Event()

    def crash(thread: int) -> bool:
        pids = range(thread * _CRASHES, (thread + 1) * _CRASHES)
        return all(_begin_and_end(ours, pid) for pid in pids)

    def remove() -> None:
        while not done.is_set():
            with ours._lock:  # not while it is made
                place.unlink(missing_ok=True)
            os.close(os.open(others, os.O_RDWR))

    with ThreadPoolExecutor() as pool:
        removing = pool.submit(remove)
        crashing = [pool.submit(crash, thread) for thread in range(_THREADS)]
        are_taken = [one.result() for one in crashing]
        done.set()
        removing.result()

    assert all(are_taken)
    assert not others.read_bytes()
    assert not place.exists() or not any(place.read_bytes())
    assert not any(is_unrecorded(tmp_path, pid) for pid in range(_THREADS * _CRASHES))


def _begin_and_end(ours: Unrecorded, pid: int) -> bool:
    began = ours.begin(pid, packed({"cmdline": b"x" * 60_000}))
    ours.end(pid)
    return began
