"""Lanes: crashes that wait for the same kind of work."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn


class Lane:
    """A queue in which each crash stands once, for any number of workers."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[str] = set()
        self._active: set[str] = set()
        self._again: set[str] = set()

    def put(self, crash_id: str) -> None:
        """Have a crash worked on; one that is worked on now, once more after that."""
        if crash_id in self._active:
            self._again.add(crash_id)
        elif crash_id not in self._queued:
            self._queued.add(crash_id)
            self._waiting.put_nowait(crash_id)

    def has(self, crash_id: str) -> bool:
        """Tell whether a crash waits here or is worked on."""
        return crash_id in self._queued or crash_id in self._active

    async def work(self, do: Callable[[str], Awaitable[None]]) -> NoReturn:
        """Do something with one crash after the other; what it raises ends this."""
        while True:
            crash_id = await self._waiting.get()
            self._queued.discard(crash_id)
            self._active.add(crash_id)
            try:
                await do(crash_id)
            finally:
                self._active.discard(crash_id)
            if crash_id in self._again:
                self._again.discard(crash_id)
                self.put(crash_id)
