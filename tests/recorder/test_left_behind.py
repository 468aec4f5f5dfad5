"""A recorder that is killed when it has let a small process go and written nothing of it."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crashbus import Bus, DeadLetter, layout
from crashbus.identity import crash_id
from services.common import unrecorded
from services.common.unrecorded import Unrecorded, is_noted
from services.recorder.kept import left_behind, orphan, taking_up
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.nats import NatsServer
from tests.support.notes import packed
from tests.support.recorder import RecorderService
from tests.support.victim import Victim
from tests.support.wait import until

# The real recorder, which a real SIGKILL ends as soon as it comes to that place.
_KILLED_AT = """
import os, runpy, signal, sys
from services.recorder import capturing
capturing.{place} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["recorder"]
runpy.run_module("services.recorder", run_name="__main__")
"""


async def killed_at(place: str, recorder: RecorderService, victim: Victim) -> None:
    """Have a recorder killed by a crash when it comes to a function of `capturing`."""
    recorder.prefix = (sys.executable, "-c", _KILLED_AT.format(place=place))
    await recorder.start()
    assert await asyncio.to_thread(victim.go().process.wait, 60) == -signal.SIGSEGV
    assert recorder.process is not None
    assert await asyncio.to_thread(recorder.process.wait, 60) == -signal.SIGKILL
    recorder.prefix = ()


@pytest.mark.parametrize("mechanism", ["auto", "pipe"])
async def test_crash_that_was_let_go_and_not_written_is_told_by_the_next_recorder(
    recorder_with: MakeRecorder, tmp_path: Path, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism)
    program = crasher("null_pointer")
    victim = Victim(program, "an argument", cwd=tmp_path, env={"API_KEY": "hunter2", "LANG": "C"})

    await killed_at("begin", recorder, victim)

    assert not list(recorder.spool.glob(f"{victim.pid}/*"))
    assert is_noted(recorder.spool, victim.pid, time.time(), 3600)
    await recorder.start()
    record = await recorder.captured(victim.pid)
    boot = record.process.boot_id
    assert record.crash_id == crash_id(boot, victim.pid, victim.start_ticks)
    assert (record.signal_name, record.fault_address) == ("SIGSEGV", 0)
    assert record.process.executable == str(program)
    assert record.process.command_line[1:] == ("an argument",)
    assert orphan.LOST in record.notes and f"no core: {orphan.LOST}" in record.notes
    assert not any(name.startswith("core_") for name in record.files)
    assert "--- registers" in recorder.file(victim.pid, "backtrace").read_text()
    snapshot = json.loads(recorder.file(victim.pid, "snapshot").read_bytes())
    assert (snapshot["Pid"], snapshot["Cwd"]) == (victim.pid, str(tmp_path))
    assert "API_KEY=<redacted>" in snapshot["Environment"]
    await until(lambda: not list((recorder.spool / layout.ORPHANS).iterdir()))
    assert b"hunter2" not in (recorder.spool / layout.UNRECORDED).read_bytes()


async def test_crash_whose_record_is_there_is_not_told_twice(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    victim = Victim(crasher("null_pointer"), cwd=tmp_path)
    recorder.prefix = ()

    await killed_at("write_core", recorder, victim)

    await recorder.start()
    later = Victim(crasher("null_pointer"), cwd=tmp_path).go()
    await recorder.captured(later.pid)
    assert len(list(recorder.spool.glob(f"{victim.pid}/capture_*"))) == 1
    assert taking_up.NOTE in (await recorder.captured(victim.pid)).notes
    assert not list(recorder.spool.glob(f"{layout.ORPHANS}/*-{victim.pid}"))


async def test_crash_whose_draft_tells_nothing_yet_is_told_by_its_note(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    victim = Victim(crasher("null_pointer"), cwd=tmp_path, env={"LANG": "C"})

    await killed_at("keep_for_another", recorder, victim)

    await recorder.start()
    record = await recorder.captured(victim.pid)
    await until(lambda: not list((recorder.spool / layout.ORPHANS).iterdir()))
    assert len(list(recorder.spool.glob(f"{victim.pid}/capture_*"))) == 1
    assert f"no core: {orphan.LOST}" in record.notes
    snapshot = json.loads(recorder.file(victim.pid, "snapshot").read_bytes())
    assert (snapshot["Cwd"], "LANG=C" in snapshot["Environment"]) == (str(tmp_path), True)
    assert not list((recorder.spool / layout.DRAFTS).iterdir())


async def test_nothing_is_left_of_a_crash_that_was_written(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    await recorder.start()
    victim = Victim(crasher("null_pointer"), cwd=tmp_path, env={"API_KEY": "hunter2"}).go()
    await recorder.captured(victim.pid)

    noted = recorder.spool / layout.UNRECORDED
    assert noted.stat().st_size > 4096  # it was taken, and there was a note
    assert not any(noted.read_bytes())


async def test_note_that_cannot_be_read_is_told(
    recorder_with: MakeRecorder, nats_server: NatsServer, bus: Bus
) -> None:
    recorder = recorder_with(nats_url=nats_server.url)
    assert Unrecorded(recorder.spool).begin(77, packed({"stat": b"\0" * 100}))

    await recorder.start()

    (letter,) = await until(lambda: bus.stored(DeadLetter))
    assert letter.reason == "capture_failed" and "cannot be read" in letter.error


_NOTE = {
    "crash": b"7 7 11 1795396543\n",
    "status": b"s" * 5000,
    "exe": b"/e" * 2000,
    "cmdline": b"c" * 4000,
    "cwd": b"/c" * 2000,
    "root": b"/r" * 2000,
}


@pytest.mark.parametrize("page", range(1, 6))
def test_note_that_a_power_cut_tore_is_kept_as_far_as_it_goes(tmp_path: Path, page: int) -> None:
    ours = Unrecorded(tmp_path)
    assert ours.begin(7, packed(_NOTE)) and ours.begin(8, packed({"crash": b"8 8 11 1795396543\n"}))
    os.pwrite(ours._file, bytes(4096), page * 4096)
    os.close(ours._file)  # as when it is killed

    left_behind.take_over(tmp_path)

    first, second = sorted((tmp_path / layout.ORPHANS).iterdir())
    assert (first / "crash").read_bytes() == _NOTE["crash"]
    assert (second / "end").exists()
    left = {name for name in ("exe", "cwd", "root") if not (first / name).is_symlink()}
    assert left < {"exe", "cwd", "root"}
    assert (tmp_path / layout.UNRECORDED).stat().st_size == 0


def test_note_with_a_longer_link_than_can_be_keeps_no_other_waiting(tmp_path: Path) -> None:
    ours = Unrecorded(tmp_path)
    for pid in (7, 8):
        note = {"crash": b"%d 1 11 1795396543\n" % pid, "exe": b"e" * 5000}
        assert ours.begin(pid, packed(note))
    os.close(ours._file)

    left_behind.take_over(tmp_path)

    kept = (tmp_path / layout.ORPHANS).iterdir()
    assert sorted(one.name for one in kept) == ["1795396543-7", "1795396543-8"]
    assert (tmp_path / layout.UNRECORDED).stat().st_size == 0


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("spool")


_NOTES = st.dictionaries(st.sampled_from(unrecorded.PARTS), st.binary(max_size=70_000))


@given(st.lists(_NOTES, max_size=3))
def test_notes_come_as_they_were_written_as_far_as_there_is_room(
    spool: Path, written: list[Mapping[str, bytes]]
) -> None:
    ours = Unrecorded(spool)
    for number, note in enumerate(written):
        assert ours.begin(number, packed(note))
    if written:
        os.close(ours._file)  # as when it is killed

    found = list(unrecorded.left_notes(spool))

    assert len(found) == len(written)
    for note, one in zip(found, written, strict=True):
        assert note.items() <= one.items()
        assert sum(map(len, one.values())) > 60_000 or note == {k: v for k, v in one.items() if v}
    assert list(unrecorded.left_notes(spool)) == []


@given(st.binary(max_size=2000), st.booleans())
def test_file_of_anything_is_read_without_an_error(spool: Path, raw: bytes, marked: bool) -> None:
    place = spool / layout.UNRECORDED
    place.write_bytes(b"note" * marked + raw)
    place.chmod(0o600)

    assert is_noted(spool, 77, 0, 1) in (True, False)
    left_behind.take_over(spool)

    assert place.stat().st_size == 0
