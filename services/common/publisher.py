"""Publishes what is in an outbox: oldest first, several in flight, for ever."""

import asyncio
import uuid

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter, EventsLost
from services.common.outbox import Outbox, Waiting
from services.common.service import Runtime

log: structlog.stdlib.BoundLogger = structlog.get_logger()

IN_FLIGHT = 64
PUBLISH_AGAIN = 0.5  # seconds after a failure
ROOM_FOR_HEADERS = 512  # bytes: a message ID and the protocol's own


class Publisher:
    """Moves messages from the outbox to the bus; made inside the event loop."""

    def __init__(self, outbox: Outbox, runtime: Runtime) -> None:
        self._outbox = outbox
        self._runtime = runtime
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._bus: Bus | None = None

    def wake(self) -> None:
        """Say that there is something to publish; any thread may call it."""
        self._loop.call_soon_threadsafe(self._more.set)

    @property
    def can_publish(self) -> bool:
        """Whether the bus can be reached just now."""
        return self._bus is not None and self._bus.is_connected

    async def drained(self) -> None:
        """Wait until all that is in the outbox now has been published."""
        self._empty.clear()
        self._more.set()
        await self._empty.wait()

    async def run(self, bus: Bus) -> None:
        """Publish until cancelled."""
        self._bus = bus
        while True:
            self._more.clear()
            waiting = await asyncio.to_thread(self._outbox.oldest, IN_FLIGHT)
            if not waiting and not self._outbox.lost():
                self._empty.set()
                await self._more.wait()
                continue
            try:
                await self._publish(bus, waiting)
                await self._tell_of_lost(bus)
            except (BusUnreachable, BusFull) as error:
                self._runtime.health.failing("bus", str(error))
                await asyncio.sleep(PUBLISH_AGAIN)
            else:
                self._runtime.health.working("bus")

    async def _publish(self, bus: Bus, waiting: list[Waiting]) -> None:
        """Publish all; those that were stored are removed even when others were not.

        Raises:
            BusUnreachable, BusFull: one was not stored.
        """
        sending = [self._publish_one(bus, message) for message in waiting]
        results = await asyncio.gather(*sending, return_exceptions=True)
        stored = [one for one, error in zip(waiting, results, strict=True) if error is None]
        await asyncio.to_thread(self._outbox.remove, stored)
        for error in results:
            if error is not None:
                raise error

    async def _publish_one(self, bus: Bus, message: Waiting) -> None:
        if len(message.payload) + len(message.subject) + ROOM_FOR_HEADERS > bus.max_payload:
            await self._give_up(bus, message)
            return
        headers = {"Nats-Msg-Id": message.message_id}
        await bus.publish_raw(message.subject, message.payload, headers)

    async def _give_up(self, bus: Bus, message: Waiting) -> None:
        """A message that the server will never take must not stand in the way of others."""
        letter = DeadLetter(
            host=self._runtime.host,
            service=self._runtime.name,
            reason="message_too_large",
            error=f"{len(message.payload)} bytes for {message.subject[:512]}, "
            f"the server takes {bus.max_payload}",
            mend="raise max_payload of the NATS server",
        )
        log.error("a message is too large for the bus", error=letter.error, mend=letter.mend)
        await bus.publish(letter)

    async def _tell_of_lost(self, bus: Bus) -> None:
        count = self._outbox.lost()
        if count:
            told = EventsLost(host=self._runtime.host, stage="outbox", count=count)
            headers = {"Nats-Msg-Id": uuid.uuid4().hex}
            await bus.publish_raw(told.subject, told.encode(), headers)
            await asyncio.to_thread(self._outbox.told_of_lost, count)
