"""Sets that a killed recorder had in hand: finished by this one.

What was read of the process is in the set's draft, `services.common.drafts`, its memory in the
core, as far as it was copied. The lock of the capture record keeps others away, the collector too.
"""

import os
import queue
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog

from crashbus.layout import Kind, crash_file_name
from services.common import capture, crash_directory, drafts
from services.common.capture import CapturedFile, CaptureRecord, UnreadableRecord
from services.common.drafts import Draft
from services.recorder import modules
from services.recorder.conditions import Conditions
from services.recorder.core import core_head
from services.recorder.core.core_head import Cause, Head
from services.recorder.kept import known, orphan
from services.recorder.recording import Recording, understand, write_early
from services.recorder.workers import Workers

log: structlog.stdlib.BoundLogger = structlog.get_logger()

MOST_TRIES = 3  # recorders that a set may see die before it is taken as it lies
NOTE = "its recorder was killed, and another finished it"
_LOOK_EVERY = 1.0  # seconds until a set is tried again that somebody is at
_AFTER_TROUBLE = 10.0  # seconds, where it was a fault
_MOST_TROUBLES = 6  # faults until we come no more, and the collector takes the set as it lies
_IDLE_CHECK = 0.02  # seconds
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_Set = tuple[int, int]  # PID and epoch
_MADE_LATE = (Kind.INFO, Kind.CFG, Kind.BACKTRACE, Kind.BACKTRACE_JSON, Kind.SNAPSHOT)


class TakingUp:
    """Finishes them one after the other, in a thread of its own.

    Args:
        spool: where crash files go.
        finish: finishes a set, given PID and epoch; False: it cannot be had now.
        stands_still: tells whether one that was begun at a monotonic time will not end, for a
            crashed process may have mapped what lies on a disk that does not answer.
    """

    def __init__(
        self,
        spool: Path,
        finish: Callable[[int, int], bool],
        stands_still: Callable[[object, float], bool],
    ) -> None:
        self._spool = spool
        self._finish = finish
        self._stands_still = stands_still
        self._left: set[_Set] = set()
        self._waiting: dict[_Set, float] = {}  # until when, monotonic
        self._begun: dict[_Set, float] = {}
        self._items: queue.Queue[_Set] = queue.Queue()
        self._troubles: Counter[_Set] = Counter()
        self._workers = Workers("taking up", 1, self._items, self._try, stands_still)
        self._stopping = threading.Event()
        # A thread of its own, and a daemon: the disk that drafts are on may not answer.
        self._coming = threading.Thread(target=self._say_that_we_come, name="coming", daemon=True)

    def start(self) -> None:
        """Begin; before this recorder takes crashes, whose drafts are its own."""
        found = drafts.left(self._spool)
        self._left.update(found)
        for one in found:
            self._items.put(one)
        if found:
            self._workers.start()
            self._coming.start()

    def replace_stuck(self) -> None:
        """Have a thread at work; call it now and then.

        Raises:
            RecorderError: only a restart frees the threads that stand still.
        """
        if self._left:
            self._workers.replace_stuck()

    def _say_that_we_come(self) -> None:
        """Keep the collector waiting, and look again at what could not be had."""
        while self._left:
            for one in tuple(self._left):
                drafts.keep_waiting(self._spool, *one)
            for one, until in tuple(self._waiting.items()):
                if time.monotonic() >= until:
                    del self._waiting[one]
                    self._items.put(one)
            if self._stopping.wait(_LOOK_EVERY):
                return

    def stop(self, within: float) -> None:
        """Take no other; wait for the one in hand, which else did not cost us our life."""
        self._stopping.set()
        end = time.monotonic() + within
        while self._begun and time.monotonic() < end:
            time.sleep(_IDLE_CHECK)
        for one, since in tuple(self._begun.items()):
            if not self._stands_still(one, since):
                drafts.count_back(self._spool, *one)

    def _try(self, one: _Set) -> None:
        if self._stopping.is_set():
            return
        self._begun[one] = time.monotonic()
        try:
            if self._finish(*one):
                self._left.discard(one)
            else:
                self._waiting[one] = time.monotonic() + _LOOK_EVERY
        except Exception as error:  # noqa: BLE001 - one must not keep those behind it waiting
            self._again_later(one, error)
        finally:
            del self._begun[one]

    def _again_later(self, one: _Set, error: Exception) -> None:
        self._troubles[one] += 1
        if self._troubles[one] < _MOST_TROUBLES:
            log.warning("a set that was left waits", pid=one[0], because=str(error))
            self._waiting[one] = time.monotonic() + _AFTER_TROUBLE
            return
        log.error(
            "a set cannot be finished: it is taken as it lies", pid=one[0], because=str(error)
        )
        self._left.discard(one)


def take_up(pid: int, epoch: int, on: Conditions) -> Recording | None:
    """Make a recording of a set that was left, locked; `finish` is still to be done.

    Returns:
        None where there is nothing to finish, and no draft any more.

    Raises:
        BlockingIOError: somebody is at it.
        OSError, CaptureFailed: it cannot be had now.
    """
    draft, recording = None, locked(on.spool, pid, epoch)
    try:
        if orphan.is_left(on.spool, pid, recording.record.crash_id if recording else None):
            raise BlockingIOError("`adopting` is at it, or will be: it was not begun, or not ended")
        draft = drafts.take_up(on.spool, pid, epoch) if recording else None
        if recording is None or draft is None or _is_given_up(recording, draft):
            drafts.remove(on.spool, pid, epoch)
            if recording is not None:
                recording.close()
            return None
        _fill(recording, draft, on)
    except BaseException:
        if draft is not None:
            drafts.count_back(on.spool, pid, epoch)
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
    """Open a file that a recorder made; -1 where there is none.

    Raises:
        OSError: it cannot be told now.
    """
    if os.fstat(directory).st_uid != os.geteuid():  # then its owner may put any name there
        return -1
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return -1
    # What is ours nobody else can take away: the directory is sticky, and ours.
    is_own = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o600
    if stat.S_ISREG(status.st_mode) and is_own and status.st_nlink == 1:
        return os.open(name, _FILE, dir_fd=directory)
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
    recording.facts = replace(found.facts, modules=())
    recording.code, recording.fault = found.code, found.fault
    recording.notes = list(dict.fromkeys((*record.notes, *found.facts.notes, NOTE)))
    if on.runtime is not None and record.process.container is not None:
        recording.container = on.runtime.ask(record.process.container)
    _take_core(recording, draft, on)
    for kind in _MADE_LATE:
        name = crash_file_name(kind, recording.epoch)
        if crash_directory.has_file(name, recording.directory):
            os.unlink(name, dir_fd=recording.directory)
    write_early(recording, on)
    # Last: a file system that does not answer keeps us here.
    again = modules.opened_again(found.facts.modules, found.files)
    recording.facts = replace(found.facts, modules=again)


def _take_core(recording: Recording, draft: Draft, on: Conditions) -> None:
    name = crash_file_name(Kind.CORE, recording.epoch)
    told = recording.record.files.get(name)
    recording.core_file = _ours(recording.directory, name)
    if recording.core_file < 0:
        if told is None or told.sent is None:
            recording.notes.extend(_why_no_core(recording.record, draft))
        else:  # it is on the bus
            recording.files[name], recording.core_size = told, told.size
        return
    with os.fdopen(os.dup(recording.core_file), "rb") as file:
        head = core_head.read(file.read)
    if head.cause is not None:
        understand(recording, head)
    if told is None:
        told = _as_decided(_as_far_as_it_goes(recording, head, draft), draft)
    if recording.record.process.boot_id != on.boot_id:
        told = _with_doubt(told)
    recording.files[name], recording.core_size = told, told.size


def _why_no_core(record: CaptureRecord, draft: Draft) -> tuple[str, ...]:
    if draft.left_out:
        return (draft.left_out,)
    if record.notes or record.files:  # it told all, this too
        return ()
    return ("no core: the recorder was killed before there was one",)


def _as_decided(told: CapturedFile, draft: Draft) -> CapturedFile:
    """Say what was left out of a core from the beginning."""
    if not draft.left_out:
        return told
    note = "; ".join(filter(None, (draft.left_out, told.note)))
    update = {"truncated": True, "expected": draft.expected or None, "note": note}
    return told.model_copy(update=update)


def _with_doubt(told: CapturedFile) -> CapturedFile:
    """Say of a core that outlived a restart of the host that nobody had waited for the disk."""
    note = "; ".join(filter(None, (told.note, _REBOOTED)))
    return told.model_copy(update={"truncated": True, "note": note})


def _as_far_as_it_goes(recording: Recording, head: Head, draft: Draft) -> CapturedFile:
    """Tell how much there is of a core that was being copied.

    The file has its whole size from the beginning, if it is not made of the kernel's stream, and
    its stacks soon: so it is cut when the backtrace is made.
    """
    size = os.fstat(recording.core_file).st_size
    if draft.left_out and draft.core_final == size:
        return CapturedFile(size=size)  # it had come to its end, wherever that is
    if head.size is None:
        return CapturedFile(size=size, truncated=True, note=f"{head.fault}: {_KILLED}")
    if size >= head.size:
        size = min(head.size, max(draft.core_final, head.data))
        recording.core_ends = size
    if size >= head.size:
        return CapturedFile(size=size)
    note = f"{head.size - size} of {head.size} bytes are missing: {_KILLED}"
    return CapturedFile(size=size, truncated=True, expected=head.size, note=note)


_REBOOTED = "the host went down before it was surely on disk: parts may be zeros"
_KILLED = "the recorder was killed while it copied them"
