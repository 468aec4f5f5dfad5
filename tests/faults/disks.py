"""Faults of the host's disks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults.blow import LOOK_EVERY, Blow
from tests.faults.crashes import MIB
from tests.support.disk import SmallDisk
from tests.support.wait import until

_NO_ROOM = "No space left on device"


@asynccontextmanager
async def filled(blow: Blow, disk: SmallDisk, hits: str, said: str) -> AsyncIterator[None]:
    """Fill a disk until the collector has said so."""
    before = blow.rig.collector.log.count(said)
    disk.fill()
    yield
    await blow.until(hits, lambda: blow.rig.collector.log.count(said) - before)


@asynccontextmanager
async def ledger_full(blow: Blow) -> AsyncIterator[None]:
    async with filled(blow, blow.rig.state_disk, "writes failed", _NO_ROOM):
        yield
    blow.rig.state_disk.empty()


@asynccontextmanager
async def ledger_hangs(blow: Blow) -> AsyncIterator[None]:
    """Whoever writes there stands still, and everything else goes on."""
    rig = blow.rig
    await blow.reach("crashes in its hands", rig.undelivered)
    with rig.state_disk.hanging():
        yield
        await blow.until("threads that hang", lambda: len(rig.collector.hanging_threads()))
        # The event loop runs in the main thread, whose ID is that of the process.
        await until(lambda: rig.collector.pid not in rig.collector.hanging_threads())


@asynccontextmanager
async def spool_full(blow: Blow) -> AsyncIterator[None]:
    """Nothing finds room there, or small files alone; what the collector gives back is taken."""
    rig = blow.rig
    before, begun = await rig.without_room(), len(rig.begun)
    async with _kept_full(rig.spool_disk, leaving=blow.random.choice((0, MIB))):
        yield

        async def found_no_room() -> float:
            return await rig.without_room() - before

        await blow.until("times without room", found_no_room)
    blow.may_be_lost.update(rig.begun[begun:])


@asynccontextmanager
async def _kept_full(disk: SmallDisk, leaving: int) -> AsyncIterator[None]:
    over = asyncio.Event()

    async def fill() -> None:
        while not over.is_set():
            await asyncio.to_thread(disk.fill, leaving)
            await asyncio.sleep(LOOK_EVERY)

    filling = asyncio.create_task(fill())
    try:
        yield
    finally:
        over.set()
        await filling
        disk.empty()
