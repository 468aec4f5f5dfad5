"""A bus of three servers, of which the leader is killed while crashes are delivered."""

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


async def test_loss_of_the_leader_loses_nothing(
    cluster: tuple[NatsCluster, Bus], tmp_path: Path
) -> None:
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
    cores: dict[str, bytes] = {}

    def crash() -> None:
        core = os.urandom(CORE_SIZE)
        name = write_set(spool, 1000 + len(cores), {Kind.INFO: b"info", Kind.CORE: core})
        cores[name] = core

    try:
        for service in services:
            await service.start()
        for service in services:
            await service.healthy()
        await until(lambda: all_follow(bus), within=LONG, every=0.2)
        for _ in range(2):
            crash()
        killed = await leader_of(bus, streams.CHUNKS)
        servers.servers[killed].kill()
        for _ in range(2):
            crash()
        await until(
            lambda: len(list(there.rglob(MANIFEST_NAME))) == len(cores), within=LONG, every=0.2
        )
        servers.servers[killed].start()
    finally:
        for service in services:
            await service.stop()

    for name, core in cores.items():
        (stored,) = there.rglob(f"*{name}/core_*.zst")
        reader = zstandard.ZstdDecompressor().stream_reader(
            stored.read_bytes(), read_across_frames=True
        )
        assert reader.read() == core
    await until(lambda: all_follow(bus), within=LONG, every=0.2)
    assert {one.crash_id for one in await bus.stored(Manifest)} == set(cores)
    assert await bus.stored(DeadLetter) == []
