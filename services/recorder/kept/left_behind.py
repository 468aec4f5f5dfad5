"""Small crashes that a recorder had read whole when it was killed: their memory went with it.

What its note tells of one is laid down as the pipe helper keeps a crash, so that the same code
makes crash files of both, `orphans`.
"""

import errno
import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

from crashbus import layout
from services.common import capture, crash_directory, drafts, unrecorded
from services.common.capture import CaptureRecord, UnreadableRecord
from services.common.crash_directory import SpoolUnusable
from services.recorder.kept import orphan
from services.recorder.kept.known import is_whole

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LINKS = ("exe", "cwd", "root")
_PASSES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # trouble of the disk, not of one note
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def take_over(spool: Path) -> None:
    """Make orphans of all notes; before this recorder writes its first one."""
    try:
        for note in unrecorded.left_notes(spool):
            _take_one(spool, note)
    except (OSError, SpoolUnusable) as error:
        log.error("what a killed recorder left behind waits for the next start", error=str(error))


def _take_one(spool: Path, note: Mapping[str, bytes]) -> None:
    try:
        if not _is_kept(spool, note):
            _lay_down(spool, note)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _PASSES:
            raise
        # Else this note would keep the others waiting for ever.
        log.error("what a killed recorder left of a crash cannot be kept", error=str(error))


def _is_kept(spool: Path, note: Mapping[str, bytes]) -> bool:
    """Tell whether it was killed a moment later, when record and draft told as much."""
    name = unrecorded.name_of(note)
    if name is None:
        return False  # `orphans` will say so
    pid = int(note["crash"].split()[0])
    for place in (spool / str(pid)).glob(f"{layout.Kind.CAPTURE}_*"):
        parsed = layout.parse_crash_file_name(place.name)
        record = _record(place) if parsed else None
        if parsed and record is not None and record.crash_id == name:
            draft = drafts.read(spool, pid, parsed[1])
            return draft is None or is_whole(draft.known)  # None: complete, or it was taken so
    return False


def _record(place: Path) -> CaptureRecord | None:
    with suppress(OSError, UnreadableRecord):
        file = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_uid == os.geteuid():
                return capture.read(file)
        finally:
            os.close(file)
    return None


def _lay_down(spool: Path, note: Mapping[str, bytes]) -> None:
    crash = orphan.CRASH.fullmatch(note.get("crash", b""))
    name = f"{int(crash[4])}-{int(crash[1])}" if crash else "0-0"  # which `orphans` will tell of
    kept = crash_directory.private_directory(spool, layout.ORPHANS)
    try:
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=kept)
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=kept)
    finally:
        os.close(kept)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        for part, content in ({"crash": b"", **note, "end": orphan.LOST.encode()}).items():
            _write(directory, part, content)
    finally:
        os.close(directory)


def _write(directory: int, name: str, content: bytes) -> None:
    """Write a file or link, unless a recorder that did not come to the end of it has."""
    with suppress(FileExistsError):
        if name in _LINKS:
            _link(directory, name, content)
            return
        file = os.open(name, _NEW, 0o600, dir_fd=directory)
        with os.fdopen(file, "wb") as to:
            to.write(content)


def _link(directory: int, name: str, target: bytes) -> None:
    """Make a link, unless its target is none: a power cut may have torn the note."""
    try:
        os.symlink(target, name, dir_fd=directory)
    except ValueError:  # a NUL
        return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # XFS takes 1024 bytes, symlink(2) 4095
            raise
