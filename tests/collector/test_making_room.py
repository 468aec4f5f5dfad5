"""What goes for want of room is what it was judged to be, in the moment in which it goes."""

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crashbus import Bus, DeadLetter, connect
from crashbus.errors import BusUnreachable
from crashbus.identity import crash_id
from crashbus.layout import Kind, crash_file_name
from services.collector.ledger import Crash, Source
from services.collector.offering import Offering
from services.collector.publish import SourceLost
from services.collector.retention import Retention
from services.collector.settings import CollectorSettings
from tests.collector.conftest import FILE, Delivering, reported_crash
from tests.support.nats import NatsServer


class Host:
    """A host whose spool has room for nothing."""

    def __init__(self, bus: Bus, spool: Path) -> None:
        self.own = Delivering(bus, spool)
        settings = CollectorSettings(drop_after=0, disk_reserve=0)
        cores: Any = SimpleNamespace(has=lambda _: False)
        self.retention = Retention(
            str(spool), self.own.ledger, bus, self.own.deliverer, cores, settings
        )
        self.limit(1)

    def limit(self, size: int) -> None:
        settings = self.retention._settings
        self.retention._settings = settings.model_copy(update={"spool_bytes": size})

    @property
    def offering(self) -> Offering:
        return self.own.deliverer.offering

    async def crash(self, number: int, *kinds: Kind, on_bus: bool = False) -> Crash:
        """Return a crash with files of these kinds, that all wait."""
        (self.own.directory / str(number)).mkdir()
        sources = [
            Source(directory=str(number), name=crash_file_name(kind, 1), kind=kind)
            for kind in kinds
        ]
        crash = reported_crash(*sources)
        crash.crash_id = crash_id(crash.process.boot_id, number, 1)
        crash.crashed_at = float(number)
        for source in sources:
            self.path(source).write_bytes(os.urandom(10_000))
            if on_bus:
                source.file = await self.own.publisher.publish(crash.crash_id, source)
        await self.own.ledger.save(crash)
        return crash

    def path(self, source: Source) -> Path:
        return self.own.directory / source.directory / source.name

    def has(self, crash: Crash, kind: Kind = Kind.CORE) -> bool:
        return self.path(crash.sources[crash_file_name(kind, 1)]).exists()

    async def sweep(self) -> None:
        """Make room until there is nothing to be judged anew."""
        while not await self.retention._make_room():
            pass


@pytest.fixture
async def host(bus: Bus, tmp_path: Path) -> AsyncIterator[Host]:
    yield Host(bus, tmp_path)


async def test_core_delivered_while_another_is_read_back_is_not_told_as_dropped(
    host: Host, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = await host.crash(1, Kind.CORE, on_bus=True)
    other = await host.crash(2, Kind.CORE)
    is_whole = host.offering.is_whole_on_bus

    async def take_minutes(crash: Crash, source: Source) -> bool:
        other.sources["core_1"].delivered.append(FILE)
        return await is_whole(crash, source)

    monkeypatch.setattr(host.offering, "is_whole_on_bus", take_minutes)
    await host.sweep()

    assert not host.has(copy)
    assert copy.sources["core_1"].removed
    assert not host.has(other)  # it has no room, and nothing is lost with it
    assert not other.sources["core_1"].lost
    assert await bus.stored(DeadLetter) == []


async def test_core_put_on_the_bus_while_another_is_dropped_is_not_dropped(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [await host.crash(number, Kind.CORE) for number in (1, 2)]
    drop = host.own.deliverer.drop

    async def drop_slowly(crash: Crash, source: Source) -> None:
        await drop(crash, source)
        if crash is first:
            core = second.sources["core_1"]
            core.file = await host.own.publisher.publish(second.crash_id, core)

    monkeypatch.setattr(host.own.deliverer, "drop", drop_slowly)
    await host.sweep()

    assert first.sources["core_1"].lost
    assert not second.sources["core_1"].lost
    await host.sweep()
    assert second.sources["core_1"].removed


async def test_file_that_is_delivered_goes_though_its_crash_is_not(host: Host, bus: Bus) -> None:
    crash = await host.crash(1, Kind.CORE, Kind.INFO)
    crash.sources["core_1"].delivered.append(FILE)
    host.limit(20_000)

    await host.sweep()

    assert not host.has(crash)
    assert host.has(crash, Kind.INFO)
    assert not any(source.lost for source in crash.sources.values())
    assert await bus.stored(DeadLetter) == []


async def test_damaged_core_has_some_time_to_be_published_anew_and_no_small_file_goes_for_it(
    host: Host,
) -> None:
    crash = await host.crash(1, Kind.CORE, Kind.INFO)
    host.limit(20_000)
    key = crash.crash_id, "core_1"

    host.retention._damaged[key] = time.monotonic() + 1000
    await host.sweep()
    assert host.has(crash)
    assert host.has(crash, Kind.INFO)

    host.retention._damaged[key] = time.monotonic()
    await host.sweep()
    assert not host.has(crash)
    assert crash.sources["core_1"].lost
    assert host.has(crash, Kind.INFO)
    assert not host.retention._damaged


async def test_copy_whose_removal_was_told_and_failed_is_only_removed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = await host.crash(1, Kind.CORE, on_bus=True)

    def fail(*_: object, **__: object) -> None:
        raise PermissionError("immutable")

    with monkeypatch.context() as failing:
        failing.setattr(os, "unlink", fail)
        for _ in range(3):
            await host.sweep()
    assert host.has(crash)
    assert len(crash.notes) == 1

    await host.sweep()
    assert not host.has(crash)
    assert len(crash.notes) == 1


FORBIDDING = """
authorization {
  users: [
    {
      user: c
      password: c
      permissions: {
        publish: { deny: "$JS.API.DIRECT.GET.>" }
      }
    }
  ]
}
"""


@pytest.fixture
async def forbidding(tmp_path: Path) -> AsyncIterator[Bus]:
    """A bus without TLS that lets no collector read chunks of cores."""
    (tmp_path / "nats").mkdir()
    server = NatsServer(tmp_path / "nats", FORBIDDING)
    server.start()
    try:
        async with connect(server.url.replace("//", "//c:c@")) as bus:
            await bus.ensure_streams()
            bus._js._timeout = 1.0  # as long as a refusal takes, for nobody answers
            yield bus
    finally:
        server.stop()


async def test_copies_that_may_not_be_read_back_stay_and_others_go(
    forbidding: Bus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool").mkdir()
    host = Host(forbidding, tmp_path / "spool")
    copies = [await host.crash(number, Kind.CORE, on_bus=True) for number in (1, 2)]
    other = await host.crash(3, Kind.CORE, Kind.INFO)

    for _ in range(3):
        await host.sweep()

    assert all(host.has(copy) and not copy.sources["core_1"].removed for copy in copies)
    assert not host.has(other)
    assert host.has(other, Kind.INFO)
    assert capsys.readouterr().out.count("cannot be read back") == 1


async def test_copy_that_is_not_answered_for_keeps_no_others_and_costs_none(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, copy = [await host.crash(number, Kind.CORE, on_bus=True) for number in (1, 2)]
    nowhere_else = await host.crash(3, Kind.CORE, Kind.INFO)
    is_whole = host.offering.is_whole_on_bus

    async def answer_for_one(crash: Crash, source: Source) -> bool:
        if crash is silent:
            raise BusUnreachable("no answer")
        return await is_whole(crash, source)

    monkeypatch.setattr(host.offering, "is_whole_on_bus", answer_for_one)
    await host.sweep()

    assert host.has(silent)
    assert not host.has(copy)
    assert host.has(nowhere_else)
    assert host.has(nowhere_else, Kind.INFO)


async def test_receipt_that_comes_while_a_loss_is_told_counts(
    host: Host, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = await host.crash(1, Kind.CORE)
    core, publish = crash.sources["core_1"], bus.publish

    async def publish_slowly(message: Any) -> None:
        await publish(message)
        core.delivered.append(FILE)

    monkeypatch.setattr(bus, "publish", publish_slowly)
    await host.offering.lose(crash, core, SourceLost("source_vanished", "gone"))

    assert (core.delivered, core.failed, core.lost) == ([FILE], {}, False)
