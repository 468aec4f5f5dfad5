"""Faults of processes: they are killed or stopped while they have something in hand."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from signal import SIGCONT, SIGKILL, SIGSTOP

from tests.faults.blow import Blow
from tests.faults.rig import Rig
from tests.support import core_pattern
from tests.support.service import ServiceProcess
from tests.support.wait import until

SWIFT = 0.05  # seconds; most captures take little more


@asynccontextmanager
async def collector_killed(blow: Blow) -> AsyncIterator[None]:
    await blow.catch([blow.rig.collector], "crashes in its hands", blow.rig.undelivered)
    blow.rig.collector.kill(SIGKILL)
    yield
    await blow.rig.restart(blow.rig.collector)


@asynccontextmanager
async def collector_stopped(blow: Blow) -> AsyncIterator[None]:
    await blow.catch([blow.rig.collector], "crashes in its hands", blow.rig.undelivered)
    yield
    blow.rig.collector.kill(SIGCONT)


@asynccontextmanager
async def shipper_killed(blow: Blow) -> AsyncIterator[None]:
    async with _items_taken_over(blow, SIGKILL):
        yield


@asynccontextmanager
async def shipper_stopped(blow: Blow) -> AsyncIterator[None]:
    async with _items_taken_over(blow, SIGSTOP):
        yield


@asynccontextmanager
async def _items_taken_over(blow: Blow, number: int) -> AsyncIterator[None]:
    """Hit a shipper with items in hand, and again until it has lost one to another."""
    rig = blow.rig
    shipper, before = rig.service("shipper"), rig.taken_over
    # What is done in milliseconds is hardly ever met.
    rig.s3_way.latency = blow.random.uniform(0.05, 0.2)

    async def strike() -> None:
        await blow.reach("items in its hands", lambda: rig.metric(shipper, _IN_HAND))
        shipper.kill(number)

    async def lost_one() -> bool:
        """Tell whether an item was taken over, once that or its end can be seen."""
        while rig.taken_over == before and await rig.given_out():
            await blow.pause()
        return rig.taken_over > before

    await strike()
    yield
    while True:
        if number == SIGKILL:
            await rig.restart(shipper)
        is_done = await lost_one()
        if number == SIGSTOP:
            shipper.kill(SIGCONT)
        if is_done:
            break
        await strike()
    rig.s3_way.restore()
    blow.hits["items taken over"] += rig.taken_over - before


_IN_HAND = "crashbus_shipper_items_in_hand"


@asynccontextmanager
async def all_shippers_killed(blow: Blow) -> AsyncIterator[None]:
    rig = blow.rig
    rig.s3_way.latency = blow.random.uniform(0.05, 0.2)
    await blow.catch(rig.shippers, "items in their hands", rig.given_out)
    for shipper in rig.shippers:
        shipper.kill(SIGKILL)
    yield
    rig.s3_way.restore()
    for shipper in rig.shippers:
        await rig.restart(shipper)


@asynccontextmanager
async def all_killed(blow: Blow) -> AsyncIterator[None]:
    """Without recorder and detector nobody would ever know of a crash: one of them stays."""
    rig = blow.rig
    services = [service for service in rig.services if service.name != "detector"]
    await blow.catch(services, "crashes in their hands", lambda: _in_any_hand(rig))
    gap = _gap(blow) if rig.capture else None
    rig.nats.kill()
    for service in services:
        service.kill(SIGKILL)
    if gap:
        await gap
    yield
    await rig.restart_nats()
    for service in services:
        await rig.restart(service)


def _in_any_hand(rig: Rig) -> int:
    return rig.undelivered() + (len(rig.being_captured()) if rig.capture else 0)


# With real crashes


@asynccontextmanager
async def recorder_killed(blow: Blow) -> AsyncIterator[None]:
    recorder = await _recorder_caught(blow)
    gap = _gap(blow)
    recorder.kill(SIGKILL)
    await gap
    yield
    await blow.rig.restart(recorder)


@asynccontextmanager
async def recorder_stopped(blow: Blow) -> AsyncIterator[None]:
    """It goes on, or was killed for it."""
    recorder = await _recorder_caught(blow)
    gap = _gap(blow)
    yield
    if recorder.has_ended:
        await gap
        await blow.rig.restart(recorder)
    else:
        gap.cancel()
        recorder.kill(SIGCONT)


async def _recorder_caught(blow: Blow) -> ServiceProcess:
    recorder = blow.rig.service("recorder")
    await blow.catch(
        [recorder], "crashes being captured", lambda: len(blow.rig.being_captured()), SWIFT
    )
    return recorder


def _gap(blow: Blow) -> asyncio.Task[None]:
    """Note what may be lost with a recorder that stands still now, if it is killed."""
    return asyncio.create_task(_until_helper(blow, blow.rig.being_captured(), len(blow.rig.begun)))


async def _until_helper(blow: Blow, in_hand: set[int], begun: int) -> None:
    """Note what a recorder had in hand, and what crashed until the pipe helper stood in for it."""
    await until(lambda: core_pattern.current().startswith("|"))
    blow.may_be_lost |= in_hand.union(blow.rig.begun[begun:])


@asynccontextmanager
async def detector_killed(blow: Blow) -> AsyncIterator[None]:
    detector = blow.rig.service("detector")
    async with _missing_crashes(blow, "crashes unseen"):
        detector.kill(SIGKILL)
        yield
    await blow.rig.restart(detector)


@asynccontextmanager
async def detector_stopped(blow: Blow) -> AsyncIterator[None]:
    detector = blow.rig.service("detector")
    async with _missing_crashes(blow, "crashes seen late"):
        detector.kill(SIGSTOP)
        yield
    detector.kill(SIGCONT)


@asynccontextmanager
async def _missing_crashes(blow: Blow, what: str) -> AsyncIterator[None]:
    before = len(blow.rig.begun)
    yield
    await blow.until(what, lambda: len(blow.rig.begun) - before)
