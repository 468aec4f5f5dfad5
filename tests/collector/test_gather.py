"""The spool is open to all: what one makes there in great numbers holds up nobody else."""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from asyncinotify import Inotify

from crashbus import Bus, identity
from crashbus.messages import SignalEvent
from services.collector import gather, spool
from services.collector.entering import Entering
from services.collector.gather import Gatherer
from services.collector.ledger import Ledger
from services.common import capture
from services.common.capture import CaptureRecord
from tests.collector.stand_in import signal_event
from tests.support.nats import NatsServer
from tests.support.requirements import need_root
from tests.support.wait import until

NO_PID = 4194304  # proc_sys_kernel(5), pid_max: the highest is one less


@pytest.fixture
async def gatherer(tmp_path: Path, bus: Bus) -> AsyncIterator[Gatherer]:
    """Of a spool without any watch yet."""
    root, boot_id = tmp_path / "appscope", identity.boot_id()
    root.mkdir(mode=0o1777)
    ledger = Ledger(tmp_path / "state")
    ledger.load()
    entering = Entering(root, "test-host", boot_id, (), ledger, lambda _: None)
    yield Gatherer(root, "test-host", boot_id, entering, bus, lambda *_: None, lambda: None, 60)


class Counted(str):
    """A name that counts how often one of its kind is compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


async def test_each_of_many_directories_costs_the_same(gatherer: Gatherer) -> None:
    names = [Counted(number) for number in range(1, 301)]
    for name in names:
        (gatherer.root / name).mkdir()
    Counted.comparisons = 0

    with Inotify() as inotify:
        for name in names:
            gatherer._watch(inotify, name)

    assert len(gatherer._watched) == len(names)
    assert Counted.comparisons < 2 * len(names)


@pytest.mark.parametrize("moved", ["8", "elsewhere"])
async def test_new_directory_with_the_name_of_a_renamed_one_is_watched(
    gatherer: Gatherer, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "LOOK_AGAIN", 3600)  # no round shall find what no watch tells
    looks: list[str] = []

    async def look(directory: str) -> bool:
        looks.append(directory)
        return True

    monkeypatch.setattr(gatherer, "look", look)
    ready = asyncio.Event()
    gatherer._on_ready = ready.set
    task = asyncio.create_task(gatherer.run())
    await ready.wait()
    (gatherer.root / "7").mkdir()
    await until(lambda: "7" in looks)
    (gatherer.root / "7").rename(gatherer.root / moved)
    looks.clear()
    (gatherer.root / "7").mkdir()
    await until(lambda: "7" in looks)

    looks.clear()
    (gatherer.root / "7/info_1").touch()

    await until(lambda: "7" in looks, within=10)
    task.cancel()
    await asyncio.wait([task])


async def test_bus_is_asked_once_for_all_sets_of_a_directory(gatherer: Gatherer, bus: Bus) -> None:
    victim = subprocess.Popen(["sleep", "600"])
    event = signal_event(victim.pid)
    victim.kill()
    victim.wait()
    await bus.publish(event)
    place = gatherer.root / str(victim.pid)
    place.mkdir()
    newest = int(event.time)
    for epoch in range(newest - 200, newest + 1):
        (place / f"info_{epoch}").write_text("Process name: x")
    before = bus._client.stats["out_msgs"]

    assert await gatherer.look(place.name)

    assert bus._client.stats["out_msgs"] - before < 20
    crash = gatherer._entering._ledger.get(event.crash_id)
    assert crash is not None
    assert f"info_{newest}" in crash.sources
    assert f"info_{newest - 100}" not in crash.sources


async def test_set_of_the_recorder_waits_for_no_bus(
    gatherer: Gatherer, nats_server: NatsServer
) -> None:
    """Anybody can put a set of his own beside it, of which only the bus knows whose it is."""
    need_root()
    event = signal_event(os.getpid())
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    newest = int(event.time)
    (place / f"info_{newest}").write_text("Process name: x")
    (place / f"info_{newest - 1}").write_text("Process name: y")
    record_set(place, newest - 1, event)
    nats_server.kill()
    try:
        assert not await gatherer.look(place.name)

        crash = gatherer._entering._ledger.get(event.crash_id)
        assert crash is not None
        assert crash.sources.keys() == {f"info_{newest - 1}"}
    finally:
        nats_server.start()


def record_set(place: Path, epoch: int, event: SignalEvent) -> None:
    """Write the capture record of a whole set."""
    record = CaptureRecord(
        state="complete",
        crash_id=event.crash_id,
        host=event.host,
        crashed_at=event.time,
        process=event.process,
        signal=event.signal,
        signal_name=event.signal_name,
    )
    with spool.open_directory(str(place)) as directory:
        os.close(capture.create(directory, epoch, record))
