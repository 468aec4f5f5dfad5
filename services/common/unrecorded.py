"""Crashes that were read already and have no capture record yet: told by locks and by notes.

The recorder lets a small process go before it writes anything. Until its record is there it holds
a lock on one byte of a file in the spool, at the PID, taken while the process still was held. So
whoever finds a process dead and no record knows whether there will be one. The locks go with the
recorder, whatever ends it. These are open file description locks, fcntl_locking(2).

What does not go with it is a note in the same file: who crashed, and of what. Where one is left, a
recorder was killed just then, and the next one makes crash files of what the note tells.
"""

import fcntl
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from crashbus import layout
from crashbus.identity import crash_id, start_ticks_in
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable

# struct flock: l_type, l_whence (0: from the beginning), l_start, l_len, l_pid
_FLOCK = struct.Struct("hhqqi4x")
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

# What a note may hold, what matters most first; as the pipe helper keeps it, see helper/orphan.c.
PARTS = (
    *("crash", "boot_id", "stat", "status", "comm", "cgroup", "exe", "cmdline", "core"),
    *("cwd", "root", "limits", "maps", "environ"),
)
NOTE = 64 * 1024  # bytes of a note, at most, and of its place in the file
_MOST = 4096  # places that are looked at
_MARK = b"note"
_HEAD = struct.Struct(f"=4s{len(PARTS)}I")  # the mark, and how many bytes each part has
_CRASH = 64  # bytes; more than the first part ever has


class Unrecorded:
    """The recorder's side; used by several threads."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._lock = threading.Lock()
        self._file = -1
        self._free: list[int] = []  # places of notes
        self._places = 0  # of them there are so many
        self._taken: dict[int, tuple[int, int]] = {}  # PID to a place and its bytes

    def begin(self, pid: int, note: bytes | memoryview) -> bool:
        """Say that a process, which is held, has no record yet; False where that cannot be.

        Args:
            note: what a recorder shall know that finds it, as recorder/taker/note.c makes it.
        """
        # To the end, for the file may be another one then, and its number anybody's.
        with self._lock:
            try:
                file = self._opened()
                if pid in self._taken:
                    return False  # of one that had the PID before, and still is to be written
                place = self._free.pop() if self._free else self._new_place()
                self._taken[pid] = place, len(note)
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, pid, 1, 0))
                is_whole = os.pwrite(file, note, place * NOTE) == len(note)
            except (OSError, SpoolUnusable):
                is_whole = False
            if not is_whole:
                self._end(pid)
            return is_whole

    def end(self, pid: int) -> None:
        """Say that it has one, or will have none; what is said twice counts once."""
        with self._lock:
            self._end(pid)

    def _end(self, pid: int) -> None:
        if pid not in self._taken:
            return
        place, size = self._taken.pop(pid)
        with suppress(OSError):  # the next recorder sees that there is a record
            _clear(self._file, place, size)
            self._free.append(place)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, pid, 1, 0))

    def _opened(self) -> int:
        if self._file >= 0:
            if os.fstat(self._file).st_nlink:
                return self._file
            os.close(self._file)  # somebody removed the spool
            self._file = -1
        self._file = crash_directory.private_file(self._spool, layout.UNRECORDED)
        # Behind what an earlier recorder left and nobody could take yet.
        self._places = -(-os.fstat(self._file).st_size // NOTE)
        self._free, self._taken = [], {}
        return self._file

    def _new_place(self) -> int:
        self._places += 1
        return self._places - 1


def is_unrecorded(spool: Path, pid: int) -> bool:
    """Tell whether a recorder has read this process's crash and still is to make its record."""
    file = _look(spool)
    if file < 0:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_RDLCK, 0, pid, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(file)


def is_noted(spool: Path, pid: int, at: float, within: float) -> bool:
    """Tell whether there is a note about a process that crashed about then; `is_unrecorded` first.

    Args:
        at: Unix seconds.
        within: seconds.
    """
    file = _look(spool)
    if file < 0:
        return False
    try:
        for place in _places(file):
            crash = os.pread(file, _CRASH, place * NOTE + _HEAD.size).partition(b"\n")[0].split()
            if len(crash) == 4 and int(crash[0]) == pid and abs(int(crash[3]) - at) < within:
                return True
    except (OSError, ValueError):
        return False  # it is not what a recorder wrote
    finally:
        os.close(file)
    return False


def left_notes(spool: Path) -> Iterator[Mapping[str, bytes]]:
    """Give each note that was left, and remove it when the next is asked for.

    To be called before there is any `Unrecorded`.

    Raises:
        OSError, SpoolUnusable: they cannot be read.
    """
    if not (spool / layout.UNRECORDED).exists():
        return
    file = crash_directory.private_file(spool, layout.UNRECORDED)
    try:
        for place in list(_places(file)):
            yield unpacked(os.pread(file, NOTE, place * NOTE))
            _clear(file, place)
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def _clear(file: int, place: int, size: int = NOTE) -> None:
    """Remove a note, all of it: it holds what may be secret."""
    os.pwrite(file, bytes(size), place * NOTE)


def unpacked(raw: bytes) -> Mapping[str, bytes]:
    """Return the parts of a note that are there."""
    _, *sizes = _HEAD.unpack_from(raw.ljust(_HEAD.size, b"\0"))
    note, at = {}, _HEAD.size
    for name, size in zip(PARTS, sizes, strict=True):
        note[name] = raw[at : at + size]
        at += size
    return {name: part for name, part in note.items() if part}


def name_of(note: Mapping[str, bytes]) -> str | None:
    """Return the crash ID of a note; None: it does not tell that."""
    try:
        pid = int(note["crash"].split()[0])
        boot = note["boot_id"].decode("ascii").strip()
        return crash_id(boot, pid, start_ticks_in(note["stat"]))
    except (KeyError, ValueError, IndexError):
        return None


def _places(file: int) -> Iterator[int]:
    for place in range(min(_MOST, -(-os.fstat(file).st_size // NOTE))):
        if os.pread(file, len(_MARK), place * NOTE) == _MARK:
            yield place


def _look(spool: Path) -> int:
    """Open the file, if it is a recorder's; -1 if not."""
    try:
        file = os.open(spool / layout.UNRECORDED, _LOOK)
    except OSError:
        return -1
    # Root's alone can be locked for writing by root alone, which is what is asked for.
    if os.fstat(file).st_uid == os.geteuid():
        return file
    os.close(file)
    return -1
