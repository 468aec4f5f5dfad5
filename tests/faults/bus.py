"""Faults of the bus: its server, its store and its disk."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from signal import SIGCONT

import nats.errors

from crashbus import streams
from tests.faults.blow import Blow
from tests.faults.crashes import MIB
from tests.faults.disks import filled

WAITING = "messages on it"


@asynccontextmanager
async def nats_killed(blow: Blow) -> AsyncIterator[None]:
    await blow.reach(WAITING, blow.rig.on_bus)
    blow.rig.nats.kill()
    yield
    await blow.rig.restart_nats()


@asynccontextmanager
async def nats_stopped(blow: Blow) -> AsyncIterator[None]:
    await blow.reach(WAITING, blow.rig.on_bus)
    blow.rig.nats.pause()
    yield
    blow.rig.nats.resume()


@asynccontextmanager
async def nats_store_lost(blow: Blow) -> AsyncIterator[None]:
    await blow.reach(WAITING, blow.rig.on_bus)
    blow.rig.nats.kill()
    yield
    await blow.rig.restart_nats(lose_store=True)


@asynccontextmanager
async def chunks_lost(blow: Blow) -> AsyncIterator[None]:
    """They are removed before they were read, again and again."""
    rig = blow.rig

    async def removed() -> int:
        with suppress(nats.errors.Error, OSError):
            found = (await rig.bus._js.stream_info(streams.CHUNKS)).state.messages
            await rig.bus._js.purge_stream(streams.CHUNKS)
            return found
        return 0

    yield
    await blow.until("chunks lost", removed)


@asynccontextmanager
async def store_full(blow: Blow) -> AsyncIterator[None]:
    """No shipper takes anything away, and there is room for one core."""
    rig = blow.rig
    config = (await rig.bus._js.stream_info(streams.CHUNKS)).config
    room, before = config.max_bytes, await rig.metric(rig.collector, _FULL)
    rig.shipper_way.silence()
    await rig.bus._js.update_stream(config.evolve(max_bytes=rig.largest * MIB + 2 * MIB))
    yield

    async def refused() -> float:
        return await rig.metric(rig.collector, _FULL) - before

    await blow.until("times store full", refused)
    await rig.bus._js.update_stream(config.evolve(max_bytes=room))
    rig.shipper_way.restore()


_FULL = "crashbus_collector_bus_full_total"


@asynccontextmanager
async def disk_full(blow: Blow) -> AsyncIterator[None]:
    """A server that ran out of disk may need a restart, whoever it serves."""
    rig = blow.rig
    # The server's own log lies on that disk.
    async with filled(blow, rig.nats_disk, "refused messages", "waiting for the bus"):
        yield
    rig.nats.kill()
    rig.nats_disk.empty()
    await rig.restart_nats()


@asynccontextmanager
async def receipts_lost(blow: Blow) -> AsyncIterator[None]:
    """The collector never hears of what was delivered while it did not listen."""
    rig = blow.rig
    while True:
        await blow.catch([rig.collector], "work items on their way", rig.items)
        # Their receipts may have been taken before they are acknowledged.
        while not await rig.untaken_receipts() and await rig.items():
            await blow.pause()
        if await rig.untaken_receipts():
            break
        rig.collector.kill(SIGCONT)
    yield
    blow.hits["receipts lost"] += await rig.untaken_receipts()
    await rig.bus._js.purge_stream(streams.RECEIPTS)
    rig.collector.kill(SIGCONT)
