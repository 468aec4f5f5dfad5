"""The limits of the bus as it is shipped: the server has them, and keeps to them."""

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
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


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))


def test_server_has_the_limits_as_they_are_meant(secured: SecuredNats) -> None:
    with urlopen(f"{secured.monitor}/varz") as answer:
        told = json.load(answer)

    assert {name: told[name] for name in LIMITS} == LIMITS
    stores = told["jetstream"]["config"]
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


def is_refused(stack: ExitStack, port: int) -> bool:
    """Connect, and tell whether the server refuses one more; until then the connection stays."""
    connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
    greeting = connection.recv(65536)
    connection.setblocking(False)
    with suppress(BlockingIOError, ConnectionResetError):
        greeting += connection.recv(65536)
    return b"maximum connections exceeded" in greeting


@pytest.mark.usefixtures("many_descriptors")
def test_connections_are_bounded(secured: SecuredNats) -> None:
    """Who has not said who he is yet counts, too, but for a few seconds alone."""
    most = LIMITS["max_connections"]
    with ExitStack() as stack:
        assert not any(is_refused(stack, secured.port) for _ in range(most * 9 // 10))
        assert any(is_refused(stack, secured.port) for _ in range(most))


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
