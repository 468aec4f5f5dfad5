"""A nats-server before 2.9.15 with nats.conf as it comes: nothing may be removed from the bus."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus import Bus, DeadLetter, connect
from crashbus.errors import BusUnreachable
from crashbus.layout import Kind
from services.collector.ledger import Ledger, Source
from tests.collector.conftest import FILE, Delivering, reported_crash
from tests.collector.stand_in import StandInShipper, write_set
from tests.support.nats import SecuredNats
from tests.support.requirements import lacking, need_program, need_root
from tests.support.service import ServiceProcess
from tests.support.wait import until


@pytest.fixture
def refusing(tmp_path: Path) -> Iterator[SecuredNats]:
    need_program("openssl")
    need_program("nats-server")
    (tmp_path / "nats").mkdir()
    server = SecuredNats(tmp_path / "nats")
    if server.counts_purges:
        lacking("needs a nats-server before 2.9.15, as Debian 12 has")
    server.forbid_deleting()
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def operator(refusing: SecuredNats) -> AsyncIterator[Bus]:
    async with connect(**refusing.options("operator"), host="test-host") as bus:
        await bus.ensure_streams()
        yield bus


async def test_crashes_are_finished_and_their_chunks_go_when_it_is_permitted(
    refusing: SecuredNats, operator: Bus, tmp_path: Path
) -> None:
    need_root()
    spool, state = tmp_path / "appscope", tmp_path / "state"
    spool.mkdir(mode=0o755)
    ids = {
        write_set(spool, pid, {Kind.INFO: b"info", Kind.BACKTRACE: b"trace", Kind.CORE: b"core"})
        for pid in (7, 8)
    }
    collector = ServiceProcess(
        "collector",
        tmp_path,
        {
            **refusing.settings("collector"),
            "CRASHBUS_HOST": "test-host",
            "CRASHBUS_SPOOL": str(spool),
            "CRASHBUS_STATE": str(state),
            "CRASHBUS_DESTINATIONS": FILE,
            "CRASHBUS_COLLECTOR_RECHECK": "0.5",
        },
    )
    shipping = StandInShipper(operator).start()
    try:
        await collector.start()
        await until(lambda: finished(state) == ids, within=120)
        assert "needs the lines that deploy/nats/nats.conf has" in collector.log
        assert ids <= await operator.crashes_on_the_way("test-host")

        refusing.permit_deleting()
        refusing.reload()

        await until(lambda: nothing_left(operator), within=120)
    finally:
        shipping.cancel()
        await collector.stop()


def finished(state: Path) -> set[str]:
    """Return the crashes that the ledger holds to be delivered, manifest.json and all."""
    found = set()
    for entry in (state / "collector").glob("*.json"):
        with suppress(FileNotFoundError):
            crash = json.loads(entry.read_text())
            if crash["delivered_at"] is not None and crash["manifest"]["delivered"] == [FILE]:
                found.add(crash["crash_id"])
    return found


async def nothing_left(bus: Bus) -> bool:
    try:
        return not await bus.crashes_on_the_way("test-host")
    except BusUnreachable:  # the server is reading its permissions
        return False


async def test_a_file_that_is_dropped_there_is_told_once(
    refusing: SecuredNats, operator: Bus, tmp_path: Path
) -> None:
    source = Source(directory="7", name="core_1", kind=Kind.CORE)
    crash = reported_crash(source)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "core_1").write_bytes(b"core")
    async with connect(**refusing.options("collector"), host="test-host") as bus:
        own = Delivering(bus, tmp_path)
        source.file = await own.publisher.publish(crash.crash_id, source)
        await own.ledger.save(crash)

        await own.deliverer.drop(crash, source)

        assert await bus.chunk_count(crash.crash_id, "core_1") == 1
    again = Ledger(tmp_path / "ledger")
    again.load()
    entry = again.get(crash.crash_id)
    assert entry is not None and entry.sources["core_1"].lost and entry.delivered_at is not None
    letters = await operator.stored(DeadLetter)
    assert [letter.reason for letter in letters] == ["dropped_for_room"]
