"""Putting one crash file on the bus, chunk by chunk, in constant memory."""

import asyncio
import io
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import structlog

from crashbus import streams
from crashbus.bus import Bus
from crashbus.chunks import Chunk, Encoder, chunk_size
from crashbus.errors import BusFull, BusUnreachable, CrashbusError
from crashbus.layout import LARGE, Kind
from crashbus.messages import CrashFile, Encoding
from services.collector import metrics, spool
from services.collector.ledger import Source
from services.collector.spool import Refused

log: structlog.stdlib.BoundLogger = structlog.get_logger()

IN_FLIGHT = 8  # chunks sent and not yet confirmed; with 1 MiB each this fills a local bus
TRY_AGAIN = 1.0  # seconds between tries while the bus is away or has no room
MAX_SMALL = 16 * 1024 * 1024  # bytes of any file that is not large; AppScope's have kilobytes
MESSAGE_OVERHEAD = 512  # bytes of subject and headers that the bus stores with each chunk
FULL_PATIENCE = 30.0  # seconds to wait for room before our own half file makes room for others


class SourceLost(CrashbusError):
    """A crash file cannot be read, now or later.

    Attributes:
        reason: for the dead letter.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Publisher:
    """Reads files of the spool and publishes their chunks.

    Attributes:
        level: zstd level for core dumps; 0 leaves them as they are.
        limit: bytes of a file that are read at most.
    """

    bus: Bus
    root: Path
    level: int
    limit: int

    async def publish(self, crash_id: str, source: Source) -> CrashFile:
        """Put all chunks of a file on the bus and return what it is.

        Waits while the bus is away.

        Raises:
            SourceLost: it vanished, is no regular file, or cannot be read.
            BusFull: there was no room for a long time; what was put there is removed again.
        """
        file = await asyncio.to_thread(self._open, source)
        with file:
            return await self._publish(crash_id, source, file, os.fstat(file.fileno()).st_size)

    async def publish_bytes(self, crash_id: str, source: Source, data: bytes) -> CrashFile:
        """Do the same with a file that exists in memory only."""
        return await self._publish(crash_id, source, io.BytesIO(data), len(data))

    def _open(self, source: Source) -> BinaryIO:
        try:
            with (
                spool.open_directory(str(self.root)) as root,
                spool.open_directory(source.directory, root) as directory,
            ):
                return os.fdopen(spool.open_file(source.name, directory), "rb", buffering=0)
        except FileNotFoundError:
            raise SourceLost(
                "source_vanished", f"{self._path(source)} vanished before it was delivered"
            ) from None
        except (Refused, OSError) as error:
            raise SourceLost("source_unreadable", f"{self._path(source)}: {error}") from None

    def _path(self, source: Source) -> Path:
        return self.root / source.directory / source.name

    async def _publish(self, crash_id: str, source: Source, file: BinaryIO, size: int) -> CrashFile:
        encoding: Encoding = "identity"
        if self.level and source.kind is Kind.CORE and size:  # an empty file has no frame
            encoding = "zstd"
        encoder = Encoder(chunk_size(self.bus.max_payload), encoding, self.level or 1)
        stream = _Stream(self.bus, crash_id, source.name)
        limit = self.limit if source.kind in LARGE else min(self.limit, MAX_SMALL)
        wanted, room = min(size, limit), await self.bus.chunk_store_bytes(source.name)
        try:
            while encoder.size < wanted:
                chunk = await asyncio.to_thread(self._next, source, file, encoder, wanted)
                if chunk is None:
                    break
                if encoder.stored_size + encoder.count * MESSAGE_OVERHEAD > room:
                    raise self._too_large(source, room)
                await stream.send(chunk)
            await stream.flush()
        except SourceLost:
            await stream.give_up()
            raise
        metrics.FILES.labels(source.kind).inc()
        metrics.BYTES_SENT.inc(encoder.stored_size)
        note = source.note or _shortfall(encoder.size, size, limit)
        return CrashFile(
            name=source.name,
            kind=source.kind,
            size=encoder.size,
            sha256=encoder.sha256,
            encoding=encoding,
            stored_size=encoder.stored_size,
            chunks=encoder.count,
            truncated=note is not None,
            note=note,
        )

    def _too_large(self, source: Source, room: int) -> SourceLost:
        return SourceLost(
            "larger_than_bus",
            f"{self._path(source)} needs more room on the bus than there is, {room} bytes;"
            f" give the stream {streams.chunks_of(source.name)} more"
            " (CRASHBUS_CHUNK_STORE_BYTES when it is made)",
        )

    def _next(self, source: Source, file: BinaryIO, encoder: Encoder, wanted: int) -> Chunk | None:
        try:
            data = _read(file, min(encoder.chunk_size, wanted - encoder.size))
        except OSError as error:
            raise SourceLost(
                "source_unreadable", f"{self._path(source)} cannot be read: {error}"
            ) from None
        metrics.BYTES_READ.inc(len(data))
        return encoder.encode(data) if data else None


def _read(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end of the file."""
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _shortfall(actual: int, size: int, limit: int) -> str | None:
    if size > limit:
        return f"cut to {limit} bytes of {size}, see CRASHBUS_COLLECTOR_MAX_FILE_BYTES"
    return f"shrank to {actual} bytes of {size} while it was read" if actual < size else None


class _Stream:
    """Sends chunks in order, several at a time, again and again until each is stored."""

    def __init__(self, bus: Bus, crash_id: str, name: str) -> None:
        self._bus = bus
        self._crash_id = crash_id
        self._name = name
        self._sent: deque[tuple[Chunk, asyncio.Task[None]]] = deque()

    async def send(self, chunk: Chunk) -> None:
        """Send a chunk; returns when fewer than `IN_FLIGHT` are unconfirmed."""
        self._sent.append((chunk, self._start(chunk)))
        while len(self._sent) >= IN_FLIGHT:
            await self._confirm()

    async def flush(self) -> None:
        """Return when all are stored."""
        while self._sent:
            await self._confirm()

    async def give_up(self) -> None:
        """Take back what was sent."""
        await self._settle()
        self._sent.clear()
        try:
            await self._bus.purge_chunks(self._crash_id, self._name)
        except BusUnreachable as error:
            log.warning("half a file stays on the bus for now", error=str(error))

    def _start(self, chunk: Chunk) -> asyncio.Task[None]:
        return asyncio.create_task(self._bus.publish_chunk(self._crash_id, self._name, chunk))

    async def _settle(self) -> None:
        await asyncio.gather(*(task for _, task in self._sent), return_exceptions=True)

    async def _confirm(self) -> None:
        """Wait for the oldest; if it failed, send it and all behind it again."""
        _, task = self._sent[0]
        try:
            await task
        except (BusUnreachable, BusFull) as error:
            await self._settle()
            await self._again(error)
        self._sent.popleft()

    async def _again(self, error: CrashbusError) -> None:
        waited = 0.0
        while True:
            if isinstance(error, BusFull):
                metrics.BUS_FULL.inc()
                if waited >= FULL_PATIENCE:
                    await self.give_up()
                    raise error
            log.warning("waiting for the bus", crash_id=self._crash_id, error=str(error))
            await asyncio.sleep(TRY_AGAIN)
            waited += TRY_AGAIN
            try:
                for chunk, _ in self._sent:
                    await self._bus.publish_chunk(self._crash_id, self._name, chunk)
            except (BusUnreachable, BusFull) as again:
                error = again
            else:
                done = asyncio.create_task(asyncio.sleep(0))
                self._sent = deque((chunk, done) for chunk, _ in self._sent)
                return
