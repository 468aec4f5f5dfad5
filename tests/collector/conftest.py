"""A real collector on a spool of the test's own."""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from nats.js.api import StreamConfig

from crashbus import Bus, streams
from tests.collector.stand_in import StandInShipper
from tests.support.nats import NatsServer
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
