"""What AppScope's library left inside a container, or another put there for us, is brought out."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crashbus import Bus
from crashbus.capture import CaptureRecord
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector.appscope import copying, sets
from services.collector.appscope.containers import Containers
from services.collector.appscope.sets import Watched
from services.collector.judge import Verdict
from tests.collector.stand_in import signal_event
from tests.support.disk import small_disk
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

    @property
    def event(self) -> SignalEvent:
        return signal_event(self.process.pid, "handled")

    def write(self, files: dict[str, bytes], epoch: int = EPOCH) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            (self.place / f"{kind}_{epoch}").write_bytes(content)

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def contained(tmp_path: Path) -> Iterator[Contained]:
    need_root()
    root = tmp_path / "root"
    root.mkdir()
    command = [sys.executable, "-c", _WAITS, root]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    made = Contained(process, root / "tmp/appscope" / str(process.pid))
    yield made
    made.end()


def watching(event: SignalEvent, spool: Path, reserve: float = 0) -> Watched:
    return Watched(event, spool, "test-host", reserve)


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
    (path,) = (spool / str(pid)).glob("capture_*")
    return CaptureRecord.model_validate_json(path.read_bytes())


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
        watched.keep_rest()

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

        watched.keep_rest()

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
        containers = Containers(disk.place, "test-host", bus, tmp_path / "state", 0)
        await containers.resume()
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
    containers = Containers(tmp_path / "spool", "test-host", bus, tmp_path / "state", 0)
    await containers.resume()
    await containers.watch(contained.event)
    await asyncio.wait_for(begun.wait(), 30)

    stop = asyncio.create_task(containers.stop())
    done, _ = await asyncio.wait([stop], timeout=0.1)
    stopping.set()
    await stop

    assert not done
    record = brought_out(tmp_path / "spool", contained.process.pid)
    assert record.files[f"core_{EPOCH}"].size == MIB


def test_file_that_shrinks_while_it_is_copied_is_not_called_whole(
    contained: Contained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained.write({**WHOLE, "core": os.urandom(3 * MIB)})
    copy_range = copying._copy_range

    def shrinking(source: int, target: int, start: int, end: int) -> int:
        if end == 3 * MIB:
            os.truncate(contained.place / f"core_{EPOCH}", MIB)
        return copy_range(source, target, start, end)

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
