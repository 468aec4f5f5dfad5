"""A small process, read whole at once, so that it is let go before anything is written.

To make a record, a directory and files takes longer than to read all of a small process. So that
comes later, from what was read. Whatever is not small, or cannot be read for sure without
waiting, stays held; what was read of it until then is not read again.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

from crashbus import identity
from services.common import process as processes
from services.common import resources
from services.common.mounts import Mounts
from services.common.proc import Remembered
from services.common.resources import Resources
from services.common.unrecorded import Unrecorded
from services.recorder import core_head, core_pages, facts
from services.recorder.core_head import Head
from services.recorder.core_memory import (
    Kept,
    Memory,
    PagesUnreadable,
    Piece,
    read_at_once,
    read_piece,
)
from services.recorder.hold import Hold, Stalled
from services.recorder.touched import Touched

LARGEST = 16 * 1024 * 1024  # bytes of touched memory
AT_ONCE = 2 * LARGEST  # bytes of all that were read and are not written yet
_RESIDENT = 4 * LARGEST  # bytes, shared pages too; of more it is not asked what is touched
_LARGEST_CORE = 1024**3  # bytes, untouched memory too
_LONGEST_HEAD = 4 * 1024 * 1024  # bytes of headers and notes
_MOST_THREADS = 256
_SPARE = 4 * 1024 * 1024  # bytes of room that is used again: new memory costs as much as to read

# File systems of this host alone, proc_pid_mountinfo(5): a page of them comes for sure.
_LOCAL = {
    *(b"ext2", b"ext3", b"ext4", b"xfs", b"btrfs", b"f2fs", b"bcachefs", b"zfs"),
    *(b"tmpfs", b"squashfs", b"erofs"),
}
_NOTED = ("stat", "status", "comm", "cgroup", "cmdline", "limits", "maps", "environ")
_LONGEST_MAPS = 256 * 1024  # bytes
_MAPPED = re.compile(rb"^\S+ \S+ \S+ (\S+) [1-9]", re.MULTILINE)  # devices in maps
_MOUNT = re.compile(rb"^\d+ \d+ (\S+) .*? - (\S+) ", re.MULTILINE)  # device and type
_VM_RSS = re.compile(rb"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


class _TooMuch(Exception):
    """It is not small, or not sure."""


@dataclass
class Taken:
    """What was read of a process before anything was written.

    Attributes:
        proc: its /proc, as far as it was read.
        head: of its core, with all headers and notes; None: it is still to be read.
        memory: all of it; None: the process is still held.
        may_be: it is small, as far as `Taker.look` sees.
        code: at the program counter, if that is where it faulted.
        files: what it mapped as code, open, by name in proc_pid_map_files(5).
        note: removes the note about it, until its record is there.
    """

    proc: Remembered = field(default_factory=Remembered)
    head: Head | None = None
    memory: Kept | None = None
    resources: Resources | None = None
    code: bytes | None = None
    files: dict[str, int] | None = None
    may_be: bool = False
    note: Callable[[], None] | None = None
    give_back: list[Callable[[], None]] = field(default_factory=list)

    def is_recorded(self) -> None:
        """Say that its record is there."""
        if self.note is not None:
            self.note()
            self.note = None

    def close(self) -> None:
        """Give back what nobody took."""
        self.is_recorded()
        for one in self.give_back:
            one()
        self.give_back = []
        for file in (self.files or {}).values():
            os.close(file)
        self.files = None

    def take_files(self) -> dict[str, int] | None:
        """Return the open files, which are the caller's then; None: none were opened yet."""
        files, self.files = self.files, None
        return files


class Taker:
    """Reads small processes; used by several threads.

    Args:
        unrecorded: told of each until its record is made.
        largest_core: bytes; larger ones are not for us.
        labels_needed: a container's crash must wait for what its runtime says.
    """

    def __init__(self, unrecorded: Unrecorded, largest_core: int, *, labels_needed: bool) -> None:
        self._unrecorded = unrecorded
        self._largest_core = min(largest_core or _LARGEST_CORE, _LARGEST_CORE)
        self._labels_needed = labels_needed
        self._boot_id = identity.boot_id().encode()
        self._lock = threading.Lock()
        self._bytes = 0
        self._mounts = Mounts()
        # Where it has not begun when the first thread is done, that one reads by itself: it may
        # have no processor, be busy with another crash, or wait for a dead disk for good.
        self._second = ThreadPoolExecutor(1, "memory")
        self._second.submit(int)  # so that its thread is there
        self._second_is_free = threading.Semaphore(1)  # behind one that hangs nothing may queue up
        self._spare = [bytearray(b"\1") * _SPARE]  # touched, so that the first has it as others

    def look(self, pid: int) -> Taken:
        """Read of a held process what tells whether it may be taken; go on with `take`.

        Nothing of its core is needed for that, which the kernel begins to send meanwhile.
        """
        taken = Taken()
        taken.may_be = self._may_be_taken(pid, taken.proc)
        return taken

    def take(self, pid: int, hold: Hold, module_files: int, taken: Taken) -> None:
        """Read a held process and let it go, or leave it held, with no memory in what was taken.

        Args:
            taken: what `look` returned; close it when its record is made.
        """
        if not taken.may_be:
            return
        with suppress(_TooMuch, PagesUnreadable, Stalled, OSError):
            taken.memory = self._take(pid, hold, module_files, taken)

    def _take(self, pid: int, hold: Hold, module_files: int, taken: Taken) -> Kept:
        taken.head = head = _whole(core_head.from_hold(hold), hold, taken)
        if not 0 < head.data <= (head.size or 0) <= self._largest_core:
            raise _TooMuch
        maps = facts.read_maps(pid, taken.proc)
        with core_pages.opened(pid) as (memory, pagemap):
            touched = Touched(pid, maps, pagemap)
            loads = list(head.loads())
            touched.look_at_all(loads)
            pieces = sorted(_few(touched.pieces(iter(loads))), key=lambda piece: not piece.sure)
            room = self._room(sum(piece.size for piece in pieces), taken)
            sure = [piece for piece in pieces if piece.sure]
            reading = self._begin_reading(pid, sure, room)
            try:
                self._read_the_rest(pid, module_files, taken)
            finally:
                if not reading.cancel():
                    wait([reading])  # the room is its own until then
            done = read_at_once(pid, sure, room) if reading.cancelled() else reading.result()
            kept = _read(memory, pieces, room, done)
        # What was read by its PID could be another's.
        if hold.pid_is_free or not self._unrecorded.begin(pid, self._note(pid, hold, taken)):
            raise _TooMuch
        taken.note = lambda: self._unrecorded.end(pid)
        taken.proc.seal()
        hold.memory_was_read = True
        hold.let_go()
        return kept

    def _note(self, pid: int, hold: Hold, taken: Taken) -> dict[str, bytes]:
        """Return what the next recorder shall know if this one is killed before the record."""
        proc, head = taken.proc, taken.head
        assert head is not None
        signal = head.cause.signal if head.cause else 0
        return {
            "crash": b"%d %d %d %d\n" % (pid, pid, signal, hold.arrived_at),
            "boot_id": self._boot_id,
            "core": head.raw,
            **{name: proc.read(f"{pid}/{name}") for name in _NOTED},
            **{name: proc.link(f"{pid}/{name}") or b"" for name in ("exe", "cwd", "root")},
        }

    def _begin_reading(self, pid: int, sure: list[Piece], room: memoryview) -> Future[int]:
        """Have the second thread read; cancelled if it is not free."""
        if not self._second_is_free.acquire(blocking=False):
            never: Future[int] = Future()
            never.cancel()
            return never
        reading = self._second.submit(read_at_once, pid, sure, room)
        reading.add_done_callback(lambda _: self._second_is_free.release())
        return reading

    def _may_be_taken(self, pid: int, proc: Remembered) -> bool:
        resident = _VM_RSS.search(proc.read(f"{pid}/status"))
        if not resident or int(resident[1]) * 1024 > _RESIDENT or not facts.has_memory(pid, proc):
            return False
        if self._labels_needed and processes.container_of(processes.cgroup(pid, proc)):
            return False
        if len(facts.read_threads(pid, proc)) > _MOST_THREADS:
            return False
        return 0 < len(facts.read_maps(pid, proc)) <= _LONGEST_MAPS

    def _read_the_rest(self, pid: int, module_files: int, taken: Taken) -> None:
        """Read what else is there of it than its memory."""
        proc, head = taken.proc, taken.head
        assert head is not None
        maps, mounts = facts.read_maps(pid, proc), self._mounts.seen_by(pid, proc)
        if not _all_local(maps, mounts):
            raise _TooMuch
        proc.learn(f"{pid}/mountinfo", mounts)
        facts.remember(pid, proc)
        taken.resources = resources.read(pid, processes.cgroup(pid, proc), proc)
        taken.code = facts.code_at_fault(pid, head, maps)
        taken.files = facts.open_modules(pid, maps, module_files)

    def _room(self, size: int, taken: Taken) -> memoryview:
        """Return room for that many bytes, until what was taken is closed."""
        with self._lock:
            if size > LARGEST or self._bytes + size > AT_ONCE:
                raise _TooMuch
            self._bytes += size
            room = bytearray(size) if size > _SPARE or not self._spare else self._spare.pop()
        taken.give_back.append(lambda: self._give_back(size, room))
        return memoryview(room)[:size]

    def _give_back(self, size: int, room: bytearray) -> None:
        with self._lock:
            self._bytes -= size
            if len(room) == _SPARE:
                self._spare.append(room)


def _whole(head: Head, hold: Hold, taken: Taken) -> Head:
    """Return a head with all bytes before the core's memory."""
    taken.head = head
    missing = head.data - len(head.raw)
    if head.fault is not None or head.data > _LONGEST_HEAD or missing < 0:
        raise _TooMuch
    return replace(head, raw=head.raw + hold.read_exactly(missing))


def _few(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Give pieces as long as they are of a small process; there may be millions."""
    size = 0
    for piece in pieces:
        size += piece.size
        if size > LARGEST:
            raise _TooMuch
        yield piece


@lru_cache(4)
def _types(mounts: bytes) -> dict[bytes, bytes]:
    """Return the type of each file system by its device; for most processes they are the same."""
    return dict(_MOUNT.findall(mounts))


def _all_local(maps: bytes, mounts: bytes) -> bool:
    """Tell whether all that is mapped lies on file systems that answer for sure."""
    types = _types(mounts)
    for device in set(_MAPPED.findall(maps)):
        major, _, minor = device.partition(b":")
        if types.get(b"%d:%d" % (int(major, 16), int(minor, 16))) not in _LOCAL:
            return False
    return True


def _read(memory: Memory, pieces: list[Piece], room: memoryview, done: int) -> Kept:
    """Read what was touched; what cannot be read of it is zeros, as in `core_pages`.

    Args:
        pieces: those that are sure come first.
        done: bytes of these that were read already.
    """
    content, place = [], 0
    for piece in pieces:
        into = room[place : place + piece.size]
        place += piece.size
        if place > done and not read_piece(memory, piece, into):
            raise _TooMuch  # it was killed
        content.append((piece.address, into))
    return Kept(content)
