"""An item in hand: what the bus is told of it, so that it comes to nobody else meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from crashbus.consuming import Delivery
from crashbus.errors import BusUnreachable
from crashbus.messages import WorkItem
from services.shipper.settings import ShipperSettings
from services.shipper.tries import Tries

log: structlog.stdlib.BoundLogger = structlog.get_logger()

HAND_BACK_WITHIN = 1.0  # seconds, on the way out


@asynccontextmanager
async def held(
    taken: Delivery[WorkItem], tries: Tries, settings: ShipperSettings
) -> AsyncIterator[None]:
    """Keep an item in hand; when cancelled, hand it back."""
    try:
        async with _heartbeat(taken, tries, settings):
            yield
    except asyncio.CancelledError:
        log.info("stopping, handed back", destination=taken.message.destination)
        with suppress(BusUnreachable, TimeoutError):
            await asyncio.wait_for(taken.retry(0), HAND_BACK_WITHIN)
        raise


@asynccontextmanager
async def _heartbeat(
    taken: Delivery[WorkItem], tries: Tries, settings: ShipperSettings
) -> AsyncIterator[None]:
    beating = asyncio.create_task(_beat(taken, tries, settings), name="heartbeat")
    try:
        yield
    finally:
        beating.cancel()
        await asyncio.wait({beating})


async def _beat(taken: Delivery[WorkItem], tries: Tries, settings: ShipperSettings) -> None:
    """Tell the bus that an item is being worked on, as long as something moves.

    A thread that hangs in a dead disk cannot be broken off; the item must not hang with it.
    """
    while True:
        await asyncio.sleep(settings.ack_wait / 3)
        if tries.still_for < settings.stall:
            with suppress(BusUnreachable):
                await taken.working()


async def acknowledge(taken: Delivery[WorkItem]) -> None:
    """Tell that an item is settled."""
    try:
        await taken.ack()
    except BusUnreachable as error:
        # It comes again, and the receipts will tell that it is done.
        log.warning("could not acknowledge an item", error=str(error))
