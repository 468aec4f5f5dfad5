"""A capture record is readable at any moment, on a full disk too."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashbus.parts import Process
from services.common import capture
from services.common.capture import CapturedFile, CaptureRecord
from tests.support.disk import tmpfs

EPOCH = 1795388839
RECORD = CaptureRecord(
    state="writing",
    crash_id="0123456789abcdef",
    host="h",
    crashed_at=EPOCH,
    process=Process(boot_id="b", pid=42, ns_pid=1, start_ticks=1, uid=0, gid=0, comm="x"),
    signal=11,
    signal_name="SIGSEGV",
)


def with_note(length: int, state: str = "writing") -> CaptureRecord:
    return RECORD.model_copy(update={"state": state, "notes": ("n" * length,)})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with tmpfs(tmp_path / "disk", "size=1m") as place:
        yield place


@pytest.fixture
def directory(disk: Path) -> Iterator[int]:
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def record(directory: int) -> Iterator[int]:
    descriptor = capture.create(directory, EPOCH, RECORD)
    yield descriptor
    os.close(descriptor)


def fill(disk: Path) -> None:
    with (disk / "full").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)


def test_record_can_be_completed_on_a_full_disk(disk: Path, record: int) -> None:
    fill(disk)
    files = {f"core_{EPOCH}": CapturedFile(size=1, truncated=True, note="no room on disk")}
    complete = with_note(6000, "complete").model_copy(update={"files": files})

    capture.write(record, complete)

    assert capture.read(record) == complete


def test_record_that_finds_no_room_stays_as_it_was(disk: Path, record: int) -> None:
    capture.write(record, with_note(100))
    fill(disk)
    before = (disk / f"capture_{EPOCH}").read_bytes()

    with pytest.raises(OSError, match="No space"):
        capture.write(record, with_note(900_000, "complete"))

    assert capture.read(record) == with_note(100)
    assert (disk / f"capture_{EPOCH}").read_bytes() == before


def test_shorter_record_leaves_nothing_of_the_longer_one(record: int, disk: Path) -> None:
    capture.write(record, with_note(20_000))

    capture.write(record, with_note(3))
    assert capture.read(record) == with_note(3)

    capture.write(record, with_note(1, "complete"))
    assert capture.read(record) == with_note(1, "complete")
    assert (disk / f"capture_{EPOCH}").stat().st_size < 1000


def test_record_is_made_though_there_is_no_room_for_more(disk: Path, directory: int) -> None:
    fill(disk)
    with (disk / "full").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4096)

    descriptor = capture.create(directory, EPOCH, RECORD)

    assert capture.read(descriptor) == RECORD
    os.close(descriptor)


def test_record_that_cannot_be_made_leaves_nothing_behind(disk: Path, directory: int) -> None:
    opened = len(list(Path("/proc/self/fd").iterdir()))

    with pytest.raises(ValueError, match="surrogates"):
        capture.create(directory, EPOCH, RECORD.model_copy(update={"notes": ("\udcff",)}))

    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    assert not list(disk.iterdir())


def test_name_that_is_a_directory_can_be_tried_elsewhere(disk: Path, directory: int) -> None:
    (disk / f"capture_{EPOCH}").mkdir()

    with pytest.raises(FileExistsError):
        capture.create(directory, EPOCH, RECORD)

    assert [path.name for path in disk.iterdir()] == [f"capture_{EPOCH}"]
