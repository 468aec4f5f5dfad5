"""The mounts that most processes of a host see, read again only when they have changed.

A host may have hundreds of them, and the kernel needs a tenth of a millisecond for forty: too long
while a process is held. Sources: proc_pid_mountinfo(5), poll(2) of it; namespaces(7).
"""

import select
import threading
from pathlib import Path

from services.common.proc import LIVE
from services.common.resources import MAX_MOUNTS

_INIT, _OURS = "1", "self"


class Mounts:
    """Knows the mounts of init's namespace, or of ours; used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes = select.poll()
        self._known = b""
        # A sandbox may keep init's from us.
        self._process = _INIT if LIVE.link(f"{_INIT}/ns/mnt") else _OURS
        self._view = _view(self._process)
        self._watched = Path(f"/proc/{self._process}/mountinfo").open("rb")  # noqa: SIM115 - polled
        self._changes.register(self._watched, select.POLLPRI)

    @property
    def view(self) -> tuple[bytes, bytes]:
        """Mount namespace and root of the processes that see these mounts; empty: of none."""
        return self._view or (b"", b"")

    def now(self) -> bytes:
        """Return what the mountinfo of such a process tells, as far as it is looked at."""
        with self._lock:
            # Asked first: what changes while it is read, the next one is told.
            if self._changes.poll(0) or not self._known:
                self._known = LIVE.read(f"{self._process}/mountinfo", MAX_MOUNTS)
            return self._known


def _view(process: str) -> tuple[bytes, bytes] | None:
    """Return mount namespace and root of a process, which say what mounts it sees."""
    namespace, root = LIVE.link(f"{process}/ns/mnt"), LIVE.link(f"{process}/root")
    return None if namespace is None or root is None else (namespace, root)
