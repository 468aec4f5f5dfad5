"""Crashes that the pipe helper kept because no recorder took them: made crash files of.

Those that a killed recorder had taken and not written come the same way, `left_behind`.

The helper leaves a directory for each, ``<spool>/.orphans/<time>-<pid>``, locked while it writes
it: see `orphan`.
"""

import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout
from services.common import crash_directory
from services.recorder.errors import CaptureFailed
from services.recorder.kept import orphan
from services.recorder.kept.orphan import Orphan, Unreadable

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LOOK_EVERY = 5.0  # seconds
_MADE_WITHIN = 60.0  # seconds from a helper's directory to the first file in it
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = re.compile(r"\d{1,12}-\d{1,10}")
_ASIDE = re.compile(rf"unreadable-({_NAME.pattern})")
_MOST_ASIDE = 8  # that cannot be read and are kept; each may have a core


class Orphans:
    """Looks for them, at the start and from then on, in a thread of its own.

    Args:
        spool: where crash files go.
        adopt: makes crash files of one; when it raises something, it is tried again later.
        failed: told of one that cannot be read.
    """

    def __init__(
        self,
        spool: Path,
        adopt: Callable[[Orphan], None],
        failed: Callable[[CaptureFailed], None],
    ) -> None:
        self._spool = spool
        self._adopt = adopt
        self._failed = failed
        self._is_prepared = False
        self._stopping = threading.Event()
        # A daemon: what a crashed process mapped may lie on a disk that does not answer.
        self._thread = threading.Thread(target=self._run, name="orphans", daemon=True)

    def prepare(self) -> Path:
        """Make the directory that the helper writes to, and return the spool's true path.

        Raises:
            SpoolUnusable, OSError: it cannot be made.
        """
        os.close(self._directory())
        self._is_prepared = True
        return self._spool.resolve()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self, within: float) -> None:
        """Take no other; wait for the one in hand."""
        self._stopping.set()
        if self._thread.is_alive():  # a recorder that could not start stops, too
            self._thread.join(within)

    def _directory(self) -> int:
        return crash_directory.private_directory(self._spool, layout.ORPHANS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - one look must not end the others
                log.warning("crashes kept by the pipe helper wait", because=str(error))
            self._stopping.wait(_LOOK_EVERY)

    def _look(self) -> None:
        if not self._is_prepared and not (self._spool / layout.ORPHANS).exists():
            return
        orphans = self._directory()
        try:
            with os.scandir(orphans) as entries:
                found = sorted(entry.name for entry in entries)
            for name in found:
                if _NAME.fullmatch(name) and not self._stopping.is_set():
                    self._try_to_take(name, orphans)
            _remove_old(orphans)
        finally:
            os.close(orphans)

    def _try_to_take(self, name: str, orphans: int) -> None:
        try:
            self._take(name, orphans)
        except Exception as error:  # noqa: BLE001 - one must not keep those behind it waiting
            log.warning("a crash kept by the pipe helper waits", name=name, because=str(error))

    def _take(self, name: str, orphans: int) -> None:
        directory = os.open(name, _DIRECTORY, dir_fd=orphans)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - os.fstat(directory).st_mtime
            if not orphan.is_there(directory) and age < _MADE_WITHIN:
                return  # just made, and not locked yet
            if not orphan.was_adopted(directory):  # by a recorder that died after that
                self._adopt(orphan.read(directory))
        except BlockingIOError:
            return  # its helper still writes it
        except Unreadable as failure:
            self._failed(failure)
            _put_aside(name, orphans)
            return
        finally:
            os.close(directory)
        shutil.rmtree(name, dir_fd=orphans)


def _put_aside(name: str, orphans: int) -> None:
    """Keep what cannot be read for a human; of those with the same name the newest.

    The helper counts those alone whose names begin with a digit.
    """
    aside = f"unreadable-{name}"
    with suppress(FileNotFoundError):
        shutil.rmtree(aside, dir_fd=orphans)
    os.rename(name, aside, src_dir_fd=orphans, dst_dir_fd=orphans)


def _remove_old(orphans: int) -> None:
    """Of those that were put aside keep the newest."""
    with os.scandir(orphans) as entries:
        aside = [match for entry in entries if (match := _ASIDE.fullmatch(entry.name))]
    aside.sort(key=lambda match: int(match[1].partition("-")[0]))
    for match in aside[:-_MOST_ASIDE]:
        shutil.rmtree(match[0], dir_fd=orphans)
