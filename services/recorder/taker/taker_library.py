"""taker.so, which reads small processes: what taker.h declares, for ctypes."""

import ctypes
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

from services.common import process as processes
from services.common import resources
from services.common.proc import MAX_READ
from services.common.unrecorded import NOTE, PARTS
from services.recorder import facts

LIBRARY = "taker.so"
ABSENT = 0xFFFFFFFF  # length of what could not be read
_ROOM = 1024 * 1024  # bytes: ARENA and HEAD

# Read beside what it reads by itself, because it must know it: names in /proc/PID, bytes at most.
FILES = (
    *((name, MAX_READ) for name in ("stat", "comm", "limits", "oom_score_adj", "smaps_rollup")),
    ("cmdline", processes.MAX_READ),
    ("environ", facts.MAX_ENVIRONMENT + 1),
)


class _Wanted(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("most", "part")),
        ("kind", ctypes.c_char),
    )


class _Piece(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("readable", ctypes.c_uint32),
    )


class _Opened(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("file", ctypes.c_int32))


class Greeted(ctypes.Structure):
    """struct arrival, taker.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("core", "pid", "pidfd")),
        ("took", ctypes.c_uint32),
        ("request", ctypes.c_ubyte * 16),
        ("at", ctypes.c_uint64),
    )


class Crash(ctypes.Structure):
    """The beginning of struct crash, taker.h.

    Attributes:
        rooms: what `arena`, `head` and `note` point to.
    """

    rooms: tuple[mmap, mmap, mmap]

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("core", "pid", "place")),
        *((name, ctypes.c_uint32) for name in ("mark", "patience", "modules")),
        *((name, ctypes.c_uint64) for name in ("resident", "largest", "touched")),
        *((name, ctypes.c_uint32) for name in ("threads", "wanteds")),
        ("wanted", ctypes.POINTER(_Wanted)),
        *((name, ctypes.c_char_p) for name in ("namespace", "root", "mounts", "boot_id")),
        ("arrived", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("arena", "head", "note")),
        *((name, ctypes.c_uint32) for name in ("used", "head_size", "note_size")),
        *((name, ctypes.c_uint32) for name in ("pieces_found", "sure")),
        *((name, ctypes.c_uint32) for name in ("files_found", "sockets", "code_size")),
        ("memory", ctypes.c_uint64),
        ("code", ctypes.c_ubyte * 16),
        ("files", _Opened * 64),
        ("pieces", _Piece * 8192),
    )

    @classmethod
    def new(cls, taker: ctypes.CDLL) -> "Crash":
        """Return one with room for what is read, none of its bounds given."""
        crash = cls.from_buffer(bytearray(taker.crash_size()))
        crash.rooms = rooms = mmap(-1, _ROOM), mmap(-1, _ROOM), mmap(-1, NOTE)
        crash.arena, crash.head, crash.note = map(address_of, rooms)
        crash.wanted, crash.wanteds = _WANTED, len(_WANTED)
        return crash

    def content(self, room: mmap) -> Iterator[tuple[int, memoryview]]:
        """Give each piece of memory that was read to `room`, with its address."""
        view, place = memoryview(room), 0
        for piece in self.pieces[: self.pieces_found]:
            yield piece.address, view[place : place + piece.size]
            place += piece.size

    def noted(self) -> memoryview:
        """Return the note about it, for `Unrecorded`."""
        return memoryview(self.rooms[2])[: self.note_size]

    def opened(self) -> dict[str, int]:
        """Return the descriptors of what it mapped as code, by name in proc_pid_map_files(5)."""
        found = self.files[: self.files_found]
        return {f"{one.start:x}-{one.end:x}": one.file for one in found}


def _wanted() -> "ctypes.Array[_Wanted]":
    """Return what is read of a process, and of its cgroup, in this order."""
    none = len(PARTS)

    def part(name: str) -> int:
        return PARTS.index(name) if name in PARTS else none

    wanted = [_Wanted(name.encode(), most, part(name), b"f") for name, most in FILES]
    wanted.append(_Wanted(b"cwd", 0, part("cwd"), b"l"))
    wanted.append(_Wanted(b"fd", resources.MAX_FILES + 1, none, b"d"))
    for hierarchy, files in resources.CGROUP_FILES.items():
        wanted.append(_Wanted(f"{resources.CGROUP_ROOT}/{hierarchy}".encode(), 0, none, b"g"))
        wanted += [_Wanted(name.encode(), MAX_READ, none, b"f") for name in files]
    return (_Wanted * len(wanted))(*wanted)


_WANTED = _wanted()


def load(library: Path) -> ctypes.CDLL:
    """Return what reads small processes.

    Raises:
        OSError: it was not built, or is of another version.
    """
    taker = ctypes.CDLL(str(library))
    try:
        _declare(taker)
    except AttributeError as error:  # one of them is not there
        raise OSError(None, f"{library} is of another version") from error
    if taker.known_size() != ctypes.sizeof(Crash) + ctypes.sizeof(Greeted):
        raise OSError(None, f"{library} is of another version")
    return taker


def _declare(taker: ctypes.CDLL) -> None:
    taker.crash_size.restype = taker.known_size.restype = ctypes.c_size_t
    taker.look.argtypes = (ctypes.c_void_p,)
    taker.greet.argtypes = (ctypes.POINTER(Greeted),)
    taker.accept_crash.argtypes = (ctypes.c_int, ctypes.POINTER(Greeted))
    taker.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p)


def address_of(room: mmap) -> int:
    """Return where a room lies, for C."""
    return ctypes.addressof(ctypes.c_char.from_buffer(room))
