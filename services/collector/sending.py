"""Sending chunks in order, several at a time, again and again until each is stored."""

import asyncio
import random
from collections import deque

import structlog

from crashbus.bus import Bus
from crashbus.chunks import Chunk
from crashbus.errors import BusFull, BusUnreachable, CrashbusError
from services.collector import metrics

log: structlog.stdlib.BoundLogger = structlog.get_logger()

IN_FLIGHT = 8  # chunks sent and not yet confirmed; with 1 MiB each this fills a local bus
IN_FLIGHT_BYTES = 8 * 1024 * 1024  # of them together: chunks are larger where the server takes it
TRY_AGAIN = 1.0  # seconds between tries while the bus is away or has no room
FULL_PATIENCE = 30.0  # seconds to wait for room before our own half file makes room for others


def uneven(seconds: float) -> float:
    """Return a time near one: what waits for the same on many hosts must not go in step."""
    return seconds * random.uniform(0.5, 1.5)  # noqa: S311 - no secret


class Sending:
    """The chunks of one file on their way.

    Args:
        without_room: gets the crash's ID while the bus has no room for them.
    """

    def __init__(self, bus: Bus, crash_id: str, name: str, without_room: set[str]) -> None:
        self._bus = bus
        self._crash_id = crash_id
        self._name = name
        self._without_room = without_room
        self._sent: deque[tuple[Chunk, asyncio.Task[None]]] = deque()

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk; returns when few enough are unconfirmed.

        Raises:
            BusFull: there was no room for a long time; what was sent is taken back.
        """
        self._sent.append((chunk, self._start(chunk)))
        while len(self._sent) >= IN_FLIGHT or self._bytes() >= IN_FLIGHT_BYTES:
            await self._confirm()

    def _bytes(self) -> int:
        return sum(len(chunk.body) for chunk, _ in self._sent)

    async def flush(self) -> None:
        """Return when all are stored; raises as `send` does."""
        while self._sent:
            await self._confirm()

    async def give_up(self) -> None:
        """Take back what was sent."""
        await self._settle()
        self._sent.clear()
        try:
            await self._bus.purge_chunks(self._crash_id, self._name)
        except BusUnreachable as error:
            log.warning("half a file stays on the bus for now", error=str(error))

    def _start(self, chunk: Chunk) -> asyncio.Task[None]:
        return asyncio.create_task(self._bus.publish_chunk(self._crash_id, self._name, chunk))

    async def _settle(self) -> None:
        await asyncio.gather(*(task for _, task in self._sent), return_exceptions=True)

    async def _confirm(self) -> None:
        """Wait for the oldest; if it failed, send it and all behind it again."""
        _, task = self._sent[0]
        try:
            await task
        except (BusUnreachable, BusFull) as error:
            await self._settle()
            try:
                await self._again(error)
            finally:
                self._without_room.discard(self._crash_id)
        self._sent.popleft()

    async def _again(self, error: CrashbusError) -> None:
        waited, patience = 0.0, uneven(FULL_PATIENCE)
        while True:
            pause = uneven(TRY_AGAIN)
            if isinstance(error, BusFull):
                metrics.BUS_FULL.inc()
                self._without_room.add(self._crash_id)
                if waited >= patience:
                    await self.give_up()
                    raise error
                waited += pause
            log.warning("waiting for the bus", crash_id=self._crash_id, error=str(error))
            await asyncio.sleep(pause)
            try:
                for chunk, _ in self._sent:
                    await self._bus.publish_chunk(self._crash_id, self._name, chunk)
            except (BusUnreachable, BusFull) as again:
                error = again
            else:
                done = asyncio.create_task(asyncio.sleep(0))
                self._sent = deque((chunk, done) for chunk, _ in self._sent)
                return
