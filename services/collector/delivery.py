"""Delivery: compares the ledger with the bus and does what is missing.

One procedure serves the first time, a restart, and a bus that lost its store: for each file
that a destination still waits for, see that its chunks and its work item are on the bus.
Files go in shipping order; core dumps have a lane of their own, so that the small files of
the next crash never wait behind a core.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from typing import Any

import structlog

from crashbus.bus import Bus
from crashbus.consuming import Delivery
from crashbus.errors import BusFull, BusUnreachable, NotPermitted
from crashbus.layout import LARGE, MANIFEST_NAME, Kind
from crashbus.messages import DeadLetter, Receipt, Replay, WorkItem
from crashbus.names import token
from services.collector import metrics
from services.collector.ahead import Ahead
from services.collector.ledger import Crash, Ledger, Source
from services.collector.plan import (
    all_sources,
    apply_failure,
    apply_receipt,
    has_large_to_send,
    is_unfinished,
    is_wanted,
    item_for,
    waiting,
    wants,
    work_items,
)
from services.collector.publish import Publisher, SourceLost
from services.collector.replay import apply_replay, gone

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SMALL_LANES = 4
SMALL_AT_ONCE = 8  # files of one crash
CORES_AT_ONCE = 1  # one core already keeps compression busy; two would only be slower each
_LOST = {"source_vanished", "dropped_for_room"}  # reasons after which no try can succeed
_NO_MEND = "nothing can bring this file back; the crash's other files are delivered"
_MEND = {
    "dropped_for_room": "make the destinations faster, or give the spool more room: "
    "CRASHBUS_COLLECTOR_SPOOL_BYTES, CRASHBUS_COLLECTOR_DISK_RESERVE",
    "larger_than_bus": "enlarge the stream CRASH_CHUNKS (nats stream edit), or limit cores with "
    "CRASHBUS_RECORDER_MAX_CORE_BYTES; the file is kept here",
}
TRY_AGAIN = 2.0  # seconds after a failure of the bus or of the disk


class Deliverer:
    """Brings every crash of the ledger to its destinations."""

    def __init__(
        self,
        host: str,
        bus: Bus,
        ledger: Ledger,
        publisher: Publisher,
        ahead: Ahead,
        recheck: float,
    ) -> None:
        self._host = host
        self._bus = bus
        self._ledger = ledger
        self._publisher = publisher
        self._ahead = ahead
        self._recheck = recheck
        self._small: asyncio.Queue[str] = asyncio.Queue()
        self._cores: asyncio.Queue[str] = asyncio.Queue()
        self._queued: set[tuple[int, str]] = set()
        self._active: set[tuple[int, str]] = set()
        self._again: set[tuple[int, str]] = set()
        self._in_hand: set[tuple[str, str]] = set()  # crash and file put on the bus now
        self._ends: dict[str, asyncio.Lock] = {}

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(SMALL_LANES):
                tasks.create_task(self._lane(self._small, core=False), name="small files")
            for _ in range(CORES_AT_ONCE):
                tasks.create_task(self._lane(self._cores, core=True), name="cores")
            tasks.create_task(self._take(Receipt), name="receipts")
            tasks.create_task(self._take(DeadLetter), name="dead letters")
            tasks.create_task(self._take(Replay), name="replays")
            tasks.create_task(self._rechecks(), name="rechecks")

    def start(self, crash: Crash) -> None:
        """Bring a crash on its way, or further on it."""
        self._enqueue(self._small, crash.crash_id)

    def is_sending(self, crash: Crash, source: Source) -> bool:
        """Tell whether a file is put on the bus just now, and does not only wait for room."""
        is_in_hand = (crash.crash_id, source.name) in self._in_hand
        return is_in_hand and crash.crash_id not in self._publisher.without_room

    async def is_on_bus(self, crash: Crash, source: Source) -> bool:
        """Tell whether all chunks of a file lie on the bus, and are waited for."""
        if source.file is None or not waiting(crash, source):
            return False
        held = await self._bus.chunk_count(crash.crash_id, source.name)
        return held >= max(source.file.chunks, source.on_bus)

    async def drop(self, crash: Crash, source: Source) -> None:
        """Give a file up for want of room, for all to see; the caller removes it."""
        text = f"{source.name} was dropped before it was delivered: there was no room for it"
        await self._lose(crash, source, SourceLost("dropped_for_room", text))
        await self._end(crash)

    def start_ahead(self, crash_id: str, directory: str, name: str) -> None:
        """Send a core that is still being written."""
        if self._ahead.expect(crash_id, directory, name):
            self._enqueue(self._cores, crash_id)

    def _enqueue(self, lane: asyncio.Queue[str], crash_id: str) -> None:
        """Have a lane work on a crash; on one it works on now, once more after that."""
        key = (id(lane), crash_id)
        if key in self._active:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            lane.put_nowait(crash_id)

    async def _rechecks(self) -> None:
        """Take up what is unfinished: at the start, and from time to time."""
        while True:
            unfinished = self._ledger.open_crashes()
            metrics.UNDELIVERED.set(len(unfinished))
            oldest = min((crash.crashed_at for crash in unfinished), default=None)
            metrics.OLDEST_UNDELIVERED.set(0 if oldest is None else time.time() - oldest)
            for crash in unfinished:
                if is_unfinished(crash):
                    self.start(crash)
            try:
                await self._ahead.tidy()
            except (BusUnreachable, OSError) as error:
                log.warning("chunks of no crash stay for now", error=str(error))
            await asyncio.sleep(self._recheck)

    async def _lane(self, lane: asyncio.Queue[str], core: bool) -> None:
        while True:
            crash_id = await lane.get()
            key = (id(lane), crash_id)
            self._queued.discard(key)
            self._active.add(key)
            try:
                if core:
                    await self._ahead.send(crash_id)
                crash = self._ledger.get(crash_id)
                if crash is not None and crash.delivered_at is None:
                    await self._work_on(crash, core)
            except NotPermitted as error:  # trying at once would only keep others waiting
                log.warning("delivery waits", crash_id=crash_id, error=str(error))
            except (BusUnreachable, BusFull, OSError) as error:
                log.warning("delivery waits", crash_id=crash_id, error=str(error))
                self._again.add(key)
                await asyncio.sleep(TRY_AGAIN)
            except Exception:  # one odd crash must not end the delivery of all others
                metrics.FAULTS.labels("deliver").inc()
                log.exception("cannot deliver a crash", crash_id=crash_id)
            finally:
                self._active.discard(key)
            if key in self._again:
                self._again.discard(key)
                self._enqueue(lane, crash_id)

    async def _work_on(self, crash: Crash, core: bool) -> None:
        await self._publish_missing(crash, core)
        if not core and has_large_to_send(crash):
            self._enqueue(self._cores, crash.crash_id)
        await self._end(crash)

    async def _end(self, crash: Crash) -> None:
        # Both lanes may come to a crash's end at once.
        async with self._ends.setdefault(crash.crash_id, asyncio.Lock()):
            await self._conclude(crash)
        if crash.delivered_at is not None:
            self._ends.pop(crash.crash_id, None)

    async def _publish_missing(self, crash: Crash, core: bool) -> None:
        wanted = [
            source
            for source in crash.in_order()
            if (source.kind in LARGE) is core and waiting(crash, source)
        ]
        # Of the small ones most fit one chunk: what takes time is to wait for the bus.
        at_once = 1 if core else SMALL_AT_ONCE
        for first in range(0, len(wanted), at_once):
            await _all(self._see_to(crash, one) for one in wanted[first : first + at_once])
        await self._offer(crash, work_items(crash, core))

    async def _see_to(self, crash: Crash, source: Source) -> None:
        in_hand = crash.crash_id, source.name
        self._in_hand.add(in_hand)
        try:
            await self._publish_source(crash, source)
        finally:
            self._in_hand.discard(in_hand)

    async def _catch_up(self, crash: Crash) -> None:
        """Apply what the bus knows of a crash that was on its way before."""
        subject = f"{token(crash.host)}.{crash.crash_id}"
        for letter in await self._bus.stored(DeadLetter, f"crash.failed.{subject}"):
            apply_failure(crash, letter)
        for receipt in await self._bus.stored(Receipt, f"crash.shipped.{subject}"):
            apply_receipt(crash, receipt)

    async def _publish_source(self, crash: Crash, source: Source) -> None:
        """See that a file's chunks are on the bus."""
        known = source.file
        held = await self._bus.chunk_count(crash.crash_id, source.name)
        if known is None:
            source.file = await self._ahead.take(crash, source)
            if source.file is not None and held >= source.file.chunks:
                source.on_bus = held
                await self._ledger.save(crash)
                return
            source.file = None
        elif held >= max(known.chunks, source.on_bus):
            return
        else:
            await self._catch_up(crash)
            if not waiting(crash, source):  # they were removed because it is delivered
                return
        if held:  # a part of it, perhaps of another form: of a collector that was killed
            await self._bus.purge_chunks(crash.crash_id, source.name)
        try:
            file = await self._publisher.publish(crash.crash_id, source)
            if known is not None and file.sha256 != known.sha256:
                raise SourceLost("source_changed", f"{source.name} is not what it was before")
        except SourceLost as error:
            await self._lose(crash, source, error)
            return
        if source.kind in LARGE:
            source.on_bus = await self._bus.chunk_count(crash.crash_id, source.name)
        else:
            source.on_bus = file.chunks
        source.file, source.released = file, False
        if source.kind in LARGE:  # what was small is noted when it is offered, or read anew
            await self._ledger.save(crash)

    async def _lose(self, crash: Crash, source: Source, error: SourceLost) -> None:
        """Give a file up, for all to see."""
        log.error("crash file lost", crash_id=crash.crash_id, error=str(error))
        await self._bus.publish(
            DeadLetter(
                host=crash.host,
                crash_id=crash.crash_id,
                service="collector",
                reason=error.reason,
                error=str(error),
                mend=_MEND.get(error.reason, _NO_MEND),
            )
        )
        metrics.FAILED.inc()
        for place in waiting(crash, source):
            source.failed[place] = error.reason
        source.lost = error.reason in _LOST
        crash.notes.append(str(error))
        await self._ledger.save(crash)  # first of all, lest it be told again
        with suppress(BusUnreachable):  # tried again when the crash is looked at
            await self._bus.purge_chunks(crash.crash_id, source.name)
            source.released = True

    async def _offer(self, crash: Crash, items: list[WorkItem]) -> None:
        """Publish work items, but for those that still wait on the bus or were settled.

        A shipper publishes its receipt before it acknowledges an item. So when an item that
        was offered before is not there any more, the receipt it led to is there already.
        """
        absent = [
            one
            for one in items
            if one.subject not in crash.offered or not await self._bus.holds(WorkItem, one.subject)
        ]
        if any(item.subject in crash.offered for item in absent):
            await self._catch_up(crash)
        wanted = [item for item in absent if is_wanted(crash, item)]
        if wanted:
            crash.offered.update(item.subject for item in wanted)
            names = {file.name for item in wanted for file in item.files}
            for source in all_sources(crash):
                if source.name in names:
                    source.offered_at = time.time()
            await self._ledger.save(crash)
        await _all(self._bus.publish(item) for item in wanted)

    async def _conclude(self, crash: Crash) -> None:
        """Report a crash once all its files are known, and finish it once all are delivered."""
        await self._report(crash)
        await self._release_chunks(crash)
        if crash.reported is not None:
            await self._send_manifest(crash)
        await self._finish(crash)

    async def _report(self, crash: Crash) -> None:
        names = tuple(s.name for s in crash.in_order())
        read = all(s.file or not waiting(crash, s) for s in crash.sources.values())
        if not read or names == crash.reported:
            return
        crash.revision += 1
        crash.reported_at = time.time()
        await self._bus.publish(crash.to_manifest())
        crash.reported = names
        crash.manifest = None
        await self._ledger.save(crash)
        log.info("reported", crash_id=crash.crash_id, revision=crash.revision)

    async def _release_chunks(self, crash: Crash) -> None:
        """Remove from the bus the chunks that no destination waits for any more.

        Where the bus does not let us, they stay, and nothing waits for that: the connection tells
        once what to permit, and from then on `late` removes what is there of delivered crashes.
        """
        for source in all_sources(crash):
            if source.removed and source.failed:
                continue  # no other copy is left for a replay
            if source.released or waiting(crash, source) or not (source.file or source.failed):
                continue
            try:
                await self._bus.purge_chunks(crash.crash_id, source.name)
            except NotPermitted as error:
                log.debug("chunks stay on the bus", crash_id=crash.crash_id, error=str(error))
                return
            source.released = True

    async def _send_manifest(self, crash: Crash) -> None:
        """Offer manifest.json to each destination that has all other files of the crash."""
        ready = [
            place
            for place in crash.destinations
            if wants(place, Kind.MANIFEST)
            and all(place in s.delivered for s in crash.sources.values() if wants(place, s.kind))
        ]
        if not ready:
            return
        if crash.manifest is None:
            crash.manifest = Source(directory="0", name=MANIFEST_NAME, kind=Kind.MANIFEST)
        manifest = crash.manifest
        if not any(place in waiting(crash, manifest) for place in ready):
            return
        known = manifest.file
        if known is None or await self._bus.chunk_count(crash.crash_id, MANIFEST_NAME) < 1:
            data = crash.to_manifest().model_dump_json(indent=1).encode()
            await self._bus.purge_chunks(crash.crash_id, MANIFEST_NAME)
            manifest.file = await self._publisher.publish_bytes(crash.crash_id, manifest, data)
            await self._ledger.save(crash)
        file = manifest.file
        assert file is not None
        places = [place for place in ready if place in waiting(crash, manifest)]
        await self._offer(crash, [item_for(crash, place, (file,)) for place in places])

    async def _finish(self, crash: Crash) -> None:
        if crash.delivered_at is not None or crash.reported is None:
            return
        places = [p for p in crash.destinations if wants(p, Kind.MANIFEST)]
        is_whole = not any(source.lost for source in crash.sources.values())
        manifest_there = not is_whole or all(
            crash.manifest and p in crash.manifest.delivered for p in places
        )
        files_there = all(
            source.lost or place in source.delivered
            for source in crash.sources.values()
            for place in crash.destinations
            if wants(place, source.kind)
        )
        if manifest_there and files_there:
            # The last receipts may have come since; nobody looks at a delivered crash again.
            await self._release_chunks(crash)
            crash.delivered_at = time.time()
            await self._ledger.save(crash)
            if is_whole:
                metrics.DELIVERED.inc()
            log.info("delivered", crash_id=crash.crash_id, files=len(crash.sources), whole=is_whole)

    async def _take(self, kind: type[Receipt] | type[DeadLetter] | type[Replay]) -> None:
        """Apply receipts, dead letters or replays of this host as they come."""
        place = kind.SUBJECT.split(".")[1]
        durable = f"collector-{place}-{token(self._host)}"
        subject = f"crash.{place}.{token(self._host)}.>"
        deliveries: AsyncIterator[Delivery[Receipt | DeadLetter | Replay]] = self._bus.consume(
            kind, durable, service="collector", subject=subject, batch=64
        )
        async for delivery in deliveries:
            try:
                await self._apply(delivery)
            except (BusUnreachable, BusFull, OSError) as error:
                log.warning("receipt will come again", error=str(error))
            except Exception:  # it comes again, too; one odd message must not end the rest
                metrics.FAULTS.labels("receipts").inc()
                log.exception("cannot apply a message", kind=kind.__name__)

    async def _apply(self, delivery: Delivery[Receipt | DeadLetter | Replay]) -> None:
        message = delivery.message
        crash = self._ledger.get(message.crash_id) if message.crash_id else None
        if crash is not None and crash.delivered_at is None:
            if isinstance(message, Receipt):
                changed = apply_receipt(crash, message)
                if changed:
                    _tell_latency(crash, message)
            elif isinstance(message, Replay):
                changed = apply_replay(crash, message)
            else:
                changed = apply_failure(crash, message)
            if changed:
                await self._ledger.save(crash)
                self._enqueue(self._small, crash.crash_id)
        elif isinstance(message, Replay) and crash is None:
            await self._bus.publish(gone(message))
        await delivery.ack()


def _tell_latency(crash: Crash, receipt: Receipt) -> None:
    kind = receipt.file.kind
    part = "whole" if kind is Kind.MANIFEST else "large" if kind in LARGE else "small"
    metrics.LATENCY.labels(part).observe(max(0.0, receipt.time - crash.crashed_at))


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do several things at a time; when all have ended, raise what one of them raised."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if result is not None:
            raise result
