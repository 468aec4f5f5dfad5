"""Work on the files of others, in threads that may be given up.

Whoever serves a file system that we look into, fuse(4), can let a thread of ours wait for ever in
a system call. So these threads are not those that the rest of the service uses, whoever asked one
of them for something is told when it stands still, and nobody can hold those that others need.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from typing import Any, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from crashbus.errors import CrashbusError
from crashbus.parts import Process

P = ParamSpec("P")
T = TypeVar("T")

STILL = 30.0  # seconds without a step, after which nobody waits any longer
_LOOK = 0.5  # seconds
# Threads that find out whether a process is to be watched, those that were given up among them.
OF_A_CONTAINER = 4
OF_A_USER = 16  # others may have the same UID in their containers
OF_ALL = 64


class NoThread(CrashbusError):
    """All threads that may work for somebody stand still.

    Attributes:
        mend: what a human can do about it.
    """

    mend = (
        "end the processes that serve a file system (FUSE) below /tmp/appscope and do not answer; "
        "what the recorder captured is not affected"
    )

    def __init__(self, whose: str) -> None:
        super().__init__(f"to look at them needs a thread, and those of {whose} stand still")


class StandsStill(CrashbusError):
    """A thread does not come back; what it uses must stay open.

    Attributes:
        mend: what a human can do about it.
    """

    mend = (
        "have the program's /tmp/appscope on a file system that needs no other process, such as "
        "tmpfs, or end the process that serves it"
    )

    def __init__(self, working: "asyncio.Future[Any]", is_cancelled: bool) -> None:
        super().__init__(f"to look at them takes more than {STILL:.0f} seconds")
        self._working = working
        self._is_cancelled = is_cancelled

    def stop_if_cancelled(self) -> None:
        """Stop, if we were told to while we waited."""
        if self._is_cancelled:
            raise asyncio.CancelledError

    async def left(self) -> None:
        """Wait until the thread comes back, unless we were told to stop meanwhile."""
        self.stop_if_cancelled()
        await asyncio.wait([self._working])
        with suppress(Exception):
            self._working.result()

    def when_left(self, call: Callable[[], None]) -> None:
        """Call something once the thread has come back."""

        def came_back(working: "asyncio.Future[Any]") -> None:
            with suppress(Exception):
                working.result()
            call()

        self._working.add_done_callback(came_back)


class Threads(Executor):
    """As many threads as there is work: whoever gives it bounds it.

    They are daemons, which a ThreadPoolExecutor's are not: the interpreter waits at its end for
    none that stands still.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._is_shut_down = False

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have work done at once, by an idle thread or a new one."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised again by `result`
                future.set_exception(error)

        future.set_running_or_notify_cancel()
        self._work.put(do)
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._run, name="appscope", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads, each when it comes back."""
        self._is_shut_down = True
        while self._idle.acquire(blocking=False):
            self._work.put(None)

    def _run(self) -> None:
        while (do := self._work.get()) is not None:
            do()
            del do  # what it holds is not needed any more
            if self._is_shut_down:
                return
            self._idle.release()


class _Share:
    """The threads that may work for somebody at once."""

    def __init__(self, whose: str, threads: int) -> None:
        self._whose = whose
        self._hoped_for = threads  # those that were not given up
        self._free = asyncio.Semaphore(threads)

    async def take(self) -> None:
        """Wait for a thread.

        Raises:
            NoThread: there is none that comes back.
        """
        if not self._hoped_for:
            raise NoThread(self._whose)
        try:
            async with asyncio.timeout(STILL):
                await self._free.acquire()
        except TimeoutError:
            raise NoThread(self._whose) from None

    def give_back(self) -> None:
        """Let another have a thread that was taken."""
        self._free.release()

    def give_up(self) -> None:
        """Hope no more for a thread that was taken."""
        self._hoped_for -= 1

    def hope(self) -> None:
        """Take back that one was given up."""
        self._hoped_for += 1


class Shares:
    """Bounds the threads that look for one container, one user, and all of them."""

    def __init__(self) -> None:
        self._all = _Share("all who were asked before", OF_ALL)
        self._of: WeakValueDictionary[str, _Share] = WeakValueDictionary()

    async def look(self, threads: Executor, process: Process, work: Callable[[], T]) -> T:
        """Do work on a process's files in a thread, once there is one for it.

        Raises:
            NoThread, StandsStill: it was not done, or may never be.
        """
        shares = self._shares(process)
        with ExitStack() as taken:
            for share in shares:
                await share.take()
                taken.callback(share.give_back)
            try:
                return await to_its_end(threads, work, Steps())
            except StandsStill as still:
                for share in shares:
                    share.give_up()
                    taken.callback(share.hope)
                still.when_left(taken.pop_all().close)
                still.stop_if_cancelled()
                raise

    def _shares(self, process: Process) -> list[_Share]:
        """Return the narrowest first: whoever waits there holds nothing that others need."""
        shares = [self._share(f"user {process.uid}", OF_A_USER), self._all]
        if process.container is not None:
            shares.insert(0, self._share(f"container {process.container.id}", OF_A_CONTAINER))
        return shares

    def _share(self, whose: str, threads: int) -> _Share:
        return self._of.setdefault(whose, _Share(whose, threads))


class Steps:
    """When something was last done: told by the thread that does it."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def step(self) -> None:
        """Say that something was done."""
        self._last = time.monotonic()

    @property
    def stand_still(self) -> bool:
        """Whether nothing was done for long."""
        return time.monotonic() - self._last > STILL


async def to_its_end(threads: Executor, work: Callable[[], T], steps: Steps) -> T:
    """Do work in a thread, and wait for its end however often we are cancelled.

    Raises:
        StandsStill: it may never come to its end.
    """
    steps.step()
    # No task, which an ending loop would cancel.
    working = asyncio.get_running_loop().run_in_executor(threads, work)
    is_cancelled = False
    while not working.done():
        try:
            await asyncio.wait([working], timeout=_LOOK)
        except asyncio.CancelledError:
            is_cancelled = True
        if not working.done() and steps.stand_still:
            raise StandsStill(working, is_cancelled)
    if is_cancelled:
        with suppress(Exception):
            working.result()
        raise asyncio.CancelledError
    return working.result()
