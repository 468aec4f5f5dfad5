"""A small process is read whole, and gone before anything of it is written."""

import multiprocessing
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from crashbus import layout
from services.common.unrecorded import Unrecorded, is_unrecorded
from services.recorder import core_copy, facts, touched
from services.recorder.core_pages import Pages
from services.recorder.hold import Hold
from services.recorder.taking import Taken, Taker
from tests.recorder.test_core_pages import SMALL_PYTHON, Crash, coredump_socket, same
from tests.support.crashers import FATAL, crasher

__all__ = ("coredump_socket",)


class KeptHeld(Hold):
    """A hold that lets go only when it is closed, so that the kernel's own core comes too."""

    def let_go(self, because: str | None = None) -> None:
        if because is not None:
            super().let_go(because)

    def close(self) -> None:
        self.let_go("the test is over")
        super().close()


class Unread(Crash):
    """A process that is held, and nothing of its core is read."""

    make_hold = KeptHeld


@pytest.fixture
def taker(tmp_path: Path) -> Taker:
    return Taker(Unrecorded(tmp_path / "spool"), 0, labels_needed=False)


def take(taker: Taker, crash: Crash) -> Taken:
    taken = taker.look(crash.pid)
    taker.take(crash.pid, crash.hold, 64, taken)
    return taken


def written(taken: Taken, crash: Crash, path: Path) -> core_copy.Copied:
    """Write the core of what was taken."""
    assert taken.head is not None
    pages = Pages(crash.pid, taken.head, facts.read_maps(crash.pid, taken.proc), taken.memory)
    with path.open("wb") as file:
        return core_copy.copy(crash.hold, taken.head.raw, taken.head.size, file.fileno(), 0, pages)


@pytest.mark.parametrize("command", [(name,) for name in FATAL] + [SMALL_PYTHON])
def test_core_of_what_was_taken_is_the_kernels(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker, command: tuple[str, ...]
) -> None:
    program = crasher(command[0]) if len(command) == 1 else command[0]
    crash = Unread(coredump_socket, program, *command[1:], reads_head=False)
    try:
        taken = take(taker, crash)
        assert taken.memory is not None and taken.head is not None
        assert written(taken, crash, tmp_path / "ours").fault is None
        crash.head = taken.head
        crash.from_stream(tmp_path / "kernels")
    finally:
        crash.end()
        taken.close()

    assert same(tmp_path / "ours", tmp_path / "kernels")


def test_process_that_touched_more_pieces_than_are_kept_in_mind_is_taken_whole(
    coredump_socket: socket.socket,
    tmp_path: Path,
    taker: Taker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(touched, "_MOST_RUNS", 1)
    crash = Unread(coredump_socket, crasher("threads"), reads_head=False)
    try:
        taken = take(taker, crash)
        assert taken.memory is not None and taken.head is not None
        assert written(taken, crash, tmp_path / "ours").fault is None
        crash.head = taken.head
        crash.from_stream(tmp_path / "kernels")
    finally:
        crash.end()
        taken.close()

    assert same(tmp_path / "ours", tmp_path / "kernels")


def test_process_whose_pid_may_be_anothers_is_not_taken(
    coredump_socket: socket.socket, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    monkeypatch.setattr(Hold, "pid_is_free", True)
    taken = take(taker, crash)
    try:
        assert taken.memory is None
    finally:
        crash.end()
        taken.close()


def test_pid_is_free_when_its_process_was_waited_for() -> None:
    read, write = os.pipe()
    process = subprocess.Popen(["cat"], stdin=read)
    hold = Hold(read, 1)
    hold.belongs_to(os.pidfd_open(process.pid))
    try:
        assert not hold.pid_is_free
        os.close(write)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not hold.pid_is_free  # nobody has waited for it yet
        process.wait()
        assert hold.pid_is_free
    finally:
        hold.close()


def test_facts_of_a_process_that_was_taken_are_those_of_the_living(
    coredump_socket: socket.socket, taker: Taker
) -> None:
    crash = Unread(coredump_socket, crasher("threads"), reads_head=False)
    try:
        identity = facts.read_identity(crash.pid, "boot")
        rest = facts.read_rest(identity)
        taken = take(taker, crash)
    finally:
        crash.end()

    assert facts.read_identity(crash.pid, "boot", taken.proc) == identity
    late = facts.read_rest(identity, taken.proc, taken.resources)
    assert (late.maps, late.threads, late.cwd, late.limits) == (
        rest.maps, rest.threads, rest.cwd, rest.limits,
    )  # fmt: skip
    assert late.raw_environment == rest.raw_environment != b""
    assert late.resources.open_files == rest.resources.open_files != {}
    known = facts.with_modules(late, 64, taken.take_files())
    try:
        assert all(module.file >= 0 for module in known.modules if module.path[0] == "/")
    finally:
        known.close()
        taken.close()


def test_process_is_gone_before_its_core_is_written(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    taken = take(taker, crash)
    try:
        assert crash.process.wait(60) == -signal.SIGSEGV
        assert is_unrecorded(tmp_path / "spool", crash.pid)

        assert written(taken, crash, tmp_path / "core") == core_copy.Copied(
            taken.head.size or 0, in_order=True
        )
    finally:
        crash.hold.close()
        taken.close()
    assert not is_unrecorded(tmp_path / "spool", crash.pid)


def test_second_thread_that_is_busy_is_not_waited_for(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    may_end = threading.Event()
    busy = taker._second.submit(may_end.wait, 60)
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    taken = take(taker, crash)
    try:
        assert busy.running()
        assert taker._second._work_queue.qsize() <= 1  # what queues up there is bounded
        assert written(taken, crash, tmp_path / "core").fault is None
        assert taken.memory is not None
    finally:
        may_end.set()
        crash.hold.close()
        taken.close()


def test_large_process_stays_held_and_its_core_is_whole(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"), "40", reads_head=False)
    try:
        taken = take(taker, crash)
        assert taken.memory is None and crash.hold.is_held
        crash.head = taken.head or crash.read_head()
        with (tmp_path / "core").open("wb") as file:
            assert crash.from_memory(file.fileno()) == crash.head.size
    finally:
        crash.end()
        taken.close()


def test_process_that_is_killed_meanwhile_is_not_taken(
    coredump_socket: socket.socket, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    crash.process.kill()
    crash.process.wait(60)
    try:
        assert take(taker, crash).memory is None
    finally:
        crash.end()


def _hold_and_wait(spool: Path, pid: int, ready: "multiprocessing.Queue[bool]") -> None:
    ready.put(Unrecorded(spool).begin(pid, {}))
    signal.pause()


def test_what_a_killed_recorder_had_read_is_waited_for_no_more(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[bool] = context.Queue()
    recorder = context.Process(target=_hold_and_wait, args=(tmp_path, 77, ready))
    recorder.start()
    assert ready.get(timeout=60)
    assert is_unrecorded(tmp_path, 77)
    assert not is_unrecorded(tmp_path, 78)

    recorder.kill()
    recorder.join(60)

    assert not is_unrecorded(tmp_path, 77)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "anybody's", "two names"])
def test_what_another_put_in_the_place_of_the_lock_is_put_aside(tmp_path: Path, kind: str) -> None:
    place = tmp_path / layout.UNRECORDED
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    match kind:
        case "link":
            place.symlink_to(elsewhere)
        case "fifo":
            os.mkfifo(place)
        case "directory":
            place.mkdir()
        case "anybody's":
            place.touch(0o666)
            os.chown(place, 65534, 65534)
        case "two names":
            elsewhere.chmod(0o600)
            place.hardlink_to(elsewhere)
    unrecorded = Unrecorded(tmp_path)

    assert not is_unrecorded(tmp_path, 77)
    assert unrecorded.begin(77, {})
    assert is_unrecorded(tmp_path, 77)
    unrecorded.end(77)
    assert not is_unrecorded(tmp_path, 77)
    assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (0, 0o600)
    assert elsewhere.read_text() == "mine"
