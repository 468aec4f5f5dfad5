"""Work on the files of others, in threads that may be given up.

Whoever serves a file system that we look into, fuse(4), can let a thread of ours wait for ever in
a system call. So these threads are not those that the rest of the service uses, and whoever asked
one of them for something is told when it stands still.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from crashbus.errors import CrashbusError

T = TypeVar("T")

STILL = 30.0  # seconds without a step, after which nobody waits any longer
_LOOK = 0.5  # seconds


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

    async def left(self) -> None:
        """Wait until the thread comes back, unless we were told to stop meanwhile."""
        if self._is_cancelled:
            raise asyncio.CancelledError
        await asyncio.wait([self._working])
        with suppress(Exception):
            self._working.result()


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


async def to_its_end(threads: ThreadPoolExecutor, work: Callable[[], T], steps: Steps) -> T:
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
