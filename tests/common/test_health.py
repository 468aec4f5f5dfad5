"""Health is told to whoever asks, whatever others do at its port."""

import asyncio
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from services.common import health
from services.common.health import Health, serve
from tests.support.nats import free_port
from tests.support.wait import until

REQUEST = b"GET /healthz HTTP/1.0\r\n"


@pytest.fixture
def served() -> Health:
    return Health()


@pytest.fixture
def port(served: Health) -> Iterator[int]:
    port = free_port()
    stop = serve(served, f"127.0.0.1:{port}")
    yield port
    stop()


def answering() -> int:
    """Return how many threads have a request, ThreadingMixIn names them so."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


async def test_those_who_never_finish_a_request_take_few_threads_and_keep_nobody_out(
    port: int,
) -> None:
    with ExitStack() as stack:
        for _ in range(3 * health.MOST_REQUESTS):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            one.sendall(REQUEST)

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as answer:
            assert answer.status == 200
        await until(lambda: answering() <= health.MOST_REQUESTS, within=health.ANSWER_WITHIN / 2)


async def test_those_who_flood_the_port_keep_out_nobody_who_has_asked(
    served: Health, port: int
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        answer.wait(30)

    served.watch("slow", slow)
    probe = asyncio.create_task(asyncio.to_thread(_status, port))
    await until(asked.is_set)
    with ExitStack() as stack:
        flood = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            for _ in range(3 * health.MOST_REQUESTS)
        ]
        assert flood[health.MOST_REQUESTS].recv(1) == b""  # it was hung up on

        answer.set()

        assert await probe == 200


def _status(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as answer:
        return int(answer.status)


def test_who_says_a_byte_now_and_then_is_hung_up_on(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWER_WITHIN", 0.1)
    end = time.monotonic() + 20
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.settimeout(0.05)
        slow.sendall(REQUEST)
        with pytest.raises((ConnectionResetError, BrokenPipeError, EOFError)):
            while time.monotonic() < end:
                slow.sendall(b"X")
                try:
                    if not slow.recv(1):
                        raise EOFError
                except TimeoutError:
                    continue
