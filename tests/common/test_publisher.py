"""The publisher with a real nats-server that comes and goes."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crashbus import DeadLetter, connect
from crashbus.messages import EventsLost, SignalEvent
from services.common.bus_settings import BusSettings
from services.common.health import Health
from services.common.outbox import Outbox, Outgoing
from services.common.publisher import Publisher
from services.common.service import Runtime
from tests.support.nats import NatsServer
from tests.support.wait import until


class Publishing:
    """An outbox and its publisher, at work."""

    def __init__(self, server: NatsServer, directory: Path, max_messages: int = 10_000) -> None:
        self.outbox = Outbox(directory / "outbox.sqlite", max_messages, 64 * 1024**2)
        settings = BusSettings(nats_url=server.url, host="h", chunk_store_bytes=64 * 1024**2)
        self.runtime = Runtime("tester", settings, Health())
        self.publisher = Publisher(self.outbox, self.runtime)
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        async def publish() -> None:
            async with self.runtime.bus(makes_streams=True) as bus:
                await self.publisher.run(bus)

        self.task = asyncio.create_task(publish())

    def put(self, *bodies: str) -> None:
        self.outbox.put([Outgoing("crash.signal.h.X", b.encode(), f"id-{b}") for b in bodies])
        self.publisher.wake()

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait({self.task})
        self.outbox.close()


@pytest.fixture
async def publishing(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Publishing]:
    made = Publishing(nats_server, tmp_path, max_messages=400)
    yield made
    await made.stop()


async def stored(server: NatsServer) -> list[str]:
    """Return the bodies on the bus in their order."""
    async with connect(server.url) as bus:
        subscription = await bus._js.pull_subscribe("crash.signal.>", stream="CRASH_SIGNALS")
        count = (await subscription.consumer_info()).num_pending or 0
        found: list[str] = []
        while len(found) < count:
            found += [one.data.decode() for one in await subscription.fetch(count - len(found))]
        return found


async def test_all_is_published_oldest_first(
    nats_server: NatsServer, publishing: Publishing
) -> None:
    bodies = [str(n) for n in range(300)]
    publishing.put(*bodies)
    publishing.start()
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    assert await stored(nats_server) == bodies
    assert publishing.outbox.usage() == (0, 0)


async def test_nothing_is_lost_or_doubled_while_the_server_comes_and_goes(
    nats_server: NatsServer, publishing: Publishing
) -> None:
    publishing.start()
    publishing.put("before")
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    nats_server.kill()
    await until(lambda: "bus_connection" in publishing.runtime.health.faults())
    publishing.put("meanwhile", "and more")
    await until(lambda: "bus" in publishing.runtime.health.faults(), within=60)
    nats_server.start()
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    assert await stored(nats_server) == ["before", "meanwhile", "and more"]
    assert publishing.runtime.health.faults() == {}


async def test_streams_are_made_again_for_a_server_with_an_empty_store(
    nats_server: NatsServer, publishing: Publishing, tmp_path: Path
) -> None:
    publishing.start()
    publishing.put("before")
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    nats_server.kill()
    shutil.rmtree(tmp_path / "nats" / "store")
    nats_server.start()
    publishing.put("after")
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    assert await stored(nats_server) == ["after"]


async def test_a_message_no_server_takes_becomes_a_dead_letter(
    nats_server: NatsServer, publishing: Publishing
) -> None:
    publishing.start()
    publishing.put("x" * 1024 * 1024, "small")
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    assert await stored(nats_server) == ["small"]
    async with connect(nats_server.url) as bus:
        (letter,) = await bus.stored(DeadLetter)
    assert (letter.service, letter.reason, letter.host) == ("tester", "message_too_large", "h")
    assert "max_payload" in letter.mend


async def test_what_found_no_room_is_told_once(
    nats_server: NatsServer, publishing: Publishing
) -> None:
    publishing.put(*(str(n) for n in range(405)))
    publishing.start()
    await asyncio.wait_for(publishing.publisher.drained(), 60)
    async with connect(nats_server.url) as bus:
        told = await bus.stored(EventsLost)
        assert await bus.stored(SignalEvent) == []  # not signal events: malformed, passed over
    assert [(one.stage, one.count) for one in told] == [("outbox", 5)]
    assert publishing.outbox.lost() == 0
