"""The source of a delivery: a crash file's chunks on the bus, each checked on its way through."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from crashbus.bus import Bus
from crashbus.chunks import Chunk, Verifier
from crashbus.errors import ChunksMissing, DamagedFile
from crashbus.messages import CrashFile
from services.shipper import metrics
from services.shipper.failure import Unfit


@dataclass(frozen=True)
class Piece:
    """One verified chunk.

    Attributes:
        index: position among the chunks, from 0.
        offset: position of `data` in the file, in bytes.
        stored: what a destination stores; pieces end to end are the object.
        data: the same, uncompressed.
        sha256: hexadecimal, of `stored`.
    """

    index: int
    offset: int
    stored: bytes
    data: bytes
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
            async with aclosing(_one_ahead(chunks)) as coming:
                async for chunk in coming:
                    piece = await asyncio.to_thread(_checked, verifier, chunk)
                    metrics.BYTES_IN.inc(len(piece.stored))
                    self.progress()
                    yield piece
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

    def _check_whole(self, verifier: Verifier) -> None:
        verifier.finish(self.file.size, self.file.sha256)
        if verifier.stored_size != self.file.stored_size:
            raise DamagedFile(
                f"{verifier.stored_size} stored bytes came, {self.file.stored_size} were announced"
            )


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


def _checked(verifier: Verifier, chunk: Chunk) -> Piece:
    offset = verifier.size
    data = verifier.accept(chunk)
    return Piece(chunk.index, offset, chunk.body, data, chunk.sha256)
