"""Listening and taking work, over the loss of the server and of its store."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from crashbus import Bus, SignalEvent, names
from crashbus.consuming import Consumer
from crashbus.errors import BusUnreachable
from tests.cli.support import make
from tests.support.nats import NatsServer, listens
from tests.support.wait import until


def event(name: str) -> SignalEvent:
    return make().event.model_copy(update={"event_id": name})


async def publish(bus: Bus, name: str) -> None:
    async def done() -> bool:
        with suppress(BusUnreachable):
            await bus.publish(event(name))
            return True
        return False

    await until(done, within=60)


async def next_id(events: AsyncIterator[SignalEvent]) -> str:
    return (await asyncio.wait_for(anext(events), 60)).event_id


async def listen(bus: Bus) -> tuple[list[str], "asyncio.Task[None]"]:
    """Listen from now on; return where the events' IDs are noted, and the task that notes them."""
    heard: list[str] = []

    async def note() -> None:
        async for one in bus.subscribe(SignalEvent):
            heard.append(one.event_id)  # noqa: PERF401 - it never ends

    listening = asyncio.create_task(note())
    await until(lambda: listens(bus), within=60)
    return heard, listening


async def test_who_listens_hears_what_comes_and_not_what_was(bus: Bus) -> None:
    await bus.publish(event("old"))
    async with aclosing(bus.subscribe(SignalEvent)) as events:
        hearing = asyncio.create_task(next_id(events))
        await asyncio.sleep(0)
        for count in range(200):
            await bus.publish(event(f"new{count}"))
            if hearing.done():
                break
            await asyncio.sleep(0.01)
        assert (await hearing).startswith("new")


async def test_who_listens_misses_and_repeats_nothing_over_a_restart(
    nats_server: NatsServer, bus: Bus
) -> None:
    await bus.publish(event("old"))
    heard, listening = await listen(bus)
    await asyncio.to_thread(nats_server.kill)
    await asyncio.to_thread(nats_server.start)
    for name in ("a", "b", "c"):
        await publish(bus, name)
    await until(lambda: len(heard) >= 3, within=60)
    listening.cancel()
    assert heard == ["a", "b", "c"]


async def test_who_listens_hears_what_comes_after_the_bus_lost_its_store(
    nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    for count in range(5):
        await bus.publish(event(f"old{count}"))
    heard, listening = await listen(bus)
    await asyncio.to_thread(nats_server.kill)
    shutil.rmtree(tmp_path / "nats" / "store")
    await asyncio.to_thread(nats_server.start)
    for name in ("a", "b"):
        await publish(bus, name)
    await until(lambda: len(heard) >= 2, within=60)
    listening.cancel()
    assert heard == ["a", "b"]


async def test_work_for_a_host_with_dots_in_its_name(bus: Bus) -> None:
    await bus.publish(event("one"))
    work = bus.consume(SignalEvent, f"worker-{names.token('web1.example.org')}", service="test")
    delivery = await asyncio.wait_for(anext(work), 60)
    await delivery.ack()
    assert delivery.message.event_id == "one"
    assert bus._client.stats["reconnects"] == 0


async def test_work_is_taken_again_when_the_bus_lost_its_store(
    nats_server: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    taken: list[str] = []

    async def work() -> None:
        async for delivery in bus.consume(SignalEvent, "worker", service="test"):
            taken.append(delivery.message.event_id)
            with suppress(BusUnreachable):
                await delivery.ack()

    working = asyncio.create_task(work())
    await publish(bus, "before")
    await until(lambda: taken == ["before"])

    await asyncio.to_thread(nats_server.kill)
    shutil.rmtree(tmp_path / "nats" / "store")
    await asyncio.to_thread(nats_server.start)

    async def streams_made() -> bool:
        with suppress(BusUnreachable):
            await bus.ensure_streams()
            return True
        return False

    await until(streams_made, within=60)
    await publish(bus, "after")
    await until(lambda: taken == ["before", "after"], within=60)
    working.cancel()


async def test_fetch_that_got_no_answer_is_no_fault(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that restarts drops requests; nats-py says so with asyncio's own error, too."""
    fetch, unanswered = JetStreamContext.PullSubscription.fetch, [TimeoutError()]

    async def fetch_unanswered_once(*args: Any, **options: Any) -> list[Msg]:
        if unanswered:
            raise unanswered.pop()
        return await fetch(*args, **options)

    monkeypatch.setattr(JetStreamContext.PullSubscription, "fetch", fetch_unanswered_once)
    await publish(bus, "one")

    work = bus.consume(SignalEvent, "worker", service="test", batch=64)
    delivery = await asyncio.wait_for(anext(work), 60)

    assert delivery.message.event_id == "one"
    assert not unanswered
    assert "cannot take work" not in caplog.text


async def test_all_that_is_stored_is_read_in_order_however_far_apart(bus: Bus) -> None:
    wanted = []
    for number in range(150):
        # Neighbours at first, then ever more of another host between them.
        for other in range(number // 50):
            await bus.publish(event(f"other{number}-{other}").model_copy(update={"host": "other"}))
        await bus.publish(event(f"wanted{number}"))
        wanted.append(f"wanted{number}")

    own = f"crash.signal.{names.token(event('').host)}.>"
    assert [one.event_id for one in await bus.stored(SignalEvent, own)] == wanted
    assert len(await bus.stored(SignalEvent)) == 150 + 50 + 100


async def test_what_was_stored_before_a_moment_is_left_out(bus: Bus) -> None:
    for number in range(10):
        await bus.publish(event(f"before{number}"))
    await asyncio.sleep(0.01)
    moment = time.time()
    await asyncio.sleep(0.01)
    for number in range(5):
        await bus.publish(event(f"since{number}"))

    found = [one.event_id for one in await bus.stored(SignalEvent, since=moment)]
    assert found == [f"since{number}" for number in range(5)]
    assert len(await bus.stored(SignalEvent, since=moment - 60)) == 15
    assert await bus.stored(SignalEvent, since=moment + 60) == []


class Forgetful:
    """A bus's client that begins to wait, and forgets a cancellation, as asyncio.wait_for may."""

    async def pull_subscribe(self, *_: object, **__: object) -> "Forgetful":
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return self

    async def fetch(self, *_: object, **__: object) -> list[Msg]:
        await asyncio.sleep(60)
        return []


async def test_consumer_that_is_cancelled_as_it_begins_ends() -> None:
    forgetful: Any = Forgetful()
    consumer = Consumer(forgetful, "CRASH_FILES", ">", "shipper", None, lambda: until(lambda: True))  # type: ignore[arg-type]
    taking = asyncio.create_task(consumer.next(1))
    await asyncio.sleep(0)  # it has begun

    taking.cancel()

    await asyncio.wait({taking}, timeout=10)
    assert taking.cancelled()
