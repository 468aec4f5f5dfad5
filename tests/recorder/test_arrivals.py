"""Who has nothing to do accepts the next crash; while all are busy, somebody else does."""

import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from services.recorder.handover import listener
from services.recorder.handover.arrivals import Arrivals
from services.recorder.handover.hold import Hold
from services.recorder.handover.listener import Listener
from services.recorder.taker.taking import Taker
from tests.recorder.test_taking import taker
from tests.support.wait import until

__all__ = ("taker",)

REQUEST = struct.pack("=IIQ", 16, 16, 0xF)
ANSWER = struct.pack("=IIQ", 16, 0, 0b1001)
WITHIN = 20  # seconds


class Capturing:
    """Threads that take crashes, each of which they keep until they are told."""

    def __init__(self, place: Path, taker: Taker, threads: int) -> None:
        self.arrivals = Arrivals(8)
        self.listener = Listener(place / "run" / "s", self.arrivals, WITHIN)
        self.listener.accept_with(taker.accept)
        self.taken: list[Hold] = []
        self.goes_on = threading.Semaphore(0)
        self.ended = False
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()
        self.listener.start()

    def _run(self) -> None:
        while not self.ended:
            hold = self.arrivals.get()
            self.taken.append(hold)
            self.goes_on.acquire()
            hold.close()
            self.arrivals.task_done()

    @property
    def idle(self) -> int:
        with self.arrivals.mutex:
            return self.arrivals._idle

    def end(self) -> None:
        self.ended = True
        self.goes_on.release(100)
        self.listener.stop(WITHIN)
        for _ in self.threads:  # who waits at the queue
            self.arrivals.put(Hold(os.open("/dev/null", os.O_RDONLY), WITHIN))
        for thread in self.threads:
            thread.join(WITHIN)
        while self.arrivals.qsize():
            self.arrivals.get().close()


@pytest.fixture
def capturing(tmp_path: Path, taker: Taker) -> Iterator[Callable[[int], Capturing]]:
    made: list[Capturing] = []

    def make(threads: int) -> Capturing:
        made.append(Capturing(tmp_path, taker, threads))
        return made[-1]

    yield make
    for one in made:
        one.end()


def _has_taken(at: Capturing, count: int) -> bool:
    return len(at.taken) == count


def crash(at: Capturing) -> socket.socket:
    """Connect and ask, as the kernel does."""
    kernels = socket.socket(socket.AF_UNIX)
    kernels.settimeout(WITHIN)
    kernels.connect(str(at.listener.path))
    with suppress(BrokenPipeError):  # it was let go already
        kernels.sendall(REQUEST)
    return kernels


def test_listener_that_was_not_started_can_be_stopped(tmp_path: Path) -> None:
    """What the start of a recorder fails of is not to be hidden by how it ends."""
    Listener(tmp_path / "run" / "s", Arrivals(1), WITHIN).stop(WITHIN)


async def test_who_is_idle_accepts_and_acknowledges_at_once(
    capturing: Callable[[int], Capturing],
) -> None:
    at = capturing(2)

    def is_acknowledged() -> bool:
        """Crash; we do not ask as fast as the kernel, and may have to be answered later."""
        with crash(at) as kernels:
            kernels.settimeout(0.05)
            with suppress(TimeoutError):
                return kernels.recv(64) == ANSWER
            at.goes_on.release()
            return False

    await until(is_acknowledged)

    await until(lambda: at.taken and at.taken[-1].acknowledged)
    hold = at.taken[-1]
    assert hold.acknowledged == os.getpid() and hold.has_its_pid
    assert at.arrivals.unfinished_tasks == 1 and at.idle == 1


async def test_crash_that_comes_while_all_are_busy_is_accepted_and_captured_later(
    capturing: Callable[[int], Capturing],
) -> None:
    at = capturing(1)
    with crash(at), crash(at), crash(at):
        await until(lambda: at.arrivals.qsize() == 2 and len(at.taken) == 1)

        at.goes_on.release(2)

        await until(lambda: len(at.taken) == 3)
        assert [hold.acknowledged for hold in at.taken[1:]] == [0, 0]
        at.goes_on.release()
        await until(lambda: at.idle == 1)
    with crash(at):
        await until(lambda: len(at.taken) == 4)
    assert not at.arrivals.qsize() and not at.idle


@pytest.mark.parametrize("request_", [b"", b"short"])
async def test_request_that_is_late_is_still_to_be_read(
    capturing: Callable[[int], Capturing], request_: bytes
) -> None:
    at = capturing(1)
    with socket.socket(socket.AF_UNIX) as kernels:
        kernels.connect(str(at.listener.path))
        kernels.sendall(request_)
        await until(lambda: at.taken)
        kernels.sendall(b"later")

        hold = at.taken[0]
        assert not hold.acknowledged
        assert hold.read_exactly(len(request_) + 5) == request_ + b"later"


async def test_each_of_many_is_captured_once(capturing: Callable[[int], Capturing]) -> None:
    at = capturing(3)
    at.goes_on.release(1000)

    kernels = [crash(at) for _ in range(200)]

    await until(lambda: len(at.taken) == 200)
    await until(lambda: not at.arrivals.unfinished_tasks and at.idle == 3)
    assert len({id(hold) for hold in at.taken}) == 200
    for one in kernels:
        one.close()


async def test_what_came_before_the_end_is_still_accepted(
    capturing: Callable[[int], Capturing],
) -> None:
    at = capturing(1)
    with crash(at), crash(at):
        await until(lambda: at.taken)

        at.listener.stop(WITHIN)

        assert len(at.taken) + at.arrivals.qsize() == 2
        assert not at.listener.path.exists()


async def test_who_waits_at_the_socket_is_woken_by_its_end(
    capturing: Callable[[int], Capturing],
) -> None:
    at = capturing(3)
    await until(lambda: at.idle == 3)

    at.listener.stop(WITHIN)

    assert not at.idle
    assert not at.listener._thread.is_alive()


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), MemoryError(), ValueError("a bug")], ids=repr
)
async def test_who_cannot_accept_does_so_later(
    capturing: Callable[[int], Capturing],
    taker: Taker,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    lacks = iter([error] * 2)
    accept = taker.accept

    def accept_or_fail(listening: int, patience: float) -> Hold:
        for error in lacks:
            raise error
        return accept(listening, patience)

    monkeypatch.setattr(taker, "accept", accept_or_fail)
    at = capturing(1)
    at.goes_on.release(1000)
    count = 0
    while count < 3 or not at.idle:
        count += 1
        with crash(at):
            await until(partial(_has_taken, at, count))


async def test_listener_outlasts_a_lack_of_memory(
    capturing: Callable[[int], Capturing], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = iter([MemoryError()])

    def hold_or_fail(descriptor: int, patience: float) -> Hold:
        for error in lacks:
            raise error
        return Hold(descriptor, patience)

    monkeypatch.setattr(listener, "Hold", hold_or_fail)
    at = capturing(1)
    with crash(at):
        await until(lambda: at.taken)
        with crash(at) as lost, crash(at):
            with suppress(ConnectionResetError):  # its request is there, unread
                assert lost.recv(64) == b""
            await until(lambda: at.arrivals.qsize() == 1)


def test_arrivals_that_are_not_to_wait_do_not() -> None:
    arrivals = Arrivals(8)
    arrivals.accept_with(lambda: pytest.fail("it waits at the socket"))
    with pytest.raises(queue.Empty):
        arrivals.get(block=False)
    with pytest.raises(queue.Empty):
        arrivals.get(timeout=0.01)
