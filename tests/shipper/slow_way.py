"""A way to a server that passes on only so many bytes a second, and counts them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

PIECE = 64 * 1024  # bytes


class SlowWay:
    """Between clients and one server on loopback.

    Attributes:
        rate: bytes a second up each connection; 0: as fast as it goes. May be changed.
        up: bytes that clients have sent so far.
    """

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self.up = 0
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counts: bool
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(PIECE):
                if counts:
                    self.up += len(piece)
                    await asyncio.sleep(len(piece) / self.rate if self.rate else 0)
                sink.write(piece)
                await sink.drain()
        sink.close()


@asynccontextmanager
async def slow_way(port: int, rate: int) -> AsyncIterator[SlowWay]:
    """Open a way to a port; it is closed at the end, with all that goes over it."""
    way = SlowWay(rate)
    passing: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", port)
        for source, sink, up in ((reader, onward, True), (there, writer, False)):
            passing.add(asyncio.create_task(way._pass(source, sink, up)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    way.port = server.sockets[0].getsockname()[1]
    try:
        yield way
    finally:
        server.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
