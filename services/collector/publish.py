"""Putting one crash file on the bus, chunk by chunk, in constant memory.

A file is read and hashed in order; its chunks are made by several threads meanwhile, and sent in
order. All this is done for cores and binaries at a lower priority than for small files.
"""

import asyncio
import errno
import io
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from crashbus import streams
from crashbus.bus import Bus
from crashbus.chunks import Chunk, Encoder, chunk_size
from crashbus.errors import CrashbusError
from crashbus.layout import LARGE, Kind
from crashbus.messages import CrashFile
from services.collector import metrics, spool
from services.collector.growing import Growing, Unsteady
from services.collector.ledger import Source
from services.collector.sending import Sending
from services.collector.spool import Refused

MAX_SMALL = 16 * 1024 * 1024  # bytes of any file that is not large; AppScope's have kilobytes
MESSAGE_OVERHEAD = 512  # bytes of subject and headers that the bus stores with each chunk
PACKED_AT_ONCE = min(4, len(os.sched_getaffinity(0)))  # ranges of a core compressed at a time
PACKED_BYTES = 8 * 1024 * 1024  # of them together, beyond the first
NICE = 5  # of the threads that do so, setpriority(2): all else on the host goes first

Read = Callable[[int], Awaitable[bytes]]  # gives so many bytes of a file, fewer only at its end
NextRange = Callable[[Encoder], Awaitable[bytes]]  # … which are counted and hashed then
Reach = Callable[[int], Awaitable[int]]  # waits until bytes can be read, tells how many can


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


def _in_background() -> ThreadPoolExecutor:
    def begin() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

    return ThreadPoolExecutor(1 + PACKED_AT_ONCE, "large files", begin)


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
    _background: ThreadPoolExecutor = field(default_factory=_in_background)

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
        encoder, sending = self._begin(crash_id, source)
        run = asyncio.get_running_loop().run_in_executor

        async def next_range(encoder: Encoder) -> bytes:
            data = await read(encoder.chunk_size)
            if encoder.size + len(data) > self.limit:
                text = f"{source.name} is larger than {self.limit} bytes"
                raise SourceLost("too_large", f"{text}, see CRASHBUS_COLLECTOR_MAX_FILE_BYTES")
            if data:
                await run(self._background, encoder.cut, data)
            return data

        try:
            await self._send(source, next_range, encoder, sending)
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
                return os.fdopen(spool.open_file(source.name, directory), "rb", buffering=0)
        except FileNotFoundError:
            raise SourceLost(
                "source_vanished", f"{self._path(source)} vanished before it was delivered"
            ) from None
        except (Refused, OSError) as error:
            raise SourceLost("source_unreadable", f"{self._path(source)}: {error}") from None

    def _path(self, source: Source) -> Path:
        return self.root / source.directory / source.name

    def _begin(self, crash_id: str, source: Source) -> tuple[Encoder, Sending]:
        compressed = source.kind is Kind.CORE and self.level > 0
        encoder = Encoder(
            chunk_size(self.bus.max_payload), "zstd" if compressed else "identity", self.level or 1
        )
        return encoder, Sending(self.bus, crash_id, source.name, self.without_room)

    async def _publish(
        self, crash_id: str, source: Source, file: BinaryIO, reach: Reach
    ) -> CrashFile:
        encoder, sending = self._begin(crash_id, source)
        limit = self.limit if source.kind in LARGE else min(self.limit, MAX_SMALL)
        threads = self._threads(source)
        run = asyncio.get_running_loop().run_in_executor
        size = 0  # of the file, which may be above the limit

        async def next_range(encoder: Encoder) -> bytes:
            nonlocal size
            size = await reach(encoder.size + encoder.chunk_size)
            end = min(size, limit)
            if encoder.size >= end:
                return b""
            return await run(threads, self._next, source, file, encoder, end)

        try:
            await self._send(source, next_range, encoder, sending)
        except (SourceLost, Unsteady):
            await sending.give_up()
            raise
        return _published(source, encoder, size, limit)

    def _threads(self, source: Source) -> Executor | None:
        return self._background if source.kind in LARGE else None

    async def _send(
        self, source: Source, next_range: NextRange, encoder: Encoder, sending: Sending
    ) -> None:
        """Send all chunks."""
        room: int | None = None
        threads = self._threads(source)
        run = asyncio.get_running_loop().run_in_executor
        packing: deque[asyncio.Future[Chunk]] = deque()

        async def send_first() -> None:
            nonlocal room
            chunk = await packing.popleft()
            encoder.stored_size += len(chunk.body)
            # Most small files have one chunk, for which there is room.
            if room is None and (chunk.index or source.kind in LARGE):
                room = await self.bus.chunk_store_bytes(source.name)
            if room is not None and encoder.stored_size + chunk.index * MESSAGE_OVERHEAD > room:
                raise self._too_large(source, room)
            await sending.send(chunk)

        while data := await next_range(encoder):
            packing.append(run(threads, encoder.packer.pack, encoder.count - 1, data))
            if len(packing) > min(PACKED_AT_ONCE, PACKED_BYTES // encoder.chunk_size):
                await send_first()
        while packing:
            await send_first()
        await sending.flush()

    def _too_large(self, source: Source, room: int) -> SourceLost:
        return SourceLost(
            "larger_than_bus",
            f"{self._path(source)} needs more room on the bus than there is, {room} bytes;"
            f" give the stream {streams.chunks_of(source.name)} more"
            " (CRASHBUS_CHUNK_STORE_BYTES when it is made)",
        )

    def _next(self, source: Source, file: BinaryIO, encoder: Encoder, end: int) -> bytes:
        """Return the next range up to `end`, counted and hashed; nothing where there is no more."""
        try:
            data = _read(file, encoder.size, min(encoder.chunk_size, end - encoder.size))
        except OSError as error:
            raise SourceLost(
                "source_unreadable", f"{self._path(source)} cannot be read: {error}"
            ) from None
        metrics.BYTES_READ.inc(len(data))
        if data:
            encoder.cut(data)
        return data


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    """Read `size` bytes at a place, fewer only at the end of the file."""
    if _is_hole(file, at, size):
        return bytes(size)
    parts, left = [], size
    while left and (part := os.pread(file.fileno(), left, at + size - left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _is_hole(file: BinaryIO, at: int, size: int) -> bool:
    """Tell whether there is nothing in a range but a hole, lseek(2); it need not be read then."""
    try:
        found = os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        behind_data = error.errno == errno.ENXIO
        return behind_data and at + size <= os.fstat(file.fileno()).st_size
    return found >= at + size


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
