"""Retention: what is removed, and what must stay."""

import asyncio
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crashbus import Bus, streams
from crashbus.chunks import Chunk
from crashbus.layout import BINARIES, Kind
from crashbus.parts import Process
from services.collector import retention
from services.collector.ledger import Crash, Ledger, Source
from services.collector.retention import Retention
from services.collector.settings import CollectorSettings
from tests.support.requirements import need_root

CRASH_ID = "0" * 16


@pytest.fixture
async def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one delivered crash, whose file lies in the spool."""
    made = Ledger(tmp_path / "ledger")
    made.load()
    (tmp_path / "spool" / "7").mkdir(parents=True)
    (tmp_path / "spool" / "7" / "info_1").write_text("delivered")
    process = Process(boot_id="b", pid=7, ns_pid=7, start_ticks=1, uid=0, gid=0, comm="x")
    crash = Crash(crash_id=CRASH_ID, host="h", crashed_at=1.0, process=process, delivered_at=1.0)
    crash.sources["info_1"] = source(1)
    await made.save(crash)
    return made


def source(epoch: int) -> Source:
    return Source(directory="7", name=f"info_{epoch}", kind=Kind.INFO)


async def test_delivered_files_are_removed_with_their_entry(tmp_path: Path, ledger: Ledger) -> None:
    (crash,) = ledger.expired(keep=0)
    await retention.remove_crash(str(tmp_path / "spool"), ledger, crash)
    assert not (tmp_path / "spool" / "7").exists()
    assert ledger.get(CRASH_ID) is None
    assert not ledger.knows_file("7", "info_1", 0)


async def test_entry_is_removed_outside_the_event_loop(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk may hang."""
    unlink, threads = Path.unlink, list[int]()

    def noted(path: Path, missing_ok: bool = False) -> None:
        threads.append(threading.get_ident())
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)
    (crash,) = ledger.crashes()
    await ledger.forget(crash)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_entry_that_is_made_anew_while_it_is_removed_stays(ledger: Ledger) -> None:
    (crash,) = ledger.crashes()
    await asyncio.gather(ledger.forget(crash), ledger.save(crash))
    again = Ledger(ledger._directory)
    again.load()
    assert [one.crash_id for one in again.crashes()] == [crash.crash_id]
    assert ledger.get(crash.crash_id) is crash


async def test_what_nobody_waits_for_leaves_the_bus_with_it(
    tmp_path: Path, ledger: Ledger, bus: Bus
) -> None:
    other = "1" * 16
    for crash_id in (CRASH_ID, other):
        for name in ("info_1", "core_1"):
            await bus.publish_chunk(crash_id, name, Chunk(0, 1, b"x", ""))
        await bus._js.publish(f"crash.file.h.{crash_id}.info_1.x", b"was acknowledged")
    (crash,) = ledger.expired(keep=0)
    spool, settings = str(tmp_path / "spool"), CollectorSettings()
    deliverer: Any = None  # only asked about what is not delivered
    coming: set[str] = {CRASH_ID}
    cores: Any = SimpleNamespace(has=coming.__contains__)
    retention = Retention(spool, ledger, bus, deliverer, cores, settings)

    await retention._remove_crash(crash)
    assert await bus.chunk_count(CRASH_ID, "core_1") == 1  # and lies nowhere else
    assert ledger.get(CRASH_ID)

    coming.clear()
    await retention._remove_crash(crash)
    for name in ("info_1", "core_1"):
        assert await bus.chunk_count(CRASH_ID, name) == 0
        assert await bus.chunk_count(other, name) == 1
    assert (await bus._js.stream_info(streams.FILES)).state.messages == 1


async def test_set_entered_after_the_sweep_began_stays(tmp_path: Path, ledger: Ledger) -> None:
    (crash,) = ledger.expired(keep=0)
    (tmp_path / "spool" / "7" / "info_2").write_text("not delivered yet")
    crash.sources["info_2"], crash.delivered_at = source(2), None
    await ledger.save(crash)
    await retention.remove_crash(str(tmp_path / "spool"), ledger, crash)
    assert (tmp_path / "spool" / "7" / "info_2").read_text() == "not delivered yet"
    assert ledger.get(CRASH_ID) is crash


async def test_file_of_another_crash_in_the_directory_stays(tmp_path: Path, ledger: Ledger) -> None:
    other = tmp_path / "spool" / "7" / "info_9"
    other.write_text("another's")
    (crash,) = ledger.expired(keep=0)
    await retention.remove_crash(str(tmp_path / "spool"), ledger, crash)
    assert other.read_text() == "another's"
    assert not (tmp_path / "spool" / "7" / "info_1").exists()


async def test_record_and_file_that_came_in_the_place_of_another_s_stay(
    tmp_path: Path, ledger: Ledger
) -> None:
    """The recorder puts aside what stands in the place of its files."""
    need_root()
    place = tmp_path / "spool" / "7"
    (place / "capture_1").write_text("the recorder's")
    (crash,) = ledger.expired(keep=0)
    crash.sources["info_1"].owner = 65534
    await ledger.save(crash)

    assert retention.measure(str(tmp_path / "spool"), [("7", "info_1", 65534)]) == {}
    await retention.remove_crash(str(tmp_path / "spool"), ledger, crash)

    assert {file.name for file in place.iterdir()} == {"info_1", "capture_1"}
    assert ledger.get(CRASH_ID) is None


async def test_binary_goes_with_the_crash_it_came_with(tmp_path: Path, ledger: Ledger) -> None:
    (crash,) = ledger.expired(keep=0)
    name = f"executable_{'ab' * 20}_{'0' * 16}"
    directory = tmp_path / "spool" / BINARIES
    directory.mkdir()
    (directory / name).write_text("delivered")
    (directory / "another").write_text("not delivered")
    crash.sources[name] = Source(directory=BINARIES, name=name, kind=Kind.EXECUTABLE)
    await ledger.save(crash)

    await retention.remove_crash(str(tmp_path / "spool"), ledger, crash)

    assert [path.name for path in directory.iterdir()] == ["another"]
    assert not ledger.knows_file(BINARIES, name, 0)


async def test_only_old_binaries_of_no_crash_are_strays(tmp_path: Path, ledger: Ledger) -> None:
    (crash,) = ledger.expired(keep=0)
    directory = tmp_path / "spool" / BINARIES
    directory.mkdir()
    old = time.time() - retention.STRAY_AFTER - 10
    for name in ("known", "new", "stray", ".hidden", "link"):
        path = directory / name
        path.symlink_to("/etc/passwd") if name == "link" else path.write_text(name)
        if name != "new":
            os.utime(path, (old, old), follow_symlinks=False)
    crash.sources["known"] = Source(directory=BINARIES, name="known", kind=Kind.EXECUTABLE)
    await ledger.save(crash)

    retention.remove_strays(str(tmp_path / "spool"), ledger)

    assert sorted(path.name for path in directory.iterdir()) == ["known", "new"]
    assert Path("/etc/passwd").exists()
    retention.remove_strays(str(tmp_path / "nowhere"), ledger)
