"""A set that is copied to the spool, under a capture record, as far as there is room."""

import errno
import os
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout
from crashbus.layout import LARGE, Kind
from crashbus.messages import SignalEvent
from services.collector import judge
from services.collector.appscope.copying import copy, size_on_disk
from services.collector.publish import MAX_SMALL
from services.collector.records import record_of
from services.common import capture, crash_directory
from services.common.capture import CapturedFile

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_NOTE = "written by AppScope's library in a /tmp/appscope of its own"


class BringingOut:
    """Copies sets of one process.

    Args:
        root: the spool.
        reserve: percent of the spool's disk that cores leave free.
        step: called whenever something was copied.
    """

    def __init__(
        self,
        event: SignalEvent,
        root: Path,
        reserve: float,
        step: Callable[[], None],
    ) -> None:
        self._step = step
        self._event = event
        self._root = root
        self._reserve = reserve

    def copy_set(
        self, since: int, files: Mapping[Kind, int], is_whole: bool, as_far_as_possible: bool
    ) -> bool:
        """Copy one set under a capture record; tell whether no file of it was cut.

        Args:
            since: its epoch; the copy has the first that is free from there on.
            files: it, held open.
            is_whole: its writer was done with it.
            as_far_as_possible: keep of each file what there is room for.

        Raises:
            OSError, SpoolUnusable: it could not be copied; nothing of it is in the spool.
        """
        directory, epoch = crash_directory.open_crash(self._root, self._event.process.pid, since)
        crash_id = self._event.crash_id
        try:
            if not as_far_as_possible:
                # Before anything is made: whoever looks into the spool now would see it vanish.
                self._need_room(files, directory)
            descriptor = capture.create(
                directory, epoch, record_of(self._event, "writing", {}, _NOTE)
            )
            try:
                doubtful = set() if is_whole else judge.doubtful(files.keys())
                captured = self._copy_files(files, doubtful, directory, epoch, as_far_as_possible)
                capture.write(descriptor, record_of(self._event, "complete", captured, _NOTE))
                uncut = not any(file.expected is not None for file in captured.values())
                log.info("brought out of a container", crash_id=crash_id, files=len(captured))
            except OSError as error:
                # An incomplete record says that the set was cut short, which it is not if it is
                # tried again.
                if not as_far_as_possible:
                    _remove(directory, epoch, (*files, Kind.CAPTURE))
                    raise
                uncut = False
                log.warning("brought out in part", crash_id=crash_id, error=str(error))
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        return uncut

    def _copy_files(
        self,
        files: Mapping[Kind, int],
        doubtful: Set[Kind],
        directory: int,
        epoch: int,
        as_far_as_possible: bool,
    ) -> dict[str, CapturedFile]:
        captured = {}
        # The small ones first: of these all are kept where there is no room for the large one.
        for kind in sorted(files, key=lambda kind: os.fstat(files[kind]).st_size):
            source, most = files[kind], MAX_SMALL
            if kind in LARGE:
                most = self._room(directory)
                if not as_far_as_possible and most < size_on_disk(source):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            copied = copy(source, directory, kind, epoch, most, self._step)
            if copied.error is not None and not as_far_as_possible:
                raise copied.error
            note = "its writer ended before it was whole" if kind in doubtful else None
            if copied.size < copied.whole:
                note = f"cut to {copied.size} bytes of {copied.whole}, {copied.why(kind)}"
            captured[layout.crash_file_name(kind, epoch)] = CapturedFile(
                size=copied.size,
                truncated=note is not None,
                expected=copied.whole if copied.size < copied.whole else None,
                note=note,
            )
        return captured

    def _need_room(self, files: Mapping[Kind, int], directory: int) -> None:
        """Raise OSError unless there is room for a set's large files."""
        large = (file for kind, file in files.items() if kind in LARGE)
        if self._room(directory) < sum(map(size_on_disk, large)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _room(self, directory: int) -> int:
        """Return how many bytes may be written before the disk is at its reserve."""
        disk = os.fstatvfs(directory)
        reserve = int(disk.f_blocks * disk.f_frsize * self._reserve / 100)
        return max(0, disk.f_bavail * disk.f_frsize - reserve)


def _remove(directory: int, epoch: int, kinds: Iterable[Kind]) -> None:
    for kind in kinds:
        with suppress(FileNotFoundError):
            os.unlink(layout.crash_file_name(kind, epoch), dir_fd=directory)
