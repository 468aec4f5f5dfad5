"""What lies in the work queue and is for nobody.

Each destination has a consumer of its own, so an item of a destination that no shipper is
configured with is given to no one, and so is a message on a subject that is no item's. Neither
may lie there for ever: each becomes a dead letter. But shippers may be configured differently,
and one that serves the destination may only just be starting, hence the patience.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable, MalformedMessage
from crashbus.messages import DeadLetter, WorkItem
from crashbus.work_queue import QueueConsumer, QueuedMessage, WorkQueue
from services.shipper import metrics
from services.shipper.failure import not_configured
from services.shipper.settings import ShipperSettings

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_EVERY = 60.0  # seconds
LOOK_AT = 2000  # messages at a time: a backlog is not read whole by every shipper every minute
MAX_KEPT = 256 * 1024  # bytes of a malformed message that its dead letter keeps


def is_unclaimed(
    found: QueuedMessage, consumers: Sequence[QueueConsumer], now: float, patience: float
) -> bool:
    """Tell whether a message has waited long enough, and for nobody (times in Unix seconds)."""
    return now - found.stored >= patience and not any(
        one.serves(found.subject, now) for one in consumers
    )


class Sweep:
    """Looks through the work queue from time to time.

    Args:
        host: for dead letters that name no crash.
    """

    def __init__(self, bus: Bus, settings: ShipperSettings, host: str) -> None:
        self._bus = bus
        self._queue = WorkQueue(bus)
        self._patience = settings.unclaimed_after
        self._host = host
        self._seen = 0  # sequence up to which the queue was looked through in this round

    async def run(self) -> None:
        """Look until cancelled.

        The first look comes late on purpose: shippers of other destinations that were started
        with this one shall have made their consumers by then.
        """
        await asyncio.sleep(self._patience)
        while True:
            try:
                await self._look()
            except (BusUnreachable, BusFull) as error:
                log.warning("cannot look for unclaimed items, trying again", error=str(error))
            except Exception:
                log.exception("failed to look for unclaimed items")
            await asyncio.sleep(min(LOOK_EVERY, self._patience))

    async def _look(self) -> None:
        consumers, now = await self._queue.consumers(), time.time()
        for _ in range(LOOK_AT):
            found = await self._queue.after(self._seen)
            # They lie in the order of their age, so all behind a young one are young.
            if found is None or now - found.stored < self._patience:
                self._seen = 0
                return
            if is_unclaimed(found, consumers, now, self._patience):
                await self._put_aside(found)
            self._seen = found.sequence

    async def _put_aside(self, found: QueuedMessage) -> None:
        """Make a dead letter of it first, then remove it: if we die between, there are two."""
        letter = _letter(found, self._host)
        metrics.FAILURES.labels("unknown", letter.reason).inc()
        log.error(
            "nobody takes it from the work queue, made it a dead letter",
            subject=found.subject[:1024],
            crash_id=letter.crash_id,
            reason=letter.reason,
            error=letter.error,
            mend=letter.mend,
        )
        await self._bus.publish(letter)
        await self._queue.remove(found.sequence)


def _letter(found: QueuedMessage, host: str) -> DeadLetter:
    try:
        item = WorkItem.decode(found.payload, found.subject)
        if item.subject != found.subject:
            raise MalformedMessage(
                found.subject, found.payload, f"this item belongs on {item.subject[:1024]}"
            )
    except MalformedMessage as error:
        return DeadLetter(
            host=host,
            service="shipper",
            reason="malformed_message",
            error=str(error)[:2000],
            mend="find out who published it; a newer major version needs newer services",
            subject_received=found.subject[:1024],
            payload_received=found.payload[:MAX_KEPT],
        )
    failure = not_configured(item.destination)
    return DeadLetter(
        host=item.host,
        crash_id=item.crash_id,
        service="shipper",
        reason=failure.reason,
        error=str(failure),
        mend=failure.mend,
        work=item,
    )
