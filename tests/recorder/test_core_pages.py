"""Pages read from the process are the kernel's own core, byte for byte."""

import errno
import os
import socket
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest

from services.recorder.core import (
    core_copy,
    core_head,
    core_pages,
    core_reduced,
    sparse,
    touched,
)
from services.recorder.core.core_memory import LiveMemory, PagesUnreadable
from services.recorder.core.core_pages import Pages
from services.recorder.core.touched import Touched
from services.recorder.handover import arrival
from services.recorder.handover.hold import Hold
from services.recorder.handover.mechanism import Mechanism
from tests.recorder.test_core_reduced import loads
from tests.support import core_pattern
from tests.support.crashers import FATAL, HOG, crasher
from tests.support.requirements import need_linux

MIB = 1024 * 1024
SMALL_PYTHON = ("/usr/bin/python3", "-c", "import ctypes, json, ssl; ctypes.string_at(0)")


@pytest.fixture
def coredump_socket(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the kernel sends cores, while the test lasts."""
    need_linux((6, 17), "the coredump socket's request")
    tmp_path.chmod(0o700)
    path = tmp_path.resolve() / "s"
    with core_pattern.core_pattern_kept(), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(8)
        listening.settimeout(20)
        core_pattern.set_pattern(f"@@{path}")
        yield listening


class Crash:
    """A process that is held, and its core as far as the notes, if that shall be read."""

    make_hold: type[Hold] = Hold

    def __init__(
        self, listening: socket.socket, *command: str | Path, reads_head: bool = True
    ) -> None:
        self.process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
        while not self._is_ours(listening):  # other tests crash processes meanwhile
            self.hold.close()
        if reads_head:
            self.head = self.read_head()
        self.maps = Path(f"/proc/{self.pid}/maps").read_bytes()

    def _is_ours(self, listening: socket.socket) -> bool:
        connection, _ = listening.accept()
        connection.setblocking(False)
        self.hold = self.make_hold(connection.detach(), 20)
        self.pid = arrival.receive(Mechanism.SOCKET_REQUEST, self.hold).pid
        arrival.confirm(Mechanism.SOCKET_REQUEST, self.hold)
        return self.pid == self.process.pid

    def read_head(self) -> core_head.Head:
        return core_head.read(self.hold.read_exactly)

    def from_memory(self, core: int) -> int:
        assert self.head.size is not None
        with core_pages.opened(self.pid) as (memory, pagemap):
            found = Touched(self.pid, self.maps, pagemap).pieces(self.head.loads())
            return core_pages.copy(self.hold, memory, found, core, self.head.size)

    def from_stream(self, path: Path) -> None:
        with path.open("wb") as file:
            copied = core_copy.copy(
                self.hold, self.head.raw, self.head.size, file.fileno(), 0, None
            )
        assert copied.fault is None

    def end(self) -> None:
        self.hold.close()
        self.process.kill()
        self.process.wait(60)


def both_ways(listening: socket.socket, place: Path, *command: str | Path) -> tuple[Path, Path]:
    """Return a core read from memory, and the kernel's, of the same crash; equal up to notes."""
    crash = Crash(listening, *command)
    ours, kernels = place / "ours", place / "kernels"
    try:
        with ours.open("wb") as file:
            assert crash.from_memory(file.fileno()) == crash.head.size
        crash.from_stream(kernels)
    finally:
        crash.end()
    with ours.open("r+b") as file, kernels.open("rb") as other:
        file.write(other.read(crash.head.data))
    return ours, kernels


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", one, other], check=False).returncode == 0


@pytest.mark.parametrize(
    "command", [(name,) for name in FATAL] + [("many_mappings",), SMALL_PYTHON]
)
@pytest.mark.parametrize("scan", [True, False], ids=["scan", "look-up"])
def test_core_from_memory_is_the_kernels(
    coredump_socket: socket.socket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    scan: bool,
) -> None:
    if not scan:
        monkeypatch.setattr(touched, "_kernel_scans", lambda: False)
    program = crasher(command[0]) if len(command) == 1 else command[0]

    assert same(*both_ways(coredump_socket, tmp_path, program, *command[1:]))


def test_core_with_everything_in_it_is_the_kernels(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    before = Path("/proc/self/coredump_filter").read_text()
    Path("/proc/self/coredump_filter").write_text("0x7f")
    try:
        assert same(*both_ways(coredump_socket, tmp_path, crasher("many_mappings"), "40"))
    finally:
        Path("/proc/self/coredump_filter").write_text("0x" + before)


# The first page of a private mapping was written, its file has no second one, and nothing of it
# may be read. No kernel lets anybody read that second page; one with proc_mem.force_override=never,
# not the first either.
UNREADABLE = f"""
import ctypes, mmap, tempfile
file = tempfile.TemporaryFile()
file.truncate(2 * mmap.PAGESIZE)
refused = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
refused[0] = 1
file.truncate(mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(refused))
assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(len(refused)), 0)
{HOG[-1]}
"""


def copied_without_room(
    crash: Crash, path: Path, pages: Pages | None, at_end: Callable[[], None] = lambda: None
) -> tuple[core_copy.Copied, list[int], list[str]]:
    """Copy a core that may have 16 MiB; return what became of it, and what was told."""
    final: list[int] = []
    told: list[str] = []

    def check_room(size: int) -> None:
        if size > 16 * MIB:
            at_end()
            raise OSError(errno.ENOSPC, "no room beside others")

    try:
        with path.open("w+b") as core:
            copied = core_copy.copy(
                *(crash.hold, crash.head.raw, crash.head.size, core.fileno(), 0, pages),
                *("", final.append, told.append, check_room),
            )
    finally:
        crash.end()
    assert copied.disk_full and not copied.in_order
    assert copied.size == path.stat().st_size
    return copied, final, told


def test_core_by_the_stream_that_shall_have_no_more_is_cut(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, *HOG, "48")

    copied, _, _ = copied_without_room(crash, tmp_path / "core", None)

    assert 8 * MIB < copied.size < 24 * MIB


@pytest.mark.parametrize("program", [HOG[-1], UNREADABLE], ids=["", "unreadable mapping"])
def test_core_that_shall_have_no_more_has_its_stacks(
    coredump_socket: socket.socket, tmp_path: Path, program: str
) -> None:
    crash = Crash(coredump_socket, *HOG[:-1], program, "48")
    pages = Pages(crash.pid, crash.head, crash.maps)

    copied, final, told = copied_without_room(crash, tmp_path / "core", pages)

    assert copied.fault == told[-1] == "only the stacks were kept: no room on disk"
    assert final[-1] <= copied.size < 8 * MIB
    with (tmp_path / "core").open("rb") as core:
        pointer = next(core_reduced.stack_pointers(crash.head, core.fileno()))
    kept = loads(tmp_path / "core")
    assert any(size and start <= pointer < start + size for _, start, size, _ in kept)


def test_core_without_room_has_no_zeros_for_stacks_that_cannot_be_read(
    coredump_socket: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = Crash(coredump_socket, *HOG, "48")
    pages = Pages(crash.pid, crash.head, crash.maps)

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "refused")

    copied, _, _ = copied_without_room(
        *(crash, tmp_path / "core", pages), lambda: monkeypatch.setattr(LiveMemory, "read", refuse)
    )

    assert copied.fault == "no room on disk, and no stacks: memory: refused"
    assert copied.size == crash.head.data
    assert (tmp_path / "core").read_bytes().startswith(crash.head.raw)


def test_core_that_is_whole_needs_no_more_room(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, *HOG, "48")
    size = crash.head.size or 0

    def check_room(has: int) -> None:
        if has >= size:
            raise OSError(errno.ENOSPC, "no room beside others")

    try:
        with (tmp_path / "core").open("wb") as core:
            pages = Pages(crash.pid, crash.head, crash.maps)
            copied = core_copy.copy(
                *(crash.hold, crash.head.raw, size, core.fileno(), 0, pages), check_room=check_room
            )
    finally:
        crash.end()

    assert copied == core_copy.Copied(size, in_order=True)


def test_untouched_pages_stay_holes(coredump_socket: socket.socket, tmp_path: Path) -> None:
    ours, kernels = both_ways(coredump_socket, tmp_path, crasher("many_mappings"), "1")

    assert ours.stat().st_blocks <= kernels.stat().st_blocks


def test_mapping_that_is_not_seen_needs_the_stream(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"))
    try:
        crash.maps = b"".join(crash.maps.splitlines(keepends=True)[3:])
        with (
            (tmp_path / "core").open("wb") as file,
            pytest.raises(PagesUnreadable, match="mapping"),
        ):
            crash.from_memory(file.fileno())
    finally:
        crash.end()


def test_process_that_is_killed_meanwhile_ends_the_copy(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"))
    try:
        crash.process.kill()
        crash.process.wait(60)
        with (tmp_path / "core").open("wb") as file, pytest.raises(PagesUnreadable):
            crash.from_memory(file.fileno())
    finally:
        crash.end()


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "look-up"])
def test_process_that_is_killed_while_its_pages_are_looked_up(
    coredump_socket: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan: bool
) -> None:
    monkeypatch.setattr(touched, "_kernel_scans", lambda: scan)
    crash = Crash(coredump_socket, crasher("many_mappings"))

    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "which is not why it ends")

    try:
        with (
            core_pages.opened(crash.pid) as (memory, pagemap),
            (tmp_path / "core").open("wb") as file,
        ):
            found = Touched(crash.pid, crash.maps, pagemap).pieces(crash.head.loads())
            first = next(found)
            crash.process.kill()
            crash.process.wait(60)

            end = core_pages.copy(
                *(crash.hold, memory, chain([first], found), file.fileno(), crash.head.size or 0),
                check_room=no_room,
            )
        assert 0 <= end < (crash.head.size or 0)
    finally:
        crash.end()


def test_file_that_cannot_grow_is_cut_to_what_is_complete(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"))
    path = tmp_path / "core"
    room = 8 << 20
    written: list[int] = []

    def write(file: int, data: bytes | bytearray, offset: int) -> int:
        if sum(written) + len(data) > room:
            raise OSError(28, os.strerror(28))
        written.append(len(data))
        return real(file, data, offset)

    real = sparse.write
    try:
        with pytest.MonkeyPatch.context() as patch, path.open("wb") as file:
            patch.setattr(sparse, "write", write)
            with pytest.raises(OSError, match="No space"):
                crash.from_memory(file.fileno())
        complete = path.stat().st_size
        crash.from_stream(tmp_path / "kernels")
    finally:
        crash.end()

    start = crash.head.data
    with path.open("rb") as ours, (tmp_path / "kernels").open("rb") as kernels:
        assert start < complete < (crash.head.size or 0)
        ours.seek(start)
        kernels.seek(start)
        assert ours.read() == kernels.read(complete - start)


@contextmanager
def no_more_memory_than(size: int) -> Iterator[None]:
    """Check what is allocated at most meanwhile, in bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def test_memory_stays_small_however_large_the_core(
    coredump_socket: socket.socket, tmp_path: Path
) -> None:
    crash = Crash(coredump_socket, crasher("many_mappings"), "500")
    try:
        with no_more_memory_than(4 * MIB), (tmp_path / "core").open("wb") as file:
            crash.from_memory(file.fileno())
    finally:
        crash.end()


@pytest.mark.parametrize("limit", [0, 16 * MIB], ids=["whole", "reduced"])
def test_memory_stays_small_however_scattered_the_core(
    coredump_socket: socket.socket, limit: int
) -> None:
    """32,768 pages, each by itself, in a core of 4 TiB."""
    crash = Crash(coredump_socket, crasher("scattered"), "256")
    core = os.memfd_create("core")  # it takes minutes to remove such a file from a disk
    try:
        pages = Pages(crash.pid, crash.head, crash.maps)
        raw, size = crash.head.raw, crash.head.size
        with no_more_memory_than(4 * MIB):
            copied = core_copy.copy(crash.hold, raw, size, core, limit, pages)
        assert copied.size == os.fstat(core).st_size
    finally:
        crash.end()
        os.close(core)

    assert (copied.fault is None) is (limit == 0)


def test_what_a_process_touched_is_told_piece_by_piece(
    coredump_socket: socket.socket,
) -> None:
    crash = Crash(coredump_socket, crasher("scattered"), "256")
    try:
        with core_pages.opened(crash.pid) as (_, pagemap), no_more_memory_than(MIB):
            found = Touched(crash.pid, crash.maps, pagemap)
            first = next(found.pieces(crash.head.loads()))
    finally:
        crash.end()

    assert first.size
