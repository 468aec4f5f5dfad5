"""The spool is open to all: what one makes there in great numbers holds up nobody else."""

import asyncio
import os
import signal
import subprocess
import time
from collections import UserList
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from asyncinotify import Inotify

from crashbus import Bus
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from crashbus.parts import CrashFile
from services.collector import gather, processes, spool, watching
from services.collector.gather import Gatherer
from services.collector.records import record_of
from services.common import capture
from services.common.capture import CapturedFile
from services.common.process import read_process
from tests.collector.stand_in import signal_event
from tests.support.nats import NatsServer
from tests.support.requirements import need_root
from tests.support.wait import stop, until

NO_PID = 4194304  # proc_sys_kernel(5), pid_max: the highest is one less


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
            gatherer._watches.add(inotify, name, is_root_s=False, is_new=True)

    assert len(gatherer._watches._names) == len(names)
    assert Counted.comparisons < 2 * len(names)


@pytest.mark.parametrize("moved", ["8", "elsewhere"])
async def test_new_directory_with_the_name_of_a_renamed_one_is_watched(
    gatherer: Gatherer, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "LOOK_AGAIN", 3600)  # no round shall find what no watch tells
    looks: list[str] = []

    async def look(directory: str) -> None:
        looks.append(directory)

    monkeypatch.setattr(gatherer, "_glance", look)
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


async def requests_for(gatherer: Gatherer, directory: str, bus: Bus) -> int:
    """Look at a directory, and count what the bus is asked meanwhile."""
    before = bus._client.stats["out_msgs"]
    assert await gatherer.look(directory)
    return bus._client.stats["out_msgs"] - before


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

    assert await requests_for(gatherer, place.name, bus) < 20

    crash = gatherer._entering._ledger.get(event.crash_id)
    assert crash is not None
    assert f"info_{newest}" in crash.sources
    assert f"info_{newest - 100}" not in crash.sources


async def test_events_behind_the_time_of_a_set_are_not_read(gatherer: Gatherer, bus: Bus) -> None:
    """Anybody can write a set of yesterday: that costs no day of events."""
    event = signal_event(os.getpid())
    later = [
        event.model_copy(update={"event_id": f"later {number}", "time": event.time + 60})
        for number in range(300)
    ]
    for one in [event, *later]:
        await bus.publish(one)
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    (place / f"info_{int(event.time)}").touch()

    assert await requests_for(gatherer, place.name, bus) < 30

    assert len(gatherer._entering._ledger.crashes()) == 1


async def test_events_that_are_read_for_one_directory_are_bounded(
    gatherer: Gatherer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "MOST_EVENTS", 20)
    event = signal_event(os.getpid())
    for number in range(300):
        await bus.publish(event.model_copy(update={"event_id": f"{number}"}))
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    (place / f"info_{int(event.time)}").touch()

    assert await requests_for(gatherer, place.name, bus) < 100


@pytest.mark.parametrize(("bound", "most", "looks"), [("MOST_SPANS", 1, 4), ("MOST_EVENTS", 5, 3)])
async def test_set_that_is_not_asked_about_waits_for_its_turn(
    bound: str, most: int, looks: int, gatherer: Gatherer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a crash of an unknown process for ever; one that waits itself blocks none."""
    need_root()
    monkeypatch.setattr(gather, bound, most)
    living = signal_event(os.getpid())
    now = int(time.time())

    def event(name: str, at: float, **process: int) -> SignalEvent:
        of = living.process.model_copy(update={"ns_pid": NO_PID, "uid": 0, **process})
        return living.model_copy(update={"event_id": name, "time": at, "process": of})

    dead = event("dead", now - 900, pid=NO_PID, start_ticks=1)
    for one in (dead, *(event(f"living {number}", float(now)) for number in range(9))):
        await bus.publish(one)
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    for before in (0, 300, 600, 900):
        (place / f"info_{now - before}").write_text("Process name: x")
    ledger = gatherer._entering._ledger

    for _ in range(looks):
        assert place.name not in gatherer._settled
        assert f"info_{now - 900}" not in {name for one in ledger.crashes() for name in one.sources}
        await gatherer.look(place.name)

    starts = {next(iter(one.sources)): one.process.start_ticks for one in ledger.crashes()}
    others = {f"info_{now - before}": now - before for before in (300, 600)}
    assert starts == {**others, f"info_{now - 900}": 1}
    for task in gatherer._waiting.values():
        task.cancel()


async def test_strange_sets_of_one_owner_do_not_take_all_places(
    gatherer: Gatherer, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    monkeypatch.setattr(gather, "MOST_STRANGE", 2)
    for number, owner in enumerate((65534, 65534, 65534, 65533), 1):
        file = gatherer.root / f"{NO_PID - number}" / "info_1"
        file.parent.mkdir()
        file.touch()
        os.chown(file, owner, owner)
        await gatherer._glance(file.parent.name)

    names = [f"{NO_PID - number}" for number in (1, 2, 4)]
    assert list(gatherer._strange._waiting) == list(gatherer._strangers) == names
    assert f"{NO_PID - 3}" not in gatherer._settled  # a round puts it there once there is a place
    await gatherer._look_at_strange(names[0])
    await gatherer._glance(f"{NO_PID - 3}")
    assert list(gatherer._strangers) == [*names[1:], f"{NO_PID - 3}"]


async def test_nobody_waits_for_the_bus_that_is_asked_about_a_strange_set(
    gatherer: Gatherer, nats_server: NatsServer, bus: Bus
) -> None:
    need_root()
    event = signal_event(os.getpid())
    strange, recorded = gatherer.root / str(NO_PID - 1), gatherer.root / str(NO_PID)
    for place in (strange, recorded):
        place.mkdir()
    (strange / f"info_{int(event.time)}").touch()
    (recorded / "info_1").touch()
    record_set(recorded, 1, event)
    await stop(nats_server.pid)
    asked = bus._client.stats["out_msgs"]
    looking = asyncio.create_task(gatherer.look(strange.name))
    try:
        await until(lambda: bus._client.stats["out_msgs"] > asked)

        async with asyncio.timeout(2):  # less than the bus is waited for
            await gatherer._glance(strange.name)
            assert await gatherer.look(recorded.name)

        assert not looking.done()
        assert gatherer._entering._ledger.get(event.crash_id) is not None
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    await looking


async def test_files_of_several_owners_are_a_crash_of_each(gatherer: Gatherer) -> None:
    """Whoever puts files of his own beside another's neither gets these nor spoils them."""
    need_root()
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    head = "backtrace info: signal {} errno 0 fault address 0x0, reason of fault:\nx"
    for name, text, owner in [
        ("info_1", "Process name: victim", 1001),
        ("core_1", "core", 1001),
        ("backtrace_1", head.format(11), 1001),
        ("cfg_1", "{}", 1000),
    ]:
        (place / name).write_text(text)
        os.chown(place / name, owner, owner)

    await gatherer.look(place.name)

    found = {crash.process.uid: crash for crash in gatherer._entering._ledger.crashes()}
    assert {uid: set(crash.sources) for uid, crash in found.items()} == {
        1001: {"info_1", "core_1", "backtrace_1"},
        1000: {"cfg_1"},
    }
    assert (found[1001].process.comm, found[1001].signal) == ("victim", 11)


async def test_names_that_a_user_used_before_are_the_recorder_s_all_the_same(
    gatherer: Gatherer,
) -> None:
    """He can guess them: the recorder puts his files aside when it comes to make its own."""
    need_root()
    event = signal_event(os.getpid())
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    for name in ("core_1", "info_1"):
        (place / name).write_text("the user's")
        os.chown(place / name, 65534, 65534)
    await gatherer.look(place.name)
    (users,) = gatherer._entering._ledger.crashes()
    assert users.process.uid == 65534

    for name in ("core_1", "info_1"):
        (place / name).unlink()
        (place / name).write_text("root's")
    record_set(place, 1, event)
    await gatherer.look(place.name)

    crash = gatherer._entering._ledger.get(event.crash_id)
    assert crash is not None
    assert crash.sources.keys() == {"core_1", "info_1"}


async def test_core_on_the_bus_is_entered_though_a_user_s_has_its_name(gatherer: Gatherer) -> None:
    need_root()
    event = signal_event(os.getpid())
    place = gatherer.root / str(NO_PID)
    place.mkdir()
    (place / "core_1").write_text("the user's")
    os.chown(place / "core_1", 65534, 65534)
    await gatherer.look(place.name)
    sent = CrashFile(
        name="core_1",
        kind=Kind.CORE,
        size=1,
        sha256="0" * 64,
        encoding="identity",
        stored_size=1,
        chunks=1,
    )

    record_set(place, 1, event, {"core_1": CapturedFile(size=1, sent=sent)})
    await gatherer.look(place.name)

    crash = gatherer._entering._ledger.get(event.crash_id)
    assert crash is not None
    assert crash.sources["core_1"].file == sent


async def test_writer_of_many_sets_is_read_once_a_look(
    gatherer: Gatherer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have arguments that take long."""
    need_root()
    reads: list[str] = []

    def noted(do: Callable[..., Any]) -> Callable[..., Any]:
        def done(*given: Any) -> Any:
            reads.append(do.__name__)
            return do(*given)

        return done

    monkeypatch.setattr(processes, "read_process", noted(read_process))
    monkeypatch.setattr(spool, "open_by_process", noted(spool.open_by_process))
    place = gatherer.root / str(os.getpid())
    place.mkdir()
    for number in range(20):
        (place / f"info_{int(time.time()) + number}").touch()

    await gatherer._glance(place.name)

    assert gatherer._waiting.keys() == {(place.name, os.getpid())}
    assert reads == ["read_process", "open_by_process"]
    for task in gatherer._waiting.values():
        task.cancel()


class Looks(UserList[SignalEvent]):
    """Events that count how often one is looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        Looks.looks += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("of", [0, 4444, 9999])
def test_few_of_many_events_are_looked_at_for_a_set(of: int) -> None:
    """There may be thousands of both."""
    event = signal_event(os.getpid())
    events = Looks(event.model_copy(update={"time": 1000.0 + number}) for number in range(10_000))
    Looks.looks = 0
    theirs = events.data[of].process.model_copy(update={"ns_pid": 7, "uid": 8})
    events.data[of] = event.model_copy(update={"time": 1000.0 + of, "process": theirs})

    assert processes.from_events(7, 1000 + of, 8, events) == theirs
    assert processes.from_events(7, 1000 + of, 9, events) is None

    assert Looks.looks < 100


async def test_watches_are_bounded_and_root_s_and_the_newest_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "MOST_WATCHED", 4)
    watches = watching.Watches(tmp_path)

    def watched() -> set[str]:
        assert set(watches._names.values()) == set(watches._of)
        kept = Path(f"/proc/self/fdinfo/{inotify.fd}").read_text()
        assert kept.count("inotify wd:") == len(watches._of)
        return set(watches._of)

    with Inotify() as inotify:

        def add(*names: str, is_root_s: bool = False, is_new: bool = True) -> None:
            for name in names:
                (tmp_path / name).mkdir(exist_ok=True)
                watches.add(inotify, name, is_root_s=is_root_s, is_new=is_new)

        add("1", is_root_s=True)
        add("2", "3", "4", "5", "6")
        assert watched() == {"1", "4", "5", "6"}
        add("7", is_new=False)  # which a round found, that goes over many
        assert watched() == {"1", "4", "5", "6"}
        add("4", "8", is_root_s=True, is_new=False)  # one was another's before
        assert watched() == {"1", "4", "6", "8"}
        add("9")
        assert watched() == {"1", "4", "8", "9"}
        add("9", is_root_s=True)
        add("10")
        assert watched() == {"1", "4", "8", "9"}
        add("10", is_root_s=True)
        assert watched() == {"4", "8", "9", "10"}


async def test_no_number_of_others_directories_holds_up_root_s(
    gatherer: Gatherer, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    looks: list[str] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def look(directory: str) -> None:
        looks.append(directory)
        begun.set()
        if directory in ("1", "2"):
            await go_on.wait()

    monkeypatch.setattr(gather, "LOOK_AGAIN", 3600)  # no round shall look at anything
    monkeypatch.setattr(gatherer, "_glance", look)
    ready = asyncio.Event()
    gatherer._on_ready = ready.set
    task = asyncio.create_task(gatherer.run())
    await ready.wait()
    await asyncio.to_thread(_made_by_nobody, gatherer.root, ("1", "2", "3"))
    await begun.wait()

    (gatherer.root / "4").mkdir()

    await until(lambda: "4" in looks)
    assert "3" not in looks
    go_on.set()
    await until(lambda: "3" in looks)
    task.cancel()
    await asyncio.wait([task])


def _made_by_nobody(root: Path, names: Iterable[str]) -> None:
    for name in names:
        aside = root / f".{name}"
        aside.mkdir()
        os.chown(aside, 65534, 65534)
        aside.rename(root / name)


async def test_a_round_looks_at_what_is_root_s_and_the_newest_of_others(
    gatherer: Gatherer, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    monkeypatch.setattr(gather, "MOST_OF_OTHERS", 2)
    for name in ("1", "2", "3", "4", "5", str(NO_PID), "0", "x"):
        (gatherer.root / name).mkdir()
    last = 0
    for name in ("1", "3", "4", "5"):
        place = gatherer.root / name
        os.chown(place, 65534, 65534)
        while place.stat().st_ctime_ns <= last:  # the kernel's clock ticks
            os.chown(place, 65534, 65534)
        if name == "1":
            os.utime(place, (1 << 32, 1 << 32))  # it would like to be the newest
        last = place.stat().st_ctime_ns

    ours, others = gatherer._directories()

    assert (set(ours), set(others)) == ({"2"}, {"4", "5"})


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


def record_set(
    place: Path, epoch: int, event: SignalEvent, files: dict[str, CapturedFile] | None = None
) -> None:
    """Write the capture record of a whole set."""
    record = record_of(event, "complete", files or {}, "as the recorder's")
    with spool.open_directory(str(place)) as directory:
        os.close(capture.create(directory, epoch, record))
