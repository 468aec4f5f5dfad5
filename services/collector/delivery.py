"""Delivery: compares the ledger with the bus and does what is missing.

One procedure serves the first time, a restart, and a bus that lost its store: for each file
that a destination still waits for, see that its chunks and its work item are on the bus.
Files go in shipping order; core dumps have a lane of their own, so that the small files of
the next crash never wait behind a core.
"""

import asyncio
import time
from functools import partial

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable, NotPermitted
from crashbus.messages import DeadLetter, Receipt, Replay
from services.collector import metrics
from services.collector.ahead import Ahead
from services.collector.answers import Answers
from services.collector.ending import Ending
from services.collector.lanes import Lane
from services.collector.ledger import Crash, Ledger, Source
from services.collector.offering import Offering
from services.collector.plan import (
    has_large_to_send,
    has_small_to_offer,
    is_unfinished,
    work_items,
)
from services.collector.publish import Publisher, SourceLost
from services.collector.sending import uneven

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SMALL_LANES = 4
CORES_AT_ONCE = 1  # one core already keeps compression busy; two would only be slower each
TRY_AGAIN = 2.0  # seconds after a failure of the bus or of the disk
GIVE_WAY = 15.0  # seconds in which others may have the room of a half core that was taken back


class Deliverer:
    """Brings every crash of the ledger to its destinations.

    Attributes:
        offering: what it puts on the bus.
    """

    def __init__(
        self,
        host: str,
        bus: Bus,
        ledger: Ledger,
        publisher: Publisher,
        ahead: Ahead,
        recheck: float,
    ) -> None:
        self._ledger = ledger
        self._ahead = ahead
        self._recheck = recheck
        self.offering = Offering(bus, ledger, publisher, ahead)
        self._ending = Ending(bus, ledger, publisher, self.offering)
        self._answers = Answers(host, bus, ledger, self.start)
        self._small = Lane()
        self._cores = Lane()
        self._going: set[str] = set()  # crashes whose small files are put on the bus just now

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(SMALL_LANES):
                tasks.create_task(
                    self._small.work(partial(self._deliver, self._small)), name="small files"
                )
            for _ in range(CORES_AT_ONCE):
                tasks.create_task(
                    self._cores.work(partial(self._deliver, self._cores)), name="cores"
                )
            tasks.create_task(self._answers.take(Receipt), name="receipts")
            tasks.create_task(self._answers.take(DeadLetter), name="dead letters")
            tasks.create_task(self._answers.take(Replay), name="replays")
            tasks.create_task(self._rechecks(), name="rechecks")

    def start(self, crash: Crash) -> None:
        """Bring a crash on its way, or further on it."""
        self._small.put(crash.crash_id)

    def start_ahead(self, crash_id: str, directory: str, name: str) -> None:
        """Send a core that is still being written."""
        if self._ahead.expect(crash_id, directory, name):
            self._cores.put(crash_id)

    async def drop(self, crash: Crash, source: Source) -> None:
        """Give a file up for want of room, for all to see; the caller removes it."""
        text = f"{source.name} was dropped before it was delivered: there was no room for it"
        await self.offering.lose(crash, source, SourceLost("dropped_for_room", text))
        await self._ending.conclude(crash)

    async def _rechecks(self) -> None:
        """Take up what is unfinished: at the start, and from time to time."""
        while True:
            unfinished = [one for one in self._ledger.open_crashes() if is_unfinished(one)]
            metrics.UNDELIVERED.set(len(unfinished))
            oldest = min((crash.crashed_at for crash in unfinished), default=None)
            metrics.OLDEST_UNDELIVERED.set(0 if oldest is None else time.time() - oldest)
            for crash in unfinished:
                self.start(crash)
            try:
                await self._ahead.tidy()
            except (BusUnreachable, OSError) as error:
                log.warning("chunks of no crash stay for now", error=str(error))
            await asyncio.sleep(self._recheck)

    async def _deliver(self, lane: Lane, crash_id: str) -> None:
        try:
            if lane is self._cores:
                await self._ahead.send(crash_id)
            crash = self._ledger.get(crash_id)
            if crash is None or crash.delivered_at is not None:
                return
            if lane is self._small:
                await self._send_small(crash)
            elif crash_id not in self._going and not has_small_to_offer(crash):
                await self._send(crash, large=True)
                await self._ending.conclude(crash)
        except NotPermitted as error:  # trying at once would only keep others waiting
            log.warning("delivery waits", crash_id=crash_id, error=str(error))
        except BusFull as error:
            log.warning("delivery waits for room", crash_id=crash_id, error=str(error))
            if lane is self._cores:
                lane.keep_first(crash_id)
            else:  # the one that makes room when it is concluded may stand behind
                lane.put(crash_id)
            await asyncio.sleep(uneven(GIVE_WAY if lane is self._cores else TRY_AGAIN))
        except (BusUnreachable, OSError) as error:
            log.warning("delivery waits", crash_id=crash_id, error=str(error))
            lane.put(crash_id)
            await asyncio.sleep(TRY_AGAIN)
        except Exception:  # one odd crash must not end the delivery of all others
            metrics.FAULTS.labels("deliver").inc()
            log.exception("cannot deliver a crash", crash_id=crash_id)

    async def _send_small(self, crash: Crash) -> None:
        """Send small files; only then is it the turn of the large ones."""
        self._going.add(crash.crash_id)
        try:
            await self._send(crash, large=False)
        finally:
            self._going.discard(crash.crash_id)
        if has_large_to_send(crash):
            self._cores.put(crash.crash_id)
        await self._ending.conclude(crash)

    async def _send(self, crash: Crash, *, large: bool) -> None:
        await self.offering.files(crash, large)
        await self.offering.items(crash, work_items(crash, large))
