"""What AppScope's library left inside a container, or another put there for us, is brought out."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crashbus.capture import CaptureRecord
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector.appscope import _Watched
from services.collector.judge import Verdict
from tests.collector.stand_in import signal_event
from tests.support.disk import small_disk
from tests.support.requirements import need_root

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

    def write(self, files: dict[str, bytes]) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            (self.place / f"{kind}_{EPOCH}").write_bytes(content)

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


def watching(event: SignalEvent, spool: Path, reserve: float = 0) -> _Watched:
    return _Watched(event, spool, "test-host", reserve)


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
        assert watched.copy_whole()

        state = os.statvfs(disk.place)
        assert state.f_bavail * 4 >= state.f_blocks - 64  # blocks: the record, and the file's own
        record = brought_out(disk.place, contained.process.pid)
        core = record.files[f"core_{EPOCH}"]
        assert record.state == "complete"
        assert core.truncated and core.expected == 32 * MIB
        assert MIB < core.size < 13 * MIB
        assert not record.files[f"info_{EPOCH}"].truncated


def test_set_that_finds_no_room_at_all_leaves_nothing_behind(
    contained: Contained, tmp_path: Path
) -> None:
    contained.write({**WHOLE, "core": b"core", "info": os.urandom(8 * MIB)})

    with (
        small_disk(tmp_path / "spool", 4) as disk,
        watching(contained.event, disk.place) as watched,
    ):
        assert watched.look()
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                watched.copy_whole()

        assert list((disk.place / str(contained.process.pid)).iterdir()) == []


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
