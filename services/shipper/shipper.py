"""The shipper's loops: which items are in hand, and how it ends."""

import asyncio
from collections.abc import Collection

import structlog

from crashbus.bus import Bus, Delivery
from crashbus.messages import WorkItem, place_token, work_item_filter
from crashbus.work_queue import WorkQueue
from services.shipper import metrics, policy
from services.shipper.delivery import Courier
from services.shipper.settings import ShipperSettings
from services.shipper.unclaimed import Sweep

log: structlog.stdlib.BoundLogger = structlog.get_logger()

FORMER_CONSUMER = "shippers"  # took everything; the queue refuses ours as long as it is there
FINISH_WITHIN = 5.5  # seconds from SIGTERM for what is in hand; the rest is handed back
HAND_BACK_WITHIN = 2.0  # seconds to take back what was begun


def consumer(destination: str, large: bool = False) -> str:
    """Return the durable consumer of a destination; all its shippers share it, and the work.

    Args:
        large: for cores and binaries, or for all other files.
    """
    name = f"shippers-{place_token(destination)}"
    return f"{name}-large" if large else name


class Shipper:
    """Takes items as long as it is not cancelled, a bounded number at a time.

    Each destination has consumers and hands of its own. The bus gives a consumer no more when
    1,024 messages are out, and one handed back for a while counts as out: a consumer for all
    would let a dead destination stop the others. And each has one for small files and one for
    large ones, so that no small file ever waits for a hand that is full of cores.

    Args:
        destinations: the URLs that are served.
        host: for dead letters that name no crash.
    """

    def __init__(
        self,
        bus: Bus,
        courier: Courier,
        settings: ShipperSettings,
        destinations: Collection[str],
        host: str,
    ) -> None:
        self._bus = bus
        self._courier = courier
        self._settings = settings
        self._destinations = destinations
        self._sweep = Sweep(bus, settings, host)
        self._in_hand: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Deliver until cancelled, then finish or hand back what is in hand."""
        metrics.MALFORMED.set_function(lambda: self._bus.malformed)
        await self._retire_former_consumer()
        try:
            async with asyncio.TaskGroup() as loops:
                loops.create_task(self._sweep.run(), name="sweep")
                for destination in self._destinations:
                    for large in (False, True):
                        work = self._serve(destination, large)
                        loops.create_task(work, name=f"serve {destination}")
        finally:
            await self._finish()

    async def _retire_former_consumer(self) -> None:
        def on_retry(error: BaseException) -> None:
            log.warning("waiting for the bus", error=str(error))

        retries = policy.until_bus_answers(self._settings, on_retry)
        await retries(WorkQueue(self._bus).retire, FORMER_CONSUMER)

    async def _serve(self, destination: str, large: bool) -> None:
        items = self._bus.consume(
            WorkItem,
            consumer(destination, large),
            service="shipper",
            subject=work_item_filter(destination, large),
            ack_wait=self._settings.ack_wait,
        )
        hands: set[asyncio.Task[None]] = set()
        # The next item is asked for only when there is a hand free to take it.
        async for taken in items:
            task = self._take(taken)
            hands.add(task)
            task.add_done_callback(hands.discard)
            while len(hands) >= self._settings.concurrency:
                await asyncio.wait(hands, return_when=asyncio.FIRST_COMPLETED)

    def _take(self, taken: Delivery[WorkItem]) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._settle(taken), name=f"item {taken.message.crash_id}")
        self._in_hand.add(task)
        task.add_done_callback(self._in_hand.discard)
        return task

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
