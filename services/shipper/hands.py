"""The hands of one destination: how many items are taken for it, and when none is."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import structlog

from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.messages import WorkItem
from crashbus.subjects import place_token, work_item_filter
from services.shipper.failure import Failure, Passing
from services.shipper.place import Place
from services.shipper.settings import ShipperSettings
from services.shipper.standing import Circuit

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Items of one destination that may be out at once, with all shippers: those in hand, and those
# handed back for a while. Further ones wait on the bus, in order.
MAX_OUT = 1024

Settling = asyncio.Task[str | None]


def consumer(destination: str, large: bool = False) -> str:
    """Return the durable consumer of a destination; all its shippers share it, and the work.

    Args:
        large: for cores and binaries, or for all other files.
    """
    name = f"shippers-{place_token(destination)}"
    return f"{name}-large" if large else name


class Hands:
    """Takes small or large items of one destination, no more than there are hands, until cancelled.

    While its circuit is open no item is taken. When the destination is due it is looked at, and if
    that fails, one item is looked at, too: whether it has waited for too long.

    Args:
        settle: begins to settle an item; what the task returns is how it was settled.
    """

    def __init__(
        self,
        bus: Bus,
        place: Place,
        large: bool,
        settings: ShipperSettings,
        settle: Callable[[Delivery[WorkItem]], Settling],
    ) -> None:
        self._bus = bus
        self._place = place
        self._large = large
        self._standing = place.standing
        self._settings = settings
        self._settle = settle
        self._settling: set[Settling] = set()
        self._asking: asyncio.Task[Delivery[WorkItem]] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looks_at_one = False

    async def run(self) -> None:
        """Take items until cancelled; what is in hand then is not ended here."""
        items = self._bus.consume(
            WorkItem,
            consumer(self._place.url, self._large),
            service="shipper",
            subject=work_item_filter(self._place.url, self._large),
            ack_wait=self._settings.ack_wait,
            max_ack_pending=MAX_OUT,
        )
        try:
            while True:
                self._ask(items)
                await self._wait()
                self._take()
                self._look()
        finally:
            if self._looking is not None:
                self._looking.cancel()  # not awaited: it may hang in a dead disk
            if self._asking is not None:
                self._asking.cancel()
                await asyncio.wait({self._asking})

    def _free(self) -> int:
        match self._standing.circuit:
            case Circuit.CLOSED:
                hands = self._settings.concurrency
            case Circuit.HALF_OPEN:
                hands = 1
            case Circuit.OPEN:
                hands = int(self._looks_at_one)
        return hands - len(self._settling)

    def _ask(self, items: AsyncIterator[Delivery[WorkItem]]) -> None:
        """Ask for the next item only when there is a hand free to take it."""
        if self._asking is None and self._free() > 0:
            self._asking = asyncio.ensure_future(anext(items))

    async def _wait(self) -> None:
        """Wait until something happens, or until the destination is due."""
        # While it is being looked at, the outcome is what there is to wait for.
        due = self._standing.is_open and self._looking is None
        timeout = self._standing.due_in if due else None
        awaited = {*self._settling, *filter(None, (self._asking, self._looking))}
        if awaited:
            await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(timeout or 0)

    def _take(self) -> None:
        for task in [one for one in self._settling if one.done()]:
            self._settling.discard(task)
            # Behind an item that has waited for too long there may be more.
            self._looks_at_one = self._looks_at_one and task.result() == "dead_lettered"
        if self._asking is not None and self._asking.done():
            asked, self._asking = self._asking, None
            self._settling.add(self._settle(asked.result()))

    def _look(self) -> None:
        """Look at a destination that is due, or see what a look has shown."""
        if self._looking is not None and self._looking.done():
            looked, self._looking = self._looking, None
            self._seen(looked)
        if self._standing.is_open and not self._standing.due_in and self._looking is None:
            self._looking = asyncio.create_task(self._place.deliverer.check())

    def _seen(self, looked: "asyncio.Task[None]") -> None:
        failure: Failure | None = None
        with suppress(asyncio.CancelledError):
            try:
                looked.result()
            except Failure as seen:
                failure = seen
            except Exception:
                log.exception("cannot look at a destination", destination=self._place.url)
        self._standing.looked_at(failure)
        if isinstance(failure, Passing):
            self._looks_at_one = True
