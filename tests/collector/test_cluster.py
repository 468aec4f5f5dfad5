"""A bus of three servers, of which those that lead are killed while crashes are delivered."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard

from crashbus import Bus, DeadLetter, Manifest, connect, streams
from crashbus.layout import MANIFEST_NAME, Kind
from tests.collector.stand_in import write_set
from tests.support.nats import NatsCluster
from tests.support.requirements import need_program, need_root
from tests.support.service import ServiceProcess
from tests.support.wait import until

CORE_SIZE = 3 * 1024 * 1024
LONG = 150  # seconds; a leader is chosen by servers that share two busy cores with us


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[tuple[NatsCluster, Bus]]:
    need_program("nats-server")
    made = NatsCluster(tmp_path / "nats")
    try:
        made.start()
        async with connect(made.url) as bus:
            yield made, bus
    finally:
        made.stop()


async def leader_of(bus: Bus, stream: str) -> str:
    async def look() -> str | None:
        try:
            info = await bus._js.stream_info(stream)
        except Exception:  # noqa: BLE001 - one is being chosen
            return None
        return info.cluster.leader if info.cluster else None

    return await until(look, within=LONG, every=0.2)


async def all_follow(bus: Bus) -> bool:
    """Tell whether each stream is whole on each server, so that any one may be lost."""
    for config in streams.all_streams(1 << 30):
        assert config.name is not None
        try:
            info = await bus._js.stream_info(config.name)
        except Exception:  # noqa: BLE001 - no leader yet
            return False
        replicas = (info.cluster and info.cluster.replicas) or []
        if len(replicas) != 2 or not all(one.current and not one.offline for one in replicas):
            return False
    return True


async def consumers_follow(bus: Bus) -> bool:
    """Tell whether what the services take from is led, and known to each server."""
    found = []
    for stream in (streams.FILES, streams.RECEIPTS):
        try:
            found += await bus._js.consumers_info(stream)
        except Exception:  # noqa: BLE001 - no leader yet
            return False
    clusters = [one.cluster for one in found]
    return bool(found) and all(
        one and one.leader and all(peer.current and not peer.offline for peer in one.replicas or [])
        for one in clusters
    )


class Crashes:
    """Sets of files that are to be delivered.

    Attributes:
        cores: by crash ID.
    """

    def __init__(self, spool: Path, there: Path) -> None:
        self._spool = spool
        self._there = there
        self.cores: dict[str, bytes] = {}

    def come(self, count: int) -> None:
        for _ in range(count):
            core = os.urandom(CORE_SIZE)
            files = {Kind.INFO: b"info", Kind.CORE: core}
            self.cores[write_set(self._spool, 1000 + len(self.cores), files)] = core

    def are_delivered(self) -> bool:
        return len(list(self._there.rglob(MANIFEST_NAME))) == len(self.cores)

    def check(self) -> None:
        for name, core in self.cores.items():
            (stored,) = self._there.rglob(f"*{name}/core_*.zst")
            content = stored.read_bytes()
            reader = zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True)
            assert reader.read() == core


async def test_loss_of_one_leader_after_another_loses_nothing(
    cluster: tuple[NatsCluster, Bus], tmp_path: Path
) -> None:
    """The first is back, and has caught up, before the second goes."""
    need_root()
    servers, bus = cluster
    spool, there = tmp_path / "appscope", tmp_path / "delivered"
    tmp_path.chmod(0o755)
    for directory in (spool, there):
        directory.mkdir()
    spool.chmod(0o1777)
    environment = {
        "CRASHBUS_NATS_URL": servers.url,
        "CRASHBUS_NATS_REPLICAS": "3",
        "CRASHBUS_HOST": "test-host",
        "CRASHBUS_SPOOL": str(spool),
        "CRASHBUS_STATE": str(tmp_path / "state"),
        "CRASHBUS_DESTINATIONS": there.as_uri(),
        "CRASHBUS_COLLECTOR_RECHECK": "1",
        "CRASHBUS_SHIPPER_ACK_WAIT": "5",
    }
    services = [ServiceProcess(name, tmp_path, environment) for name in ("collector", "shipper")]
    crashes = Crashes(spool, there)

    async def whole() -> bool:
        return await all_follow(bus) and await consumers_follow(bus)

    try:
        for service in services:
            await service.start()
        for service in services:
            await service.healthy()
        for _ in range(2):
            await until(whole, within=LONG, every=0.2)
            crashes.come(2)
            leader = await leader_of(bus, streams.CHUNKS)
            servers.servers[leader].kill()
            crashes.come(2)
            await until(crashes.are_delivered, within=LONG, every=0.2)
            servers.servers[leader].start()
    finally:
        for service in services:
            await service.stop()

    crashes.check()
    await until(whole, within=LONG, every=0.2)
    assert {one.crash_id for one in await bus.stored(Manifest)} == set(crashes.cores)
    assert await bus.stored(DeadLetter) == []
