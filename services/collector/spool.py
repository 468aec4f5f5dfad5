"""Reading the spool: the directories that crashing processes and the recorder write to.

Everything here may be an attacker's: any local user can make ``/tmp/appscope/<pid>``. So a
name is used only when it has the form of a crash file's, and each is opened as one component
below a descriptor, never through a link; see openat(2), O_NOFOLLOW.
"""

import os
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nlargest

from crashbus import layout
from crashbus.errors import CrashbusError
from crashbus.layout import Kind

MAX_ENTRIES = 4096  # looked at in one directory; AppScope writes five for each signal
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Of a link or a device this opens the name alone, open(2): to open a device is to act on it.
_NAME = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Whoever holds a lease on his file would let us wait for up to /proc/sys/fs/lease-break-time,
# fcntl(2), F_SETLEASE; refused, it can be opened at a later look.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Refused(CrashbusError):
    """Something in the spool is not a crash file and is left alone.

    Attributes:
        reason: one word for the metric.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Entry:
    """One crash file as the directory shows it.

    Attributes:
        identity: device and inode, by which open descriptors are recognised.
        others_write: its group or everybody may write to it.
    """

    name: str
    kind: Kind
    epoch: int
    size: int
    uid: int
    identity: tuple[int, int]
    others_write: bool = False


@dataclass(frozen=True)
class Listing:
    """What lies in one ``<pid>`` directory: crash files by epoch and kind, and what does not."""

    sets: dict[int, dict[Kind, Entry]]
    refused: tuple[Refused, ...]


@contextmanager
def open_directory(name: str, parent: int | None = None) -> Iterator[int]:
    """Open a directory that is no link.

    Raises:
        OSError: it is not there, a link, or no directory.
    """
    descriptor = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(name: str, directory: int, owner: int | None) -> int:
    """Open a crash file for reading and return its descriptor.

    Args:
        owner: whose it must be: it may be another file than a listing showed; None: anyone's.

    Raises:
        Refused: it is a link, a device, a FIFO, …, another user's, or has a second name elsewhere.
        FileNotFoundError: it is gone.
    """
    try:
        found = os.open(name, _NAME, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(name, error) from error
    try:
        status = os.fstat(found)
        _check(name, status)
        if owner is not None and status.st_uid != owner:
            text = f"{name!r} belongs to UID {status.st_uid}, not to {owner}"
            raise Refused("foreign_owner", text)
        return os.open(f"/proc/self/fd/{found}", _FILE)
    except OSError as error:
        raise _unreadable(name, error) from error
    finally:
        os.close(found)


def _unreadable(name: str, error: OSError) -> Refused:
    return Refused("unreadable", f"{name!r} cannot be opened: {error.strerror}")


def is_root_s(name: str, directory: int) -> bool:
    """Tell whether a file is there that root made, and no one else can have changed."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return _fault(status) is None and status.st_uid == 0 and not may_others_write(status)


def may_others_write(status: os.stat_result) -> bool:
    """Tell whether a file's group or everybody may write to it.

    Neither we nor AppScope's library make such a file; but who has one of root's in a directory of
    his own may move it here.
    """
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _check(name: str, status: os.stat_result) -> None:
    fault = _fault(status)
    if fault:
        raise Refused(fault, f"{name!r} is refused: {fault}")


def _fault(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "not_a_regular_file"
    # A hard link could make us ship a file that its maker may not read.
    return "hard_link" if status.st_nlink > 1 else None


def list_directory(directory: int) -> Listing:
    """Look at a ``<pid>`` directory, without opening anything in it.

    Whoever fills a directory with names hides nothing, and takes none of our memory: sets with a
    capture record of root's come first, then the newest, and foreign names are passed over
    unlooked at.
    """
    recorded = _recorded(directory)
    names, foreign, too_many = _newest(directory, recorded)
    sets: dict[int, dict[Kind, Entry]] = {}
    refused = [_foreign(foreign)] if foreign else []
    looked_at = 0
    for epoch in sorted(names, key=lambda e: (e not in recorded, -e)):
        looked_at += len(names[epoch])
        if looked_at > MAX_ENTRIES:
            too_many = True
            break
        for name, kind in names[epoch]:
            try:
                sets.setdefault(epoch, {})[kind] = _entry(name, kind, epoch, directory)
            except FileNotFoundError:
                continue
            except Refused as error:
                refused.append(error)
    if too_many:
        refused.append(Refused("too_many_entries", f"more than {MAX_ENTRIES} crash files"))
    return Listing({e: entries for e, entries in sets.items() if entries}, tuple(refused))


def _recorded(directory: int) -> set[int]:
    """Return the epochs of the newest sets that have a capture record of root's."""
    records = (
        (name, parsed[1])
        for name in _names(directory)
        if (parsed := layout.parse_crash_file_name(name)) and parsed[0] is Kind.CAPTURE
    )
    ours = (epoch for name, epoch in records if is_root_s(name, directory))
    return set(nlargest(MAX_ENTRIES, ours))


def _newest(
    directory: int, recorded: Set[int]
) -> tuple[dict[int, list[tuple[str, Kind]]], int, bool]:
    """Return names by epoch: of recorded sets, and of the newest others.

    Returns:
        These; the number of foreign names; whether any set was left out.
    """
    names: dict[int, list[tuple[str, Kind]]] = {}
    foreign, since = 0, 0
    for name in _names(directory):
        parsed = layout.parse_crash_file_name(name)
        if parsed is None:
            foreign += not name.startswith(".")  # a record in the making, or put aside by us
        elif parsed[1] in recorded or parsed[1] >= since:
            names.setdefault(parsed[1], []).append((name, parsed[0]))
            if len(names) > 3 * MAX_ENTRIES:
                others = sorted(names.keys() - recorded)
                since = others[-MAX_ENTRIES]
                for epoch in others[:-MAX_ENTRIES]:
                    del names[epoch]
    return names, foreign, since > 0


def _foreign(count: int) -> Refused:
    # Not by name: the number grows by steps, so that it is not told anew for each.
    return Refused("foreign_name", f"{1 << (count.bit_length() - 1)} or more foreign names")


def _names(directory: int) -> Iterator[str]:
    # A name that is not UTF-8 comes with surrogates and fits no crash file's name.
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry.name


def _entry(name: str, kind: Kind, epoch: int, directory: int) -> Entry:
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    _check(name, status)
    others_write = may_others_write(status)
    if kind is Kind.CAPTURE and others_write:  # it is believed
        raise Refused("others_may_write", f"{name!r} is refused: others may write to it")
    identity = status.st_dev, status.st_ino
    return Entry(name, kind, epoch, status.st_size, status.st_uid, identity, others_write)


def open_by_process(pid: int) -> set[tuple[int, int]]:
    """Return device and inode of every file a process has open; empty when it is gone."""
    identities = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                try:
                    status = descriptor.stat()
                except OSError:
                    continue  # closed meanwhile
                identities.add((status.st_dev, status.st_ino))
    except OSError:
        return set()
    return identities
