"""Drafts: what a recorder knows of a crash whose files it is still to make, kept for the next one.

One file for each set in ``<spool>/.drafts``, root's alone, from before the set's capture record
is there until that is complete. A SIGKILL takes nothing of it back. While the record of a set is
not locked and there is a draft, its recorder was killed and another may finish it: whoever holds
the record's lock may read the draft, and removes it to have the set taken as it lies.
"""

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crashbus import layout
from services.common import crash_directory

_FINAL = struct.Struct("=Q")  # bytes of the core that are final
_COUNT = struct.Struct("=I")  # how often the set was taken up
_LEFT_OUT = struct.Struct("=Q256s")  # bytes of the core with what it leaves out, and why it does
_HEAD = struct.Struct("=QIQ256s")  # the three
_COUNT_AT, _LEFT_OUT_AT = _FINAL.size, _FINAL.size + _COUNT.size
_MOST = 16 * 1024 * 1024  # bytes that are read
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_THERE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Draft:
    """A draft as it was found.

    Attributes:
        core_final: up to where the core was copied, in bytes, as far as that was told.
        taken_up: how often a recorder has begun to finish the set.
        left_out: why a core has less than the kernel's from the beginning, or no place; empty: it
            has all.
        expected: bytes that it would have with that.
        known: what was kept of the crash; empty where the recorder had not come to that.
    """

    core_final: int
    taken_up: int
    left_out: str
    expected: int
    known: bytes


def begin(spool: Path, pid: int, epoch: int) -> int:
    """Make the draft of a set, and return its descriptor.

    Raises:
        OSError, SpoolUnusable: it cannot be made.
    """
    place = crash_directory.private_directory(spool, layout.DRAFTS)
    try:
        return _begun(_name(pid, epoch), place)
    finally:
        os.close(place)


def _begun(name: str, place: int) -> int:
    draft = os.open(name, _NEW, 0o600, dir_fd=place)
    try:
        os.pwrite(draft, _HEAD.pack(0, 0, 0, b""), 0)
    except BaseException:  # no room, say: nobody is to find a draft that is none
        os.close(draft)
        with suppress(OSError):
            os.unlink(name, dir_fd=place)
        raise
    return draft


def keep(draft: int, known: bytes) -> None:
    """Keep what is known of the crash."""
    os.pwrite(draft, known, _HEAD.size)


def tell_final(draft: int, end: int) -> None:
    """Say that the core is copied up to `end` bytes."""
    os.pwrite(draft, _FINAL.pack(end), 0)


def tell_left_out(draft: int, why: str, expected: int) -> None:
    """Say, before the core is copied, that it leaves something out."""
    os.pwrite(draft, _LEFT_OUT.pack(expected, why.encode("utf-8", "replace")), _LEFT_OUT_AT)


def take_up(spool: Path, pid: int, epoch: int) -> Draft | None:
    """Read a draft, and count that; None where there is none.

    Raises:
        OSError: it cannot be read now.
    """
    try:
        with _opened(spool, pid, epoch) as file:
            raw = os.pread(file, _MOST, 0)
            draft = _unpacked(raw)
            os.pwrite(file, _COUNT.pack(draft.taken_up + 1), _COUNT_AT)
    except FileNotFoundError:
        return None
    return draft


def read(spool: Path, pid: int, epoch: int) -> Draft | None:
    """Read a draft and leave it as it is; None where it cannot be read."""
    with suppress(OSError), _opened(spool, pid, epoch) as file:
        return _unpacked(os.pread(file, _MOST, 0))
    return None


def _unpacked(raw: bytes) -> Draft:
    final, taken_up, expected, why = _HEAD.unpack_from(raw.ljust(_HEAD.size, b"\0"))
    left_out = why.rstrip(b"\0").decode("utf-8", "replace")
    return Draft(final, taken_up, left_out, expected, raw[_HEAD.size :])


def count_back(spool: Path, pid: int, epoch: int) -> None:
    """Take back what `take_up` counted: the recorder did not die of the set."""
    with suppress(OSError), _opened(spool, pid, epoch) as file:
        raw = os.pread(file, _COUNT.size, _COUNT_AT)
        (taken_up,) = _COUNT.unpack(raw.ljust(_COUNT.size, b"\0"))
        os.pwrite(file, _COUNT.pack(max(0, taken_up - 1)), _COUNT_AT)


def remove(spool: Path, pid: int, epoch: int) -> None:
    """Remove a draft: the set is whole, or nobody is to finish it."""
    with suppress(OSError), _directory(spool) as place:
        os.unlink(_name(pid, epoch), dir_fd=place)


def left(spool: Path) -> list[tuple[int, int]]:
    """Return PID and epoch of each set that has one, the oldest first."""
    found = []
    with suppress(OSError), _directory(spool) as place:
        for name in os.listdir(place):  # noqa: PTH208 - names alone
            pid, _, epoch = name.partition("-")
            if pid.isdecimal() and epoch.isdecimal():
                found.append((int(pid), int(epoch)))
    return sorted(found, key=lambda one: one[1])


def keep_waiting(spool: Path, pid: int, epoch: int) -> None:
    """Say that a recorder is there that will finish the set."""
    with suppress(OSError), _directory(spool) as place:
        os.utime(_name(pid, epoch), dir_fd=place, follow_symlinks=False)


class Awaited:
    """Tells of sets that nobody is at whether another recorder may finish them.

    Args:
        patience: seconds for which one is waited for that is not there yet.
    """

    def __init__(self, spool: Path, patience: float) -> None:
        self._spool = spool
        self._patience = patience
        # Monotonic seconds. A draft tells when its recorder last wrote, not when it ended.
        self._first_seen: dict[tuple[int, int], float] = {}

    def is_there(self, pid: int, epoch: int) -> None:
        """Tell it of a recorder at work on a set: if it is killed, too, the next is waited for."""
        self._first_seen.pop((pid, epoch), None)

    def is_awaited(self, pid: int, epoch: int, lock: Callable[[], bool]) -> bool:
        """Tell it of a set whose capture record is not locked.

        Args:
            lock: locks that; False where a recorder has.
        """
        one = pid, epoch
        since = self._since(one)
        try:
            with _directory(self._spool) as place:
                status = os.stat(_name(*one), dir_fd=place, follow_symlinks=False)
        except OSError:
            return False
        # A clock that was set back must not keep a set waiting for long.
        renewed = abs(time.time() - status.st_mtime)
        if min(time.monotonic() - since, renewed) < self._patience or not lock():
            return True
        remove(self._spool, *one)
        return False

    def _since(self, one: tuple[int, int]) -> float:
        if one not in self._first_seen:
            there = set(left(self._spool))  # what is finished needs not be known any more
            known = {seen: at for seen, at in self._first_seen.items() if seen in there}
            self._first_seen = known | {one: time.monotonic()}
        return self._first_seen[one]


@contextmanager
def _directory(spool: Path) -> Iterator[int]:
    """Give the directory of all drafts; what another user made in its place is none."""
    place = crash_directory.existing_private_directory(spool, layout.DRAFTS)
    try:
        yield place
    finally:
        os.close(place)


@contextmanager
def _opened(spool: Path, pid: int, epoch: int) -> Iterator[int]:
    with _directory(spool) as place:
        file = os.open(_name(pid, epoch), _THERE, dir_fd=place)
    try:
        yield file
    finally:
        os.close(file)


def _name(pid: int, epoch: int) -> str:
    return f"{pid}-{epoch}"
