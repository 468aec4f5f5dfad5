"""Lanes: crashes, or directories of theirs, that wait for the same kind of work."""

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import NoReturn

FIRST_AT_MOST = 3  # times in a row; what still cannot go then may never, and others could


class Lane:
    """A queue in which each crash stands once, for any number of workers.

    Args:
        most: how many may wait; None: any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._waiting = deque[str]()
        self._filled = asyncio.Semaphore(0)  # how many wait
        self._queued: set[str] = set()
        self._active: set[str] = set()
        self._again: set[str] = set()
        self._first: set[str] = set()
        self._rounds = Counter[str]()  # how often in a row each was kept first

    def put(self, crash_id: str) -> bool:
        """Have a crash worked on; one that is worked on now, once more after that.

        Returns:
            False: there is no place for it.
        """
        if crash_id in self._active:
            self._again.add(crash_id)
        elif crash_id not in self._queued:
            if self._most is not None and len(self._waiting) >= self._most:
                return False
            self._queued.add(crash_id)
            self._waiting.append(crash_id)
            self._filled.release()
        return True

    def keep_first(self, crash_id: str) -> None:
        """Have a crash that is worked on now worked on once more, before all that wait.

        After a few times in a row it has to queue as any other.
        """
        self._again.add(crash_id)
        self._first.add(crash_id)

    async def work(self, do: Callable[[str], Awaitable[object]]) -> NoReturn:
        """Do something with one crash after the other; what it raises ends this."""
        while True:
            await self._filled.acquire()
            crash_id = self._waiting.popleft()
            self._queued.discard(crash_id)
            self._active.add(crash_id)
            try:
                await do(crash_id)
            finally:
                self._active.discard(crash_id)
            if crash_id in self._again:
                self._again.discard(crash_id)
                self.put(crash_id)
            if self._stays_first(crash_id):
                self._waiting.remove(crash_id)
                self._waiting.appendleft(crash_id)

    def _stays_first(self, crash_id: str) -> bool:
        if crash_id in self._first and self._rounds[crash_id] < FIRST_AT_MOST:
            self._first.discard(crash_id)
            self._rounds[crash_id] += 1
            return True
        self._first.discard(crash_id)
        del self._rounds[crash_id]
        return False
