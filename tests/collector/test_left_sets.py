"""Sets that a killed recorder left: the collector waits for the one that finishes them."""

import fcntl
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crashbus import Manifest, crash_id, layout
from crashbus.layout import Kind, crash_file_name
from services.collector import spool
from services.collector.found import look_at
from services.collector.judge import Verdict
from services.collector.processes import Living
from services.common import capture, drafts
from services.common.capture import CapturedFile
from services.common.drafts import Awaited
from tests.collector.conftest import Setup
from tests.support.records import EPOCH, Writing, process
from tests.support.requirements import need_root
from tests.support.wait import until

PID = 4194001
CORE = crash_file_name(Kind.CORE, EPOCH)
LATER = crash_file_name(Kind.CORE, EPOCH + 1)


class Left:
    """A set as a killed recorder leaves it: a record that nobody locks, a draft, a core."""

    def __init__(self, setup: Setup) -> None:
        need_root()
        self._writing = Writing(setup.spool, process(PID))
        self.crash_id = self._writing.crash_id
        self.record = self._writing.place / crash_file_name(Kind.CAPTURE, EPOCH)
        self.draft = setup.spool / layout.DRAFTS / f"{PID}-{EPOCH}"
        os.close(drafts.begin(setup.spool, PID, EPOCH))
        (self._writing.place / CORE).write_bytes(b"core")
        self._writing.end()

    def finish(self, locked: int) -> None:
        """Do as the recorder that has locked it."""
        record = capture.read(locked).model_copy(
            update={"state": "complete", "files": {CORE: CapturedFile(size=4)}}
        )
        capture.write(locked, record)
        self.draft.unlink()


async def start(setup: Setup, patience: float) -> None:
    setup.collector._environment["CRASHBUS_COLLECTOR_RECORDER_PATIENCE"] = str(patience)
    await setup.collector.start()
    await setup.collector.healthy()


async def has_looked(setup: Setup, left: Left) -> None:
    """Return when the collector has looked at the set: it has entered another beside it."""
    other = process(PID, start_ticks=2)
    with left.record.open("rb") as file:
        record = capture.read(file.fileno())
    another = record.model_copy(
        update={
            "state": "complete",
            "process": other,
            "crash_id": crash_id(other.boot_id, PID, other.start_ticks),
            "files": {LATER: CapturedFile(size=5)},
        }
    )
    directory = os.open(left.record.parent, os.O_RDONLY)
    locked = capture.create(directory, EPOCH + 1, another)
    (left.record.parent / LATER).write_bytes(b"later")
    os.close(locked)
    os.close(directory)
    await until(lambda: _is_entered(setup, another.crash_id))


def _is_entered(setup: Setup, crash: str) -> bool:
    return any(path.stem == crash for path in setup.ledger())


async def test_set_is_entered_whole_when_a_recorder_has_finished_it(setup: Setup) -> None:
    left = Left(setup)
    await start(setup, 3600)
    await has_looked(setup, left)
    assert not _is_entered(setup, left.crash_id)

    with left.record.open("r+b") as record:
        assert capture.lock(record.fileno())
        left.finish(record.fileno())

    await until(lambda: _is_entered(setup, left.crash_id))
    (manifest,) = [one for one in await _manifests(setup) if one.crash_id == left.crash_id]
    assert not manifest.notes and not any(file.truncated for file in manifest.files)


async def _manifests(setup: Setup) -> list[Manifest]:
    return await until(lambda: _both(setup), within=60)


async def _both(setup: Setup) -> list[Manifest] | None:
    found = await setup.bus.stored(Manifest)
    return found if len(found) >= 2 else None


async def test_set_is_taken_as_it_lies_when_no_recorder_comes(setup: Setup) -> None:
    left = Left(setup)
    await start(setup, 1)

    await until(lambda: _is_entered(setup, left.crash_id), within=30)

    assert not left.draft.exists()  # a recorder that comes later leaves it alone
    manifest = await until(lambda: _first(setup), within=60)
    assert any("cut short" in note for note in manifest.notes)


async def _first(setup: Setup) -> Manifest | None:
    return next(iter(await setup.bus.stored(Manifest)), None)


@pytest.mark.parametrize("seconds", [-1000, 1000])
async def test_set_that_a_recorder_has_locked_is_not_taken_however_long_it_takes(
    setup: Setup, seconds: int
) -> None:
    left = Left(setup)
    with left.record.open("r+b") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        os.utime(left.draft, (time.time() + seconds,) * 2)
        await start(setup, 1)
        await has_looked(setup, left)
        assert not _is_entered(setup, left.crash_id)
        assert left.draft.exists()
        left.finish(record.fileno())

    await until(lambda: _is_entered(setup, left.crash_id))


async def test_clock_that_was_set_back_keeps_no_set_waiting(setup: Setup) -> None:
    left = Left(setup)
    os.utime(left.draft, (time.time() + 86400,) * 2)

    await start(setup, 1)

    await until(lambda: _is_entered(setup, left.crash_id))


def test_only_one_of_recorder_and_collector_gets_a_set(tmp_path: Path) -> None:
    """Whoever is first: the other finds it locked, or no draft."""
    os.close(drafts.begin(tmp_path, PID, EPOCH))
    patient, impatient = (Awaited(tmp_path, patience).is_awaited for patience in (60, 0))

    assert patient(PID, EPOCH, lambda: True)
    assert impatient(PID, EPOCH, lambda: False)
    assert not impatient(PID, EPOCH, lambda: True)
    assert drafts.take_up(tmp_path, PID, EPOCH) is None
    assert not patient(PID, EPOCH, lambda: True)


def test_set_is_awaited_from_when_nobody_is_at_it_not_from_its_recorder_s_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(drafts.begin(tmp_path, PID, EPOCH))
    os.utime(tmp_path / layout.DRAFTS / f"{PID}-{EPOCH}", (0, 0))
    awaited = Awaited(tmp_path, 60)
    assert awaited.is_awaited(PID, EPOCH, lambda: True)
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)

    # A collector that was started again begins to wait anew.
    assert Awaited(tmp_path, 60).is_awaited(PID, EPOCH, lambda: True)
    drafts.keep_waiting(tmp_path, PID, EPOCH)
    assert awaited.is_awaited(PID, EPOCH, lambda: True)
    os.utime(tmp_path / layout.DRAFTS / f"{PID}-{EPOCH}", (0, 0))
    assert not awaited.is_awaited(PID, EPOCH, lambda: True)


def test_next_recorder_is_awaited_as_long_when_one_is_killed_over_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_root()
    writing = Writing(tmp_path, process(PID))
    awaited = Awaited(tmp_path, 60)
    os.close(drafts.begin(tmp_path, PID, EPOCH))
    with spool.open_directory(str(writing.place)) as directory:
        entries = spool.list_directory(directory).sets[EPOCH]

        def verdict() -> Verdict:
            os.utime(tmp_path / layout.DRAFTS / f"{PID}-{EPOCH}", (0, 0))
            (found,) = look_at(str(PID), directory, EPOCH, entries, Living(PID, ""), awaited)
            return found.verdict

        writing.end()
        assert verdict() is Verdict.WAIT
        with (writing.place / crash_file_name(Kind.CAPTURE, EPOCH)).open("r+b") as record:
            fcntl.flock(record, fcntl.LOCK_EX)
            later = time.monotonic() + 61
            monkeypatch.setattr(time, "monotonic", lambda: later)
            assert verdict() is Verdict.WAIT

        assert verdict() is Verdict.WAIT
        later += 61
        assert verdict() is Verdict.CUT_SHORT


def test_sets_that_are_finished_are_not_remembered(tmp_path: Path) -> None:
    awaited = Awaited(tmp_path, 60)
    for epoch in range(9):
        os.close(drafts.begin(tmp_path, PID, epoch))
        assert awaited.is_awaited(PID, epoch, lambda: True)
        drafts.remove(tmp_path, PID, epoch)

    assert len(awaited._first_seen) == 1


def test_draft_tells_what_was_kept(tmp_path: Path) -> None:
    draft = drafts.begin(tmp_path, PID, EPOCH)
    drafts.keep(draft, b"known")
    drafts.tell_final(draft, 1 << 40)
    drafts.tell_left_out(draft, "it is large", 1 << 41)
    os.close(draft)

    assert drafts.left(tmp_path) == [(PID, EPOCH)]
    for count in (0, 1):
        draft_then = drafts.Draft(1 << 40, count, "it is large", 1 << 41, b"known")
        assert drafts.take_up(tmp_path, PID, EPOCH) == draft_then
    drafts.count_back(tmp_path, PID, EPOCH)
    assert drafts.take_up(tmp_path, PID, EPOCH) == draft_then
    drafts.remove(tmp_path, PID, EPOCH)
    assert drafts.left(tmp_path) == []


def test_set_that_was_finished_after_its_record_was_read_is_whole(tmp_path: Path) -> None:
    need_root()
    writing = Writing(tmp_path, process(PID))
    writing.end()

    def finished_just_now(*_: object) -> bool:
        with (writing.place / crash_file_name(Kind.CAPTURE, EPOCH)).open("r+b") as file:
            record = capture.read(file.fileno())
            capture.write(file.fileno(), record.model_copy(update={"state": "complete"}))
        return False

    with spool.open_directory(str(writing.place)) as directory:
        entries = spool.list_directory(directory).sets[EPOCH]
        awaited: Any = SimpleNamespace(is_awaited=finished_just_now)
        (found,) = look_at(str(PID), directory, EPOCH, entries, Living(PID, ""), awaited)

    assert found.verdict is Verdict.WHOLE
