"""Large cores, sent while the recorder still writes them.

When the set is whole, most of the core's chunks are on the bus. Until then the ledger does not
know of the crash, so a mark on disk does, by which chunks that became nothing are taken back.
"""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from crashbus.bus import Bus
from crashbus.errors import BusFull, BusUnreachable
from crashbus.layout import Kind
from crashbus.parts import CrashFile
from services.collector import metrics
from services.collector.growing import Unsteady
from services.collector.ledger import Crash, Ledger, Source
from services.collector.publish import Identity, Publisher, SourceLost

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LEAST = 64 * 1024 * 1024  # bytes; a smaller core is copied before this could save anything
KEPT = 120.0  # seconds from the end of a core to its set's entry in the ledger, at most
_MOST = 64  # cores remembered; a storm of crashes is sent when it is over


@dataclass(frozen=True)
class _Sent:
    """A core whose chunks are on the bus."""

    file: CrashFile
    identity: Identity
    at: float  # monotonic seconds


class Ahead:
    """Cores on their way before their crash is known to be whole.

    Args:
        marks: directory for the marks.
    """

    def __init__(self, bus: Bus, ledger: Ledger, publisher: Publisher, marks: Path) -> None:
        self._bus = bus
        self._ledger = ledger
        self._publisher = publisher
        self._marks = marks
        self._expected: dict[str, Source] = {}
        self._seen: dict[tuple[str, str], None] = {}
        self._sending: set[str] = set()
        self._sent: dict[str, _Sent] = {}

    def expect(self, crash_id: str, directory: str, name: str) -> bool:
        """Take note of a core that is being written; False if it was known already."""
        key = (crash_id, name)
        if key in self._seen or len(self._expected) >= _MOST:
            return False
        self._seen[key] = None
        if len(self._seen) > 16 * _MOST:
            del self._seen[next(iter(self._seen))]
        self._expected[crash_id] = Source(directory=directory, name=name, kind=Kind.CORE, owner=0)
        return True

    def has(self, crash_id: str) -> bool:
        """Tell whether chunks of a crash may be on the bus that the ledger does not know yet."""
        return any(crash_id in one for one in (self._expected, self._sending, self._sent))

    async def send(self, crash_id: str) -> None:
        """Send the core of a crash, if one is expected, as it is written."""
        source = self._expected.pop(crash_id, None)
        if source is None or self._ledger.knows_file(source.directory, source.name, 0):
            return
        self._sending.add(crash_id)
        try:
            await asyncio.to_thread(self._mark, crash_id, source.name)
            await self._bus.purge_chunks(crash_id, source.name)
            file, identity = await self._publisher.publish_ahead(crash_id, source)
        except (Unsteady, SourceLost, BusFull, BusUnreachable, OSError) as error:
            log.info("core is sent when it is whole", crash_id=crash_id, because=str(error))
        else:
            metrics.AHEAD.inc()
            self._sent[crash_id] = _Sent(file, identity, time.monotonic())
        finally:
            self._sending.discard(crash_id)

    async def take(self, crash: Crash, source: Source) -> CrashFile | None:
        """Return what was sent of a core, if it is what now lies there; only once."""
        sent = self._sent.get(crash.crash_id)
        if sent is None or sent.file.name != source.name:
            return None
        del self._sent[crash.crash_id]
        try:
            now = await asyncio.to_thread(self._publisher.identity, source)
        except SourceLost:
            return None
        if not source.in_order or now != sent.identity:
            return None
        if source.note is None:
            return sent.file
        told = {"note": source.note, "truncated": True, "expected_size": source.expected}
        return sent.file.model_copy(update=told)

    async def tidy(self) -> None:
        """Take back what was sent of crashes that never became known.

        Raises:
            BusUnreachable: another time, then.
        """
        for mark in await asyncio.to_thread(lambda: list(self._marks.glob("*"))):
            crash_id = mark.name
            sent = self._sent.get(crash_id)
            if crash_id in self._sending or (sent and time.monotonic() - sent.at < KEPT):
                continue
            if self._ledger.get(crash_id) is None:
                await self._bus.purge_chunks(crash_id, await asyncio.to_thread(mark.read_text))
                self._sent.pop(crash_id, None)
            await asyncio.to_thread(mark.unlink, missing_ok=True)

    def _mark(self, crash_id: str, name: str) -> None:
        self._marks.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._marks / crash_id).write_text(name)
