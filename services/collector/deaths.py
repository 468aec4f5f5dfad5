"""Deaths: every death that the detector saw has crash files, or is told to have none.

The recorder makes its capture record while it holds the process, or locks what tells that it will
make one, `services.common.unrecorded`. So once the process is gone and nothing is locked, a record
is there or will never be.
"""

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout
from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.errors import BusFull, BusUnreachable
from crashbus.identity import crash_id
from crashbus.messages import DeadLetter, Manifest, SignalEvent
from crashbus.names import token
from services.collector import metrics, oom, processes, uncaptured
from services.collector.appscope.containers import Containers
from services.collector.gather import Gatherer
from services.collector.ledger import Crash, Ledger
from services.common.crash_directory import SpoolUnusable
from services.common.unrecorded import is_noted, is_unrecorded

log: structlog.stdlib.BoundLogger = structlog.get_logger()

ACK_WAIT = 60.0  # seconds; a large process is held longer than that, so we keep saying "working"
AT_ONCE = 512  # deaths followed at a time
PATIENCE = 5.0  # seconds one may hold its place while its process lives; then others' turn
LOOK_AGAIN = 0.02  # seconds; a record is made within milliseconds
LATER = 10.0  # seconds until it comes again
EPOCH_BEFORE = 5.0  # seconds; AppScope's set is made two seconds before the abort() it ends in
SAME_CRASH = 60.0  # seconds between the signal and what was kept of it; a PID comes again later
LOOK_IDLY = 0.5  # seconds
STUCK_AFTER = 10.0  # seconds from a signal on; AppScope's first files are there in milliseconds
GIVE_UP = 3600.0  # seconds after which a process that still lives did not die of it
_MOST_OOM_KILLS = 1024  # remembered: as many events as the bus gives out unsettled


class Deaths:
    """Follows each signal event of this host to the crash files it leads to.

    Args:
        state: directory for what a restart must not forget.
        reserve: percent of the spool's disk that copies of cores leave free.
    """

    def __init__(
        self,
        host: str,
        destinations: tuple[str, ...],
        bus: Bus,
        ledger: Ledger,
        gatherer: Gatherer,
        state: Path,
        reserve: float,
    ) -> None:
        self._host = host
        self._destinations = destinations
        self._bus = bus
        self._ledger = ledger
        self._gatherer = gatherer
        self._containers = Containers(gatherer.root, host, bus, state / "watched", reserve)
        self._oom_kills: dict[str, oom.Seen] = {}  # by event
        self._places = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Follow events until cancelled."""
        await self._containers.resume()
        try:
            await self._run()
        finally:
            await self._containers.stop()

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
            if await self._settle(delivery.message):
                self._oom_kills.pop(delivery.message.event_id, None)
                await delivery.ack()
            else:
                await delivery.retry(LATER)
        except (BusUnreachable, BusFull, OSError) as error:
            log.warning("event will come again", error=str(error))
        except Exception:  # one odd event must not end the following of all others
            metrics.FAULTS.labels("deaths").inc()
            log.exception("cannot follow an event", event_id=delivery.message.event_id)
            with suppress(BusUnreachable):
                await delivery.ack()
        finally:
            working.cancel()

    async def _settle(self, event: SignalEvent) -> bool:
        """Do what an event asks for; False: not yet."""
        process = event.process
        if not _is_named_right(event):
            metrics.REFUSED.labels("forged_event").inc()
            log.warning("event with a crash ID that is not its process's", event_id=event.event_id)
            return True
        if event.handler is not None and event.handler.appscope:
            await self._containers.watch(event)
            if not event.fatal:
                return await self._is_set_begun(event)
        if not event.fatal:
            return True
        if event.disposition == "oom_kill":
            await self._note_oom_kill(event)
        try:
            await asyncio.wait_for(processes.gone(process.pid, process.start_ticks), PATIENCE)
        except TimeoutError:
            return time.time() - event.time > GIVE_UP
        if not await self._is_recorded(process.pid):
            return False
        # Before the look: when it is an orphan no more, its capture record is there.
        if event.disposition != "oom_kill" and _is_kept(event, self._gatherer.root):
            return True  # the recorder makes its files when it is back, or tells why not
        if not await self._gatherer.look(str(process.pid)):
            raise OSError(f"the directory of process {process.pid} could not be looked at")
        seen = self._oom_kills.get(event.event_id)
        if seen is not None and not self._has_files_of(event):
            await self._keep_oom_kill(seen)
        if self._has_files_of(event) or self._gatherer.is_being_captured(event.crash_id):
            return True
        # Its files may have been delivered and removed long ago: the event came late.
        subject = f"crash.report.{token(self._host)}.{event.crash_id}"
        if not await self._bus.holds(Manifest, subject):
            await self._tell(event)
        return True

    async def _is_set_begun(self, event: SignalEvent) -> bool:
        """Wait for AppScope's library to write; tell if it never does; False: not yet.

        Where it cannot write, it tries for ever: the process neither dies nor does its work.
        """
        process = event.process
        end = time.monotonic() + min(PATIENCE, max(0.0, event.time + STUCK_AFTER - time.time()))
        while processes.is_alive(process.pid, process.start_ticks):
            if await self._containers.has_written(event):
                return True
            if time.monotonic() >= end:
                if time.time() < event.time + STUCK_AFTER:
                    return False
                await self._bus.publish(_stuck(event))
                return True
            await asyncio.sleep(LOOK_IDLY)
        return True

    async def _is_recorded(self, pid: int) -> bool:
        """Wait until the recorder has made the record of what it has read; False: not yet."""
        end = time.monotonic() + PATIENCE
        while is_unrecorded(self._gatherer.root, pid):
            if time.monotonic() > end:
                return False
            await asyncio.sleep(LOOK_AGAIN)
        return True

    async def _note_oom_kill(self, event: SignalEvent) -> None:
        """Look at the victim while it may be there; what is seen is kept until it is gone."""
        if event.event_id in self._oom_kills:
            return
        if len(self._oom_kills) >= _MOST_OOM_KILLS:  # of events that the bus lost meanwhile
            del self._oom_kills[next(iter(self._oom_kills))]
        self._oom_kills[event.event_id] = await asyncio.to_thread(oom.look, event)

    async def _keep_oom_kill(self, seen: oom.Seen) -> None:
        try:
            await asyncio.to_thread(oom.write, seen, self._gatherer.root)
        except SpoolUnusable as error:
            raise OSError(f"{error}; {error.mend}") from error
        await self._gatherer.look(str(seen.event.process.pid))

    def _has_files_of(self, event: SignalEvent) -> bool:
        """Tell whether the ledger has files of this very signal, not of one recovered from."""
        crash = self._ledger.get(event.crash_id)
        epochs = [int(name.rpartition("_")[2]) for name in crash.sources] if crash else []
        return any(epoch >= event.time - EPOCH_BEFORE for epoch in epochs)

    async def _tell(self, event: SignalEvent) -> None:
        """Report a crash without files, and why there are none."""
        why, mend = await asyncio.to_thread(uncaptured.why, event)
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


def _stuck(event: SignalEvent) -> DeadLetter:
    process = event.process
    return DeadLetter(
        host=event.host,
        crash_id=event.crash_id,
        service="collector",
        reason="appscope_stuck",
        error=f"{process.comm}[{process.pid}] took {event.signal_name} and hangs: AppScope's "
        "library handles it and has written nothing, as where it cannot write to /tmp/appscope",
        mend=f"'crashbus snapshot --core {process.pid}' keeps what it is now; then end it, "
        f"kill -KILL {process.pid}, and give its user a /tmp/appscope to write to (a tmpfs, where "
        "its root is read-only)",
    )


def _is_named_right(event: SignalEvent) -> bool:
    process = event.process
    return event.crash_id == crash_id(process.boot_id, process.pid, process.start_ticks)


def _is_kept(event: SignalEvent, spool: Path) -> bool:
    """Tell whether the next recorder will make files of this crash."""
    # In this order: of a note it makes an orphan.
    noted = is_noted(spool, event.process.pid, event.time, SAME_CRASH)
    return noted or _is_orphan(event, spool)


def _is_orphan(event: SignalEvent, spool: Path) -> bool:
    """Tell whether the recorder's pipe helper keeps this crash until a recorder is there."""
    with suppress(OSError):
        for kept in (spool / layout.ORPHANS).iterdir():
            at, _, pid = kept.name.partition("-")
            if pid == str(event.process.pid) and at.isdecimal():
                return abs(int(at) - event.time) < SAME_CRASH
    return False


async def _keep(delivery: Delivery[SignalEvent]) -> None:
    """Keep an event from being given to another while its process is held."""
    while True:
        await asyncio.sleep(ACK_WAIT / 3)
        try:
            await delivery.working()
        except BusUnreachable:
            continue
