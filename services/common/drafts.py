"""Drafts: what a recorder knows of a crash whose files it is still to make, kept for the next one.

One file for each set in ``<spool>/.drafts``, root's alone, from before the set's capture record
is there until that is complete. A SIGKILL takes nothing of it back. While the record of a set is
not locked and there is a draft, its recorder was killed and another may finish it: whoever holds
the record's lock may read the draft, and removes it to have the set taken as it lies.
"""

import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
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
        draft = os.open(_path(spool, pid, epoch), _THERE)
    except FileNotFoundError:
        return None
    try:
        raw = os.pread(draft, _MOST, 0)
        final, taken_up, expected, why = _HEAD.unpack_from(raw.ljust(_HEAD.size, b"\0"))
        os.pwrite(draft, _COUNT.pack(taken_up + 1), _COUNT_AT)
    finally:
        os.close(draft)
    left_out = why.rstrip(b"\0").decode("utf-8", "replace")
    return Draft(final, taken_up, left_out, expected, raw[_HEAD.size :])


def count_back(spool: Path, pid: int, epoch: int) -> None:
    """Take back what `take_up` counted: the recorder did not die of the set."""
    with suppress(OSError):
        draft = os.open(_path(spool, pid, epoch), _THERE)
        try:
            raw = os.pread(draft, _COUNT.size, _COUNT_AT)
            (taken_up,) = _COUNT.unpack(raw.ljust(_COUNT.size, b"\0"))
            os.pwrite(draft, _COUNT.pack(max(0, taken_up - 1)), _COUNT_AT)
        finally:
            os.close(draft)


def remove(spool: Path, pid: int, epoch: int) -> None:
    """Remove a draft: the set is whole, or nobody is to finish it."""
    with suppress(OSError):
        _path(spool, pid, epoch).unlink()


def left(spool: Path) -> list[tuple[int, int]]:
    """Return PID and epoch of each set that has one, the oldest first."""
    found = []
    with suppress(OSError):
        for name in os.listdir(spool / layout.DRAFTS):  # noqa: PTH208 - names alone
            pid, _, epoch = name.partition("-")
            if pid.isdecimal() and epoch.isdecimal():
                found.append((int(pid), int(epoch)))
    return sorted(found, key=lambda one: one[1])


def keep_waiting(spool: Path, pid: int, epoch: int) -> None:
    """Say that a recorder is there that will finish the set."""
    with suppress(OSError):
        os.utime(_path(spool, pid, epoch))


def is_awaited(
    spool: Path, patience: float, pid: int, epoch: int, lock: Callable[[], bool]
) -> bool:
    """Tell whether a set that nobody is at may be finished by another recorder.

    Args:
        patience: seconds since a recorder was seen after which that is not awaited any more.
        lock: locks the set's capture record; False where a recorder has.
    """
    path = _path(spool, pid, epoch)
    try:
        status = path.lstat()
    except OSError:
        return False
    if status.st_uid != os.geteuid():
        return False
    # A clock that was set back must not keep a set waiting for long.
    if abs(time.time() - status.st_mtime) < patience:
        return True
    if not lock():
        return True
    remove(spool, pid, epoch)
    return False


def _path(spool: Path, pid: int, epoch: int) -> Path:
    return spool / layout.DRAFTS / _name(pid, epoch)


def _name(pid: int, epoch: int) -> str:
    return f"{pid}-{epoch}"
