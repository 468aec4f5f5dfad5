"""Faults of the ways between services and servers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

from tests.faults.blow import Blow
from tests.support.proxy import Proxy

SLOWED = 10  # pieces, at least

Fault = Callable[[Blow], AbstractAsyncContextManager[None]]


def bad(way: str, hits: str, least: int = 1, **attributes: object) -> Fault:
    """Return a fault that makes a way bad as the attributes of `Proxy` say.

    Args:
        hits: what the way counts then, `least` times or more.
    """

    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        proxy: Proxy = getattr(blow.rig, way)
        async with blow.counting(hits, least):
            for name, value in attributes.items():
                setattr(proxy, name, value)
            proxy.cut()  # connections that are open were made before it
            yield
        proxy.restore()

    return fault


def slow(way: str, latency: float) -> Fault:
    return bad(way, "large pieces slowed", SLOWED, latency=latency, rate=4 * 1024 * 1024)


def silent(way: str) -> Fault:
    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        proxy: Proxy = getattr(blow.rig, way)
        await blow.reach("messages on the bus", blow.rig.on_bus)
        async with blow.counting("pieces held back"):
            proxy.silence()
            yield
        proxy.restore()

    return fault


def cut_again_and_again(way: str) -> Fault:
    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        proxy: Proxy = getattr(blow.rig, way)
        async with blow.counting("connections cut"):
            cutting = asyncio.create_task(_cutting(proxy, blow))
            yield
        cutting.cancel()

    return fault


async def _cutting(way: Proxy, blow: Blow) -> None:
    """Cut a way as long as something goes over it."""
    while True:
        if await blow.rig.on_bus():
            way.cut()
        await asyncio.sleep(blow.random.uniform(0.01, 0.4))


# A file is published again five times; one that is always damaged fails, as it should.
MOST_FLIPS = 3


class Flips:
    """Changes a byte in the middle of some pieces; only a body is so long."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.count = 0

    def __call__(self, piece: bytes) -> bytes:
        if len(piece) < 48 * 1024 or self.count == MOST_FLIPS or self._random.random() > 0.1:
            return piece
        self.count += 1
        return flipped(piece)


def flipped(data: bytes) -> bytes:
    """Return data with a bit in its middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def flips(way: str, direction: str) -> Fault:
    """Return a fault that changes bytes; until some were changed, it goes on."""

    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        proxy: Proxy = getattr(blow.rig, way)
        change = Flips(blow.random)
        setattr(proxy, f"change_{direction}", change)
        yield
        await blow.until("bytes flipped", lambda: change.count)
        proxy.restore()

    return fault
