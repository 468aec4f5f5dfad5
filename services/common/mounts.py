"""The mounts that most processes of a host see, read again only when they have changed.

A host may have hundreds of them, and the kernel needs a tenth of a millisecond for forty: too long
while a process is held. Sources: proc_pid_mountinfo(5), poll(2) of it; namespaces(7).
"""

import select
import threading
from pathlib import Path

from services.common.proc import LIVE, Proc, read_file
from services.common.resources import MAX_MOUNTS, read_mounts

_INIT = 1  # the process whose mounts are watched


class Mounts:
    """Knows the mounts of the init process's namespace; used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._namespace = LIVE.link(f"{_INIT}/ns/mnt")
        self._root = LIVE.link(f"{_INIT}/root")
        self._changes = select.poll()
        self._known: bytes | None = None
        try:
            self._watched = Path(f"/proc/{_INIT}/mountinfo").open("rb")  # noqa: SIM115 - poll needs it
        except OSError:
            self._namespace = None
        else:
            self._changes.register(self._watched, select.POLLPRI)

    def seen_by(self, pid: int, proc: Proc) -> bytes:
        """Return what a process's mountinfo tells, as far as it is looked at."""
        namespace, root = proc.link(f"{pid}/ns/mnt"), proc.link(f"{pid}/root")
        if None in (namespace, root) or (namespace, root) != (self._namespace, self._root):
            return read_mounts(pid, proc)
        with self._lock:
            # Asked first: what changes while it is read, the next one is told.
            if self._changes.poll(0) or self._known is None:
                self._known = read_file(f"/proc/{_INIT}/mountinfo", MAX_MOUNTS)
            return self._known
