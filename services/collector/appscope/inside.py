"""A process's own view of the files: what lies below its root."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crashbus import identity
from crashbus.messages import SignalEvent
from services.collector import spool
from services.common.process import read_process

_INSIDE = ("tmp", "appscope")


def is_contained(event: SignalEvent) -> bool:
    """Tell whether an event's process is there, is the one it says, and has its own root.

    What the event says of UIDs and PIDs decides what we read as root, so it is not believed.
    """
    given = event.process
    try:
        found = read_process(given.pid, given.boot_id)
    except ProcessLookupError:
        return False
    same = (found.start_ticks, found.uid, found.ns_pid) == (
        given.start_ticks,
        given.uid,
        given.ns_pid,
    )
    return same and given.boot_id == identity.boot_id() and _has_own_root(given.pid)


def _has_own_root(pid: int) -> bool:
    """Tell whether a process has another root than the host's first process.

    Where that may not be looked at, we are no container ourselves and our root is the host's.
    """
    try:
        own = Path(f"/proc/{pid}/root/.").stat()
    except OSError:
        return False
    try:
        host = Path("/proc/1/root/.").stat()
    except OSError:
        host = Path("/").stat()
    return (own.st_dev, own.st_ino) != (host.st_dev, host.st_ino)


@contextmanager
def directory_inside(pid: int, ns_pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope/<pid>`` below a process's root, component by component."""
    with ExitStack() as stack:
        # The magic link leads to the process's root; below it no link is followed.
        current = os.open(f"/proc/{pid}/root/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, current)
        for name in (*_INSIDE, str(ns_pid)):
            current = stack.enter_context(spool.open_directory(name, current))
        yield current
