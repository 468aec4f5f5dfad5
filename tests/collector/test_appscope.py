"""What AppScope's library left inside a container, or another put there for us, is brought out."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from crashbus import Bus
from crashbus.layout import Kind
from crashbus.messages import DeadLetter, SignalEvent
from crashbus.parts import Container
from services.collector.appscope import containers as places
from services.collector.appscope import copying, inside, sets, threads
from services.collector.appscope.containers import Containers
from services.collector.appscope.sets import Watched
from services.collector.judge import Verdict
from services.common.capture import CaptureRecord
from tests.collector.stand_in import signal_event
from tests.support.crashers import crasher
from tests.support.disk import small_disk
from tests.support.fuse import StandingStill, overlaid
from tests.support.requirements import need_root
from tests.support.wait import until

_WAITS = (
    "import os, sys; os.chroot(sys.argv[1]); os.chdir('/'); print(flush=True); sys.stdin.read()"
)
MIB = 1024 * 1024
EPOCH = int(time.time()) + 86400  # after any event


@dataclass
class Contained:
    """A process with a root of its own, as in a container.

    Attributes:
        place: where the library writes there, as we see it.
    """

    process: subprocess.Popen[bytes]
    place: Path

    @cached_property
    def event(self) -> SignalEvent:
        return signal_event(self.process.pid, "handled")

    def write(self, files: dict[str, bytes], epoch: int = EPOCH) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            (self.place / f"{kind}_{epoch}").write_bytes(content)

    def end(self) -> None:
        self.process.communicate()


def start(root: Path, *wrapper: str) -> Contained:
    root.mkdir()
    command: list[str | Path] = [*wrapper, sys.executable, "-c", _WAITS, root]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    made = Contained(process, root / "tmp/appscope" / str(process.pid))
    assert made.event.process.pid == process.pid  # as it is while it lives
    return made


@pytest.fixture
def contained(tmp_path: Path) -> Iterator[Contained]:
    need_root()
    made = start(tmp_path / "root")
    yield made
    made.end()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Contained]:
    need_root()
    made = start(tmp_path / "other root")
    yield made
    made.end()


def watching(event: SignalEvent, spool: Path, reserve: float = 0) -> closing[Watched]:
    return closing(Watched(event, spool, reserve, lambda: None, {}))


def test_last_files_of_a_process_are_seen_when_it_has_ended(
    contained: Contained, tmp_path: Path
) -> None:
    with watching(contained.event, tmp_path) as watched:
        contained.write({"info": b"one"})
        assert watched.look()
        contained.write({"backtrace": b"two"})
        contained.end()

        assert not watched.look()

        (one,) = watched._sets.values()
        assert set(one.files) == {Kind.INFO, Kind.BACKTRACE}


def test_process_that_has_the_pid_of_one_that_ended_is_not_looked_into(
    contained: Contained, tmp_path: Path
) -> None:
    """As after a restart of the collector, with a note of a watch that is long over."""
    process = contained.event.process.model_copy(update={"start_ticks": 1})
    contained.write({"info": b"of another"})

    event = contained.event.model_copy(update={"process": process})
    with watching(event, tmp_path) as watched:
        assert not watched.look()
        assert not watched._sets


WHOLE = {
    "info": b"Process name: x",
    "cfg": b'{"libscope": {"snapshot": {"coredump": "true", "backtrace": "true"}}}',
    "backtrace": b"#0 0x1 f + 1",
}


def brought_out(spool: Path, pid: int) -> CaptureRecord:
    (record,) = all_brought_out(spool, pid)
    return record


def all_brought_out(spool: Path, pid: int) -> list[CaptureRecord]:
    """Return the records, the oldest set's first."""
    paths = sorted((spool / str(pid)).glob("capture_*"))
    return [CaptureRecord.model_validate_json(path.read_bytes()) for path in paths]


async def watching_all(spool: Path, bus: Bus) -> Containers:
    """Return what a started collector watches with; its notes are beside the spool."""
    containers = Containers(spool, "test-host", bus, spool.parent / "state", 0)
    await containers.resume()
    return containers


async def letters_of(bus: Bus, event: SignalEvent) -> list[DeadLetter]:
    found = await bus.stored(DeadLetter)
    return [letter for letter in found if letter.crash_id == event.crash_id]


async def is_watched_no_more(containers: Containers, event: SignalEvent) -> None:
    await until(lambda: event.crash_id not in containers._watches, 30)


def test_holes_stay_holes(contained: Contained, tmp_path: Path) -> None:
    contained.write({**WHOLE, "core": b""})
    with (contained.place / f"core_{EPOCH}").open("r+b") as core:
        core.write(b"begin")
        core.seek(1 << 40)
        core.write(b"middle")
        core.truncate(1 << 41)

    with watching(contained.event, tmp_path / "spool") as watched:
        assert watched.look()
        assert watched.copy_whole()

    copy = tmp_path / "spool" / str(contained.process.pid) / f"core_{EPOCH}"
    assert (copy.stat().st_size, copy.stat().st_blocks < 1024) == (1 << 41, True)
    with copy.open("rb") as file:
        assert file.read(6) == b"begin\0"
        file.seek(1 << 40)
        assert file.read(7) == b"middle\0"


def test_core_that_is_larger_than_the_disk_is_cut_at_its_reserve(
    contained: Contained, tmp_path: Path
) -> None:
    contained.write({**WHOLE, "core": os.urandom(32 * MIB)})

    with (
        small_disk(tmp_path / "spool", 16) as disk,
        watching(contained.event, disk.place, 25) as watched,
    ):
        assert watched.look()
        assert not watched.copy_whole()
        assert files_in(disk.place, contained) == []  # it waits for room
        watched.keep()

        state = os.statvfs(disk.place)
        assert state.f_bavail * 4 >= state.f_blocks - 64  # blocks: the record, and the file's own
        record = brought_out(disk.place, contained.process.pid)
        core = record.files[f"core_{EPOCH}"]
        assert record.state == "complete"
        assert core.truncated and core.expected == 32 * MIB
        assert MIB < core.size < 13 * MIB
        assert not record.files[f"info_{EPOCH}"].truncated


def files_in(spool: Path, contained: Contained) -> list[Path]:
    return list((spool / str(contained.process.pid)).iterdir())


def test_set_that_finds_no_room_leaves_nothing_behind_and_is_tried_again(
    contained: Contained, tmp_path: Path
) -> None:
    contained.write({**WHOLE, "core": os.urandom(3 * MIB)})

    with (
        small_disk(tmp_path / "spool", 4) as disk,
        watching(contained.event, disk.place) as watched,
    ):
        disk.fill(leaving=MIB)
        assert watched.look()
        for _ in range(3):
            assert not watched.copy_whole()
            assert files_in(disk.place, contained) == []
        contained.end()
        assert not watched.look()
        assert watched.copy_rest()
        assert files_in(disk.place, contained) == []
        disk.empty()

        assert not watched.copy_rest()

        record = brought_out(disk.place, contained.process.pid)
        assert not any(file.truncated for file in record.files.values())
        assert record.files[f"core_{EPOCH}"].size == 3 * MIB


def test_set_that_waited_long_enough_for_room_is_cut(
    contained: Contained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "FOR_ROOM", 0)
    contained.write({**WHOLE, "core": os.urandom(8 * MIB)})

    with (
        small_disk(tmp_path / "spool", 4) as disk,
        watching(contained.event, disk.place) as watched,
    ):
        assert watched.look()
        assert not watched.copy_whole()
        assert watched.copy_whole()

        record = brought_out(disk.place, contained.process.pid)
        assert {name: file.truncated for name, file in record.files.items()} == {
            **{f"{kind}_{EPOCH}": False for kind in WHOLE},
            f"core_{EPOCH}": True,
        }


def test_at_last_every_set_is_kept_as_far_as_there_is_room(
    contained: Contained, tmp_path: Path
) -> None:
    contained.write({**WHOLE, "info": os.urandom(8 * MIB)})
    contained.write({"info": b"of another signal"}, EPOCH + 1)

    with (
        small_disk(tmp_path / "spool", 4) as disk,
        watching(contained.event, disk.place) as watched,
    ):
        assert watched.look()
        contained.end()
        assert not watched.look()
        assert watched.copy_rest()

        watched.keep()

        assert not watched._sets
        place = disk.place / str(contained.process.pid)
        record = CaptureRecord.model_validate_json((place / f"capture_{EPOCH}").read_bytes())
        info = record.files[f"info_{EPOCH}"]
        assert info.truncated
        assert info.expected == 8 * MIB
        assert info.size == (place / f"info_{EPOCH}").stat().st_size > MIB
        assert (place / f"backtrace_{EPOCH}").read_bytes() == WHOLE["backtrace"]
        assert (place / f"info_{EPOCH + 1}").exists()


async def test_what_waits_for_room_is_kept_when_the_collector_is_stopped(
    contained: Contained, tmp_path: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained.write({**WHOLE, "core": os.urandom(8 * MIB)})
    waits, loop = asyncio.Event(), asyncio.get_running_loop()
    copy_rest = Watched.copy_rest

    def telling(watched: Watched) -> bool:
        is_left = copy_rest(watched)
        loop.call_soon_threadsafe(waits.set)
        return is_left

    monkeypatch.setattr(Watched, "copy_rest", telling)
    with small_disk(tmp_path / "spool", 4) as disk:
        containers = await watching_all(disk.place, bus)
        await containers.watch(contained.event)
        await until((disk.place / str(contained.process.pid)).exists)  # it was tried once
        await asyncio.to_thread(contained.end)
        await asyncio.wait_for(waits.wait(), 30)
        assert files_in(disk.place, contained) == []

        await containers.stop()

        record = brought_out(disk.place, contained.process.pid)
        assert record.files[f"core_{EPOCH}"].truncated


async def test_what_is_being_copied_is_copied_to_its_end_when_the_collector_is_stopped(
    contained: Contained, tmp_path: Path, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained.write({**WHOLE, "core": os.urandom(MIB)})
    begun, stopping, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    copy_whole = Watched.copy_whole

    def slow(watched: Watched) -> bool:
        loop.call_soon_threadsafe(begun.set)
        stopping.wait(30)
        return copy_whole(watched)

    monkeypatch.setattr(Watched, "copy_whole", slow)
    containers = await watching_all(tmp_path / "spool", bus)
    await containers.watch(contained.event)
    await asyncio.wait_for(begun.wait(), 30)
    (task,) = containers._tasks.values()

    stop = asyncio.create_task(containers.stop())
    done, _ = await asyncio.wait([stop], timeout=0.1)
    task.cancel()  # as the end of the loop does
    done_again, _ = await asyncio.wait([stop], timeout=0.1)
    stopping.set()
    await stop

    assert not done and not done_again
    record = brought_out(tmp_path / "spool", contained.process.pid)
    assert record.files[f"core_{EPOCH}"].size == MIB


async def test_whole_set_that_waits_for_room_is_kept_when_the_collector_is_stopped(
    contained: Contained, tmp_path: Path, bus: Bus
) -> None:
    """Its process may have ended before the collector is back."""
    contained.write({**WHOLE, "core": os.urandom(8 * MIB)})
    with small_disk(tmp_path / "spool", 16) as disk:
        disk.fill(leaving=4 * MIB)
        containers = await watching_all(disk.place, bus)
        await containers.watch(contained.event)
        await until((disk.place / str(contained.process.pid)).exists)  # it was tried once
        assert files_in(disk.place, contained) == []

        await containers.stop()

        record = brought_out(disk.place, contained.process.pid)
        assert record.files[f"core_{EPOCH}"].truncated
        assert not record.files[f"info_{EPOCH}"].truncated
        # Its process lives on, and there is room.
        disk.empty()
        containers = await watching_all(disk.place, bus)
        await until(lambda: len(all_brought_out(disk.place, contained.process.pid)) == 2)
        contained.end()
        await is_watched_no_more(containers, contained.event)
        _, again = all_brought_out(disk.place, contained.process.pid)
        assert again.files[f"core_{EPOCH + 1}"].size == 8 * MIB
    assert await letters_of(bus, contained.event) == []


async def test_set_that_was_brought_out_is_not_brought_again_after_a_restart(
    contained: Contained, tmp_path: Path, bus: Bus
) -> None:
    event, spool = contained.event, tmp_path / "spool"
    contained.write({**WHOLE, "core": b"core"})
    containers = await watching_all(spool, bus)
    await containers.watch(event)
    await until(lambda: (spool / str(contained.process.pid) / f"core_{EPOCH}").exists())
    await containers.stop()

    containers = await watching_all(spool, bus)
    contained.write({**WHOLE, "core": b"another"}, EPOCH + 5)
    await until((spool / str(contained.process.pid) / f"core_{EPOCH + 5}").exists)
    contained.end()
    await is_watched_no_more(containers, event)

    assert len(all_brought_out(spool, contained.process.pid)) == 2
    assert await letters_of(bus, event) == []


async def test_process_that_ended_while_no_collector_ran_is_told(
    contained: Contained, tmp_path: Path, bus: Bus
) -> None:
    event = contained.event
    containers = await watching_all(tmp_path / "spool", bus)
    await containers.watch(event)
    await containers.stop()
    contained.write({**WHOLE, "core": b"core"})
    contained.end()

    containers = await watching_all(tmp_path / "spool", bus)
    await is_watched_no_more(containers, event)

    (letter,) = await letters_of(bus, event)
    assert letter.reason == "not_brought_out" and "while no collector ran" in letter.error


async def test_process_that_ended_and_waits_for_room_gives_its_place_to_a_living_one(
    contained: Contained,
    other: Contained,
    tmp_path: Path,
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "AT_ONCE", 1)
    contained.write({**WHOLE, "core": os.urandom(8 * MIB)})
    with small_disk(tmp_path / "spool", 4) as disk:
        containers = await watching_all(disk.place, bus)
        event = contained.event
        await containers.watch(event)
        await containers.watch(other.event)
        (letter,) = await letters_of(bus, other.event)
        assert "more than 1 processes" in letter.error
        await until((disk.place / str(contained.process.pid)).exists)
        await asyncio.to_thread(contained.end)
        await until(lambda: containers._watches[event.crash_id].waits_for_room)

        async with asyncio.timeout(sets.FOR_ROOM / 3):
            await containers.watch(other.event)

        assert list(containers._watches) == [other.event.crash_id]
        assert brought_out(disk.place, contained.process.pid).files[f"core_{EPOCH}"].truncated
        assert len(await letters_of(bus, other.event)) == 1
        await containers.stop()


async def comes_out(containers: Containers, of: Contained, root: Path) -> None:
    """Have a process watched, and wait until what it wrote is in the spool."""
    await containers.watch(of.event)
    await until((root / str(of.process.pid) / f"core_{EPOCH}").exists)


async def test_place_on_a_file_system_that_somebody_serves_is_not_looked_into(
    contained: Contained, other: Contained, tmp_path: Path, bus: Bus
) -> None:
    contained.place.parent.parent.mkdir()
    other.write({**WHOLE, "core": b"core"})
    with StandingStill(contained.place.parent, crasher("waiting")) as served:
        containers = await watching_all(tmp_path / "spool", bus)
        served.stand_still()

        await asyncio.wait_for(containers.watch(contained.event), 10)

        (letter,) = await letters_of(bus, contained.event)
        assert "whose server may not answer (fuse)" in letter.error
        assert "tmpfs" in letter.mend
        assert not containers._watches
        await comes_out(containers, other, tmp_path / "spool")
        await containers.stop()


async def test_thread_that_a_file_system_holds_is_given_up(
    contained: Contained,
    other: Contained,
    tmp_path: Path,
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below an overlay of the container's own, which no list of mounts tells."""
    monkeypatch.setattr(threads, "STILL", 1.0)
    event = contained.event
    containers = await watching_all(tmp_path / "spool", bus)
    await containers.watch(event)
    contained.place.parent.parent.mkdir()
    with (
        StandingStill(tmp_path / "served", crasher("waiting")) as served,
        overlaid(tmp_path / "served", contained.place.parent),
    ):
        served.stand_still()

        (letter,) = await until(lambda: letters_of(bus, event), 30)

        assert "to look at them takes more than" in letter.error
        assert list(containers._watches) == [event.crash_id]  # its place is taken
        other.write({**WHOLE, "core": b"core"})
        await comes_out(containers, other, tmp_path / "spool")
        await asyncio.wait_for(containers.stop(), 10)


async def test_threads_that_one_container_can_hold_are_few(
    contained: Contained,
    other: Contained,
    tmp_path: Path,
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inside, "_check", lambda pid, root: None)
    monkeypatch.setattr(threads, "STILL", 1.0)
    process = contained.event.process
    inner = process.model_copy(update={"container": Container(id="a" * 64, runtime="docker")})
    event = contained.event.model_copy(update={"process": inner})
    before = appscope_threads()
    containers = await watching_all(tmp_path / "spool", bus)
    contained.place.parent.parent.mkdir()
    with StandingStill(contained.place.parent, crasher("waiting")) as served:
        served.stand_still()

        await asyncio.gather(*(containers.watch(event) for _ in range(12)))

        assert len(appscope_threads() - before) == threads.OF_A_CONTAINER
        errors = {letter.error for letter in await letters_of(bus, event)}
        assert any("those of container aaa" in error for error in errors)
        async with asyncio.timeout(threads.STILL):  # no thread is waited for
            assert await containers.has_written(event)
        other.write({**WHOLE, "core": b"core"})
        await containers.watch(other.event)
        assert list(containers._watches) == [other.event.crash_id]
    told = len(await letters_of(bus, event))
    await until(lambda: containers._shares._all._hoped_for == threads.OF_ALL)
    await containers.watch(event)  # the threads are back
    assert event.crash_id in containers._watches
    assert len(await letters_of(bus, event)) == told
    await containers.stop()
    await until(lambda: not appscope_threads() - before)


def appscope_threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith("appscope")}


_GIVES_UP = """
import asyncio, os, sys
from services.collector.appscope import threads
threads.STILL = 0.1
async def main():
    try:
        work = lambda: os.listdir(sys.argv[1])
        await threads.to_its_end(threads.Threads(), work, threads.Steps())
    except threads.StandsStill:
        print("given up")
asyncio.run(main())
"""


def test_thread_that_was_given_up_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    need_root()
    with StandingStill(tmp_path / "served", crasher("waiting")) as served:
        served.stand_still()
        command: list[str | Path] = [sys.executable, "-c", _GIVES_UP, tmp_path / "served"]

        ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=True)

    assert ended.stdout == b"given up\n"


async def test_who_is_told_to_stop_while_a_thread_stands_still_stops(
    contained: Contained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "STILL", 0.1)
    released, at_work = threading.Event(), threading.Event()

    def stand_still() -> None:
        at_work.set()
        released.wait(60)

    executor = threads.Threads()
    look = threads.Shares().look(executor, contained.event.process, stand_still)
    task = asyncio.create_task(look)
    try:
        await until(at_work.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        released.set()
        executor.shutdown()


_MANY_MOUNTS = """
import ctypes, os, sys
BIND = 4096
mount = ctypes.CDLL(None, use_errno=True).mount
assert mount(b"private", b"/tmp", b"tmpfs", 0, None) == 0
os.makedirs(f"/tmp/appscope/{os.getpid()}")
for name in ["/tmp/deep", *["d" * 254] * int(sys.argv[2])]:
    os.mkdir(name)
    os.chdir(name)
for _ in range(int(sys.argv[1])):
    assert mount(b".", b".", None, BIND, None) == 0
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("mounts", "depth", "too_many"),
    [
        (100, 15, False),  # each takes two paths of 3.8 KB in mountinfo
        (200, 15, True),
        (3000, 0, False),
        (4000, 0, True),
    ],
)
async def test_mounts_that_are_too_many_to_look_at_are_not_believed(
    tmp_path: Path, bus: Bus, mounts: int, depth: int, too_many: bool
) -> None:
    """Behind them there may be one that stands still."""
    need_root()
    (tmp_path / "spool").mkdir()
    command = ["unshare", "--mount", sys.executable, "-c", _MANY_MOUNTS, f"{mounts}", f"{depth}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    made = Contained(process, Path(f"/proc/{process.pid}/root/tmp/appscope/{process.pid}"))
    containers = await watching_all(tmp_path / "spool", bus)

    await containers.watch(made.event)

    assert bool(containers._watches) is not too_many
    errors = [letter.error for letter in await letters_of(bus, made.event)]
    assert len(errors) == too_many and all("more mounts than are looked at" in e for e in errors)
    await asyncio.to_thread(made.end)
    await containers.stop()


@pytest.mark.parametrize("user", [[], ["--user", "--map-root-user"]])
async def test_root_that_no_mountinfo_shows_is_believed_of_the_hosts_users_alone(
    tmp_path: Path, bus: Bus, user: list[str]
) -> None:
    """A directory of a mount in a namespace of its own: others may have FUSE there."""
    need_root()
    (tmp_path / "spool").mkdir()
    made = start(tmp_path / "root", "unshare", *user, "--mount")
    containers = await watching_all(tmp_path / "spool", bus)
    try:
        await containers.watch(made.event)

        assert bool(containers._watches) is not bool(user)
        assert len(await letters_of(bus, made.event)) == bool(user)
    finally:
        await asyncio.to_thread(made.end)
        await containers.stop()


_PRIVATE_TMP = "mount -t tmpfs private /tmp && mkdir -p /tmp/appscope/$$ && echo && exec cat"


@pytest.mark.parametrize("private", [True, False])
async def test_process_with_a_tmp_of_its_own_is_watched(
    tmp_path: Path, bus: Bus, private: bool
) -> None:
    """As systemd's PrivateTmp= makes it: the same root, another /tmp."""
    need_root()
    shared = "mkdir -p /tmp/appscope && mount --bind $0 /tmp/appscope && echo && exec cat"
    spool = tmp_path / "spool"
    spool.mkdir()
    script = _PRIVATE_TMP if private else shared
    command: list[str | Path] = ["unshare", "--mount", "sh", "-c", script, spool]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    made = Contained(process, Path(f"/proc/{process.pid}/root/tmp/appscope/{process.pid}"))
    containers = await watching_all(spool, bus)

    await containers.watch(made.event)

    assert bool(containers._watches) is private
    if private:
        made.write({**WHOLE, "core": b"core"})
        await until((spool / str(process.pid) / f"core_{EPOCH}").exists)
    await asyncio.to_thread(made.end)
    await containers.stop()
    assert await letters_of(bus, made.event) == []


def test_file_that_shrinks_while_it_is_copied_is_not_called_whole(
    contained: Contained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained.write({**WHOLE, "core": os.urandom(3 * MIB)})
    copy_range = copying._copy_range

    def shrinking(source: int, target: int, start: int, end: int, step: Callable[[], None]) -> int:
        if end == 3 * MIB:
            os.truncate(contained.place / f"core_{EPOCH}", MIB)
        return copy_range(source, target, start, end, step)

    monkeypatch.setattr(copying, "_copy_range", shrinking)
    with watching(contained.event, tmp_path / "spool") as watched:
        assert watched.look()
        assert watched.copy_whole()

    core = brought_out(tmp_path / "spool", contained.process.pid).files[f"core_{EPOCH}"]
    assert (core.size, core.truncated, core.expected) == (MIB, True, 3 * MIB)


def test_small_file_that_is_huge_is_cut(contained: Contained, tmp_path: Path) -> None:
    contained.write({**WHOLE, "core": b"core", "info": bytes(17 * MIB - 1) + b"x"})

    with watching(contained.event, tmp_path / "spool") as watched:
        assert watched.look()
        assert watched.copy_whole()

    info = brought_out(tmp_path / "spool", contained.process.pid).files[f"info_{EPOCH}"]
    assert (info.size, info.truncated, info.expected) == (16 * MIB, True, 17 * MIB)


def test_configuration_that_is_huge_is_not_read_again_and_again(
    contained: Contained, tmp_path: Path
) -> None:
    """It is parsed at each look, twenty times a second."""
    promises = b'{"libscope": {"snapshot": {"coredump": "false", "backtrace": "false"}}'
    contained.write({"info": b"x", "cfg": promises.ljust(64 * 1024 - 1) + b"}"})

    with watching(contained.event, tmp_path / "spool") as watched:
        watched.look()
        assert [one.verdict for one in watched._sets.values()] == [Verdict.WHOLE]
        contained.write({"cfg": promises.ljust(64 * 1024) + b"}"})
        watched.look()
        assert [one.verdict for one in watched._sets.values()] == [Verdict.WAIT]
