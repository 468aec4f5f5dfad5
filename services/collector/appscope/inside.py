"""A process's own view of the files: where its ``/tmp/appscope`` leads.

What is found there is another's, so that nothing is opened below a file system whose server may
not answer, fuse(4): any user can have one, in namespaces of his own.
"""

import os
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
_Mount = tuple[bytes, bytes, bytes]  # ID, place, type
_MAX_MOUNTS = 16 * 1024 * 1024  # bytes; fs.mount-max allows 100,000


class Unsafe(CrashbusError):
    """To look into a process's ``/tmp/appscope`` could take for ever."""

    mend = (
        "let the program have its /tmp/appscope on a file system that needs no other process: a "
        "tmpfs, or a directory of the host; what the recorder captured is not affected"
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
    mounts = _mounts(pid)
    below = (kind for _, place, kind in mounts if _leads_there(place))
    for kind in (_root_type(pid, _mount_of(root), mounts), *below):
        if kind.partition(b".")[0] in _SERVED:
            raise Unsafe(
                f"its /tmp/appscope is on a file system whose server may not answer "
                f"({names.text(kind)})"
            )


def _root_type(pid: int, mount: bytes, mounts: list[_Mount]) -> bytes:
    """Return the type of the mount that a process's root is on.

    Where the root is a directory of that mount, chroot(2), its own mountinfo leaves it out. Then
    it may be one of the host's; if not, it is believed in our own user namespace alone, where to
    mount takes a privilege of the host's.
    """
    for number, _, kind in (*mounts, *_mounts(1)):
        if number == mount:
            return kind
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


def _mounts(pid: int) -> list[_Mount]:
    """Return ID, place and type of each mount that a process sees; proc_pid_mountinfo(5)."""
    mounts = []
    for line in proc.lines(proc.read_file(f"/proc/{pid}/mountinfo", _MAX_MOUNTS)):
        before, _, after = line.partition(b" - ")
        fields, kind = before.split(b" "), after.partition(b" ")[0]
        if len(fields) > 4:
            mounts.append((fields[0], fields[4], kind))
    return mounts
