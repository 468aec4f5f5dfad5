"""What of a crash lies on the bus for the shippers: the chunks of its files, and work items."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from itertools import groupby
from typing import Any

import structlog

from crashbus.bus import Bus
from crashbus.chunks import MAX_CHUNK_SIZE, Chunk, Verifier
from crashbus.errors import BusUnreachable, DamagedFile
from crashbus.layout import LARGE
from crashbus.messages import DeadLetter, Receipt, WorkItem
from crashbus.names import token
from crashbus.parts import CrashFile
from services.collector import metrics
from services.collector.ahead import Ahead
from services.collector.ledger import Crash, Ledger, Source, Told
from services.collector.plan import (
    PUBLISH_ANEW,
    all_sources,
    apply_failure,
    apply_receipt,
    files_rank,
    is_wanted,
    waiting,
)
from services.collector.publish import Publisher, SourceLost

log: structlog.stdlib.BoundLogger = structlog.get_logger()

SMALL_AT_ONCE = 8  # files of one crash
_LOST = {"source_vanished", "dropped_for_room"}  # reasons after which no try can succeed
_KEPT = "then crashbus retry it; it is kept here"
_NO_MEND = "nothing can bring this file back; the crash's other files are delivered"
_MEND = {
    "dropped_for_room": "make the destinations faster, or give the spool more room: "
    "CRASHBUS_COLLECTOR_SPOOL_BYTES, CRASHBUS_COLLECTOR_DISK_RESERVE",
    "larger_than_bus": "enlarge the stream CRASH_CHUNKS (nats stream edit), or limit cores with "
    f"CRASHBUS_RECORDER_MAX_CORE_BYTES; {_KEPT}",
    "source_unreadable": "see that the file can be read (a disk that fails, another owner, a lease "
    f"on it), {_KEPT}",
    "source_changed": "put it back as it was (where another destination has it, crashbus get "
    f"fetches it), {_KEPT}",
}


class Offering:
    """Puts files and work items on the bus where they are missing, and notes it in the ledger."""

    def __init__(self, bus: Bus, ledger: Ledger, publisher: Publisher, ahead: Ahead) -> None:
        self._bus = bus
        self._ledger = ledger
        self._publisher = publisher
        self._ahead = ahead
        self._in_hand: set[tuple[str, str]] = set()  # crash and file put on the bus now

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

    async def is_whole_on_bus(self, crash: Crash, source: Source) -> bool:
        """Tell whether what the bus holds of a file is the file; or else have it published anew.

        All of it is read back, but for a bus with TLS: there nothing can be damaged on the way, and
        a secured one lets no collector read chunks, for they are those of all hosts.

        Raises:
            NotPermitted: we may not read it.
            BusUnreachable: another time, then.
        """
        file = source.file
        if file is None or not waiting(crash, source):
            return False
        if self._bus.is_encrypted:
            return True
        try:
            await _read_back(self._bus.chunks(crash.crash_id, file.name, file.chunks), file)
        except DamagedFile as error:
            if not waiting(crash, source):
                return False  # they were removed because it is delivered
            log.warning("chunks on the bus are damaged", crash_id=crash.crash_id, error=str(error))
            source.on_bus = PUBLISH_ANEW
            await self._ledger.save(crash)
            return False
        return bool(waiting(crash, source))  # it took its time

    async def files(self, crash: Crash, large: bool) -> None:
        """See that the chunks of all large or all small files that are waited for are there."""
        wanted = [
            source
            for source in crash.in_order()
            if (source.kind in LARGE) is large and waiting(crash, source)
        ]
        # Of the small ones most fit one chunk: what takes time is to wait for the bus.
        at_once = 1 if large else SMALL_AT_ONCE
        for first in range(0, len(wanted), at_once):
            await _all(self._file(crash, one) for one in wanted[first : first + at_once])

    async def items(self, crash: Crash, items: list[WorkItem]) -> None:
        """Publish work items in their order, but for those that still wait on the bus or were
        settled.

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
        # Each rank when the one before is stored, or else a lost answer would change their order.
        for _, group in groupby(wanted, lambda item: files_rank(item.files)):
            await _all(self._bus.publish(item) for item in group)

    async def lose(self, crash: Crash, source: Source, error: SourceLost) -> None:
        """Give a file up, for all to see."""
        log.error("crash file lost", crash_id=crash.crash_id, error=str(error))
        told = Told(error=str(error), mend=_MEND.get(error.reason, _NO_MEND))
        letter = letter_of(crash, source, waiting(crash, source), error.reason, told)
        await self._bus.publish(letter)
        places = waiting(crash, source)  # a receipt may have come meanwhile
        if not places and not source.failed:
            return
        metrics.FAILED.inc()
        for place in places:
            source.give_up(place, error.reason, told)
        source.lost = error.reason in _LOST
        crash.notes.append(str(error))
        await self._ledger.save(crash)  # first of all, lest it be told again
        with suppress(BusUnreachable):  # tried again when the crash is looked at
            await self._bus.purge_chunks(crash.crash_id, source.name)
            source.released = True

    async def _file(self, crash: Crash, source: Source) -> None:
        in_hand = crash.crash_id, source.name
        self._in_hand.add(in_hand)
        try:
            held = await self._bus.chunk_count(crash.crash_id, source.name)
            if not await self._is_there(crash, source, held):
                await self._publish(crash, source, held)
        except SourceLost as error:
            await self.lose(crash, source, error)
        finally:
            self._in_hand.discard(in_hand)

    async def _is_there(self, crash: Crash, source: Source, held: int) -> bool:
        """Tell whether a file needs no more chunks than the bus holds of it."""
        if source.file is None:
            sent = await self._ahead.take(crash, source)
            if sent is None or held < sent.chunks:
                return False
            source.file, source.on_bus = sent, held
            await self._ledger.save(crash)
            return True
        if held >= max(source.file.chunks, source.on_bus):
            return True
        await self._catch_up(crash)
        return not waiting(crash, source)  # they were removed because it is delivered

    async def _publish(self, crash: Crash, source: Source, held: int) -> None:
        """Put a file's chunks on the bus.

        Raises:
            SourceLost: see `Publisher.publish`; or it is another file than it was.
        """
        if held:  # a part of it, perhaps of another form: of a collector that was killed
            await self._bus.purge_chunks(crash.crash_id, source.name)
        file = await self._publisher.publish(crash.crash_id, source)
        if source.file is not None and file.sha256 != source.file.sha256:
            raise SourceLost("source_changed", f"{source.name} is not what it was before")
        source.on_bus = file.chunks
        if source.kind in LARGE:
            source.on_bus = await self._bus.chunk_count(crash.crash_id, source.name)
        source.file, source.released = file, False
        if source.kind in LARGE:  # what was small is noted when it is offered, or read anew
            await self._ledger.save(crash)

    async def _catch_up(self, crash: Crash) -> None:
        """Apply what the bus knows of a crash that was on its way before."""
        subject = f"{token(crash.host)}.{crash.crash_id}"
        letters = await self._bus.stored(DeadLetter, f"crash.failed.{subject}")
        receipts = await self._bus.stored(Receipt, f"crash.shipped.{subject}")
        news = [apply_failure(crash, letter) for letter in letters]
        news += [apply_receipt(crash, receipt) for receipt in receipts]
        if any(news):  # when they come by the consumer they are no news any more
            await self._ledger.save(crash)


def letter_of(
    crash: Crash, source: Source, places: tuple[str, ...], reason: str, told: Told
) -> DeadLetter:
    """Return what tells that places do not get a file; one that is not lost can be asked for."""
    is_lost = reason in _LOST
    return DeadLetter(
        host=crash.host,
        crash_id=crash.crash_id,
        service="collector",
        reason=reason,
        error=told.error,
        mend=told.mend,
        destinations=() if is_lost else places,
        files=() if is_lost else (source.name,),
    )


async def _read_back(chunks: AsyncIterator[Chunk], file: CrashFile) -> None:
    verifier, buffer = Verifier(file.encoding), bytearray(MAX_CHUNK_SIZE)
    async for chunk in chunks:
        data = await asyncio.to_thread(verifier.unpack, chunk, buffer)
        await asyncio.to_thread(verifier.take, chunk, data)
    verifier.finish(file.size, file.sha256)
    if verifier.stored_size != file.stored_size:
        raise DamagedFile(f"{verifier.stored_size} bytes stored, {file.stored_size} were sent")


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do several things at a time; when all have ended, raise what one of them raised."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if result is not None:
            raise result
