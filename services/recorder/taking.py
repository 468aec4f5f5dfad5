"""A small process, read whole at once, so that it is let go before anything is written.

To make a record, a directory and files takes longer than to read all of a small process. So that
comes later, from what was read. Whatever is not small, or cannot be read for sure without
waiting, stays held; what was read of it until then is not read again.
"""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from services.common import process as processes
from services.common import resources
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
from services.recorder.core_pages import Touched
from services.recorder.hold import Hold, Stalled

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
        code: at the program counter, if that is where it faulted.
        files: what it mapped as code, open, by name in proc_pid_map_files(5).
    """

    proc: Remembered = field(default_factory=Remembered)
    head: Head | None = None
    memory: Kept | None = None
    resources: Resources | None = None
    code: bytes | None = None
    files: dict[str, int] | None = None
    give_back: list[Callable[[], None]] = field(default_factory=list)

    def close(self) -> None:
        """Give back what nobody took."""
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
        self._lock = threading.Lock()
        self._bytes = 0
        self._spare = [bytearray(_SPARE)]

    def take(self, pid: int, hold: Hold, module_files: int) -> Taken:
        """Read a held process and let it go, or leave it held, with no memory in what returns.

        Close the result when its record is made.
        """
        taken = Taken()
        try:
            self._take(pid, hold, module_files, taken)
        except (_TooMuch, PagesUnreadable, Stalled, OSError):
            taken.memory = None
        except BaseException:
            taken.close()
            raise
        return taken

    def _take(self, pid: int, hold: Hold, module_files: int, taken: Taken) -> None:
        group = self._look(pid, taken.proc)
        maps = facts.read_maps(pid, taken.proc)
        taken.head = head = _whole(core_head.from_hold(hold), hold, taken)
        if not 0 < head.data <= (head.size or 0) <= self._largest_core:
            raise _TooMuch
        with core_pages.opened(pid) as (memory, pagemap):
            touched = Touched(pid, maps, pagemap)
            loads = list(head.loads())
            touched.look_at_all(loads)
            pieces = list(touched.pieces(iter(loads)))
            room = self._room(sum(piece.size for piece in pieces), taken)
            kept = _read(pid, memory, pieces, room)
        facts.remember(pid, taken.proc)
        taken.resources = resources.read(pid, group, taken.proc)
        taken.code = facts.code_at_fault(pid, head, maps)
        taken.files = facts.open_modules(pid, maps, module_files)
        if not self._unrecorded.begin(pid):
            raise _TooMuch
        taken.give_back.append(lambda: self._unrecorded.end(pid))
        taken.proc.seal()
        taken.memory = kept
        hold.memory_was_read = True
        hold.let_go()

    def _look(self, pid: int, proc: Remembered) -> str | None:
        """Look for a reason not to go on; return its cgroup."""
        resident = _VM_RSS.search(proc.read(f"{pid}/status"))
        if not resident or int(resident[1]) * 1024 > _RESIDENT or not facts.has_memory(pid, proc):
            raise _TooMuch
        group = processes.cgroup(pid, proc)
        if self._labels_needed and processes.container_of(group):
            raise _TooMuch
        if len(facts.read_threads(pid, proc)) > _MOST_THREADS:
            raise _TooMuch
        maps, mounts = facts.read_maps(pid, proc), resources.read_mounts(pid, proc)
        if not 0 < len(maps) <= _LONGEST_MAPS or not _all_local(maps, mounts):
            raise _TooMuch
        return group

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


def _all_local(maps: bytes, mounts: bytes) -> bool:
    """Tell whether all that is mapped lies on file systems that answer for sure."""
    types = dict(_MOUNT.findall(mounts))
    for device in set(_MAPPED.findall(maps)):
        major, _, minor = device.partition(b":")
        if types.get(b"%d:%d" % (int(major, 16), int(minor, 16))) not in _LOCAL:
            return False
    return True


def _read(pid: int, memory: Memory, pieces: list[Piece], room: memoryview) -> Kept:
    """Read what was touched; what cannot be read of it is zeros, as in `core_pages`."""
    ordered = sorted(pieces, key=lambda piece: not piece.sure)
    done = read_at_once(pid, [piece for piece in pieces if piece.sure], room)
    content, place = [], 0
    for piece in ordered:
        into = room[place : place + piece.size]
        place += piece.size
        if place > done and not read_piece(memory, piece, into):
            raise _TooMuch  # it was killed
        content.append((piece.address, into))
    return Kept(content)
