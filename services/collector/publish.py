"""Putting one crash file on the bus, chunk by chunk, in constant memory.

Cores and binaries are read and packed at a lower priority than small files.
"""

import asyncio
import io
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from crashbus import streams
from crashbus.bus import Bus
from crashbus.chunks import Encoder, chunk_size
from crashbus.errors import CrashbusError
from crashbus.layout import LARGE, Kind
from crashbus.parts import CrashFile
from services.collector import metrics, spool
from services.collector.growing import Growing, Unsteady
from services.collector.ledger import Source
from services.collector.ranges import (
    FileRanges,
    NextRange,
    Packing,
    Reach,
    Unreadable,
    in_background,
)
from services.collector.sending import Sending
from services.collector.spool import Refused

MAX_SMALL = 16 * 1024 * 1024  # bytes of any file that is not large; AppScope's have kilobytes
MESSAGE_OVERHEAD = 512  # bytes of subject and headers that the bus stores with each chunk
Read = Callable[[int], Awaitable[bytes]]  # gives so many bytes of a file, fewer only at its end


class SourceLost(CrashbusError):
    """A crash file cannot be read, now or later.

    Attributes:
        reason: for the dead letter.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Identity:
    """What tells whether a file is still the one that was read."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, file: BinaryIO) -> "Identity":
        """Return an open file's."""
        status = os.fstat(file.fileno())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Publisher:
    """Reads files of the spool and publishes their chunks.

    Attributes:
        level: zstd level for core dumps; 0 leaves them as they are.
        limit: bytes of a file that are read at most.
        without_room: IDs of the crashes that wait for room on the bus just now.
        receiving: by ID, crashes whose core comes just now, `publish_stream`; set when it is over.
    """

    bus: Bus
    root: Path
    level: int
    limit: int
    without_room: set[str] = field(default_factory=set)
    receiving: dict[str, asyncio.Event] = field(default_factory=dict)
    _background: ThreadPoolExecutor = field(default_factory=in_background)

    async def publish(self, crash_id: str, source: Source) -> CrashFile:
        """Put all chunks of a file on the bus and return what it is.

        Waits while the bus is away.

        Raises:
            SourceLost: it vanished, is no regular file, or cannot be read.
            BusFull: there was no room for a long time; what was put there is removed again.
        """
        await self._received(crash_id)
        file = await asyncio.to_thread(self._open, source)
        with file:
            size = os.fstat(file.fileno()).st_size

            async def reach(_: int) -> int:
                return size

            return await self._publish(crash_id, source, file, reach)

    async def publish_ahead(self, crash_id: str, source: Source) -> tuple[CrashFile, Identity]:
        """Do the same with a file that is being written; return which file it was, too.

        Raises:
            Unsteady: it cannot be followed to its end; what was put on the bus is removed again.
        """
        await self._received(crash_id)
        file = await asyncio.to_thread(self._open, source)
        with file:
            growing = Growing(file.fileno())
            found = await self._publish(crash_id, source, file, growing.reach)
            return found, Identity.of(file)

    async def publish_stream(self, crash_id: str, source: Source, read: Read) -> CrashFile:
        """Do the same with a file that comes piece by piece and cannot be read again.

        Whatever is raised, what was put on the bus is removed again.
        """
        packing, sending = self._begin(crash_id, source)
        encoder, run = packing.encoder, asyncio.get_running_loop().run_in_executor

        async def next_range() -> bytes:
            data = await read(encoder.range_size)
            if encoder.size + len(data) > self.limit:
                text = f"{source.name} is larger than {self.limit} bytes"
                raise SourceLost("file_too_large", f"{text}, see CRASHBUS_COLLECTOR_MAX_FILE_BYTES")
            if data:
                await run(self._background, encoder.cut, data)
            return data

        try:
            await self._send(source, packing, next_range, sending)
        except BaseException:  # the recorder may be gone
            await sending.give_up()
            raise
        return _published(source, encoder, encoder.size, self.limit)

    async def _received(self, crash_id: str) -> None:
        """Wait until what came of a crash's core by another way is taken back."""
        event = self.receiving.get(crash_id)
        if event is not None:
            await event.wait()

    async def publish_bytes(self, crash_id: str, source: Source, data: bytes) -> CrashFile:
        """Do the same with a file that exists in memory only."""
        encoder = Encoder(chunk_size(self.bus.max_payload), "identity")
        sending = Sending(self.bus, crash_id, source.name, self.without_room)
        for chunk in encoder.chunks(io.BytesIO(data)):
            await sending.send(chunk)
        await sending.flush()
        return _published(source, encoder, len(data), len(data))

    def identity(self, source: Source) -> Identity:
        """Return which file a source is now; raises as `publish` does."""
        with self._open(source) as file:
            return Identity.of(file)

    def _open(self, source: Source) -> BinaryIO:
        try:
            with (
                spool.open_directory(str(self.root)) as root,
                spool.open_directory(source.directory, root) as directory,
            ):
                file = spool.open_file(source.name, directory, source.owner)
                return os.fdopen(file, "rb", buffering=0)
        except FileNotFoundError:
            raise SourceLost(
                "source_vanished", f"{self._path(source)} vanished before it was delivered"
            ) from None
        except (Refused, OSError) as error:
            raise SourceLost("source_unreadable", f"{self._path(source)}: {error}") from None

    def _path(self, source: Source) -> Path:
        return self.root / source.directory / source.name

    def _begin(self, crash_id: str, source: Source) -> tuple[Packing, Sending]:
        compressed = source.kind is Kind.CORE and self.level > 0
        encoder = Encoder(
            chunk_size(self.bus.max_payload), "zstd" if compressed else "identity", self.level or 1
        )
        packing = Packing(encoder, self._background if source.kind in LARGE else None)
        return packing, Sending(self.bus, crash_id, source.name, self.without_room)

    async def _publish(
        self, crash_id: str, source: Source, file: BinaryIO, reach: Reach
    ) -> CrashFile:
        packing, sending = self._begin(crash_id, source)
        limit = self.limit if source.kind in LARGE else min(self.limit, MAX_SMALL)
        ranges = FileRanges(file, packing, reach, limit)
        try:
            await self._send(source, packing, ranges.next, sending)
        except (SourceLost, Unsteady):
            await sending.give_up()
            raise
        except Unreadable as error:
            await sending.give_up()
            text = f"{self._path(source)} cannot be read: {error}"
            raise SourceLost("source_unreadable", text) from None
        return _published(source, packing.encoder, ranges.file_size, limit)

    async def _send(
        self, source: Source, packing: Packing, next_range: NextRange, sending: Sending
    ) -> None:
        """Send all chunks."""
        room, encoder = None, packing.encoder
        async with aclosing(packing.chunks(next_range)) as chunks:
            async for chunk in chunks:
                # Most small files have one chunk, for which there is room.
                if room is None and (chunk.index or source.kind in LARGE):
                    room = await self.bus.chunk_store_bytes(source.name)
                if room is not None and encoder.stored_size + chunk.index * MESSAGE_OVERHEAD > room:
                    raise self._too_large(source, room)
                await sending.send(chunk)
        await sending.flush()

    def _too_large(self, source: Source, room: int) -> SourceLost:
        return SourceLost(
            "larger_than_bus",
            f"{self._path(source)} needs more room on the bus than there is, {room} bytes;"
            f" give the stream {streams.chunks_of(source.name)} more"
            " (CRASHBUS_CHUNK_STORE_BYTES when it is made)",
        )


def _published(source: Source, encoder: Encoder, size: int, limit: int) -> CrashFile:
    metrics.FILES.labels(source.kind).inc()
    metrics.BYTES_SENT.inc(encoder.stored_size)
    note = source.note or _shortfall(encoder.size, size, limit)
    return CrashFile(
        name=source.name,
        kind=source.kind,
        size=encoder.size,
        sha256=encoder.sha256,
        encoding=encoder.encoding if encoder.count else "identity",  # an empty file has no frame
        stored_size=encoder.stored_size,
        chunks=encoder.count,
        truncated=note is not None,
        expected_size=source.expected or (size if size > encoder.size else None),
        note=note,
    )


def _shortfall(actual: int, size: int, limit: int) -> str | None:
    if size > limit:
        return f"cut to {limit} bytes of {size}, see CRASHBUS_COLLECTOR_MAX_FILE_BYTES"
    return f"shrank to {actual} bytes of {size} while it was read" if actual < size else None
