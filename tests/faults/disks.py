"""Faults of the host's disks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.faults.blow import Blow
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
    rig = blow.rig
    before = await rig.captures("truncated", "failed")
    rig.spool_disk.fill(leaving=blow.random.randrange(2 * MIB))
    yield

    async def not_whole() -> float:
        return await rig.captures("truncated", "failed") - before

    await blow.until("captures not whole", not_whole)
    rig.spool_disk.empty()
