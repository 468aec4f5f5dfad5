"""What a killed recorder had in hand is finished by the next one."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from crashbus import layout
from crashbus.identity import boot_id
from services.common import capture, drafts
from services.common.bus_settings import BusSettings
from services.common.capture import CaptureRecord
from services.recorder.conditions import Conditions
from services.recorder.kept import orphan, taking_up
from services.recorder.kept.taking_up import TakingUp
from services.recorder.recording import keep_for_another
from services.recorder.settings import RecorderSettings
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_capture import frames, gdb
from tests.support.crashers import HOG, crasher
from tests.support.recorder import FILES, RecorderService, crash
from tests.support.records import EPOCH, Writing, process
from tests.support.requirements import need_root
from tests.support.victim import Victim
from tests.support.wait import until

# The real recorder, which a real SIGKILL ends when it comes to a place for the first time.
_KILLED = """
import os, runpy, signal, sys
from services.recorder import capturing, finishing, service
from services.recorder.core import core_pages
from services.recorder.kept import adopting
from services.recorder.kept.orphan import Orphan
from services.recorder.unwinding import unwinder
def end(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def after(done):
    def both(*values, **named):
        done(*values, **named)
        end()
    return both
{place}
sys.argv = ["recorder"]
runpy.run_module("services.recorder", run_name="__main__")
"""
WHILE_COPYING = """
def told(work, upto):
    tell(work, upto)
    if upto > 100 << 20: end()
tell, core_pages._Work._tell = core_pages._Work._tell, told
"""
BEFORE_MEMORY = "capturing.write_core = end"
BEFORE_IT_IS_TOLD = "service.say_what_is_there = end"
_TROUBLE = """
from services.recorder.kept import taking_up
def fail_once(name, *values, **named):
    if str(name).startswith("core_") and not failed:
        failed.append(name)
        raise OSError({}, "trouble")
    return opened(name, *values, **named)
failed, opened = [], os.open
class Os:
    open = staticmethod(fail_once)
    def __getattr__(self, name): return getattr(os, name)
taking_up.os = Os()
"""
BEFORE_BACKTRACE = "finishing.finish = end"
IN_BACKTRACE = "unwinder._run = end"
AFTER_BACKTRACE = "finishing._write_backtrace = after(finishing._write_backtrace)"
BEFORE_ITS_BINARIES_ARE_KEPT = "finishing._binaries = end"
WHEN_COMPLETE = "finishing._complete = after(finishing._complete)"
BEFORE_THE_END = "finishing._complete = end"


async def killed(recorder: RecorderService, place: str) -> None:
    """Start a recorder that is killed at a place, and return when it was."""
    recorder.prefix = (sys.executable, "-c", _KILLED.format(place=place))
    await recorder.start()


async def has_died(recorder: RecorderService) -> None:
    assert recorder.process is not None
    assert await asyncio.to_thread(recorder.process.wait, 60) == -signal.SIGKILL
    recorder.prefix = ()


def left(recorder: RecorderService, pid: int) -> CaptureRecord:
    """Return the record of a set that nobody is at."""
    with recorder.file(pid, "capture").open("rb") as file:
        assert not capture.is_being_written(file.fileno())
        return capture.read(file.fileno())


def drafts_of(recorder: RecorderService) -> list[Path]:
    return list((recorder.spool / layout.DRAFTS).iterdir())


PLACES = [BEFORE_BACKTRACE, IN_BACKTRACE, AFTER_BACKTRACE, BEFORE_THE_END]


# How the core came matters no more by then.
@pytest.mark.parametrize(
    ("mechanism", "place"), [*product(["auto"], PLACES), ("pipe", BEFORE_BACKTRACE)]
)
async def test_set_with_a_whole_core_is_finished(
    recorder_with: MakeRecorder, tmp_path: Path, place: str, mechanism: str
) -> None:
    recorder = recorder_with(recorder_mechanism=mechanism)
    program = crasher("null_pointer")
    victim = Victim(program, "an argument", cwd=tmp_path, env={"API_KEY": "hunter2", "LANG": "C"})
    await killed(recorder, place)
    assert await asyncio.to_thread(victim.go().process.wait, 60) == -signal.SIGSEGV
    await has_died(recorder)
    before = left(recorder, victim.pid)
    assert before.state == "writing" and len(drafts_of(recorder)) == 1

    await recorder.start()

    record = await recorder.captured(victim.pid)
    assert (record.crash_id, record.signal_name) == (before.crash_id, "SIGSEGV")
    assert taking_up.NOTE in record.notes
    assert record.fingerprint and record.modules
    assert sorted(record.files) == sorted(recorder.file(victim.pid, kind).name for kind in FILES)
    assert not any(file.truncated for file in record.files.values())
    for name, file in record.files.items():
        assert (recorder.spool / str(victim.pid) / name).stat().st_size == file.size
    assert frames(recorder.file(victim.pid, "backtrace").read_text())[0][2] == "crash_here"
    assert "--- instruction" in recorder.file(victim.pid, "backtrace").read_text()
    assert "crash_here" in gdb(program, recorder.file(victim.pid, "core"), "bt")
    snapshot = json.loads(recorder.file(victim.pid, "snapshot").read_bytes())
    assert (snapshot["Pid"], snapshot["Cwd"]) == (victim.pid, str(tmp_path))
    assert {"API_KEY=<redacted>", "LANG=C"} <= set(snapshot["Environment"])
    assert snapshot["Arguments"][1:] == ["an argument"]
    assert snapshot["Threads"][0]["Name"] == "null_pointer" and snapshot["OpenFiles"]
    assert snapshot["FaultMapping"] and snapshot["Limits"] and snapshot["Mounts"]
    assert not drafts_of(recorder)


async def test_core_that_was_being_copied_is_cut_and_told_and_has_a_backtrace(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await killed(recorder, WHILE_COPYING)
    victim = subprocess.Popen([*HOG, "300"], stderr=subprocess.DEVNULL)
    await has_died(recorder)
    assert await asyncio.to_thread(victim.wait, 60) == -signal.SIGSEGV
    # What takes its time comes before the core is cut, or the next one found no stacks in it.
    for place in (BEFORE_ITS_BINARIES_ARE_KEPT, WHEN_COMPLETE):
        assert recorder.file(victim.pid, "core").stat().st_size > 300 << 20
        recorder.prefix = (sys.executable, "-c", _KILLED.format(place=place))
        recorder.launch()
        await has_died(recorder)

    record = await recorder.captured(victim.pid)
    core = recorder.file(victim.pid, "core")
    told = record.files[core.name]
    assert told.truncated and told.expected is not None
    assert 100 << 20 < told.size == core.stat().st_size < told.expected
    assert f"{told.expected - told.size} of {told.expected} bytes are missing" in (told.note or "")
    assert "_PyEval" in recorder.file(victim.pid, "backtrace").read_text()
    assert json.loads(recorder.file(victim.pid, "snapshot").read_bytes())["Pid"] == victim.pid


@pytest.mark.parametrize("place", [BEFORE_IT_IS_TOLD, BEFORE_BACKTRACE])
async def test_core_that_was_laid_out_anew_is_read_again(
    recorder_with: MakeRecorder, place: str
) -> None:
    recorder = recorder_with(recorder_max_core_bytes=8 << 20)
    await killed(recorder, place)
    pid, _ = await asyncio.to_thread(crash, *HOG, "50")
    await has_died(recorder)

    await recorder.start()

    record = await recorder.captured(pid)
    core = record.files[recorder.file(pid, "core").name]
    assert core.truncated and "were left out" in (core.note or "")
    assert core.expected is not None and core.expected > 50 << 20
    assert "--- registers" in recorder.file(pid, "backtrace").read_text()


async def test_crash_whose_memory_was_not_read_is_told_all_the_same(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_MEMORY)
    victim = Victim(crasher("null_pointer"), cwd=tmp_path).go()
    await has_died(recorder)

    await recorder.start()

    record = await recorder.captured(victim.pid)
    assert (record.signal_name, record.fault_address) == ("SIGSEGV", 0)
    assert "no core: the recorder was killed before there was one" in record.notes
    assert not any(name.startswith("core_") for name in record.files)
    assert json.loads(recorder.file(victim.pid, "snapshot").read_bytes())["Cwd"] == str(tmp_path)


async def test_second_kill_leads_to_the_same_again(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    recorder.prefix = (sys.executable, "-c", _KILLED.format(place=AFTER_BACKTRACE))
    recorder.launch()
    await has_died(recorder)

    await recorder.start()

    record = await recorder.captured(pid)
    assert len(record.files) == len(FILES)
    assert list(record.notes).count(taking_up.NOTE) == 1
    assert frames(recorder.file(pid, "backtrace").read_text())[0][2] == "crash_here"


async def test_set_of_which_recorders_die_is_given_up(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    for _ in range(taking_up.MOST_TRIES):
        recorder.prefix = (sys.executable, "-c", _KILLED.format(place=IN_BACKTRACE))
        recorder.launch()
        await has_died(recorder)

    await recorder.start()

    await until(lambda: not drafts_of(recorder))
    assert left(recorder, pid).state == "writing"  # with no draft: the collector takes it so
    assert "recorders die of this crash" in recorder.log
    assert recorder.file(pid, "core").stat().st_size
    later, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await recorder.captured(later)


async def test_set_that_another_has_locked_is_left_alone_until_it_is_free(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    (draft,) = drafts_of(recorder)
    os.utime(draft, (0, 0))
    with recorder.file(pid, "capture").open("rb") as record:
        assert capture.lock(record.fileno())
        await recorder.start()
        # It looks again and again, and says each time that it will come.
        await until(lambda: time.time() - draft.stat().st_mtime < 60)
        os.utime(draft, (0, 0))
        await until(lambda: time.time() - draft.stat().st_mtime < 60)
        assert capture.read(record.fileno()).state == "writing"

    assert len((await recorder.captured(pid)).files) == len(FILES)


async def test_drafts_without_an_own_unfinished_set_are_removed(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    recorder = recorder_with()
    recorder.spool.mkdir()
    whole = Writing(recorder.spool, process(4194001))
    whole.complete({})
    foreign = Writing(recorder.spool, process(4194002))
    foreign.end()
    os.chown(foreign.place, 65534, 65534)
    linked = Writing(recorder.spool, process(4194003))
    linked.end()
    (record,) = linked.place.iterdir()
    os.link(record, tmp_path / "second name")
    torn = Writing(recorder.spool, process(4194004))
    torn.end()
    (record_of_torn,) = torn.place.iterdir()
    record_of_torn.write_bytes(b"{")
    for pid in range(4194000, 4194005):  # the first has no directory
        os.close(drafts.begin(recorder.spool, pid, EPOCH))

    await recorder.start()

    await until(lambda: not drafts_of(recorder))
    for one in (foreign, linked):
        (record,) = one.place.iterdir()
        assert b'"writing"' in record.read_bytes()


@pytest.mark.parametrize("known", [b"", b"{", b"\0" * 8])
async def test_torn_draft_costs_what_it_told(recorder_with: MakeRecorder, known: bytes) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    (draft,) = drafts_of(recorder)
    draft.write_bytes(draft.read_bytes()[: drafts._HEAD.size] + known)

    await recorder.start()

    record = await recorder.captured(pid)
    assert len(record.files) == len(FILES)
    assert any("before it had read more" in note for note in record.notes)
    assert "--- registers" in recorder.file(pid, "backtrace").read_text()


@pytest.mark.parametrize(
    "place",
    [
        "adopting.begin = after(adopting.begin)",
        "Orphan.is_adopted = end",
        IN_BACKTRACE,
    ],
)
async def test_crash_that_its_helper_kept_is_whole_once_whenever_its_recorder_is_killed(
    recorder_with: MakeRecorder, place: str
) -> None:
    recorder = recorder_with(recorder_mechanism="socket")
    await recorder.start()
    recorder.kill()
    await until(lambda: "the pipe helper keeps crashes" in recorder.log)
    program = crasher("null_pointer")
    victim = Victim(program, env={"LANG": "C"})
    assert await asyncio.to_thread(victim.go().process.wait, 60) == -signal.SIGSEGV
    recorder.prefix = (sys.executable, "-c", _KILLED.format(place=place))
    recorder.launch()
    await has_died(recorder)

    await recorder.start()

    await until(lambda: not drafts_of(recorder) and not orphan.is_left(recorder.spool, victim.pid))
    assert len(list((recorder.spool / str(victim.pid)).glob("capture_*"))) == 1
    record = await recorder.captured(victim.pid)
    assert len(record.files) == len(FILES) and record.modules
    assert not any(file.truncated for file in record.files.values())
    core = recorder.file(victim.pid, "core")
    assert core.stat().st_size == record.files[core.name].size
    assert "crash_here" in gdb(program, core, "bt")
    assert "LANG=C" in json.loads(recorder.file(victim.pid, "snapshot").read_bytes())["Environment"]
    assert sum("pipe helper kept it" in note for note in record.notes) == 1


async def test_core_that_was_cut_at_its_limit_is_told_to_be_cut_for_that_reason(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with(recorder_core_source="stream", recorder_max_core_bytes=100_000)
    await killed(recorder, BEFORE_IT_IS_TOLD)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)

    await recorder.start()

    core = (await recorder.captured(pid)).files[recorder.file(pid, "core").name]
    assert (core.size, core.truncated) == (100_000, True)
    assert core.note == "cut at the limit of 100000 bytes"
    assert core.expected is not None and core.expected > core.size


@pytest.mark.parametrize("place", [BEFORE_IT_IS_TOLD, BEFORE_BACKTRACE])
async def test_core_that_was_not_to_be_kept_is_told_to_be_none_for_that_reason(
    recorder_with: MakeRecorder, place: str
) -> None:
    recorder = recorder_with(recorder_core_off="executable=*null_pointer")
    await killed(recorder, place)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)

    await recorder.start()

    notes = (await recorder.captured(pid)).notes
    assert any("CRASHBUS_RECORDER_CORE_OFF" in note for note in notes)
    assert not any("before there was one" in note for note in notes)


async def test_core_that_outlived_a_restart_of_the_host_is_doubtful(
    recorder_with: MakeRecorder,
) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    place = recorder.file(pid, "capture")
    other = f"{2:08}-0000-4000-8000-{0:012}"
    place.write_text(place.read_text().replace(boot_id(), other))

    await recorder.start()

    core = (await recorder.captured(pid)).files[recorder.file(pid, "core").name]
    assert core.truncated and "the host went down" in (core.note or "")


def test_set_does_not_wait_for_another_crash_of_its_pid(tmp_path: Path) -> None:
    """What the pipe helper kept of that may be there for as long as it cannot be adopted."""
    need_root()
    writing = Writing(tmp_path, process(4194001))
    writing.end()
    os.close(drafts.begin(tmp_path, 4194001, EPOCH))
    kept = tmp_path / layout.ORPHANS / f"{EPOCH + 1}-4194001"
    kept.mkdir(parents=True)
    (kept / "crash").write_bytes(b"4194001 4194001 11 1795396543\n")
    (kept / "boot_id").write_bytes(b"boot\n")
    (kept / "stat").write_bytes(b"4194001 (x) S " + b"0 " * 18 + b"2\n")
    on = Conditions.of(BusSettings(spool=tmp_path), RecorderSettings(), {})

    taken = taking_up.take_up(4194001, EPOCH, on)

    assert taken is not None and taken.record.crash_id == writing.crash_id
    taken.close()
    (kept / "stat").write_bytes(b"4194001 (x) S " + b"0 " * 18 + b"1\n")
    with pytest.raises(BlockingIOError, match="adopting"):
        taking_up.take_up(4194001, EPOCH, on)


def test_draft_that_cannot_be_made_costs_no_capture(tmp_path: Path) -> None:
    need_root()
    Writing(tmp_path, process(4194001)).end()
    os.close(drafts.begin(tmp_path, 4194001, EPOCH))
    on = Conditions.of(BusSettings(spool=tmp_path), RecorderSettings(), {})
    recording = taking_up.take_up(4194001, EPOCH, on)
    assert recording is not None and recording.facts is not None
    recording.draft = os.open(tmp_path / "draft", os.O_RDWR | os.O_CREAT)

    keep_for_another(recording, replace(recording.facts, cwd="no \udcff JSON"))

    assert not (tmp_path / "draft").read_bytes()
    recording.close()


def test_one_that_stands_still_keeps_none_behind_it_waiting(tmp_path: Path) -> None:
    done, released = threading.Event(), threading.Event()

    def finish(pid: int, _: int) -> bool:
        if pid == 1:
            released.wait(60)
        else:
            done.set()
        return True

    for pid in (1, 2):
        os.close(drafts.begin(tmp_path, pid, pid))
    stuck = TakingUp(tmp_path, finish, lambda one, _: one == (1, 1))
    stuck.start()
    try:
        draft = tmp_path / layout.DRAFTS / "1-1"
        os.utime(draft, (0, 0))
        end = time.monotonic() + 30
        while time.monotonic() < end and time.time() - draft.stat().st_mtime > 60:
            time.sleep(0.01)
        assert time.time() - draft.stat().st_mtime < 60
        stuck.replace_stuck()
        assert done.wait(30)
    finally:
        released.set()
        stuck.stop(30)


def test_one_that_fails_again_and_again_is_left_to_who_takes_it_as_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking_up, "_AFTER_TROUBLE", 0)
    monkeypatch.setattr(taking_up, "_LOOK_EVERY", 0.01)
    tries = []

    def finish(pid: int, _: int) -> bool:
        tries.append(pid)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.close(drafts.begin(tmp_path, 1, 1))
    broken = TakingUp(tmp_path, finish, lambda *_: False)
    broken.start()

    broken._coming.join(30)  # nobody says any more that it will be finished
    assert not broken._coming.is_alive()
    assert len(tries) == taking_up._MOST_TROUBLES


def test_only_a_death_counts(tmp_path: Path) -> None:
    """Neither what cannot be had now nor a regular stop."""
    os.close(drafts.begin(tmp_path, 1, 1))
    begun, released = threading.Event(), threading.Event()

    def finish(pid: int, epoch: int) -> bool:
        assert drafts.take_up(tmp_path, pid, epoch)
        begun.set()
        return released.wait(60)

    stopped = TakingUp(tmp_path, finish, lambda *_: False)
    stopped.start()
    assert begun.wait(30)
    try:
        stopped.stop(0)
        draft = drafts.take_up(tmp_path, 1, 1)
        assert draft is not None and draft.taken_up == 0
    finally:
        released.set()


async def test_passing_trouble_costs_neither_draft_nor_try(recorder_with: MakeRecorder) -> None:
    recorder = recorder_with()
    await killed(recorder, BEFORE_BACKTRACE)
    pid, _ = await asyncio.to_thread(crash, crasher("null_pointer"))
    await has_died(recorder)
    recorder.prefix = (sys.executable, "-c", _KILLED.format(place=_TROUBLE.format(errno.EMFILE)))

    await recorder.start()

    await until(lambda: "a set that was left waits" in recorder.log)
    (draft,) = drafts_of(recorder)
    assert draft.read_bytes()[8] == 0
    assert len((await recorder.captured(pid)).files) == len(FILES)
