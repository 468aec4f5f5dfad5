"""Fixtures and helpers for tests of the shipper."""

import asyncio
import hashlib
import io
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crashbus import Bus, Receipt, WorkItem, crash_id, streams
from crashbus.chunks import Encoder, chunk_size
from crashbus.consuming import Delivery
from crashbus.destination import parse
from crashbus.fields import Encoding
from crashbus.layout import Kind
from crashbus.messages import DeadLetter
from crashbus.parts import CrashFile
from crashbus.subjects import work_item_filter
from services.common.health import Health
from services.shipper.delivery import Courier
from services.shipper.hands import consumer
from services.shipper.place import Place
from services.shipper.settings import ShipperSettings
from services.shipper.shipper import Shipper
from tests.support.nats import NatsServer, stored
from tests.support.service import ServiceProcess
from tests.support.tcp import Receiver
from tests.support.wait import until

CRASHED_AT = 1795388839.0
MIB = 1024 * 1024
SOME_FILE = CrashFile(
    name="info_1",
    kind=Kind.INFO,
    size=1,
    sha256="0" * 64,
    encoding="identity",
    stored_size=1,
    chunks=1,
)


@dataclass(frozen=True)
class Sent:
    """A crash whose files were put on the bus, as the collector does it."""

    crash_id: str
    files: tuple[CrashFile, ...]
    contents: dict[str, bytes]

    def item(self, destination: str, *names: str, **changes: Any) -> WorkItem:
        """Return a work item for these files (by default all) to one destination."""
        wanted = [file for file in self.files if not names or file.name in names]
        fields: dict[str, Any] = {
            "host": "web1",
            "crash_id": self.crash_id,
            "crashed_at": CRASHED_AT,
            "process_name": "nginx",
            "destination": parse(destination).url,
            "files": tuple(wanted),
        }
        return WorkItem(**(fields | changes))

    async def offer(self, bus: Bus, destination: str) -> None:
        """Publish an item for each file to one destination."""
        for name in self.contents:
            await bus.publish(self.item(destination, name))

    @property
    def folder(self) -> str:
        return self.item("file:///x").folder


def kind_of(name: str) -> Kind:
    return Kind(name.partition("_")[0])


async def send(bus: Bus, contents: dict[str, bytes], encoding: Encoding = "zstd") -> Sent:
    """Put a crash's files on the bus."""
    name = crash_id("boot", 1, int.from_bytes(os.urandom(7), "big"))
    files = [await _send_file(bus, name, *one, encoding) for one in contents.items()]
    return Sent(name, tuple(files), contents)


async def _send_file(
    bus: Bus, crash: str, name: str, content: bytes, encoding: Encoding
) -> CrashFile:
    encoder = Encoder(chunk_size(bus.max_payload), encoding)
    for chunk in encoder.chunks(io.BytesIO(content)):
        await bus.publish_chunk(crash, name, chunk)
    return CrashFile(
        name=name,
        kind=kind_of(name),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        encoding=encoding,
        stored_size=encoder.stored_size,
        chunks=encoder.count,
    )


async def receipts_of(bus: Bus, sent: Sent, count: int, within: float = 60) -> list[Receipt]:
    """Wait until a crash has so many receipts."""
    return await stored(bus, Receipt, count, f"crash.shipped.*.{sent.crash_id}", within)


async def dead_letters(bus: Bus, count: int = 1, within: float = 60) -> list[DeadLetter]:
    """Wait until there are so many dead letters."""
    return await stored(bus, DeadLetter, count, within=within)


async def nothing_left(bus: Bus) -> None:
    """Wait until no work item is on the bus: all were acknowledged."""

    async def empty() -> bool:
        return (await bus._js.stream_info(streams.FILES)).state.messages == 0

    await until(empty)


def taking(bus: Bus, url: str) -> AsyncIterator[Delivery[WorkItem]]:
    """Take a destination's items, as its shippers do."""
    return bus.consume(WorkItem, consumer(url), service="test", subject=work_item_filter(url))


class Absent(Receiver):
    """Takes nothing from its first connection before it is told to."""

    def __init__(self) -> None:
        self.back = threading.Event()
        super().__init__()

    def _read(self, connection: socket.socket) -> bytes | None:
        if connection is self._open[0]:
            self.back.wait()
        return super()._read(connection)


def quick(**changes: Any) -> ShipperSettings:
    """Return settings that do not keep a test waiting."""
    fast: dict[str, Any] = {
        "ack_wait": 3,
        "retry_first": 0.05,
        "retry_cap": 0.5,
        "retry_in_hand": 2,
        "unclaimed_after": 1,
        "source_patience": 0,
        "s3_read_timeout": 5,
        "tcp_write_timeout": 2,
        "tcp_close_timeout": 1,
    }
    return ShipperSettings(**(fast | changes))


Running = Callable[..., AbstractAsyncContextManager[Health]]


@pytest.fixture
def shipping(bus: Bus) -> Running:
    """Run a shipper within the test's event loop: ``async with shipping(urls, settings)``."""

    @asynccontextmanager
    async def run(
        urls: Sequence[str], settings: ShipperSettings | None = None
    ) -> AsyncIterator[Health]:
        settings, health = settings or quick(), Health()
        made = [Place.at(url, settings, health) for url in urls]
        places = {place.url: place for place in made}
        courier = Courier(bus, places, settings, "test-shipper")
        shipper = Shipper(bus, courier, settings, places, "shipper-host")
        task = asyncio.create_task(shipper.run())
        try:
            yield health
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()

    return run


@pytest.fixture
async def shipper_process(
    nats_server: NatsServer, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[ServiceProcess]]]:
    """Start shippers as processes; they are ended with the test."""
    started: list[ServiceProcess] = []

    async def start(urls: Sequence[str], **variables: str) -> ServiceProcess:
        directory = tmp_path / f"shipper-{len(started)}"
        directory.mkdir()
        environment = {
            "CRASHBUS_NATS_URL": nats_server.url,
            "CRASHBUS_DESTINATIONS": ",".join(urls),
            "CRASHBUS_HOST": "shipper-host",
            "CRASHBUS_SHIPPER_ACK_WAIT": "3",
            "CRASHBUS_SHIPPER_RETRY_FIRST": "0.05",
            **variables,
        }
        process = ServiceProcess("shipper", directory, environment)
        started.append(process)
        await process.start()
        return process

    yield start
    for process in started:
        await process.stop()
