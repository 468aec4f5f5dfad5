"""Faults of messages: somebody who may publish on the bus repeats, damages or delays them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import msgpack
from nats.aio.msg import Msg

from tests.faults.blow import Blow
from tests.faults.rig import Rig

Fault = Callable[[Blow], AbstractAsyncContextManager[None]]
Meddler = Callable[[Msg], Awaitable[None]]


@asynccontextmanager
async def _listening(rig: Rig, subject: str, meddler: Meddler) -> AsyncIterator[None]:
    """Show everything that is published on a subject to a third party."""
    subscription = await rig.bus._client.subscribe(subject, cb=meddler)
    yield
    await subscription.unsubscribe()


async def _publish(rig: Rig, message: Msg, data: bytes) -> None:
    headers = {k: v for k, v in (message.headers or {}).items() if not k.startswith("Nats-")}
    await rig.bus._client.publish(message.subject, data, headers=headers or None)


def repeated(subject: str, at_once: int) -> Fault:
    """Return a fault that publishes messages once more, so many together, the last one first.

    Work items of one crash go together, or chunks of one file.
    """

    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        waiting: dict[str, list[Msg]] = {}
        ours: set[tuple[str, bytes]] = set()
        count = 0

        async def repeat(message: Msg) -> None:
            nonlocal count
            if (message.subject, message.data) in ours:
                return
            ours.add((message.subject, message.data))
            kept = waiting.setdefault(message.subject.split(".")[3], [])
            kept.append(message)
            if len(kept) == at_once:
                for one in reversed(kept):
                    count += 1
                    await _publish(blow.rig, one, one.data)
                kept.clear()

        async with _listening(blow.rig, subject, repeat):
            yield
            await blow.until("copies", lambda: count)

    return fault


def damaged(subject: str, most: int, damage: Callable[[bytes], bytes]) -> Fault:
    """Return a fault that publishes damaged copies of some messages."""

    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        count = 0

        async def meddle(message: Msg) -> None:
            nonlocal count
            if count < most:
                count += 1
                await _publish(blow.rig, message, damage(message.data))

        async with _listening(blow.rig, subject, meddle):
            yield
            await blow.until("damaged copies", lambda: count)

    return fault


def of_another_file(data: bytes) -> bytes:
    """Return a work item with other hashes."""
    item = msgpack.unpackb(data)
    for file in item["files"]:
        file["sha256"] = "0" * 64
    return bytes(msgpack.packb(item))


MOST_LATE = 8  # copies on one subject
FORGOTTEN_WITHIN = 0.5  # seconds: what the bus has of a crash goes just after its entry


def late(*subjects: str) -> Fault:
    """Return a fault that publishes copies when their crash is delivered and forgotten."""

    @asynccontextmanager
    async def fault(blow: Blow) -> AsyncIterator[None]:
        rig, kept = blow.rig, list[Msg]()

        async def keep(message: Msg) -> None:
            if sum(one.subject == message.subject for one in kept) < MOST_LATE:
                kept.append(message)

        async def repeat() -> int:
            if not kept or any(rig.ledger.glob("*.json")) or await rig.on_bus():
                return 0
            await asyncio.sleep(FORGOTTEN_WITHIN)
            for one in kept:
                await _publish(rig, one, one.data)
            return len(kept)

        async with AsyncExitStack() as stack:
            for subject in subjects:
                await stack.enter_async_context(_listening(rig, subject, keep))
            yield
        await blow.until("late copies", repeat)

    return fault
