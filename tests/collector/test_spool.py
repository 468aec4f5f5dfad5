"""Files of the spool are what was opened, and not what the directory showed before."""

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from asyncinotify import Inotify, Mask

from crashbus.layout import Kind
from services.collector import found, spool
from services.collector.spool import Refused
from services.common.drafts import Awaited
from tests.support.lease import leased
from tests.support.requirements import need_root

NOBODY = 65534


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    need_root()
    with spool.open_directory(str(tmp_path)) as descriptor:
        yield descriptor


def test_file_of_another_than_the_directory_showed_is_refused(
    tmp_path: Path, directory: int
) -> None:
    file = tmp_path / "core_100"
    file.write_text("a crash")
    os.chown(file, NOBODY, NOBODY)
    os.close(spool.open_file("core_100", directory, NOBODY))
    # Its maker may move what is not his, where he may write.
    (tmp_path / "secret").write_text("root's own")
    (tmp_path / "secret").rename(file)

    with pytest.raises(Refused, match="belongs to UID 0, not to 65534"):
        spool.open_file("core_100", directory, NOBODY)


def test_record_of_another_than_root_is_none_whatever_the_directory_showed(
    tmp_path: Path, directory: int
) -> None:
    (tmp_path / "capture_100").write_text("")
    (entries,) = spool.list_directory(directory).sets.values()
    assert found._record(directory, entries[Kind.CAPTURE], 7, Awaited(tmp_path, 60)) is not None
    os.chown(tmp_path / "capture_100", NOBODY, NOBODY)

    assert found._record(directory, entries[Kind.CAPTURE], 7, Awaited(tmp_path, 60)) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_record_that_others_may_write_to_is_none(tmp_path: Path, directory: int, mode: int) -> None:
    """Who has a file of root's in a directory of his own may move it here."""
    record = tmp_path / "capture_100"
    record.write_text("")
    (entries,) = spool.list_directory(directory).sets.values()
    record.chmod(mode)

    assert not spool.is_root_s("capture_100", directory)
    assert found._record(directory, entries[Kind.CAPTURE], 7, Awaited(tmp_path, 60)) is None
    listing = spool.list_directory(directory)
    assert listing.sets == {}
    assert [one.reason for one in listing.refused] == ["others_may_write"]


def test_device_is_not_opened_to_see_what_it_is(tmp_path: Path, directory: int) -> None:
    device = tmp_path / "core_100"
    os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))

    with Inotify(sync_timeout=0) as inotify:
        inotify.add_watch(device, Mask.OPEN)
        with pytest.raises(Refused, match="not_a_regular_file"):
            spool.open_file("core_100", directory, None)
        assert list(inotify) == []
        device.read_bytes()
        assert [event.mask for event in inotify] == [Mask.OPEN]


def test_file_with_a_lease_is_refused_and_not_waited_for(tmp_path: Path, directory: int) -> None:
    file = tmp_path / "core_100"
    file.write_text("a crash")
    said = "cannot be opened: Resource temporarily unavailable"
    with leased(file), pytest.raises(Refused, match=said):
        spool.open_file("core_100", directory, None)

    os.close(spool.open_file("core_100", directory, None))


def write(place: Path, epoch: int, *kinds: str) -> None:
    for kind in kinds:
        (place / f"{kind}_{epoch}").touch()


def test_of_too_many_names_what_root_has_recorded_and_the_newest_are_seen_whole(
    tmp_path: Path, directory: int
) -> None:
    others = 10 * spool.MAX_ENTRIES
    write(tmp_path, 100, "info", "core")
    for epoch in range(1000, 1000 + others):
        write(tmp_path, epoch, "info")
    write(tmp_path, 1000 + others, "info", "core", "cfg")
    write(tmp_path, 100, "capture", "backtrace")

    tracemalloc.start()
    try:
        listing = spool.list_directory(directory)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    recorded = {Kind.INFO, Kind.CORE, Kind.CAPTURE, Kind.BACKTRACE}
    assert listing.sets[100].keys() == recorded
    assert listing.sets[1000 + others].keys() == {Kind.INFO, Kind.CORE, Kind.CFG}
    assert len(listing.sets) == spool.MAX_ENTRIES - 4 - 3 + 2  # of all others one file each
    assert [one.reason for one in listing.refused] == ["too_many_entries"]
    assert most < 2000 * spool.MAX_ENTRIES  # bytes: not of all names at once
