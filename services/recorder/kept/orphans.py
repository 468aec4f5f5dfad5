"""Crashes that the pipe helper kept because no recorder took them: made crash files of.

Those that a killed recorder had taken and not written come the same way, `left_behind`.

The helper leaves a directory for each, ``<spool>/.orphans/<time>-<pid>``, locked while it writes
it: see `orphan`.
"""

import fcntl
import os
import queue
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
from services.recorder.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LOOK_EVERY = 5.0  # seconds
_MADE_WITHIN = 60.0  # seconds from a helper's directory to the first file in it
_IDLE_CHECK = 0.02  # seconds
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = re.compile(r"\d{1,12}-\d{1,10}")
_ASIDE = re.compile(rf"unreadable-({_NAME.pattern})")
_MOST_ASIDE = 8  # that cannot be read and are kept; each may have a core


class Orphans:
    """Looks for them, at the start and from then on, and takes one after the other.

    Args:
        spool: where crash files go.
        adopt: makes crash files of one; when it raises something, it is tried again later.
        failed: told of one that cannot be read.
        stands_still: tells whether one that was begun at a monotonic time will not end, for a
            crashed process may have mapped what lies on a disk that does not answer.
    """

    def __init__(
        self,
        spool: Path,
        adopt: Callable[[Orphan], None],
        failed: Callable[[CaptureFailed], None],
        stands_still: Callable[[object, float], bool],
    ) -> None:
        self._spool = spool
        self._adopt = adopt
        self._failed = failed
        self._is_prepared = False
        self._stopping = threading.Event()
        self._names: queue.Queue[str] = queue.Queue()
        self._in_hand: set[str] = set()  # that wait in the queue, or are taken
        self._workers = Workers("adopting", 1, self._names, self._try_to_take, stands_still)
        # A daemon: the spool's disk may not answer.
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
        self._workers.start()
        self._thread.start()

    def replace_stuck(self) -> None:
        """Have a thread at work; call it now and then.

        Raises:
            RecorderError: only a restart frees the threads that stand still.
        """
        self._workers.replace_stuck()

    def stop(self, within: float) -> None:
        """Take no other; wait for the one in hand, unless it stands still."""
        self._stopping.set()
        end = time.monotonic() + within
        while self._workers.makes_progress() and time.monotonic() < end:
            time.sleep(_IDLE_CHECK)

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
        in_hand = self._in_hand.copy()  # before it is looked: what is done meanwhile is no new one
        try:
            with os.scandir(orphans) as entries:
                found = {entry.name for entry in entries if _NAME.fullmatch(entry.name)}
            # One that let an earlier recorder wait may let this one wait as well.
            order = ((orphan.was_tried(name, orphans), name) for name in found - in_hand)
            for _, name in sorted(order):
                self._in_hand.add(name)
                self._names.put(name)
            _remove_old(orphans)
        finally:
            os.close(orphans)

    def _try_to_take(self, name: str) -> None:
        try:
            if not self._stopping.is_set():
                self._open_and_take(name)
        except Exception as error:  # noqa: BLE001 - one must not keep those behind it waiting
            log.warning("a crash kept by the pipe helper waits", name=name, because=str(error))
        finally:
            self._in_hand.discard(name)

    def _open_and_take(self, name: str) -> None:
        orphans = self._directory()
        try:
            self._take(name, orphans)
        finally:
            os.close(orphans)

    def _take(self, name: str, orphans: int) -> None:
        directory = os.open(name, _DIRECTORY, dir_fd=orphans)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            age = time.time() - os.fstat(directory).st_mtime
            if not orphan.is_there(directory) and age < _MADE_WITHIN:
                return  # just made, and not locked yet
            if not orphan.was_adopted(directory):  # by a recorder that died after that
                orphan.is_tried(directory)
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
