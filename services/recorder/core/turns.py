"""Turns of large cores, so that some capture threads are always there for small ones.

One core of many gigabytes takes minutes, and whoever likes can have any number of them: processes
that share some memory, each mapped many times over.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from crashbus.parts import Process
from services.recorder.handover.hold import Hold

LARGE = 256 * 1024 * 1024  # bytes; those below take a second or two
_LOOK_EVERY = 0.5  # seconds between two looks whether a process is still held
_USER_SLICE = re.compile(r"/user\.slice/user-(\d+)\.slice/")  # systemd.special(7)

_Core = tuple[str, Hold]  # whose it is, and what holds its process


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
        self._is_stopping = False
        self._waiting: list[_Core] = []  # in the order they came
        self._in_work: list[_Core] = []
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, process: Process, hold: Hold) -> Iterator[bool]:
        """Wait for the turn of a process's core; False: it does not come."""
        core = (_owner(process), hold)
        is_on = self._is_on(core)
        try:
            yield is_on
        finally:
            if is_on:
                self._end(core)

    def stop(self) -> None:
        """Let nobody wait from here on."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def _is_on(self, core: _Core) -> bool:
        with self._changed:
            may_wait = len(self._waiting) < self._most_waiting
            self._waiting.append(core)
            if may_wait and not self._is_next(core):
                self._wait(core)
            is_on = self._is_next(core)
            self._waiting.remove(core)
            if is_on:
                self._in_work.append(core)
            self._changed.notify_all()  # another may be the next now
            return is_on

    def _is_next(self, core: _Core) -> bool:
        """Tell whether there is room, and this is the first that waits whose owner has some left.

        One that stands still until its process is let go holds nobody up any longer: whatever
        its thread waits for may never come.
        """
        owners = [one for one, hold in self._in_work if hold.is_held]
        can_go = (one for one in self._waiting if owners.count(one[0]) < self._of_one)
        return len(owners) < self._at_once and next(can_go, None) is core

    def _wait(self, core: _Core) -> None:
        _, hold = core
        end = time.monotonic() + self._patience
        hold.waits = True
        while not (self._is_next(core) or self._is_stopping) and hold.is_held:
            if time.monotonic() >= end:
                break
            self._changed.wait(_LOOK_EVERY)
            hold.last_progress = time.monotonic()  # it does not stand still
        hold.waits = False

    def _end(self, core: _Core) -> None:
        with self._changed:
            self._in_work.remove(core)
            self._changed.notify_all()


def _owner(process: Process) -> str:
    """Return whose a process is: one user's or one container's.

    What is below a user's slice is that user's, whatever it is called: systemd lets users make
    cgroups there, with names like containers' and processes with subordinate UIDs.
    """
    user = _USER_SLICE.match(process.cgroup or "")
    if user:
        return f"user {user[1]}"
    return process.container.id if process.container else f"user {process.uid}"
