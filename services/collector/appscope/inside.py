"""A process's own view of the files: where its ``/tmp/appscope`` leads.

What is found there is another's, so that nothing is opened below a file system whose server may
not answer, fuse(4): any user can have one, in namespaces of his own.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from crashbus import identity, names
from crashbus.errors import CrashbusError
from crashbus.messages import SignalEvent
from services.collector import spool
from services.common import proc
from services.common.process import read_process

_INSIDE = ("tmp", "appscope")
_PLACE = b"/tmp/appscope"
_SERVED = frozenset(  # by a process, or by another host
    (b"fuse", b"fuseblk", b"nfs", b"nfs4", b"cifs", b"smb3", b"9p", b"ceph", b"afs", b"orangefs")
)
_MAX_MOUNTS = 4000  # a busy node has a thousand; fs.mount-max allows 100,000
_MAX_MOUNTINFO = 1024 * 1024  # bytes
_PARSING = threading.Semaphore(2)  # each look of each watch comes here, twenty times a second


class Unsafe(CrashbusError):
    """To look into a process's ``/tmp/appscope`` could take for ever."""

    mend = (
        "let the program have its /tmp/appscope on a file system that needs no other process: a "
        "tmpfs, or a directory of the host; what the recorder captured is not affected"
    )


class TooManyMounts(Unsafe):
    """Among so many mounts it is not told in time whether one is of a kind that may not answer."""

    mend = (
        f"let the program see fewer mounts: {_MAX_MOUNTS} at most, which take less than "
        f"{_MAX_MOUNTINFO // 1024} KiB in its /proc/<pid>/mountinfo; what the recorder captured is "
        "not affected"
    )


def has_own_place(event: SignalEvent, root: Path) -> bool:
    """Tell whether an event's process has another ``/tmp/appscope`` than the spool.

    It has in a container, or with a ``/tmp`` of its own (systemd's PrivateTmp=). What the event
    says of UIDs and PIDs decides what we read as root, so it is not believed.

    Raises:
        Unsafe: that cannot be told.
    """
    given = event.process
    try:
        found = read_process(given.pid, given.boot_id)
    except ProcessLookupError:
        return False
    if given.boot_id != identity.boot_id() or (found.start_ticks, found.uid, found.ns_pid) != (
        given.start_ticks,
        given.uid,
        given.ns_pid,
    ):
        return False
    try:
        with _place_of(given.pid) as place:
            own, ours = os.fstat(place), root.stat()
    except OSError:
        return True  # one of them is not there yet
    return (own.st_dev, own.st_ino) != (ours.st_dev, ours.st_ino)


def has_set(event: SignalEvent) -> bool:
    """Tell whether the library has begun to write a set since an event.

    Raises:
        Unsafe: that cannot be told.
    """
    with suppress(OSError), directory_inside(event.process.pid, event.process.ns_pid) as directory:
        return any(epoch >= int(event.time) - 1 for epoch in spool.list_directory(directory).sets)
    return False


@contextmanager
def directory_inside(pid: int, ns_pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope/<pid>`` below a process's root.

    Raises:
        OSError: it is not there.
        Unsafe: it is nothing to look into.
    """
    with _place_of(pid) as place, spool.open_directory(str(ns_pid), place) as current:
        yield current


@contextmanager
def _place_of(pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope`` below a process's root, component by component."""
    with ExitStack() as stack:
        # The magic link leads to the process's root; below it no link is followed.
        name = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, name)
        _check(pid, name)
        current = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=name)
        stack.callback(os.close, current)
        for component in _INSIDE:
            current = stack.enter_context(spool.open_directory(component, current))
        yield current


def _check(pid: int, root: int) -> None:
    """Refuse what lies, wholly or in part, on a file system that somebody serves.

    Whoever mounts one between this and what is done next wins nothing but a thread, see `threads`.
    """
    mount = _mount_of(root)
    own, below = _types(pid, mount)
    for kind in (own or _root_type(pid, mount), *below):
        if kind.partition(b".")[0] in _SERVED:
            raise Unsafe(
                f"its /tmp/appscope is on a file system whose server may not answer "
                f"({names.text(kind)})"
            )


def _root_type(pid: int, mount: bytes) -> bytes:
    """Return the type of a process's root that its own mountinfo leaves out.

    It does where the root is a directory of its mount, chroot(2). Then that may be one of the
    host's; if not, it is believed in our own user namespace alone, where to mount takes a
    privilege of the host's.
    """
    known, _ = _types(1, mount)
    if known:
        return known
    return b"unknown" if _user_namespace(pid) == _user_namespace(os.getpid()) else b"fuse"


def _user_namespace(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/user").readlink())
    except OSError:
        return ""


def _leads_there(place: bytes) -> bool:
    return place in (b"/tmp", _PLACE) or place.startswith(_PLACE + b"/")


def _mount_of(descriptor: int) -> bytes:
    """Return the ID of the mount that a descriptor is on; the file system is not asked."""
    for line in proc.lines(proc.read_file(f"/proc/self/fdinfo/{descriptor}")):
        if line.startswith(b"mnt_id:"):  # proc_pid_fdinfo(5)
            return line.split()[1]
    return b""


def _types(pid: int, mount: bytes) -> tuple[bytes, list[bytes]]:
    """Return the type of a mount that a process sees, and those of what leads to its place.

    Raises:
        OSError: its mounts cannot be read.
        TooManyMounts: there are more than are looked at.
    """
    known, below = b"", []
    with _PARSING:
        for line in _mountinfo(pid).split(b"\n"):
            fields = line.split(b" ", 5)  # ID, parent, device, root, place; proc_pid_mountinfo(5)
            if len(fields) < 6:
                continue
            number, place = fields[0], fields[4]
            if number == mount or _leads_there(place):
                kind = fields[5].partition(b" - ")[2].partition(b" ")[0]
                known = kind if number == mount else known
                below += [kind] if _leads_there(place) else []
    return known, below


def _mountinfo(pid: int) -> bytes:
    with Path(f"/proc/{pid}/mountinfo").open("rb") as file:
        raw = file.read(_MAX_MOUNTINFO + 1)
    if len(raw) > _MAX_MOUNTINFO or raw.count(b"\n") > _MAX_MOUNTS:
        raise TooManyMounts(
            "it sees more mounts than are looked at, and one of them may be of a file system whose "
            "server does not answer"
        )
    return raw
