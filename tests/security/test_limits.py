"""The limits of the bus as it is shipped: the server has them, and keeps to them."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from crashbus import connect, streams
from crashbus.errors import BusFull
from tests.support.nats import SecuredNats
from tests.support.wait import until

MIB = 1024 * 1024
GIB = 1024 * MIB
LIMITS = {
    "max_payload": MIB,
    "max_connections": 4096,
    "max_control_line": 4096,
    "max_pending": 64 * MIB,
    "write_deadline": 10_000_000_000,  # nanoseconds
    "auth_timeout": 5,  # seconds
}
SUBSCRIPTIONS = 1024  # of one connection; the server does not tell
FEW = 64  # connections, so many as can be opened long before the server tires of silent ones


def told(server: SecuredNats) -> dict[str, Any]:
    """Return what the server tells of itself."""
    with urlopen(f"{server.monitor}/varz") as answer:
        return dict(json.load(answer))


def test_server_has_the_limits_as_they_are_meant(secured: SecuredNats) -> None:
    varz = told(secured)

    assert {name: varz[name] for name in LIMITS} == LIMITS
    stores = varz["jetstream"]["config"]
    assert (stores["max_memory"], stores["max_storage"]) == (64 * MIB, 16 * GIB)


async def test_message_above_the_limit_is_refused_by_the_server(secured: SecuredNats) -> None:
    async with connect(**secured.options("operator")) as bus:
        client = bus._client
        client._max_payload = 2 * MIB  # else it would refuse by itself
        await client.publish("crash.x", bytes(MIB))
        await client.flush(60)
        assert "maximum payload" not in secured.log.lower()
        await client.publish("crash.x", bytes(MIB + 1))
        await until(lambda: "maximum payload exceeded" in secured.log)


async def test_connection_that_subscribes_too_often_is_refused(secured: SecuredNats) -> None:
    async with connect(**secured.options("consumer")) as bus:
        for _ in range(SUBSCRIPTIONS):
            await bus._client.subscribe("crash.signal.>")
        await bus._client.flush(60)
        assert "maximum subscriptions" not in secured.log
        await bus._client.subscribe("crash.signal.>")
        await until(lambda: "maximum subscriptions exceeded" in secured.log)


@pytest.fixture
def for_few(program: str, tmp_path: Path) -> Iterator[SecuredNats]:
    """The bus as it is shipped, but for no more than a few connections."""
    server = SecuredNats(tmp_path, program=program)
    with server.config.open("a") as config:
        config.write(f"max_connections: {FEW}\n")  # the last one counts
    server.start()
    yield server
    server.stop()


async def test_connections_are_bounded(for_few: SecuredNats) -> None:
    """Who has not said who he is yet counts, too, but for a few seconds alone."""
    with ExitStack() as stack:

        def connected() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", for_few.port), 60))

        for _ in range(FEW):
            connected()
        await until(lambda: told(for_few)["connections"] == FEW)
        with connected().makefile("rb") as one_more:
            assert b"maximum connections exceeded" in one_more.read()
    await until(lambda: told(for_few)["connections"] == 0)


async def test_store_has_room_for_all_streams_and_for_no_larger_ones(secured: SecuredNats) -> None:
    async with connect(**secured.options("operator")) as bus:
        await bus.ensure_streams()  # as the collector makes them
        chunks = (streams.CHUNKS, streams.SMALL_CHUNKS)
        sizes = [(await bus._js.stream_info(one)).config.max_bytes or 0 for one in chunks]
        assert sum(sizes) == 8 * GIB
        for one in chunks:
            await bus._js.delete_stream(one)
        with pytest.raises(BusFull):
            await bus.ensure_streams(16 * GIB)
