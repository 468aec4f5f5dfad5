"""The shipper's loops: which items are in hand, and how it ends."""

import asyncio
from collections.abc import Mapping

import structlog

from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.messages import WorkItem
from crashbus.work_queue import WorkQueue
from services.shipper import metrics, policy, queue
from services.shipper.delivery import Courier
from services.shipper.hands import Hands
from services.shipper.place import Place
from services.shipper.settings import ShipperSettings
from services.shipper.unclaimed import Sweep

log: structlog.stdlib.BoundLogger = structlog.get_logger()

FORMER_CONSUMER = "shippers"  # took everything; the queue refuses ours as long as it is there
FINISH_WITHIN = 5.5  # seconds from SIGTERM for what is in hand; the rest is handed back
HAND_BACK_WITHIN = 2.0  # seconds to take back what was begun


class Shipper:
    """Takes items as long as it is not cancelled, a bounded number at a time.

    Each destination has consumers and hands of its own: one that is dead does not stop the others.
    And each has them for small files and for large ones, so that no small file ever waits for a
    hand that is full of cores.

    Args:
        places: the destinations that are served, by URL.
        host: for dead letters that name no crash.
    """

    def __init__(
        self,
        bus: Bus,
        courier: Courier,
        settings: ShipperSettings,
        places: Mapping[str, Place],
        host: str,
    ) -> None:
        self._bus = bus
        self._courier = courier
        self._settings = settings
        self._places = places
        self._sweep = Sweep(bus, settings, host)
        self._in_hand: set[asyncio.Task[str | None]] = set()

    async def run(self) -> None:
        """Deliver until cancelled, then finish or hand back what is in hand."""
        metrics.MALFORMED.set_function(lambda: self._bus.malformed)
        await self._retire_former_consumer()
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._sweep.run(), name="sweep")
                loops.create_task(queue.watch(self._bus, self._places), name="queue")
                for url, place in self._places.items():
                    for large in (False, True):
                        hands = Hands(self._bus, place, large, self._settings, self._take)
                        loops.create_task(hands.run(), name=f"serve {url}")
        finally:
            await self._finish()

    async def _retire_former_consumer(self) -> None:
        def on_retry(error: BaseException) -> None:
            log.warning("waiting for the bus", error=str(error))

        retries = policy.until_bus_answers(self._settings, on_retry)
        await retries(WorkQueue(self._bus).retire, FORMER_CONSUMER)

    def _take(self, taken: Delivery[WorkItem]) -> "asyncio.Task[str | None]":
        task = asyncio.create_task(self._settle(taken), name=f"item {taken.message.crash_id}")
        self._in_hand.add(task)
        task.add_done_callback(self._in_hand.discard)
        return task

    async def _settle(self, taken: Delivery[WorkItem]) -> str | None:
        structlog.contextvars.bind_contextvars(crash_id=taken.message.crash_id)
        with metrics.IN_HAND.track_inprogress():
            try:
                return await self._courier.settle(taken)
            except Exception:
                # Not acknowledged, so it comes again; the service goes on with the others.
                log.exception("failed to settle an item")
                return None

    async def _finish(self) -> None:
        if not self._in_hand:
            return
        log.info("finishing what is in hand", items=len(self._in_hand))
        _, unfinished = await asyncio.wait(self._in_hand, timeout=FINISH_WITHIN)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished, timeout=HAND_BACK_WITHIN)
