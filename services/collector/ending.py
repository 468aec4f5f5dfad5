"""The end of a crash's delivery: its report, manifest.json, and what is left on the bus."""

import asyncio
import time

import structlog

from crashbus.bus import Bus
from crashbus.errors import NotPermitted
from crashbus.layout import MANIFEST_NAME
from crashbus.parts import CrashFile
from services.collector import metrics
from services.collector.ledger import Crash, Ledger
from services.collector.offering import Offering
from services.collector.plan import (
    all_sources,
    is_everywhere,
    is_whole,
    item_for,
    new_manifest,
    waiting,
    without_manifest,
)
from services.collector.publish import Publisher

log: structlog.stdlib.BoundLogger = structlog.get_logger()


class Ending:
    """Reports crashes once all their files are known, and finishes those that are delivered."""

    def __init__(self, bus: Bus, ledger: Ledger, publisher: Publisher, offering: Offering) -> None:
        self._bus = bus
        self._ledger = ledger
        self._publisher = publisher
        self._offering = offering
        self._locks: dict[str, asyncio.Lock] = {}

    async def conclude(self, crash: Crash) -> None:
        """Take a crash as far to its end as its files are; one at a time."""
        async with self._locks.setdefault(crash.crash_id, asyncio.Lock()):
            await self._report(crash)
            await self._release_chunks(crash)
            if crash.reported is not None:
                await self._send_manifest(crash)
            await self._finish(crash)
        if crash.delivered_at is not None:
            self._locks.pop(crash.crash_id, None)

    async def _finish(self, crash: Crash) -> None:
        """Note that a crash is delivered, if it is."""
        if crash.delivered_at is not None or crash.reported is None or not is_everywhere(crash):
            return
        # The last receipts may have come since; nobody looks at a delivered crash again.
        await self._release_chunks(crash)
        crash.delivered_at = time.time()
        await self._ledger.save(crash)
        whole = is_whole(crash)
        if whole:
            metrics.DELIVERED.inc()
        log.info("delivered", crash_id=crash.crash_id, files=len(crash.sources), whole=whole)

    async def _report(self, crash: Crash) -> None:
        names = tuple(s.name for s in crash.in_order() if s.file)
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
        places = without_manifest(crash)
        if places:
            file = await self._manifest(crash)
            await self._offering.items(crash, [item_for(crash, place, (file,)) for place in places])

    async def _manifest(self, crash: Crash) -> CrashFile:
        """Return manifest.json; its chunk is on the bus."""
        manifest = crash.manifest = crash.manifest or new_manifest()
        file = manifest.file
        if file is None or await self._bus.chunk_count(crash.crash_id, MANIFEST_NAME) < 1:
            data = crash.to_manifest().model_dump_json(indent=1).encode()
            await self._bus.purge_chunks(crash.crash_id, MANIFEST_NAME)
            file = await self._publisher.publish_bytes(crash.crash_id, manifest, data)
            manifest.file = file
            await self._ledger.save(crash)
        return file
