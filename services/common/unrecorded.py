"""Crashes that were read already and have no capture record yet: told by locks.

The recorder lets a small process go before it writes anything. Until its record is there it holds
a lock on one byte of a file in the spool, at the PID, taken while the process still was held. So
whoever finds a process dead and no record knows whether there will be one. The locks go with the
recorder, whatever ends it. These are open file description locks, fcntl_locking(2).
"""

import fcntl
import os
import struct
import threading
from pathlib import Path

from crashbus import layout
from services.common import crash_directory
from services.common.crash_directory import SpoolUnusable

# struct flock: l_type, l_whence (0: from the beginning), l_start, l_len, l_pid
_FLOCK = struct.Struct("hhqqi4x")
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Unrecorded:
    """The recorder's side; used by several threads."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._lock = threading.Lock()
        self._file = -1

    def begin(self, pid: int) -> bool:
        """Say that a process, which is held, has no record yet; False where that cannot be."""
        try:
            with self._lock:
                file = self._opened()
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, pid, 1, 0))
        except (OSError, SpoolUnusable):
            return False
        return True

    def end(self, pid: int) -> None:
        """Say that it has one, or will have none."""
        with self._lock:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, pid, 1, 0))

    def _opened(self) -> int:
        if self._file >= 0:
            if os.fstat(self._file).st_nlink:
                return self._file
            os.close(self._file)  # somebody removed the spool
            self._file = -1
        spool = crash_directory.open_spool(self._spool)
        try:
            self._file = crash_directory.private_file(layout.UNRECORDED, spool)
        finally:
            os.close(spool)
        return self._file


def is_unrecorded(spool: Path, pid: int) -> bool:
    """Tell whether a recorder has read this process's crash and still is to make its record."""
    try:
        file = os.open(spool / layout.UNRECORDED, _LOOK)
    except OSError:
        return False
    try:
        # Root's alone can be locked for writing by root alone, which is what is asked for.
        if os.fstat(file).st_uid != os.geteuid():
            return False
        asked = _FLOCK.pack(fcntl.F_RDLCK, 0, pid, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(file)
