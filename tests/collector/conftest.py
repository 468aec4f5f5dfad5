"""A real collector on a spool of the test's own."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from nats.js.api import StreamConfig

from crashbus import Bus, Manifest, identity, streams
from services.collector.ahead import Ahead
from services.collector.delivery import Deliverer
from services.collector.entering import Entering
from services.collector.gather import Gatherer
from services.collector.ledger import Crash, Ledger, Source
from services.collector.publish import Publisher
from tests.collector.stand_in import StandInShipper, signal_event
from tests.support.crashers import crasher
from tests.support.nats import NatsServer, stored
from tests.support.requirements import need_root
from tests.support.service import ServiceProcess

FILE = "file:///delivered"
TCP = "tcp://127.0.0.1:9"


@dataclass
class Setup:
    bus: Bus
    spool: Path
    state: Path
    collector: ServiceProcess
    shipper: StandInShipper
    nats: NatsServer

    def ledger(self) -> list[Path]:
        return list((self.state / "collector").glob("*.json"))


@pytest.fixture
async def setup(tmp_path: Path, nats_server: NatsServer, bus: Bus) -> AsyncIterator[Setup]:
    """The collector with one directory and one TCP destination, not yet started."""
    need_root()
    spool, state = tmp_path / "appscope", tmp_path / "state"
    tmp_path.chmod(0o755)
    spool.mkdir()
    spool.chmod(0o1777)
    collector = ServiceProcess(
        "collector",
        tmp_path,
        {
            "CRASHBUS_NATS_URL": nats_server.url,
            "CRASHBUS_HOST": "test-host",
            "CRASHBUS_SPOOL": str(spool),
            "CRASHBUS_STATE": str(state),
            "CRASHBUS_DESTINATIONS": f"{FILE},{TCP}",
            "CRASHBUS_COLLECTOR_RECHECK": "1",
        },
    )
    yield Setup(bus, spool, state, collector, StandInShipper(bus), nats_server)
    await collector.stop()


async def fill_chunk_store(setup: Setup) -> StreamConfig:
    """Leave no room for any chunk of a core; it might hold one otherwise."""
    await setup.bus.publish_raw("crash.chunk.filler.x", os.urandom(1_040_000))
    info = await setup.bus._js.stream_info(streams.CHUNKS)
    info.config.max_bytes = info.state.bytes
    await setup.bus._js.update_stream(info.config)
    return info.config


@pytest.fixture
async def shipper(setup: Setup) -> AsyncIterator[asyncio.Task[None]]:
    """A shipper that takes what the collector offers."""
    task = setup.shipper.start()
    yield task
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def crash(setup: Setup, *options: str) -> subprocess.Popen[bytes]:
    """Let a process die as one under AppScope does; the kernel dumps nothing of it."""
    without_core = {**os.environ, "WITHOUT_CORE": "1"}
    return subprocess.Popen([crasher("appscope_like"), setup.spool, *options], env=without_core)


async def reports(setup: Setup, count: int = 1) -> list[Manifest]:
    """Wait until there are so many manifests."""
    return await stored(setup.bus, Manifest, count)


@dataclass
class Delivering:
    """What delivers, within the test's own process; its ledger and spool are below `directory`."""

    bus: Bus
    directory: Path
    host: str = "test-host"

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.directory / "ledger")
        self.ledger.load()
        self.publisher = Publisher(self.bus, self.directory, 1, 1 << 30)
        ahead = Ahead(self.bus, self.ledger, self.publisher, self.directory / "ahead")
        self.deliverer = Deliverer(self.host, self.bus, self.ledger, self.publisher, ahead, 60)


def reported_crash(*sources: Source) -> Crash:
    """Return a crash of this host for one destination, of which these files were reported."""
    event = signal_event(1)
    return Crash(
        crash_id=event.crash_id,
        host="test-host",
        crashed_at=1.0,
        process=event.process,
        destinations=(FILE,),
        reported=tuple(source.name for source in sources),
        sources={source.name: source for source in sources},
    )


def epoch_of(setup: Setup, pid: int) -> int:
    """Return the epoch of a crash's files."""
    return int(next((setup.spool / str(pid)).glob("core_*")).name.split("_")[1])


@pytest.fixture
async def gatherer(tmp_path: Path, bus: Bus) -> AsyncIterator[Gatherer]:
    """Of a spool without any watch yet."""
    root, boot_id = tmp_path / "appscope", identity.boot_id()
    root.mkdir(mode=0o1777)
    ledger = Ledger(tmp_path / "state")
    ledger.load()
    entering = Entering(root, "test-host", boot_id, (), ledger, lambda _: None)
    yield Gatherer(root, "test-host", boot_id, entering, bus, lambda *_: None, lambda: None, 60)
