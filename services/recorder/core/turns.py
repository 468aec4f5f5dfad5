"""Turns of large cores, so that some capture threads are always there for small ones.

One core of many gigabytes takes minutes, and whoever likes can have any number of them: processes
that share some memory, each mapped many times over.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from crashbus.parts import Process
from services.recorder.handover.hold import Hold

LARGE = 256 * 1024 * 1024  # bytes; those below take a second or two
_LOOK_EVERY = 0.5  # seconds between two looks whether a process is still held


class Turns:
    """Who copies a large core, and who waits for that; used by several threads.

    Args:
        captures: threads that capture.
        waiting: how many may wait, each of which takes a thread more.
        patience: seconds that they wait.
    """

    def __init__(self, captures: int, waiting: int, patience: float) -> None:
        self._at_once = max(1, captures - max(1, captures // 4))
        self._of_one = max(1, self._at_once // 2)
        self._most_waiting = waiting
        self._patience = patience
        self._waiting = 0
        self._in_work: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, process: Process, hold: Hold) -> Iterator[bool]:
        """Wait for the turn of a process's core; False: it does not come."""
        owner = process.container.id if process.container else f"user {process.uid}"
        is_on = self._is_on(owner, hold)
        try:
            yield is_on
        finally:
            if is_on:
                self._end(owner)

    def _is_on(self, owner: str, hold: Hold) -> bool:
        with self._changed:
            if not self._is_free(owner) and self._waiting < self._most_waiting:
                self._wait(owner, hold)
            if not self._is_free(owner):
                return False
            self._in_work[owner] += 1
            return True

    def _is_free(self, owner: str) -> bool:
        return self._in_work.total() < self._at_once and self._in_work[owner] < self._of_one

    def _wait(self, owner: str, hold: Hold) -> None:
        end = time.monotonic() + self._patience
        self._waiting += 1
        hold.waits = True
        while not self._is_free(owner) and hold.is_held and time.monotonic() < end:
            self._changed.wait(_LOOK_EVERY)
            hold.last_progress = time.monotonic()  # it does not stand still
        hold.waits = False
        self._waiting -= 1

    def _end(self, owner: str) -> None:
        with self._changed:
            self._in_work[owner] -= 1
            if not self._in_work[owner]:
                del self._in_work[owner]
            self._changed.notify_all()
