"""A small process, read whole at once, so that it is let go before anything is written.

To make a record, a directory and files takes longer than to read all of a small process. So that
comes later, from what was read. Whatever is not small, or cannot be read for sure without
waiting, stays held.

What is done meanwhile is counted in microseconds, so the reading itself is C, `taker/taker.c`, in
three calls that wait for no interpreter lock; Python decides before and after.
"""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from mmap import MADV_HUGEPAGE, mmap
from pathlib import Path
from typing import Any

import structlog

from crashbus import identity
from services.common import process as processes
from services.common import resources
from services.common.mounts import Mounts
from services.common.proc import MAX_READ, Remembered
from services.common.resources import Resources
from services.common.unrecorded import Unrecorded
from services.recorder import core_head, facts
from services.recorder.core_head import Head
from services.recorder.core_memory import PAGE, Kept
from services.recorder.hold import Hold

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LIBRARY = "taker.so"
LARGEST = 16 * 1024 * 1024  # bytes of touched memory
AT_ONCE = (
    LARGEST + 4 * 1024 * 1024
)  # bytes of all that was read and is not written yet, /proc and heads too
_RESIDENT = 4 * LARGEST  # bytes, shared pages too; of more it is not asked what is touched
_LARGEST_CORE = 1024**3  # bytes, untouched memory too
_MOST_THREADS = 256
_SPARE = 4 * 1024 * 1024  # bytes of room that is used again: new memory costs as much as to read
_CRASHES = 2  # of what a crash is read to are kept; more are made when crashes come in bursts
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

# Read beside what taker.c reads by itself, because it must know it.
_FILES = (
    *((name, MAX_READ) for name in ("stat", "comm", "limits", "oom_score_adj", "smaps_rollup")),
    ("cmdline", processes.MAX_READ),
    ("environ", facts.MAX_ENVIRONMENT + 1),
)
_NOTED = ("stat", "status", "comm", "cgroup", "cmdline", "limits", "maps", "environ")
_NUMBER = struct.Struct("=I")
_ABSENT = 0xFFFFFFFF
_ROOM = 1024 * 1024  # bytes: ARENA and HEAD in taker.h


class _Wanted(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("most", ctypes.c_uint32), ("kind", ctypes.c_char))


class _Piece(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("readable", ctypes.c_uint32),
    )


class _Opened(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("file", ctypes.c_int32))


class _Crash(ctypes.Structure):
    """The beginning of struct crash, taker.h.

    Attributes:
        rooms: what `arena` and `head` point to.
    """

    rooms: tuple[mmap, mmap]

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("core", "pid", "place", "pidfd")),
        *((name, ctypes.c_uint32) for name in ("mark", "patience", "modules")),
        *((name, ctypes.c_uint64) for name in ("resident", "largest", "touched")),
        *((name, ctypes.c_uint32) for name in ("threads", "wanteds")),
        ("wanted", ctypes.POINTER(_Wanted)),
        *((name, ctypes.c_char_p) for name in ("namespace", "root", "mounts")),
        *((name, ctypes.c_void_p) for name in ("arena", "head")),
        *((name, ctypes.c_uint32) for name in ("used", "head_size", "pieces_found", "sure")),
        *((name, ctypes.c_uint32) for name in ("files_found", "sockets", "code_size")),
        ("memory", ctypes.c_uint64),
        ("code", ctypes.c_ubyte * 16),
        ("files", _Opened * 64),
        ("pieces", _Piece * 8192),
    )


def _wanted() -> "ctypes.Array[_Wanted]":
    """Return what is read of a process, and of its cgroup."""
    wanted = [_Wanted(name.encode(), most, b"f") for name, most in _FILES]
    wanted += [_Wanted(b"cwd", 0, b"l"), _Wanted(b"fd", resources.MAX_FILES + 1, b"d")]
    for hierarchy, files in resources.CGROUP_FILES.items():
        wanted.append(_Wanted(f"{resources.CGROUP_ROOT}/{hierarchy}".encode(), 0, b"g"))
        wanted += [_Wanted(name.encode(), MAX_READ, b"f") for name in files]
    return (_Wanted * len(wanted))(*wanted)


_WANTED = _wanted()


def load(library: Path) -> ctypes.CDLL:
    """Return what reads small processes.

    Raises:
        OSError: it was not built, or is of another version.
    """
    taking = ctypes.CDLL(str(library))
    taking.crash_size.restype = taking.known_size.restype = ctypes.c_size_t
    taking.greet.argtypes = taking.look.argtypes = (ctypes.c_void_p,)
    taking.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    if taking.known_size() != ctypes.sizeof(_Crash):
        raise OSError(None, f"{library} is of another version")
    return taking


@dataclass
class Taken:
    """What was read of a process before anything was written.

    Attributes:
        proc: its /proc, as far as it was read.
        head: of its core, with all headers and notes; None: it is still to be read.
        memory: all of it; None: the process is still held.
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
        taking: what `load` returned.
        unrecorded: told of each until its record is made.
        largest_core: bytes; larger ones are not for us.
        labels_needed: a container's crash must wait for what its runtime says.
    """

    def __init__(
        self, taking: ctypes.CDLL, unrecorded: Unrecorded, largest_core: int, *, labels_needed: bool
    ) -> None:
        self._taking = taking
        self._unrecorded = unrecorded
        self._largest_core = min(largest_core or _LARGEST_CORE, _LARGEST_CORE)
        self._labels_needed = labels_needed
        self._boot_id = identity.boot_id().encode()
        self._lock = threading.Lock()
        self._bytes = 0
        self._mounts = Mounts()
        self._spare = [_new_room(_SPARE)]
        self._crashes = [self._new_crash()]

    def take(self, pid: int, hold: Hold, mark: int, module_files: int) -> Taken:
        """Read a held process and let it go, or leave it held, with nothing in what was taken.

        Args:
            mark: bytes before its core.

        Returns:
            What is to be closed when its record is made.
        """
        taken = Taken()
        if self._labels_needed and processes.container_of(processes.cgroup(pid, taken.proc)):
            return taken
        try:
            place = os.open(f"/proc/{pid}", _PLACE)
        except OSError:
            return taken
        try:
            with self._crash(hold) as crash:
                crash.pid, crash.place = pid, place
                crash.mark, crash.modules = mark, module_files
                if self._take(crash, hold, taken):
                    return taken
        except Exception:  # there is the longer way, which needs less memory
            log.error("a small process could not be read at once: it stays held", exc_info=True)
        finally:
            os.close(place)
        taken.close()
        return Taken()

    def greet(self, hold: Hold) -> int | None:
        """Return who crashes, and acknowledge the kernel's request, if that comes at once."""
        try:
            with self._crash(hold) as crash:
                if self._taking.greet(ctypes.addressof(crash)):
                    return None
                crash.head_size = 0  # that was the request
                hold.belongs_to(crash.pidfd)
                return int(crash.pid)
        except (OSError, MemoryError):  # no memory to read it to; nothing was asked yet
            return None

    @contextmanager
    def _crash(self, hold: Hold) -> Iterator[_Crash]:
        """Give what a crash is read to; what is left of the core's head is put back."""
        with self._lock:
            crash = self._crashes.pop() if self._crashes else None
        crash = crash or self._new_crash()
        crash.core, crash.patience = hold.descriptor, int(hold.patience * 1000)
        crash.head_size = 0
        try:
            yield crash
        finally:
            hold.unread(ctypes.string_at(crash.head, crash.head_size))
            with self._lock:
                if len(self._crashes) < _CRASHES:
                    self._crashes.append(crash)

    def _new_crash(self) -> _Crash:
        crash = _Crash.from_buffer(bytearray(self._taking.crash_size()))
        crash.resident, crash.touched, crash.threads = _RESIDENT, LARGEST, _MOST_THREADS
        crash.largest = self._largest_core
        crash.rooms = arena, head = mmap(-1, _ROOM), mmap(-1, _ROOM)
        crash.arena, crash.head = _address(arena), _address(head)
        crash.wanted, crash.wanteds = _WANTED, len(_WANTED)
        crash.namespace, crash.root = self._mounts.view
        return crash

    def _take(self, crash: _Crash, hold: Hold, taken: Taken) -> bool:
        crash.mounts = mounts = self._mounts.now()
        if self._taking.look(ctypes.addressof(crash)):
            return False
        opened = crash.files[: crash.files_found]
        taken.files = {f"{one.start:x}-{one.end:x}": one.file for one in opened}
        room = self._room(crash, taken)
        if room is None:
            return False
        if self._taking.read_memory(ctypes.addressof(crash), _address(room)):
            return False
        told = _Told(crash, mounts)
        # These are asked through the process; most have none.
        sockets = tuple(resources.sockets(crash.pid, told.open_files)) if crash.sockets else ()
        told.understand(crash, sockets, taken)
        note = self._note(crash.pid, hold, taken)
        # Without these it could not be named or written; and what was read by its PID could be
        # another's.
        if taken.head is None or taken.head.fault or not note["stat"] or not hold.has_its_pid:
            return False
        if not self._unrecorded.begin(crash.pid, note):
            return False
        taken.note = partial(self._unrecorded.end, crash.pid)
        taken.proc.seal()
        hold.let_go()
        crash.head_size = 0  # it is taken
        taken.memory = Kept(_content(crash, room))
        hold.memory_was_read = True
        return True

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

    def _room(self, crash: _Crash, taken: Taken) -> mmap | None:
        """Return room for its memory, until what was taken is closed; None: there is too much."""
        with self._lock:
            is_spare = bool(self._spare) and crash.memory <= _SPARE
            size = _SPARE if is_spare else max(crash.memory, PAGE)
            counted = size + crash.used + crash.head_size
            if self._bytes + counted > AT_ONCE:
                return None
            self._bytes += counted
            spare = self._spare.pop() if is_spare else None
        taken.give_back.append(partial(self._give_back, counted, spare))
        return spare or _new_room(size)

    def _give_back(self, counted: int, spare: mmap | None) -> None:
        with self._lock:
            self._bytes -= counted
            if spare is not None:
                self._spare.append(spare)


def _address(room: mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(room))


def _new_room(size: int) -> mmap:
    """Return memory that is there already, in large pages: reading to it is faster."""
    room = mmap(-1, size)
    with suppress(OSError):  # a kernel without
        room.madvise(MADV_HUGEPAGE)
    for page in range(0, size, PAGE):
        room[page] = 1
    return room


def _content(crash: _Crash, room: mmap) -> Iterator[tuple[int, memoryview]]:
    """Give each piece of memory with its address."""
    view, place = memoryview(room), 0
    for piece in crash.pieces[: crash.pieces_found]:
        yield piece.address, view[place : place + piece.size]
        place += piece.size


class _Told:
    """What was read of /proc, in the order in which taker.c puts it into the arena."""

    def __init__(self, crash: _Crash, mounts: bytes) -> None:
        self._raw = ctypes.string_at(crash.arena, crash.used)
        self._place = 0
        self._files = {"status": self._file()}
        self._links = {"exe": self._content()}
        self._files["maps"] = self._file()
        self._files["cgroup"] = self._file()
        self._links |= {name: self._content() for name in ("ns/mnt", "root")}
        seen = self._content()
        self._files["mountinfo"] = mounts if seen is None else seen
        self._threads = [
            (self._file().decode(), self._file(), self._file()) for _ in range(self._number())
        ]
        self._files |= {name: self._file() for name, _ in _FILES}
        self._links["cwd"] = self._content()
        open_files = [(int(self._file()), self._content()) for _ in range(self._number())]
        self._more_files = len(open_files) > resources.MAX_FILES
        self.open_files = {n: to for n, to in open_files[: resources.MAX_FILES] if to is not None}
        self._cgroup: dict[str, bytes] = {}
        for files in resources.CGROUP_FILES.values():
            self._cgroup |= {name: raw for name in files if (raw := self._file())}

    def _number(self) -> int:
        (number,) = _NUMBER.unpack_from(self._raw, self._place)
        self._place += _NUMBER.size
        return int(number)

    def _content(self) -> bytes | None:
        """Return what comes next; None: it could not be read."""
        size = self._number()
        if size == _ABSENT:
            return None
        begin, self._place = self._place, self._place + size + 1  # a NUL
        return self._raw[begin : begin + size]

    def _file(self) -> bytes:
        return self._content() or b""

    def understand(self, crash: _Crash, sockets: tuple[dict[str, Any], ...], taken: Taken) -> None:
        """Parse the rest of what was read."""
        pid, proc = crash.pid, taken.proc
        for name, content in self._files.items():
            proc.learn(f"{pid}/{name}", content)
        for name, target in self._links.items():
            proc.learn_link(f"{pid}/{name}", target)
        proc.learn_list(f"{pid}/task", [task for task, *_ in self._threads])
        for task, comm, status in self._threads:
            proc.learn(f"{pid}/task/{task}/comm", comm)
            proc.learn(f"{pid}/task/{task}/status", status)
        taken.resources = self._resources(sockets)
        raw = ctypes.string_at(crash.head, crash.head_size)[crash.mark :]
        # It looks at the first notes alone; many threads have more.
        taken.head = replace(core_head.read(BytesIO(raw).read), raw=raw)
        if facts.is_at_fault(taken.head):
            taken.code = bytes(memoryview(crash.code)[: crash.code_size])

    def _resources(self, sockets: tuple[dict[str, Any], ...]) -> Resources:
        return Resources(
            status=self._files["status"],
            rollup=self._files["smaps_rollup"],
            open_files=self.open_files,
            more_files=self._more_files,
            sockets=sockets,
            mounts=self._files["mountinfo"],
            cgroup=self._cgroup,
            oom_score_adj=self._files["oom_score_adj"],
        )
