"""Room for cores on the spool's disk."""

import errno
import os
from pathlib import Path

from services.recorder.core import core_copy

_LOOK_EVERY = 16 * 1024 * 1024  # bytes of a core


def for_core(place: int | Path, reserve: float) -> int:
    """Return how many bytes a core may take of a disk: at least 1.

    Args:
        place: a file or directory there, or a descriptor of one.
        reserve: percent of the disk that stay free.
    """
    free, kept = _free(place, reserve)
    return max(1, free - max(kept, core_copy.GIVEN_BACK))


def _free(place: int | Path, reserve: float) -> tuple[int, int]:
    """Return how many bytes are free, and how many of them should stay so."""
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize, int(disk.f_blocks * disk.f_frsize * reserve / 100)


def for_new_core(directory: int, reserve: float) -> int:
    """Return the same for a core whose file is still to be made, which takes an inode."""
    disk = os.statvfs(directory)
    if disk.f_files and not disk.f_favail:  # some file systems do not count them
        return 1
    return for_core(directory, reserve)


class Reserve:
    """Keeps half of the reserve from cores that are written at the same time.

    Each is laid out for the room that there was when it began, and others take of the same. Half,
    because one alone may take a little of the reserve, and must not be cut for that.
    """

    def __init__(self, core: int, reserve: float) -> None:
        self._core = core
        self._reserve = reserve
        self._next = 0

    def check(self, size: int) -> None:
        """See whether a core that has so many bytes may have more; call it often.

        Raises:
            OSError: it may not.
        """
        if size < self._next:
            return
        self._next = size + _LOOK_EVERY
        free, kept = _free(self._core, self._reserve)
        if free < kept // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Lack:
    """Whether there was too little room for the last core, and still is."""

    def __init__(self, spool: Path, reserve: float) -> None:
        self._spool = spool
        self._reserve = reserve
        self._wanted = 0

    def note(self, wanted: int) -> None:
        """Take note of the bytes that the last core wanted and did not find; 0: it found them."""
        self._wanted = wanted

    def fault(self) -> str | None:
        """Return what is wrong; None when there is room, for such a core too."""
        try:
            if not self._wanted or for_core(self._spool, self._reserve) >= self._wanted:
                return None
        except OSError as error:
            return str(error)
        return "no room for a core; free some, see docs/operations.md"
