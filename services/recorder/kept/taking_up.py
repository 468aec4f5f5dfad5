"""Sets that a killed recorder had in hand: finished by this one.

What was read of the process is in the set's draft, `services.common.drafts`, its memory in the
core, as far as it was copied. The lock of the capture record keeps others away, the collector too.
"""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from crashbus import capture
from crashbus.capture import CapturedFile, CaptureRecord, UnreadableRecord
from crashbus.layout import Kind, crash_file_name
from services.common import crash_directory, drafts
from services.common.drafts import Draft
from services.recorder.conditions import Conditions
from services.recorder.core import core_head
from services.recorder.core.core_head import Cause, Head
from services.recorder.kept import known, orphan
from services.recorder.recording import Recording, understand, write_early

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MOST_TRIES = 3  # recorders that a set may see die before it is taken as it lies
NOTE = "its recorder was killed, and another finished it"
_LOOK_EVERY = 1.0  # seconds; short against the time for which a collector waits
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MADE_LATE = (Kind.INFO, Kind.CFG, Kind.BACKTRACE, Kind.BACKTRACE_JSON, Kind.SNAPSHOT)


class TakingUp:
    """Finishes them one after the other, in a thread of its own.

    Args:
        spool: where crash files go.
        finish: finishes a set, given PID and epoch; False: it cannot be had now.
    """

    def __init__(self, spool: Path, finish: Callable[[int, int], bool]) -> None:
        self._spool = spool
        self._finish = finish
        self._left: list[tuple[int, int]] = []
        self._stopping = threading.Event()
        # A daemon: what a crashed process mapped may lie on a disk that does not answer.
        self._thread = threading.Thread(target=self._run, name="taking up", daemon=True)

    def start(self) -> None:
        """Begin; before this recorder takes crashes, whose drafts are its own."""
        self._left = drafts.left(self._spool)
        self._say_that_we_come()
        self._thread.start()

    def stop(self, within: float) -> None:
        """Take no other; wait for the one in hand."""
        self._stopping.set()
        if self._thread.is_alive():  # a recorder that could not start stops, too
            self._thread.join(within)

    def _run(self) -> None:
        while self._left and not self._stopping.is_set():
            self._left = [one for one in self._left if not self._is_done(one)]
            if self._left:
                self._stopping.wait(_LOOK_EVERY)

    def _is_done(self, one: tuple[int, int]) -> bool:
        if self._stopping.is_set():
            return False
        self._say_that_we_come()
        try:
            return self._finish(*one)
        except Exception as error:  # noqa: BLE001 - one must not keep those behind it waiting
            log.warning("a set that was left waits", pid=one[0], because=str(error))
            return False

    def _say_that_we_come(self) -> None:
        for pid, epoch in self._left:
            drafts.keep_waiting(self._spool, pid, epoch)


def take_up(pid: int, epoch: int, on: Conditions) -> Recording | None:
    """Make a recording of a set that was left, locked; `finish` is still to be done.

    Returns:
        None where there is nothing to finish, and no draft any more.

    Raises:
        BlockingIOError: somebody is at it.
        OSError, CaptureFailed: it cannot be had now.
    """
    if orphan.is_left(on.spool, pid):
        raise BlockingIOError("`adopting` is at it, or will be: it was not begun, or not ended")
    recording = locked(on.spool, pid, epoch)
    try:
        draft = drafts.take_up(on.spool, pid, epoch) if recording else None
        if recording is None or draft is None or _is_given_up(recording, draft):
            drafts.remove(on.spool, pid, epoch)
            if recording is not None:
                recording.close()
            return None
        _fill(recording, draft, on)
    except BaseException:
        if recording is not None:
            recording.close()
        raise
    return recording


def locked(spool: Path, pid: int, epoch: int) -> Recording | None:
    """Open and lock a record that is not complete; None where there is none.

    Raises:
        BlockingIOError: somebody is at it.
        OSError: it cannot be had now.
    """
    try:
        return _opened(os.open(spool / str(pid), _DIRECTORY), epoch)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _opened(directory: int, epoch: int) -> Recording | None:
    """Open and lock a record that is not complete; the directory becomes the recording's."""
    record_file = -1
    try:
        record_file = _ours(directory, crash_file_name(Kind.CAPTURE, epoch))
        if record_file >= 0 and not capture.lock(record_file):
            raise BlockingIOError("somebody is at it")
        record = _unfinished(record_file)
        if record is not None:
            cause = Cause(record.signal, record.code, 0, record.fault_address)
            return Recording(directory, record_file, epoch, record, cause=cause)
    except BaseException:
        _close(directory, record_file)
        raise
    _close(directory, record_file)
    return None


def _close(*descriptors: int) -> None:
    for one in descriptors:
        if one >= 0:
            os.close(one)


def _ours(directory: int, name: str) -> int:
    """Open a file that a recorder made; -1 where there is none."""
    if os.fstat(directory).st_uid != os.geteuid():  # then its owner may put any name there
        return -1
    try:
        file = os.open(name, _FILE, dir_fd=directory)
    except OSError:
        return -1
    status = os.fstat(file)
    is_own = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600
    if stat.S_ISREG(status.st_mode) and is_own and status.st_nlink == 1:
        return file
    os.close(file)
    return -1


def _unfinished(record_file: int) -> CaptureRecord | None:
    if record_file < 0:
        return None
    try:
        record = capture.read(record_file)
    except UnreadableRecord:
        return None
    return None if record.state == "complete" else record


def _is_given_up(recording: Recording, draft: Draft) -> bool:
    if draft.taken_up < MOST_TRIES:
        return False
    log.error(
        "recorders die of this crash: what there is of it is taken as it lies",
        crash_id=recording.record.crash_id,
        tries=draft.taken_up,
    )
    return True


def _fill(recording: Recording, draft: Draft, on: Conditions) -> None:
    """Take in what the killed recorder had read and written."""
    record = recording.record
    found = known.decoded(draft.known, record)
    recording.facts, recording.code, recording.fault = found.facts, found.code, found.fault
    recording.notes = list(dict.fromkeys((*record.notes, *found.facts.notes, NOTE)))
    if on.runtime is not None and record.process.container is not None:
        recording.container = on.runtime.ask(record.process.container)
    _take_core(recording, draft)
    for kind in _MADE_LATE:
        name = crash_file_name(kind, recording.epoch)
        if crash_directory.has_file(name, recording.directory):
            os.unlink(name, dir_fd=recording.directory)
    write_early(recording, on)


def _take_core(recording: Recording, draft: Draft) -> None:
    name = crash_file_name(Kind.CORE, recording.epoch)
    told = recording.record.files.get(name)
    recording.core_file = _ours(recording.directory, name)
    if recording.core_file < 0:
        if told is None or told.sent is None:
            recording.notes.append("no core: the recorder was killed before there was one")
        else:  # it is on the bus
            recording.files[name], recording.core_size = told, told.size
        return
    with os.fdopen(os.dup(recording.core_file), "rb") as file:
        head = core_head.read(file.read)
    if head.cause is not None:
        understand(recording, head)
    if told is None:
        told = _as_far_as_it_goes(recording, head, draft.core_final)
    recording.files[name], recording.core_size = told, told.size


def _as_far_as_it_goes(recording: Recording, head: Head, final: int) -> CapturedFile:
    """Tell how much there is of a core that was being copied.

    The file has its whole size from the beginning, if it is not made of the kernel's stream, and
    its stacks soon: so it is cut when the backtrace is made.
    """
    size = os.fstat(recording.core_file).st_size
    if head.size is None:
        return CapturedFile(size=size, truncated=True, note=f"{head.fault}: {_KILLED}")
    if size >= head.size:
        size = min(head.size, max(final, head.data))
        recording.core_ends = size
    if size >= head.size:
        return CapturedFile(size=size)
    note = f"{head.size - size} of {head.size} bytes are missing: {_KILLED}"
    return CapturedFile(size=size, truncated=True, expected=head.size, note=note)


_KILLED = "the recorder was killed while it copied them"
