"""Making chunks of a file's ranges, and the ranges of a file of the spool.

A file is read and hashed in order; its chunks are made by several threads meanwhile. The ranges of
a large file go through a few buffers, again and again: a fresh block for each would cost the kernel
as much time as reading does.
"""

import asyncio
import errno
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from crashbus.chunks import Chunk, Encoder, Packed
from crashbus.errors import CrashbusError
from services.collector import metrics

AT_ONCE = min(4, len(os.sched_getaffinity(0)))  # ranges of a core packed at a time
BYTES_AT_ONCE = 8 * 1024 * 1024  # of them together, beyond the first
NICE = 5  # of the threads that do so, setpriority(2): all else on the host goes first

Range = bytes | bytearray
NextRange = Callable[[], Awaitable[Range]]  # gives the next one, counted and hashed; empty: the end
Reach = Callable[[int], Awaitable[int]]  # waits until bytes can be read, tells how many can


class Unreadable(CrashbusError):
    """A file cannot be read, now or later."""


def in_background() -> ThreadPoolExecutor:
    """Return threads for large files."""

    def begin() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

    return ThreadPoolExecutor(1 + AT_ONCE, "large files", begin)


class Packing:
    """The chunks of one file.

    Args:
        threads: where the work is done; None: where all small work is.

    Attributes:
        spare: memory of whole ranges that were packed.
    """

    def __init__(self, encoder: Encoder, threads: ThreadPoolExecutor | None) -> None:
        self.encoder = encoder
        self.threads = threads
        self.spare: list[bytearray] = []

    async def chunks(self, next_range: NextRange) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of all ranges, in order."""
        run, encoder = asyncio.get_running_loop().run_in_executor, self.encoder
        packing = deque[asyncio.Future[list[Packed]]]()
        while data := await next_range():
            packing.append(run(self.threads, self._pack, data))
            if len(packing) > min(AT_ONCE, BYTES_AT_ONCE // encoder.range_size):
                for chunk in encoder.number(await packing.popleft()):
                    yield chunk
        while packing:
            for chunk in encoder.number(await packing.popleft()):
                yield chunk
        for chunk in encoder.finish():
            yield chunk

    def _pack(self, data: Range) -> list[Packed]:
        packed = self.encoder.packer.pack(data)
        if isinstance(data, bytearray) and len(data) == self.encoder.range_size:
            self.spare.append(data)
        return packed


class FileRanges:
    """The ranges of one file, from its beginning.

    Args:
        limit: bytes that are read at most.

    Attributes:
        file_size: of the whole file as it was last seen, which may be above the limit.
    """

    def __init__(self, file: BinaryIO, packing: Packing, reach: Reach, limit: int) -> None:
        self._file = file
        self._packing = packing
        self._encoder = packing.encoder
        self._reach = reach
        self._limit = limit
        self.file_size = 0

    async def next(self) -> Range:
        """Return the next range.

        Raises:
            Unreadable: no more of it can be read.
        """
        encoder = self._encoder
        self.file_size = await self._reach(encoder.size + encoder.range_size)
        end = min(self.file_size, self._limit)
        if encoder.size >= end:
            return b""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._packing.threads, self._next, end)

    def _next(self, end: int) -> Range:
        encoder = self._encoder
        try:
            data = self._read(encoder.size, min(encoder.range_size, end - encoder.size))
        except OSError as error:
            raise Unreadable(str(error)) from error
        metrics.BYTES_READ.inc(len(data))
        if data:
            encoder.cut(data)
        return data

    def _read(self, at: int, size: int) -> Range:
        """Read `size` bytes at a place, fewer only at the end of the file."""
        is_whole, spare = size == self._encoder.range_size, self._packing.spare
        if _is_hole(self._file, at, size):
            return self._encoder.packer.zeros if is_whole else bytes(size)
        buffer = spare.pop() if is_whole and spare else bytearray(size)
        rest = memoryview(buffer)
        while rest and (read := os.preadv(self._file.fileno(), [rest], at + size - len(rest))):
            rest = rest[read:]
        return bytes(buffer[: size - len(rest)]) if rest else buffer


def _is_hole(file: BinaryIO, at: int, size: int) -> bool:
    """Tell whether there is nothing in a range but a hole, lseek(2); it need not be read then."""
    try:
        found = os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        behind_data = error.errno == errno.ENXIO
        return behind_data and at + size <= os.fstat(file.fileno()).st_size
    return found >= at + size
