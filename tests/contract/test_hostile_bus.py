"""What anyone who may publish can put on the bus, and what a server may say: no one goes deaf."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from crashbus import Bus, DeadLetter, SignalEvent, connect
from crashbus.errors import BusUnreachable, MessageTooLarge
from tests.cli.support import make
from tests.support.nats import NatsServer, free_port, listens
from tests.support.wait import until

EVENT = make().event


async def send(server: NatsServer, *commands: bytes) -> None:
    """Say something to the server as no client library would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n' + b"".join(commands) + b"PING\r\n")
    assert await asyncio.wait_for(reader.readline(), 60) == b"PONG\r\n"
    writer.close()
    await writer.wait_closed()


def pub(subject: bytes, payload: bytes = b"x") -> bytes:
    return b"PUB %b %d\r\n%b\r\n" % (subject, len(payload), payload)


def hpub(header: bytes, payload: bytes) -> bytes:
    size = len(header)
    return b"HPUB crash.signal.h.X %d %d\r\n%b%b\r\n" % (
        size,
        size + len(payload),
        header,
        payload,
    )


ODD_SUBJECTS = {
    "not UTF-8": b"crash.signal.h.\xff\xfe",
    "a vertical tab": b"crash.signal.h.\x0b7",
    "a form feed at its end": b"crash.signal.h.\x0c",
}
ODD_HEADERS = {
    "nothing behind the version": b"NATS/1.0",
    "a status that is not UTF-8": b"NATS/1.0 \xff\xfe\xfd\r\n\r\n",
    "a description that is not UTF-8": b"NATS/1.0 200 \xff\r\n\r\n",
    "a status of the server": b"NATS/1.0 409 Consumer Deleted\r\n\r\n",
    "no such message": b"NATS/1.0 404\r\n\r\n",
    "a status without a description": b"NATS/1.0\r\nStatus: 500\r\n\r\n",
    "a status that is no number": b"NATS/1.0\r\nStatus: \xc2\xb2\r\n\r\n",
}


async def assert_heard(bus: Bus, events: AsyncIterator[SignalEvent]) -> None:
    event = await asyncio.wait_for(anext(events), 60)
    assert event == EVENT
    assert bus._client.stats["reconnects"] == 0


@pytest.mark.parametrize("subject", ODD_SUBJECTS.values(), ids=ODD_SUBJECTS)
async def test_a_subject_that_is_no_text_is_put_aside(
    nats_server: NatsServer, bus: Bus, subject: bytes
) -> None:
    await send(nats_server, pub(subject))
    await bus.publish(EVENT)

    assert await bus.stored(SignalEvent) == [EVENT]
    async with aclosing(bus.consume(SignalEvent, "worker", service="test")) as work:
        delivery = await asyncio.wait_for(anext(work), 60)
        await delivery.ack()
    assert delivery.message == EVENT
    (letter,) = await bus.stored(DeadLetter)
    assert letter.reason == "malformed_message"
    assert letter.subject_received == subject.decode("utf-8", "backslashreplace")
    assert letter.error.isprintable()
    assert bus._client.stats["reconnects"] == 0


@pytest.mark.parametrize("header", ODD_HEADERS.values(), ids=ODD_HEADERS)
async def test_headers_of_any_kind_stop_no_one(
    nats_server: NatsServer, bus: Bus, header: bytes
) -> None:
    await send(nats_server, hpub(header, EVENT.encode()))
    await send(nats_server, hpub(header, b""))
    other = EVENT.model_copy(update={"event_id": "other"})
    await bus.publish(other)

    assert await bus.stored(SignalEvent) == [EVENT, other]
    async with aclosing(bus.consume(SignalEvent, "worker", service="test")) as work:
        for expected in (EVENT, other):
            delivery = await asyncio.wait_for(anext(work), 60)
            assert delivery.message == expected
            await delivery.ack()
    assert bus._client.stats["reconnects"] == 0


async def test_who_listens_hears_on_behind_odd_messages(nats_server: NatsServer, bus: Bus) -> None:
    async with aclosing(bus.subscribe(SignalEvent)) as events:
        first = asyncio.create_task(assert_heard(bus, events))
        await until(lambda: listens(bus), within=60)
        await send(nats_server, *(pub(subject) for subject in ODD_SUBJECTS.values()))
        await send(nats_server, *(hpub(header, b"") for header in ODD_HEADERS.values()))
        await bus.publish(EVENT)
        await first


# A reply below $JS.ACK the server itself refuses.
@pytest.mark.parametrize("reply", [b"", b"x.y "], ids=["none", "elsewhere"])
async def test_a_message_past_the_stream_is_dropped(
    nats_server: NatsServer, bus: Bus, reply: bytes
) -> None:
    async with aclosing(bus.consume(SignalEvent, "worker", service="test")) as work:
        taking = asyncio.ensure_future(anext(work))
        inbox = await until(lambda: _inbox(bus))
        payload = EVENT.encode()
        await send(nats_server, b"PUB %b %b%d\r\n%b\r\n" % (inbox, reply, len(payload), payload))
        await until(lambda: bus.malformed == 1)
        await bus.publish(EVENT)
        delivery = await asyncio.wait_for(taking, 60)
        assert delivery.attempts == 1
        await delivery.ack()


def _inbox(bus: Bus) -> bytes:
    """Return the inbox of the only fetch there is: others who may subscribe to > see it too."""
    subjects = [one.subject for one in bus._client._subs.values() if one._cb is None]
    return subjects[0].encode() if subjects else b""


async def test_a_reader_that_has_ended_is_no_connection(bus: Bus) -> None:
    assert bus.is_connected
    reader = bus._client._reading_task
    assert reader is not None
    reader.cancel()
    await asyncio.wait({reader})
    assert not bus.is_connected


async def test_a_reader_that_fails_begins_anew(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process, failed = bus._client._process_msg, False

    async def fail_once(*given: Any) -> None:
        nonlocal failed
        if failed:
            await process(*given)
        failed = True
        if not bus._client.stats["reconnects"]:
            raise RuntimeError("not foreseen")

    monkeypatch.setattr(bus._client, "_process_msg", fail_once)
    caplog.set_level(logging.CRITICAL, "nats")
    with pytest.raises(BusUnreachable):
        await bus.publish(EVENT)
    await until(lambda: bus._client.stats["reconnects"] == 1, within=60)
    monkeypatch.undo()
    await until(lambda: bus.is_connected)
    await bus.publish(EVENT)


async def test_reading_what_is_stored_leaves_nothing_behind(bus: Bus) -> None:
    await bus.publish(EVENT)
    await bus.stored(SignalEvent)
    before = len(bus._client._subs)
    await bus.stored(SignalEvent)
    assert len(bus._client._subs) == before
    assert (await bus._js.stream_info("CRASH_SIGNALS")).state.consumer_count == 0


async def test_a_message_above_the_servers_limit_is_refused_by_name(bus: Bus) -> None:
    with pytest.raises(MessageTooLarge, match="max_payload"):
        await bus.publish_raw("crash.signal.h.X", bytes(bus.max_payload + 1))
    # Over its headers the server would close the connection.
    with pytest.raises(MessageTooLarge):
        await bus.publish_raw("crash.signal.h.X", bytes(bus.max_payload), {"Nats-Msg-Id": "1"})
    room = bus.max_payload - len("NATS/1.0\r\nNats-Msg-Id: 1\r\n\r\n")
    await bus.publish_raw("crash.signal.h.X", bytes(room), {"Nats-Msg-Id": "1"})
    with pytest.raises(MessageTooLarge):
        await bus.publish_raw("crash.signal.h.X", bytes(room + 1), {"Nats-Msg-Id": "2"})
    assert bus._client.stats["reconnects"] == 0


async def test_work_in_hand_is_bounded_as_asked(bus: Bus) -> None:
    for name in ("a", "b"):
        await bus.publish(EVENT.model_copy(update={"event_id": name}))
    work = bus.consume(SignalEvent, "worker", service="test", max_ack_pending=1)
    async with aclosing(work):
        first = await asyncio.wait_for(anext(work), 60)
        info = await bus._js.consumer_info("CRASH_SIGNALS", "worker")
        assert info.config.max_ack_pending == 1
        await first.ack()
        assert (await asyncio.wait_for(anext(work), 60)).message.event_id == "b"


async def test_a_refused_port_is_said_to_be_refused() -> None:
    with pytest.raises(BusUnreachable, match="ConnectionRefusedError"):
        async with connect(f"nats://127.0.0.1:{free_port()}"):
            pass


async def test_a_port_that_stays_silent_is_no_bus() -> None:
    silent = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    with pytest.raises(BusUnreachable, match="no NATS server answers"):
        async with connect(f"nats://127.0.0.1:{port}"):
            pass
    silent.close()
