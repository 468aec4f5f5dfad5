"""A small process is read whole, and gone before anything of it is written."""

import gc
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crashbus import layout
from services.common.mounts import Mounts
from services.common.unrecorded import PARTS, Unrecorded, is_unrecorded, left_notes
from services.recorder import facts, modules
from services.recorder.core import core_copy
from services.recorder.core.core_pages import Pages
from services.recorder.errors import CaptureFailed
from services.recorder.handover import arrival
from services.recorder.handover import hold as hold_module
from services.recorder.handover.hold import Hold, end_those_let_go
from services.recorder.handover.mechanism import Mechanism
from services.recorder.settings import RecorderSettings
from services.recorder.taker import taking
from services.recorder.taker.taken import Taken
from services.recorder.taker.taker_library import LIBRARY, load
from services.recorder.taker.taking import Taker
from tests.recorder.conftest import MakeRecorder
from tests.recorder.test_core_pages import SMALL_PYTHON, Crash, coredump_socket, same
from tests.support.crashers import FATAL, crasher
from tests.support.notes import packed
from tests.support.recorder import FILES, crash
from tests.support.wait import until

__all__ = ("coredump_socket",)

MANY_THREADS = ("threads", "60")  # of which the kernel notes more than is looked at of others


class KeptHeld(Hold):
    """A hold that lets go only when it is closed, so that the kernel's own core comes too."""

    def let_go(self, because: str | None = None) -> None:
        if because is not None:
            super().let_go(because)

    def close(self) -> None:
        self.let_go("the test is over")
        super().close()


class Unread(Crash):
    """A process that is held, and nothing of its core is read."""

    make_hold = KeptHeld


@pytest.fixture
def taker(tmp_path: Path) -> Taker:
    return new_taker(tmp_path / "spool")


def new_taker(spool: Path, largest_core: int = 0, *, labels_needed: bool = False) -> Taker:
    library = RecorderSettings().helper.with_name(LIBRARY)
    return Taker(load(library), Unrecorded(spool), largest_core, labels_needed=labels_needed)


@contextmanager
def knocking(place: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket that listens, and one that has connected to it as the kernel does."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as kernels:
        kernels.settimeout(20)
        listening.bind(str(place / "s"))
        listening.listen()
        kernels.connect(str(place / "s"))
        yield listening, kernels


def take(taker: Taker, crash: Crash) -> Taken:
    return taker.take(crash.pid, crash.hold, 0, 64)


def written(taken: Taken, crash: Crash, path: Path) -> core_copy.Copied:
    """Write the core of what was taken."""
    assert taken.head is not None
    pages = Pages(crash.pid, taken.head, facts.read_maps(crash.pid, taken.proc), taken.memory)
    with path.open("wb") as file:
        return core_copy.copy(crash.hold, taken.head.raw, taken.head.size, file.fileno(), 0, pages)


@pytest.mark.parametrize("command", [(name,) for name in FATAL] + [SMALL_PYTHON, MANY_THREADS])
def test_core_of_what_was_taken_is_the_kernels(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker, command: tuple[str, ...]
) -> None:
    program = crasher(command[0]) if "/" not in command[0] else command[0]
    crash = Unread(coredump_socket, program, *command[1:], reads_head=False)
    try:
        taken = take(taker, crash)
        assert taken.memory is not None and taken.head is not None
        assert written(taken, crash, tmp_path / "ours").fault is None
        crash.head = taken.head
        crash.from_stream(tmp_path / "kernels")
    finally:
        crash.end()
        taken.close()

    assert same(tmp_path / "ours", tmp_path / "kernels")


@pytest.mark.parametrize("size", [16, 24])
def test_request_of_any_length_is_acknowledged(taker: Taker, size: int) -> None:
    ours, kernels = socket.socketpair()
    hold = Hold(ours.detach(), 20)
    with kernels:
        kernels.sendall(struct.pack("=IIQ", size, 16, 0xF) + bytes(size - 16))

        arrived = arrival.receive(Mechanism.SOCKET_REQUEST, hold, taker.greet)

        assert arrived.pid == os.getpid()
        assert kernels.recv(64) == struct.pack("=IIQ", 16, 0, 0b1001)
        kernels.sendall(b"next")
        assert hold.read_exactly(4) == b"next"
    hold.close()


@pytest.mark.parametrize("size", [16, 24])
def test_request_of_any_length_that_came_by_accept_is_acknowledged(
    taker: Taker, tmp_path: Path, size: int
) -> None:
    with knocking(tmp_path) as (listening, kernels):
        kernels.sendall(struct.pack("=IIQ", size, 16, 0xF) + bytes(range(1, size - 15)))
        hold = taker.accept(listening.fileno(), 20)

        arrived = arrival.receive(Mechanism.SOCKET_REQUEST, hold, taker.greet)

        assert arrived.pid == os.getpid()
        assert kernels.recv(64) == struct.pack("=IIQ", 16, 0, 0b1001)
        kernels.sendall(b"next")
        assert hold.read_exactly(4) == b"next"
        hold.close()


def test_hold_begins_when_its_crash_is_accepted(taker: Taker, tmp_path: Path) -> None:
    with knocking(tmp_path) as (listening, _):
        hold = taker.accept(listening.fileno(), 20)  # which waits for the request in vain
        try:
            assert hold.age >= 300e-6
        finally:
            hold.close()


@pytest.mark.parametrize(
    "request_", [struct.pack("=IIQ", 16, 16, 0xF), b"short"], ids=["whole", "short"]
)
@pytest.mark.parametrize("of", [Hold, (Hold, "belongs_to"), (Hold, "unread")], ids=str)
def test_crash_that_there_is_no_memory_for_is_let_go(
    taker: Taker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: bytes, of: Any
) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    if of is Hold:
        monkeypatch.setattr(taking, "Hold", no_memory)
    else:
        owner, name = of
        monkeypatch.setattr(owner, name, no_memory)
    monkeypatch.setattr(hold_module, "_END_WITHIN", 0)
    with knocking(tmp_path) as (listening, kernels):
        gc.collect()
        end_those_let_go()
        before = len(list(Path("/proc/self/fd").iterdir()))
        kernels.sendall(request_)
        with suppress(MemoryError):  # one of both is not called
            taker.accept(listening.fileno(), 20).close()

        kernels.recv(64)
        with suppress(ConnectionResetError):
            assert kernels.recv(64) == b""
        end_those_let_go()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_library_of_another_version_is_not_loaded() -> None:
    with pytest.raises(OSError, match=r"libc\.so\.6 is of another version"):
        load(Path("libc.so.6"))


@pytest.mark.parametrize("request_", [b"short", bytes(16), struct.pack("=IIQ", 16, 16, 0b0001)])
def test_who_is_not_the_kernel_is_told(taker: Taker, request_: bytes) -> None:
    ours, theirs = socket.socketpair()
    hold = Hold(ours.detach(), 20)
    with theirs:
        theirs.sendall(request_)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(CaptureFailed, match="not a crash: a request"):
            arrival.receive(Mechanism.SOCKET_REQUEST, hold, taker.greet)
    hold.close()


def test_process_whose_pid_may_be_anothers_is_not_taken(
    coredump_socket: socket.socket, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    monkeypatch.setattr(Hold, "has_its_pid", False)
    taken = take(taker, crash)
    try:
        assert taken.memory is None
    finally:
        crash.end()
        taken.close()


def test_pid_is_its_own_until_its_process_was_waited_for() -> None:
    read, write = os.pipe()
    process = subprocess.Popen(["cat"], stdin=read)
    hold = Hold(read, 1)
    hold.belongs_to(os.pidfd_open(process.pid))
    try:
        assert hold.has_its_pid
        os.close(write)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert hold.has_its_pid  # nobody has waited for it yet
        process.wait()
        assert not hold.has_its_pid
    finally:
        hold.close()


def test_facts_of_a_process_that_was_taken_are_those_of_the_living(
    coredump_socket: socket.socket, taker: Taker
) -> None:
    crash = Unread(coredump_socket, crasher("threads"), reads_head=False)
    try:
        identity = facts.read_identity(crash.pid, "boot")
        rest = facts.read_rest(identity)
        taken = take(taker, crash)
    finally:
        crash.end()

    assert facts.read_identity(crash.pid, "boot", taken.proc) == identity
    late = facts.read_rest(identity, taken.proc, taken.resources)
    assert (late.maps, late.threads, late.cwd, late.limits) == (
        rest.maps, rest.threads, rest.cwd, rest.limits,
    )  # fmt: skip
    assert late.raw_environment == rest.raw_environment != b""
    assert late.resources.open_files == rest.resources.open_files != {}
    known = replace(late, modules=modules.read(late.task, late.maps, 64, taken.take_files()))
    try:
        assert all(module.file >= 0 for module in known.modules if module.path[0] == "/")
    finally:
        known.close()
        taken.close()


def test_note_of_a_process_that_was_taken_tells_what_its_proc_told(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    proc = Path(f"/proc/{crash.pid}")
    told = {name: (proc / name).read_bytes() for name in ("cmdline", "environ", "maps", "limits")}
    told |= {name: os.fsencode((proc / name).readlink()) for name in ("exe", "cwd", "root")}
    try:
        taken = take(taker, crash)
        assert taken.memory is not None and taken.head is not None
        os.close(taker._unrecorded._file)  # as when it is killed
        (note,) = left_notes(tmp_path / "spool")
    finally:
        crash.end()

    assert note.keys() == set(PARTS)
    assert told.items() <= note.items()
    arrived = int(crash.hold.arrived_at)
    assert note["crash"] == f"{crash.pid} {crash.pid} {signal.SIGSEGV} {arrived}\n".encode()
    assert note["core"] == taken.head.raw
    assert note["stat"].startswith(f"{crash.pid} (null_pointer) ".encode())
    assert note["comm"] == b"null_pointer\n" and b"NSpid" in note["status"]
    assert note["boot_id"] == taker._boot_id and note["cgroup"]


def test_process_with_mounts_of_its_own_is_asked_itself(
    coredump_socket: socket.socket, taker: Taker
) -> None:
    script = f"mount -t tmpfs its-own /mnt; exec {crasher('null_pointer')}"
    theirs = Crash(coredump_socket, "unshare", "--mount", "sh", "-c", script, reads_head=False)
    ours = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    taken = [take(taker, crash) for crash in (theirs, ours)]
    try:
        assert all(one.memory is not None for one in taken)
        mounts = [one.resources.mounts for one in taken if one.resources is not None]
        assert [b"its-own" in one for one in mounts] == [True, False]
    finally:
        for crash, one in zip((theirs, ours), taken, strict=True):
            crash.end()
            one.close()


def test_process_with_a_file_that_may_never_come_stays_held(
    coredump_socket: socket.socket, taker: Taker, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    mounts = re.sub(rb" - \S+ ", b" - nfs4 ", Mounts().now())
    monkeypatch.setattr(Mounts, "now", lambda _: mounts)
    taken = take(taker, crash)
    try:
        assert taken.memory is None and crash.hold.is_held
        assert crash.read_head().fault is None  # and its core is still whole
    finally:
        crash.end()
        taken.close()


def test_core_that_was_begun_and_not_taken_comes_whole(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    taken = take(new_taker(tmp_path / "spool", largest_core=4096), crash)
    try:
        assert taken.memory is None and crash.hold.is_held
        crash.head = crash.read_head()
        assert crash.head.fault is None
        crash.from_stream(tmp_path / "core")
        assert (tmp_path / "core").stat().st_size == crash.head.size
    finally:
        crash.end()
        taken.close()


def test_process_is_gone_before_its_core_is_written(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    taken = take(taker, crash)
    assert taken.head is not None
    try:
        assert crash.process.wait(60) == -signal.SIGSEGV
        assert is_unrecorded(tmp_path / "spool", crash.pid)

        assert written(taken, crash, tmp_path / "core") == core_copy.Copied(
            taken.head.size or 0, in_order=True
        )
    finally:
        crash.hold.close()
        taken.close()
    assert not is_unrecorded(tmp_path / "spool", crash.pid)


def test_large_process_stays_held_and_its_core_is_whole(
    coredump_socket: socket.socket, tmp_path: Path, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"), "40", reads_head=False)
    try:
        taken = take(taker, crash)
        assert taken.memory is None and crash.hold.is_held
        crash.head = taken.head or crash.read_head()
        with (tmp_path / "core").open("wb") as file:
            assert crash.from_memory(file.fileno()) == crash.head.size
    finally:
        crash.end()
        taken.close()


def test_process_that_is_killed_meanwhile_is_not_taken(
    coredump_socket: socket.socket, taker: Taker
) -> None:
    crash = Crash(coredump_socket, crasher("null_pointer"), reads_head=False)
    crash.process.kill()
    crash.process.wait(60)
    try:
        assert take(taker, crash).memory is None
    finally:
        crash.end()


def _hold_and_wait(spool: Path, pid: int, ready: "multiprocessing.Queue[bool]") -> None:
    ready.put(Unrecorded(spool).begin(pid, packed({})))
    signal.pause()


def test_what_a_killed_recorder_had_read_is_waited_for_no_more(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[bool] = context.Queue()
    recorder = context.Process(target=_hold_and_wait, args=(tmp_path, 77, ready))
    recorder.start()
    assert ready.get(timeout=60)
    assert is_unrecorded(tmp_path, 77)
    assert not is_unrecorded(tmp_path, 78)

    recorder.kill()
    recorder.join(60)

    assert not is_unrecorded(tmp_path, 77)


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "anybody's", "two names"])
def test_what_another_put_in_the_place_of_the_lock_is_put_aside(tmp_path: Path, kind: str) -> None:
    place = tmp_path / layout.UNRECORDED
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    match kind:
        case "link":
            place.symlink_to(elsewhere)
        case "fifo":
            os.mkfifo(place)
        case "directory":
            place.mkdir()
        case "anybody's":
            place.touch(0o666)
            os.chown(place, 65534, 65534)
        case "two names":
            elsewhere.chmod(0o600)
            place.hardlink_to(elsewhere)
    unrecorded = Unrecorded(tmp_path)

    assert not is_unrecorded(tmp_path, 77)
    assert unrecorded.begin(77, packed({}))
    assert is_unrecorded(tmp_path, 77)
    unrecorded.end(77)
    assert not is_unrecorded(tmp_path, 77)
    assert (place.stat().st_uid, place.stat().st_mode & 0o777) == (0, 0o600)
    assert elsewhere.read_text() == "mine"


async def test_name_that_looks_like_a_mapping_costs_neither_the_core_nor_descriptors(
    recorder_with: MakeRecorder, tmp_path: Path
) -> None:
    program = shutil.copy(crasher("null_pointer"), tmp_path / "x\rzz-1 a b c d e")
    recorder = recorder_with()
    await recorder.start()
    record = await recorder.captured(crash(program)[0])

    assert len(record.files) == len(FILES)
    assert not any(file.truncated for file in record.files.values())
    await until(lambda: program not in open_files(recorder.pid))


def open_files(pid: int) -> set[Path]:
    found = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed meanwhile
            found.add(one.readlink())
    return found


@pytest.mark.parametrize("built", [True, False])
async def test_without_its_reader_a_process_is_held_until_all_is_written(
    recorder_with: MakeRecorder, tmp_path: Path, built: bool
) -> None:
    helper = RecorderSettings().helper
    place = helper if built else Path(shutil.copy(helper, tmp_path))
    recorder = recorder_with(recorder_helper=place)
    await recorder.start()

    record = await recorder.captured(crash(crasher("null_pointer"))[0])

    assert len(record.files) == len(FILES)
    assert ("held longer: build with make setup" in recorder.log) is not built
