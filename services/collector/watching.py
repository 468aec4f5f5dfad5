"""Watches of directories in the spool, inotify(7): bounded, for root's are for other services, too.

Anybody can make directories without end. So root's, as the recorder's are, keep their watches, and
of the others the newest do: what is new matters most.
"""

from contextlib import suppress
from pathlib import Path

import asyncinotify
import structlog
from asyncinotify import Inotify, Mask

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MOST_WATCHED = 4096  # directories
_CHANGES = Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.ONLYDIR | Mask.DONT_FOLLOW


class Watches:
    """The watches that there are, by directory.

    Args:
        root: the spool.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[asyncinotify.Watch, str] = {}  # the oldest first
        self._others: dict[asyncinotify.Watch, None] = {}  # those that are not root's, likewise
        self._of: dict[str, asyncinotify.Watch] = {}

    def name_of(self, watch: asyncinotify.Watch) -> str | None:
        """Return the name of the directory that a watch is of."""
        return self._names.get(watch)

    def add(self, inotify: Inotify, name: str, *, is_root_s: bool, is_new: bool) -> None:
        """Watch a directory, if there is a place for it.

        Args:
            is_new: so it takes that of an older one; else it must find a free one, or be root's.
        """
        watch = self._of.get(name)
        if watch is not None:
            if is_root_s:  # the recorder took it over
                self._others.pop(watch, None)
            return
        if len(self._names) >= MOST_WATCHED and not self._make_place(inotify, is_root_s, is_new):
            return
        try:
            watch = inotify.add_watch(self._root / name, _CHANGES)
        except OSError as error:  # gone again, no directory, or no watches left: rounds go on
            log.debug("directory is not watched", directory=name, error=str(error))
            return
        self._names[watch], self._of[name] = name, watch
        if not is_root_s:
            self._others[watch] = None

    def _make_place(self, inotify: Inotify, is_root_s: bool, is_new: bool) -> bool:
        oldest = next(iter(self._others), None)
        if oldest is None and is_root_s:
            oldest = next(iter(self._names))
        if oldest is None or not (is_root_s or is_new):
            return False
        self.ended(oldest)
        with suppress(OSError):  # it went with its directory
            inotify.rm_watch(oldest)
        return True

    def ended(self, watch: asyncinotify.Watch) -> None:
        """Forget a watch: its directory is gone."""
        self.renamed(self._names.pop(watch, ""))
        self._others.pop(watch, None)

    def renamed(self, name: str) -> None:
        """Forget a directory's name, which another may get; the watch stays with the directory."""
        self._of.pop(name, None)
