"""The shipper's loop: which items are in hand, and how it ends."""

import asyncio

import structlog

from crashbus.bus import Bus, Delivery
from crashbus.messages import WorkItem
from services.shipper import metrics
from services.shipper.delivery import Courier
from services.shipper.settings import ShipperSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

CONSUMER = "shippers"  # all shippers share it, and so share the work
FINISH_WITHIN = 5.5  # seconds from SIGTERM for what is in hand; the rest is handed back
HAND_BACK_WITHIN = 2.0  # seconds to take back what was begun


class Shipper:
    """Takes items as long as it is not cancelled, a bounded number at a time."""

    def __init__(self, bus: Bus, courier: Courier, settings: ShipperSettings) -> None:
        self._bus = bus
        self._courier = courier
        self._settings = settings
        self._in_hand: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver until cancelled, then finish or hand back what is in hand."""
        metrics.MALFORMED.set_function(lambda: self._bus.malformed)
        items = self._bus.consume(
            WorkItem, CONSUMER, service="shipper", ack_wait=self._settings.ack_wait
        )
        try:
            # The next item is asked for only when there is a hand free to take it.
            async for taken in items:
                self._take(taken)
                while len(self._in_hand) >= self._settings.concurrency:
                    await asyncio.wait(self._in_hand, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._finish()

    def _take(self, taken: Delivery[WorkItem]) -> None:
        task = asyncio.create_task(self._settle(taken), name=f"item {taken.message.crash_id}")
        self._in_hand.add(task)
        task.add_done_callback(self._in_hand.discard)

    async def _settle(self, taken: Delivery[WorkItem]) -> None:
        structlog.contextvars.bind_contextvars(crash_id=taken.message.crash_id)
        with metrics.IN_HAND.track_inprogress():
            try:
                await self._courier.settle(taken)
            except Exception:
                # Not acknowledged, so it comes again; the service goes on with the others.
                log.exception("failed to settle an item")

    async def _finish(self) -> None:
        if not self._in_hand:
            return
        log.info("finishing what is in hand", items=len(self._in_hand))
        _, unfinished = await asyncio.wait(self._in_hand, timeout=FINISH_WITHIN)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=HAND_BACK_WITHIN)
