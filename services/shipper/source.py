"""The source of a delivery: a crash file's chunks on the bus, each checked on its way through."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from crashbus.bus import Bus
from crashbus.chunks import Chunk, Unpacked, Verifier
from crashbus.errors import ChunksMissing, DamagedFile
from crashbus.parts import CrashFile
from services.shipper import metrics
from services.shipper.failure import Unfit


@dataclass(frozen=True)
class Piece:
    """One verified chunk.

    Attributes:
        index: position among the chunks, from 0.
        offset: position of `data` in the file, in bytes.
        stored: what a destination stores; pieces end to end are the object.
        data: the same, uncompressed; only until the next piece is asked for.
        sha256: hexadecimal, of `stored`.
    """

    index: int
    offset: int
    stored: bytes
    data: Unpacked
    sha256: str


@dataclass(frozen=True)
class Source:
    """One crash file on the bus.

    Attributes:
        progress: called for each piece, so that a delivery that stands still is noticed.
    """

    bus: Bus
    crash_id: str
    file: CrashFile
    progress: Callable[[], None] = lambda: None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the file's chunks in order.

        It ends without an error only if the whole file is what was announced, so a delivery
        may be completed after the end, and must not be before.

        Raises:
            Unfit: the chunks are not there, or not the file.
            BusUnreachable: the bus did not answer.
        """
        verifier = Verifier(self.file.encoding)
        chunks = self.bus.chunks(self.crash_id, self.file.name, self.file.chunks)
        try:
            async with aclosing(_unpacked(verifier, chunks)) as coming:
                async for chunk, data in coming:
                    offset = verifier.size
                    await asyncio.to_thread(verifier.take, chunk, data)
                    self._check_so_far(verifier)
                    metrics.BYTES_IN.inc(len(chunk.body))
                    self.progress()
                    yield Piece(chunk.index, offset, chunk.body, data, chunk.sha256)
            self._check_whole(verifier)
        except ChunksMissing as error:
            raise Unfit(
                self.file,
                "chunks_missing",
                str(error),
                "if the crashed host still has the file, restart its collector to publish it again",
            ) from error
        except DamagedFile as error:
            raise Unfit(
                self.file,
                "damaged_file",
                str(error),
                "find out who publishes on crash.chunk.>, then let the collector publish it again",
            ) from error

    def _check_so_far(self, verifier: Verifier) -> None:
        # Destinations hold in memory what is small by its announcement.
        if verifier.stored_size > self.file.stored_size or verifier.size > self.file.size:
            raise DamagedFile(f"more bytes came than the {self.file.size} that were announced")

    def _check_whole(self, verifier: Verifier) -> None:
        verifier.finish(self.file.size, self.file.sha256)
        if verifier.stored_size != self.file.stored_size:
            raise DamagedFile(
                f"{verifier.stored_size} stored bytes came, {self.file.stored_size} were announced"
            )


class _Buffer:
    """Where a chunk is unpacked to."""

    def __init__(self) -> None:
        self._memory = bytearray()
        self._chunk: Chunk | None = None
        self._data: Unpacked = b""

    def unpack(self, verifier: Verifier, chunk: Chunk) -> Unpacked:
        """Return what is in a chunk; the same one as before, as those of zeros are, is there."""
        before = self._chunk
        if before and (before.sha256, before.size) == (chunk.sha256, chunk.size):
            return self._data
        self._chunk = None
        if verifier.is_compressed and len(self._memory) < chunk.size:
            self._memory = bytearray(chunk.size)
        self._data = verifier.unpack(chunk, self._memory)
        self._chunk = chunk if verifier.is_compressed else None
        return self._data


async def _one_ahead(chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """Yield chunks; the next one is on its way while the one before is checked and delivered."""
    coming = asyncio.ensure_future(anext(chunks, None))
    try:
        while (chunk := await coming) is not None:
            coming = asyncio.ensure_future(anext(chunks, None))
            yield chunk
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        if not coming.cancelled():
            coming.exception()  # of a chunk that nobody waits for any more


async def _unpacked(
    verifier: Verifier, chunks: AsyncIterator[Chunk]
) -> AsyncGenerator[tuple[Chunk, Unpacked], None]:
    """Yield chunks with what is in them; the next one is unpacked while one is hashed and sent.

    Two buffers take turns, so what was yielded is overwritten when the next one was asked for.
    """
    buffers = deque((_Buffer(), _Buffer()))
    under_way: deque[tuple[Chunk, asyncio.Future[Unpacked]]] = deque()
    try:
        async with aclosing(_one_ahead(chunks)) as coming:
            async for chunk in coming:
                buffers.rotate()
                unpacking = asyncio.to_thread(buffers[0].unpack, verifier, chunk)
                under_way.append((chunk, asyncio.ensure_future(unpacking)))
                if len(under_way) == len(buffers):
                    first, data = under_way.popleft()
                    yield first, await data
        while under_way:
            first, data = under_way.popleft()
            yield first, await data
    finally:
        await asyncio.gather(*(data for _, data in under_way), return_exceptions=True)
