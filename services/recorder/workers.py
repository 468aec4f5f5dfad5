"""Threads that take items from a queue, with a stand-in for each that stands still, or waits.

What a crashed process mapped may lie on a file system (FUSE, a dead server) that does not answer
for as long as its owner likes, and a thread that waits for it cannot be ended.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

from services.recorder.errors import RecorderError

log: structlog.stdlib.BoundLogger = structlog.get_logger()

T = TypeVar("T")

MAX_STUCK = 64  # each holds some descriptors, and memory for its stack


class Workers(Generic[T]):
    """A number of threads that work, whatever becomes of others.

    Args:
        count: how many shall be able to work.
        work: does one item and raises nothing.
        stands_still: tells whether an item that was begun at a monotonic time makes no progress.
        waits: tells whether an item waits for others: there is a bound to how many do.
    """

    def __init__(
        self,
        name: str,
        count: int,
        items: "queue.Queue[T]",
        work: Callable[[T], None],
        stands_still: Callable[[T, float], bool],
        waits: Callable[[T], bool] = lambda _: False,
    ) -> None:
        self._name = name
        self._count = count
        self._items = items
        self._work = work
        self._stands_still = stands_still
        self._waits = waits
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0  # those that stand still or wait
        self._begun: dict[int, tuple[T, float]] = {}  # by thread

    def start(self) -> None:
        """Start them."""
        for _ in range(self._count):
            self._start_one()

    def in_work(self) -> list[T]:
        """Return what is worked on."""
        with self._lock:
            return [item for item, _ in self._begun.values()]

    def makes_progress(self) -> bool:
        """Tell whether anything is worked on that does not stand still."""
        with self._lock:
            begun = list(self._begun.values())
        return not all(self._stands_still(item, since) for item, since in begun)

    def replace_stuck(self) -> None:
        """See to it that as many work as should; call it now and then.

        Raises:
            RecorderError: more stand still than a process can bear: only its end frees them.
        """
        with self._lock:
            begun = list(self._begun.values())
            stuck = sum(self._stands_still(item, since) for item, since in begun)
            self._idle = stuck + sum(self._waits(item) for item, _ in begun)
            missing = self._count + self._idle - self._threads
        if stuck > MAX_STUCK:
            raise RecorderError(
                f"{stuck} {self._name} threads stand still for good, and only a restart "
                "frees them: see what the last crashes mapped (FUSE, NFS)"
            )
        for _ in range(missing):
            log.warning("a thread stands still or waits, starting another", work=self._name)
            self._start_one()

    def _start_one(self) -> None:
        with self._lock:
            self._threads += 1
            number = self._threads
        # A daemon: a thread that stands still must not keep the service from ending.
        threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True).start()

    def _run(self) -> None:
        me = threading.get_ident()
        while not self._is_surplus():
            item = self._items.get()
            with self._lock:
                self._begun[me] = (item, time.monotonic())
            try:
                self._work(item)
            finally:
                with self._lock:
                    del self._begun[me]
                self._items.task_done()

    def _is_surplus(self) -> bool:
        """Tell a thread whether it shall end: the one that it stood in for works again."""
        with self._lock:
            if self._threads <= self._count + self._idle:
                return False
            self._threads -= 1
            return True
