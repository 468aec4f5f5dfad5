"""Programs and libraries are kept once, whole, whatever lies in the way."""

import hashlib
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from crashbus import elf, layout
from crashbus.layout import Kind
from crashbus.parts import Module, Process
from services.common.capture import CaptureRecord
from services.recorder import finishing
from services.recorder.binaries import Binaries
from services.recorder.conditions import Conditions
from services.recorder.facts import Facts
from services.recorder.modules import Module as MappedModule
from services.recorder.modules import opened_module
from services.recorder.recording import Recording
from services.recorder.unwinding import debug_files
from tests.recorder.conftest import MakeRecorder
from tests.support.crashers import crasher
from tests.support.fuse import StandingStill
from tests.support.packaged import lay_down, packaged
from tests.support.recorder import crash
from tests.support.requirements import need_program, need_root

GIB = 1024**3


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    need_root()
    return tmp_path / "spool"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy(crasher("null_pointer"), tmp_path / "program"))


@pytest.fixture
def mapped(program: Path) -> Iterator[MappedModule]:
    with program.open("rb") as file:
        yield opened_module(str(program), 0, 4096, file.fileno())


def kept_by(binaries: Binaries, mapped: MappedModule) -> Module:
    (module,) = binaries.keep((mapped,))
    return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_program_is_kept_once_under_its_build_id(
    spool: Path, program: Path, mapped: MappedModule
) -> None:
    binaries = Binaries(spool, GIB, 0)

    module = kept_by(binaries, mapped)

    with program.open("rb") as file:
        assert module.build_id == elf.build_id(file.fileno())
    (file_,) = module.files()
    (path,) = (spool / layout.BINARIES).iterdir()
    assert path.name == file_.name
    assert (file_.size, file_.sha256) == (program.stat().st_size, sha256(program))
    assert path.read_bytes() == program.read_bytes()
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)
    written = path.stat().st_mtime_ns
    assert kept_by(binaries, mapped) == kept_by(Binaries(spool, GIB, 0), mapped) == module
    assert path.stat().st_mtime_ns == written
    assert len(list((spool / layout.BINARIES).iterdir())) == 1


def test_program_without_build_id_is_kept_by_its_content(spool: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    need_program("gcc")
    command = ["gcc", "-o", str(program), "-Wl,--build-id=none", "-x", "c", "-"]
    subprocess.run(command, input=b"int main() {}", check=True)
    script = tmp_path / "script"
    script.write_text("no program at all")
    binaries = Binaries(spool, GIB, 0)
    with program.open("rb") as file, script.open("rb") as other:
        mapped = opened_module("/program", 0, 1, file.fileno())

        (module,) = binaries.keep((opened_module("/script", 0, 1, other.fileno()), mapped))

        (kept,) = (spool / layout.BINARIES).iterdir()
        assert kept.read_bytes() == program.read_bytes()
        assert (module.build_id, module.has_build_id) == (sha256(program)[:40], False)
        assert [one.name for one in module.files()] == [kept.name]
        assert binaries.keep((mapped,)) == (module,)
        assert Binaries(spool, 0, 0).keep((mapped,)) == ()


def test_program_on_a_file_system_that_stands_still_is_told_and_not_read(
    spool: Path, tmp_path: Path
) -> None:
    need_root()
    read, none = {4096: "ab" * 20}, {4096: "not an ID"}
    on = SimpleNamespace(debuginfod=SimpleNamespace(fetch=lambda ids, _: list(ids)))
    with (
        ThreadPoolExecutor(1) as pool,
        StandingStill(tmp_path / "fuse", crasher("null_pointer")) as file_system,
    ):
        file = os.open(file_system.program, os.O_RDONLY)
        mapped = opened_module("/program", 4096, 8192, file)
        known = cast("Facts", SimpleNamespace(modules=(mapped,)))
        file_system.stand_still()

        def finish() -> list[tuple[Module, ...]]:
            finishing._fetch_debug_information(known, 1.0, cast("Conditions", on))
            return [Binaries(spool, GIB, 0).keep((mapped,), ids) for ids in (read, none)]

        told = pool.submit(finish).result(10)

    assert told == [(Module(path="/program", build_id="ab" * 20),), ()]
    with suppress(OSError):  # close(2) tells the file system, which is gone
        os.close(file)


def test_record_is_unlocked_though_a_program_cannot_be_closed(tmp_path: Path) -> None:
    need_root()
    until, record = os.pipe()
    with (
        ThreadPoolExecutor(1) as pool,
        StandingStill(tmp_path / "fuse", crasher("null_pointer")) as file_system,
        os.fdopen(until, "rb") as unlocked,
    ):
        mapped = opened_module("/x", 0, 1, os.open(file_system.program, os.O_RDONLY))
        known = Facts(cast("Process", None), "root", b"", None, None, {}, (), (mapped,))
        recording = Recording(-1, record, 0, cast("CaptureRecord", None), facts=known)
        file_system.stand_still()

        closed = pool.submit(recording.close)

        assert select.select([unlocked], [], [], 10)[0], "the record is still open"
        assert not closed.done(), "nothing stood still"

    closed.result()


def test_what_was_removed_is_kept_again(spool: Path, mapped: MappedModule) -> None:
    binaries = Binaries(spool, GIB, 0)
    kept_by(binaries, mapped)
    (path,) = (spool / layout.BINARIES).iterdir()
    path.unlink()

    kept_by(binaries, mapped)

    assert path.exists()


def test_program_that_is_its_own_debug_information_is_told_as_both(
    spool: Path, program: Path, mapped: MappedModule, tmp_path: Path
) -> None:
    build_id = elf.build_id(mapped.file)
    assert build_id
    debug = debug_files.path_of(tmp_path / "debug", build_id)
    debug.parent.mkdir(parents=True)
    debug.hardlink_to(program)
    binaries = Binaries(spool, GIB, 0, (tmp_path / "debug",))

    first, second = kept_by(binaries, mapped), kept_by(binaries, mapped)

    assert [file.kind for file in first.kept] == [Kind.EXECUTABLE, Kind.DEBUGINFO]
    assert first == second


def test_stripped_program_is_kept_beside_the_other(
    spool: Path, program: Path, mapped: MappedModule, tmp_path: Path
) -> None:
    need_program("strip")
    subprocess.run(["strip", "-o", tmp_path / "stripped", program], check=True)
    binaries = Binaries(spool, GIB, 0)
    with (tmp_path / "stripped").open("rb") as file:
        stripped = kept_by(binaries, opened_module("/stripped", 0, 1, file.fileno()))

    whole = kept_by(binaries, mapped)

    assert whole.build_id == stripped.build_id
    assert len(list((spool / layout.BINARIES).iterdir())) == 2


@pytest.mark.parametrize("obstacle", ["file", "link", "fifo", "directory", "hard link"])
def test_what_another_user_put_in_its_place_is_put_aside(
    spool: Path, program: Path, mapped: MappedModule, obstacle: str, tmp_path: Path
) -> None:
    module = kept_by(Binaries(spool, GIB, 0), mapped)
    (file,) = module.files()
    place = spool / layout.BINARIES / file.name
    place.unlink()
    target = tmp_path / "target"
    target.write_text("precious")
    if obstacle == "file":
        place.write_text("forged")
        os.chown(place, 65534, 65534)
    elif obstacle == "link":
        place.symlink_to(target)
    elif obstacle == "fifo":
        os.mkfifo(place)
    elif obstacle == "directory":
        place.mkdir()
    else:
        place.hardlink_to(target)

    assert kept_by(Binaries(spool, GIB, 0), mapped) == module

    assert not place.is_symlink()
    assert place.read_bytes() == program.read_bytes()
    assert target.read_text() == "precious"


def test_directory_in_the_spool_that_is_another_s_is_taken_over(
    spool: Path, mapped: MappedModule
) -> None:
    (spool / layout.BINARIES).mkdir(parents=True)
    os.chown(spool / layout.BINARIES, 65534, 65534)

    assert kept_by(Binaries(spool, GIB, 0), mapped).kept
    assert (spool / layout.BINARIES).stat().st_uid == 0


@pytest.mark.parametrize(("max_bytes", "reserve"), [(0, 0), (1000, 0), (GIB, 100)])
def test_limits(spool: Path, mapped: MappedModule, max_bytes: int, reserve: float) -> None:
    module = kept_by(Binaries(spool, max_bytes, reserve), mapped)

    assert module.build_id
    assert module.kept == ()
    directory = spool / layout.BINARIES
    assert not directory.exists() or not list(directory.iterdir())


def test_file_of_which_a_read_may_not_end_is_not_read(spool: Path) -> None:
    # /proc stands for all file systems that are not local ones.
    process = subprocess.Popen(["sleep", "60"])
    try:
        with Path(f"/proc/{process.pid}/maps").open("rb") as maps:
            binaries = Binaries(spool, GIB, 0)
            spool.mkdir()
            directory = os.open(spool, os.O_RDONLY)
            build, file = "ab" * 20, maps.fileno()
            try:
                assert binaries._kept(Kind.EXECUTABLE, "/x", build, file, directory) is None
            finally:
                os.close(directory)
    finally:
        process.kill()
        process.wait()


def test_full_disk_leaves_nothing_behind(
    spool: Path, mapped: MappedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.recorder.binaries._write", full)

    assert kept_by(Binaries(spool, GIB, 0), mapped).kept == ()
    assert list((spool / layout.BINARIES).iterdir()) == []


async def test_separate_debug_information_is_found_and_kept(
    recorder_with: MakeRecorder, tmp_path: Path, readable_directory: Path
) -> None:
    need_program("objcopy")
    program = Path(shutil.copy(crasher("null_pointer"), tmp_path / "stripped"))
    with program.open("rb") as file:
        build_id = elf.build_id(file.fileno())
    assert build_id
    debug = debug_files.path_of(readable_directory, build_id)
    debug.parent.mkdir(parents=True)
    subprocess.run(["objcopy", "--only-keep-debug", program, debug], check=True)
    subprocess.run(["strip", program], check=True)
    recorder = recorder_with(recorder_debug_directory=readable_directory)
    await recorder.start()

    pid, _ = crash(program)
    record = await recorder.captured(pid)

    assert "null_pointer.c:" in recorder.file(pid, "backtrace").read_text()
    (module,) = [one for one in record.modules if one.path == str(program)]
    assert [file.kind for file in module.files()] == [Kind.EXECUTABLE, Kind.DEBUGINFO]
    (kept,) = (recorder.spool / "build-id").glob(f"debuginfo_{build_id}_*")
    assert kept.read_bytes() == debug.read_bytes()


@pytest.mark.parametrize("place", [".build-id", ".dwz"])
def test_what_debug_information_refers_to_is_kept_beside_it(
    spool: Path, tmp_path: Path, place: str
) -> None:
    made, debug = packaged(tmp_path / "made"), tmp_path / "debug"
    lay_down(made.debug, debug_files.path_of(debug, made.build_id))
    by_id = debug_files.path_of(debug, made.common_id)
    lay_down(made.common, by_id if place == ".build-id" else debug / ".dwz/some/common.debug")

    with made.program.open("rb") as file:
        module = kept_by(
            Binaries(spool, GIB, 0, (tmp_path / "none", debug)),
            opened_module("/x", 0, 1, file.fileno()),
        )

    _, kept, supplement = module.files()
    assert kept.name.startswith(f"debuginfo_{made.build_id}_")
    assert supplement.name.startswith(f"debuginfo_{made.common_id}_")
    assert (spool / layout.BINARIES / kept.name).read_bytes() == made.debug.read_bytes()
    assert (spool / layout.BINARIES / supplement.name).read_bytes() == made.common.read_bytes()


@pytest.mark.parametrize("name", ["{0}/away/.dwz/common.debug", "/x/.dwz/../away/common.debug"])
def test_what_debug_information_refers_to_is_nowhere_but_in_debug_directories(
    spool: Path, tmp_path: Path, name: str
) -> None:
    """The name was written by whoever built what crashed."""
    made, debug = packaged(tmp_path / "made", name.format(tmp_path)), tmp_path / "debug"
    lay_down(made.debug, debug_files.path_of(debug, made.build_id))
    for away in (tmp_path / "away/.dwz", debug / "away"):
        lay_down(made.common, away / "common.debug")
    lay_down(made.debug, debug / ".dwz/common.debug")  # of another build

    with made.program.open("rb") as file:
        module = kept_by(
            Binaries(spool, GIB, 0, (debug,)), opened_module("/x", 0, 1, file.fileno())
        )

    assert len(module.kept) == 2
    assert module.supplement is None
