"""A spool in a directory that everyone can write to, and what others put there."""

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from crashbus.layout import Kind, crash_file_name
from services.common import capture, crash_directory
from services.common.crash_directory import SpoolUnusable
from tests.common.test_capture_record import RECORD
from tests.support.requirements import need_root

NOBODY = 65534
EPOCH = 1795388839


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "appscope"


def is_ours(path: Path) -> bool:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and mode == 0o1777


def open_crash(root: Path, pid: int = 42) -> int:
    """Open and close the directory of a crash; return the epoch."""
    directory, epoch = crash_directory.open_crash(root, pid, EPOCH)
    os.close(directory)
    return epoch


def test_spool_is_made_open_to_all(root: Path) -> None:
    assert open_crash(root) == EPOCH

    assert is_ours(root)
    assert is_ours(root / "42")


def test_spool_of_another_user_is_taken_over(root: Path) -> None:
    root.mkdir(mode=0o755)
    os.chown(root, NOBODY, NOBODY)

    open_crash(root)

    assert is_ours(root)


def test_appscope_s_directory_is_shared_with_its_process(root: Path) -> None:
    open_crash(root, 1)
    (root / "42").mkdir()
    (root / "42" / "info_1").touch()
    os.chown(root / "42", NOBODY, NOBODY)

    open_crash(root)

    assert is_ours(root / "42")
    assert (root / "42" / "info_1").exists()


@pytest.mark.parametrize("place", ["", "42"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "fifo"])
def test_what_stands_in_the_place_of_a_directory_is_put_aside(
    root: Path, tmp_path: Path, place: str, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    if place:
        open_crash(root, 1)
    path = root / place if place else root
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        path.touch()
    else:
        os.mkfifo(path)

    open_crash(root)

    assert is_ours(path)
    assert list(victim.iterdir()) == []
    assert stat.S_IMODE(victim.stat().st_mode) == 0o700
    assert not (tmp_path / "nowhere").exists()
    assert len(list(path.parent.glob(".*.aside-*"))) == 1


@pytest.mark.parametrize(
    "name",
    [*(crash_file_name(kind, EPOCH) for kind in Kind if kind != "manifest"), f".capture_{EPOCH}"],
)
def test_epoch_whose_name_is_taken_is_passed_over(root: Path, name: str) -> None:
    open_crash(root)
    (root / "42" / name).symlink_to("/etc/passwd")

    assert open_crash(root) == EPOCH + 1


def test_others_names_do_not_have_what_lies_there_put_aside(root: Path) -> None:
    """Nobody would look at it again, and some of it may not be delivered."""
    place = root / "42"
    open_crash(root)
    (place / f"core_{EPOCH - 1}").touch()
    (place / f"core_{EPOCH}").touch()
    for epoch in range(EPOCH, EPOCH + 200):
        (place / f"info_{epoch}").touch()
        (place / f"capture_{epoch}").mkdir()
        for kind in ("info", "capture"):
            os.chown(place / f"{kind}_{epoch}", NOBODY, NOBODY)

    directory, epoch = crash_directory.open_crash(root, 42, EPOCH)
    try:
        assert epoch == EPOCH + 1, "the first of which nothing is ours"
        os.close(crash_directory.create_file(directory, Kind.INFO, epoch))
        os.close(capture.create(directory, epoch, RECORD))
    finally:
        os.close(directory)

    assert (place / f"core_{EPOCH - 1}").exists()
    assert {(place / f"{kind}_{epoch}").stat().st_uid for kind in ("info", "capture")} == {0}
    assert not list(root.glob(".*.aside-*"))


def test_directory_full_of_our_names_is_put_aside(root: Path) -> None:
    open_crash(root)
    for epoch in range(EPOCH, EPOCH + 200):
        (root / "42" / f"core_{epoch}").touch()

    assert open_crash(root) == EPOCH

    assert list((root / "42").iterdir()) == []


def test_file_is_never_written_through_a_link(root: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    directory, _ = crash_directory.open_crash(root, 42, EPOCH)
    (root / "42" / f"core_{EPOCH}").symlink_to(victim)

    core = crash_directory.create_file(directory, Kind.CORE, EPOCH)
    os.write(core, b"core")

    os.close(core)
    os.close(directory)
    assert victim.stat().st_size == 0
    assert (root / "42" / f"core_{EPOCH}").read_bytes() == b"core"


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "directory", "fifo"])
def test_what_another_user_put_in_a_file_s_place_is_put_aside(
    root: Path, tmp_path: Path, kind: str
) -> None:
    directory, _ = crash_directory.open_crash(root, 42, EPOCH)
    place = root / "42" / f"core_{EPOCH}"
    if kind == "file":
        place.write_bytes(b"theirs")
    elif kind == "link":
        place.symlink_to("/etc/passwd")
    elif kind == "hard link":
        (tmp_path / "root's").touch()
        place.hardlink_to(tmp_path / "root's")
    elif kind == "directory":
        place.mkdir()
        (place / "not empty").touch()
    else:
        os.mkfifo(place)
    if kind != "hard link":
        os.lchown(place, NOBODY, NOBODY)

    os.close(crash_directory.create_file(directory, Kind.CORE, EPOCH))

    os.close(directory)
    status = place.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert (status.st_uid, status.st_nlink, status.st_size) == (0, 1, 0)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert len(list(place.parent.glob(f".{place.name}.aside-*"))) == 1


def test_root_s_own_file_is_not_replaced(root: Path) -> None:
    directory, _ = crash_directory.open_crash(root, 42, EPOCH)
    (root / "42" / f"core_{EPOCH}").write_bytes(b"AppScope's, of a root's process")

    with pytest.raises(FileExistsError):
        crash_directory.create_file(directory, Kind.CORE, EPOCH)

    os.close(directory)
    assert [path.name for path in (root / "42").iterdir()] == [f"core_{EPOCH}"]


def _occupy_for_ever(place: str, as_directory: bool) -> None:
    os.setresuid(NOBODY, NOBODY, NOBODY)
    while True:
        with suppress(OSError):
            if as_directory:
                Path(place).mkdir()
            else:
                os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@pytest.mark.parametrize("as_directory", [False, True])
def test_who_occupies_a_name_in_a_loop_does_not_win(as_directory: bool) -> None:
    # Below /tmp: pytest's own directories are closed to others.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        root = Path(place) / "appscope"
        directory, epoch = crash_directory.open_crash(root, 42, EPOCH)
        core = root / "42" / f"core_{epoch}"
        attacker = multiprocessing.get_context("fork").Process(
            target=_occupy_for_ever, args=(str(core), as_directory)
        )
        attacker.start()
        try:
            for _ in range(200):
                while not core.exists():
                    assert attacker.is_alive()
                os.close(crash_directory.create_file(directory, Kind.CORE, epoch))
                assert core.lstat().st_uid == 0
                core.unlink()
        finally:
            attacker.kill()
            attacker.join()
            os.close(directory)


def test_file_is_for_root_alone_whatever_the_umask(root: Path) -> None:
    directory, epoch = crash_directory.open_crash(root, 42, EPOCH)
    before = os.umask(0)
    try:
        os.close(crash_directory.create_file(directory, Kind.CORE, epoch))
    finally:
        os.umask(before)
        os.close(directory)

    assert stat.S_IMODE((root / "42" / f"core_{EPOCH}").stat().st_mode) == 0o600


def test_unusable_spool_names_the_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SpoolUnusable, match="cannot be used") as caught:
        crash_directory.open_spool(tmp_path / "file" / "appscope")

    assert "CRASHBUS_SPOOL" in caught.value.mend


# As within a systemd unit with ProtectSystem=strict.
READ_ONLY = """
mount -t tmpfs -o ro tmpfs "$1"
"$2" -c '
import sys, pathlib
from services.common import capture, crash_directory
try:
    crash_directory.open_spool(pathlib.Path(sys.argv[1], "crashes"))
except crash_directory.SpoolUnusable as error:
    print(error.mend)
' "$1"
"""


def test_spool_that_its_unit_may_not_write_to_names_the_setting_of_the_unit(tmp_path: Path) -> None:
    need_root()
    command = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(tmp_path), sys.executable]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert f"ReadWritePaths={tmp_path}/crashes" in done.stdout, done.stderr
