"""Room for cores on the spool's disk."""

import os
from pathlib import Path

from services.recorder.core import core_copy


def for_core(place: int | Path, reserve: float) -> int:
    """Return how many bytes a core may take of a disk: at least 1.

    Args:
        place: a file or directory there, or a descriptor of one.
        reserve: percent of the disk that stay free.
    """
    disk = os.statvfs(place)
    kept = int(disk.f_blocks * disk.f_frsize * reserve / 100)
    return max(1, disk.f_bavail * disk.f_frsize - max(kept, core_copy.GIVEN_BACK))


def for_new_core(directory: int, reserve: float) -> int:
    """Return the same for a core whose file is still to be made, which takes an inode."""
    disk = os.statvfs(directory)
    if disk.f_files and not disk.f_favail:  # some file systems do not count them
        return 1
    return for_core(directory, reserve)


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
