"""Deaths: every death that the detector saw has crash files, or is told to have none.

The recorder makes its capture record while it holds the process. So once the process is
gone, a record is there or will never be.
"""

import asyncio
import time

import structlog

from crashbus.bus import Bus, Delivery
from crashbus.errors import BusFull, BusUnreachable
from crashbus.messages import DeadLetter, Manifest, SignalEvent
from crashbus.names import token
from services.collector import metrics, processes
from services.collector.appscope import Containers
from services.collector.gather import Gatherer
from services.collector.ledger import Crash, Ledger

log: structlog.stdlib.BoundLogger = structlog.get_logger()

ACK_WAIT = 60.0  # seconds; a large process is held longer than that, so we keep saying "working"
AT_ONCE = 512  # deaths followed at a time


class Deaths:
    """Follows each signal event of this host to the crash files it leads to."""

    def __init__(
        self,
        host: str,
        destinations: tuple[str, ...],
        bus: Bus,
        ledger: Ledger,
        gatherer: Gatherer,
    ) -> None:
        self._host = host
        self._destinations = destinations
        self._bus = bus
        self._ledger = ledger
        self._gatherer = gatherer
        self._containers = Containers(gatherer.root, host)
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Follow events until cancelled."""
        try:
            await self._run()
        finally:
            self._containers.stop()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for delivery in self._bus.consume(
                SignalEvent,
                f"collector-signals-{token(self._host)}",
                service="collector",
                subject=f"crash.signal.{token(self._host)}.>",
                ack_wait=ACK_WAIT,
                batch=64,
                new_only=True,
            ):
                await self._places.acquire()
                task = tasks.create_task(self._follow(delivery))
                task.add_done_callback(lambda _: self._places.release())

    async def _follow(self, delivery: Delivery[SignalEvent]) -> None:
        working = asyncio.create_task(_keep(delivery))
        try:
            await self._settle(delivery.message)
            await delivery.ack()
        except (BusUnreachable, BusFull, OSError) as error:
            log.warning("event will come again", error=str(error))
        finally:
            working.cancel()

    async def _settle(self, event: SignalEvent) -> None:
        process = event.process
        log.debug("event", crash_id=event.crash_id, age=round(time.time() - event.time, 3))
        if event.handler is not None and event.handler.appscope:
            self._containers.watch(event)
        if not event.fatal:
            return
        await processes.gone(process.pid, process.start_ticks)
        if not await self._gatherer.look(str(process.pid)):
            raise OSError(f"the directory of process {process.pid} could not be looked at")
        if self._ledger.get(event.crash_id) or self._gatherer.is_being_captured(event.crash_id):
            return
        # Its files may have been delivered and removed long ago: the event came late.
        subject = f"crash.report.{token(self._host)}.{event.crash_id}"
        if not await self._bus.holds(Manifest, subject):
            await self._tell(event)

    async def _tell(self, event: SignalEvent) -> None:
        """Report a crash without files, and why there are none."""
        why, mend = _why(event)
        log.warning("no crash files", crash_id=event.crash_id, why=why)
        metrics.NOT_CAPTURED.inc()
        crash = Crash(
            crash_id=event.crash_id,
            host=self._host,
            crashed_at=event.time,
            process=event.process,
            signal=event.signal,
            signal_name=event.signal_name,
            code=event.code,
            code_meaning=event.code_meaning,
            fault_address=event.fault_address,
            destinations=self._destinations,
            notes=[why],
            revision=1,
            reported_at=event.time,
        )
        if event.disposition != "oom_kill":
            letter = DeadLetter(
                host=self._host,
                crash_id=event.crash_id,
                service="collector",
                reason="not_captured",
                error=why,
                mend=mend,
            )
            await self._bus.publish(letter)
        await self._bus.publish(crash.to_manifest())


def _why(event: SignalEvent) -> tuple[str, str]:
    if event.disposition == "oom_kill":
        return "killed by the OOM killer: the kernel dumps no core for that", "add memory"
    return (
        f"{event.process.comm} died of {event.signal_name} and nothing captured it",
        "see with 'crashbus doctor' whether the recorder runs and owns core_pattern",
    )


async def _keep(delivery: Delivery[SignalEvent]) -> None:
    """Keep an event from being given to another while its process is held."""
    while True:
        await asyncio.sleep(ACK_WAIT / 3)
        try:
            await delivery.working()
        except BusUnreachable:
            continue
