"""What is on the bus of crashes that are delivered, and for nobody.

A copy can be held back anywhere on its way, and a nats-server 2.9 that is killed has items back
that were acknowledged. Nobody else would ever take them off the bus.
"""

import asyncio
import random

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import Kind
from crashbus.messages import Manifest, Receipt
from crashbus.names import token
from services.collector import metrics
from services.collector.ahead import Ahead
from services.collector.core_streams import CoreStreams
from services.collector.ledger import Ledger
from services.collector.plan import wants

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_EVERY = 10  # times as seldom as deliveries are compared with the bus


class Late:
    """Looks at what chunks the bus holds, from time to time.

    Args:
        recheck: seconds between comparisons of unfinished deliveries with the bus.
    """

    def __init__(
        self,
        host: str,
        bus: Bus,
        ledger: Ledger,
        ahead: Ahead,
        cores: CoreStreams,
        recheck: float,
    ) -> None:
        self._host = host
        self._bus = bus
        self._ledger = ledger
        self._ahead = ahead
        self._cores = cores
        self._every = recheck * LOOK_EVERY
        self._of_others: set[str] = set()  # crashes of other hosts, as long as they have chunks

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(self._every * random.uniform(0.7, 1.3))  # noqa: S311 - no secret
            try:
                await self.look()
            except (BusUnreachable, BusFull) as error:
                log.warning("what came late stays for now", error=str(error))
            except Exception:  # one odd message must not end the rest
                metrics.FAULTS.labels("late").inc()
                log.exception("cannot look for what came late")

    async def look(self) -> None:
        """Remove what no destination waits for."""
        found = await self._bus.crashes_on_the_way(self._host)
        self._of_others &= found
        for crash_id in found - self._of_others:
            is_over = self._is_over(crash_id)
            if is_over is None:
                is_over = await self._was_delivered(crash_id)
            # Its process may have crashed once more while the bus was asked.
            if is_over and self._is_over(crash_id) is not False:
                await self._bus.purge_crash(crash_id)
                metrics.LATE.inc()
                log.info("removed what came late", crash_id=crash_id)

    def _is_over(self, crash_id: str) -> bool | None:
        """Tell whether nobody waits for a crash any more, as far as we know of it."""
        if self._ahead.has(crash_id) or self._cores.has(crash_id):
            return False
        crash = self._ledger.get(crash_id)
        return None if crash is None else crash.delivered_at is not None

    async def _was_delivered(self, crash_id: str) -> bool:
        """Tell whether a crash is ours and all of it has its receipts.

        An entry alone can be lost with the disk it was on, while its files are still on their way.
        """
        subject = f"{token(self._host)}.{crash_id}"
        reports = await self._bus.stored(Manifest, f"crash.report.{subject}")
        if not reports:
            self._of_others.add(crash_id)
            return False
        receipts = await self._bus.stored(Receipt, f"crash.shipped.{subject}")
        return is_delivered(reports[-1], receipts)


def is_delivered(manifest: Manifest, receipts: list[Receipt]) -> bool:
    """Tell whether every file of a manifest, and itself, has come to all who want it."""
    # Not by name: a file that several crashes share may get another one.
    there = {(one.destination, one.file.sha256) for one in receipts}
    named = {one.destination for one in receipts if one.file.kind is Kind.MANIFEST}
    return all(
        not wants(place, Kind.MANIFEST) or place in named for place in manifest.destinations
    ) and all(
        (place, file.sha256) in there
        for file in manifest.files
        for place in manifest.destinations
        if wants(place, file.kind)
    )
