"""A bus of three servers, of which those that lead are killed while crashes are delivered."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import zstandard

from crashbus import Bus, DeadLetter, Manifest, connect, streams
from crashbus.chunks import chunk_size
from crashbus.layout import MANIFEST_NAME, Kind
from tests.collector.stand_in import write_set
from tests.support.nats import NatsCluster
from tests.support.requirements import need_program, need_root
from tests.support.service import ServiceProcess
from tests.support.wait import until

CORE_SIZE = 12 * 1024 * 1024
CORE_CHUNKS = -(-CORE_SIZE // chunk_size(1024 * 1024))  # of noise
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


async def stop_in_the_middle(
    service: ServiceProcess, in_hand: Callable[[], Awaitable[bool]], crashes: Crashes
) -> None:
    """Let crashes come until a service was stopped while it had something of them in its hands.

    What it has is looked at once more while it is stopped, so it is so when a server is killed.
    """

    async def hit() -> bool:
        if crashes.are_delivered():  # the first, or it was too fast
            crashes.come(1)
        if not await in_hand():
            return False
        service.kill(signal.SIGSTOP)
        if await in_hand():
            return True
        service.kill(signal.SIGCONT)
        return False

    await until(hit, within=LONG, every=0.01)


async def test_loss_of_one_leader_after_another_loses_nothing(
    cluster: tuple[NatsCluster, Bus], tmp_path: Path
) -> None:
    """The first is back, and has caught up, before the second goes.

    One leads the chunks, in the middle of a core that the collector sends; the other the work
    items, while a shipper is at one.
    """
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

    async def half_a_core_is_sent() -> bool:
        info = await bus._js.stream_info(streams.CHUNKS, subjects_filter="crash.chunk.>")
        held = (info.state.subjects or {}).values()
        return any(0 < chunks < CORE_CHUNKS for chunks in held)

    async def an_item_is_in_hand() -> bool:
        return any(one.num_ack_pending for one in await bus._js.consumers_info(streams.FILES))

    try:
        for service in services:
            await service.start()
        for service in services:
            await service.healthy()
        for stream, service, in_hand in (
            (streams.CHUNKS, services[0], half_a_core_is_sent),
            (streams.FILES, services[1], an_item_is_in_hand),
        ):
            await until(whole, within=LONG, every=0.2)
            await stop_in_the_middle(service, in_hand, crashes)
            leader = await leader_of(bus, stream)  # it may have changed until now
            servers.servers[leader].kill()
            service.kill(signal.SIGCONT)
            crashes.come(1)
            await until(crashes.are_delivered, within=LONG, every=0.2)
            servers.servers[leader].start()
    finally:
        for service in services:
            await service.stop()

    crashes.check()
    await until(whole, within=LONG, every=0.2)
    assert {one.crash_id for one in await bus.stored(Manifest)} == set(crashes.cores)
    assert await bus.stored(DeadLetter) == []
