"""A crash whose files are being made: its record, and what is known of it so far.

A locked capture record says from its first moment on that files will come. Whoever fills it,
`capturing` while the process is held and `adopting` where the pipe helper kept the crash, hands
it to `finishing`, which completes and unlocks it.
"""

import errno
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from crashbus import signals
from crashbus.layout import Kind, crash_file_name
from crashbus.parts import Process
from services.common import capture, crash_directory, drafts
from services.common.capture import CapturedFile, CaptureRecord
from services.common.crash_directory import SpoolUnusable
from services.recorder import containers, crash_files
from services.recorder.conditions import Conditions
from services.recorder.containers import Answer
from services.recorder.core.core_head import Cause, Head
from services.recorder.errors import CaptureFailed
from services.recorder.facts import Facts
from services.recorder.kept import known

log: structlog.stdlib.BoundLogger = structlog.get_logger()

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PLACES_TRIED = 64  # others can take a name, and the collector remove the directory, meanwhile


@dataclass
class Recording:
    """A crash whose process is gone and whose files are not all there yet.

    It holds three descriptors, besides those of the modules: the set counts as being written
    as long as the record's is open.

    Attributes:
        draft: what the next recorder has if this one is killed, `services.common.drafts`.
        core_ends: where to cut the core when all is made of it; beyond, pages may be missing.
    """

    directory: int
    record_file: int
    epoch: int
    record: CaptureRecord
    container: Answer | None = None  # of the container runtime
    draft: int = -1
    core_file: int = -1
    core_ends: int | None = None
    facts: Facts | None = None
    cause: Cause = field(default_factory=lambda: Cause(0))
    head: Head = field(default_factory=lambda: Head(b""))  # of its core, without the bytes
    code: bytes | None = None  # at the program counter, if that is where it faulted
    fault: str | None = None  # what the fault address was
    held_for: float | None = None
    core_size: int = 0
    files: dict[str, CapturedFile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Give all descriptors back; this is what unlocks the record."""
        self.close_draft()
        _close(self.core_file, self.directory, self.record_file)
        # Last: a file system that does not answer keeps us here, too.
        if self.facts is not None:
            self.facts.close()

    def tell_final(self, end: int) -> None:
        """Keep up to where the core is copied."""
        if self.draft >= 0:
            with suppress(OSError):  # then less of it is believed
                drafts.tell_final(self.draft, end)

    def tell_left_out(self, why: str, expected: int | None) -> None:
        """Keep why the core will have less than the kernel's; empty: it will have all."""
        if self.draft >= 0:
            with suppress(OSError):  # then it will seem to be whole
                drafts.tell_left_out(self.draft, why, expected or 0)

    def close_draft(self) -> None:
        """Keep no more of the crash; what there is stays until the record is complete."""
        if self.draft >= 0:
            os.close(self.draft)
            self.draft = -1


def begin(name: str, process: Process, signal: int, crashed_at: float, on: Conditions) -> Recording:
    """Make the record: from here on the crash cannot vanish unseen."""
    record = CaptureRecord(
        state="writing",
        crash_id=name,
        host=on.host,
        crashed_at=crashed_at,
        process=process,
        signal=signal,
        signal_name=signals.name(signal),
    )
    epoch, is_full = int(crashed_at), False
    for _ in range(_PLACES_TRIED):
        try:
            directory, epoch = crash_directory.open_crash(on.spool, process.pid, epoch)
        except SpoolUnusable as error:
            raise CaptureFailed("spool_unusable", str(error), error.mend) from error
        # First: a record without a draft is nobody's to finish.
        draft = -1 if is_full else _begin_draft(on.spool, process.pid, epoch)
        try:
            record_file = capture.create(directory, epoch, record)
        except BaseException as error:
            _close(directory, draft)
            drafts.remove(on.spool, process.pid, epoch)
            if not isinstance(error, OSError):
                raise
            # Where there is room for one file alone, it is the record's.
            is_full = draft >= 0 and error.errno in _FULL
            if is_full or isinstance(error, FileExistsError | FileNotFoundError):
                continue
            raise _no_record(on.spool, error) from error
        return Recording(directory, record_file, epoch, record, cause=Cause(signal), draft=draft)
    raise _no_record(on.spool, OSError(None, "its place is taken or removed at once"))


def _begin_draft(spool: Path, pid: int, epoch: int) -> int:
    try:
        return drafts.begin(spool, pid, epoch)
    except (OSError, SpoolUnusable) as error:
        log.warning("no other recorder can finish this crash", pid=pid, error=str(error))
        return -1


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _no_record(path: Path, error: OSError) -> CaptureFailed:
    return CaptureFailed(
        "capture_failed",
        f"no capture record could be made in {path}: {error.strerror}",
        f"make room on its disk: df {path}; df -i {path}",
    )


def understand(recording: Recording, head: Head) -> None:
    """Take in what the core's head tells, and keep it."""
    if head.cause is not None:
        recording.cause = head.cause
    if head.fault is not None:
        recording.notes.append(head.fault)
    recording.head = replace(head, raw=b"")
    recording.record = _with_cause(recording.record, recording.cause)
    keep_record(recording)


def _with_cause(record: CaptureRecord, cause: Cause) -> CaptureRecord:
    return record.model_copy(
        update={
            "signal": cause.signal,
            "signal_name": signals.name(cause.signal),
            "code": cause.code,
            "code_meaning": None
            if cause.code is None
            else signals.code_meaning(cause.signal, cause.code),
            "fault_address": cause.fault_address,
        }
    )


def keep_record(recording: Recording) -> bool:
    """Bring the record on disk up to date; a full disk must not keep the process held."""
    try:
        capture.write(recording.record_file, recording.record)
        return True
    except OSError as error:
        log.error(
            "the capture record could not be written",
            crash_id=recording.record.crash_id,
            error=error.strerror,
        )
        return False


def keep_for_another(recording: Recording, facts: Facts) -> None:
    """Keep what was read for the recorder that finishes the crash if this one is killed."""
    if recording.draft < 0:
        return
    try:
        drafts.keep(recording.draft, known.encoded(facts, recording.code, recording.fault))
    except (OSError, ValueError) as error:  # no room, or no JSON: it will know less
        log.warning(
            "another recorder would know little of this crash",
            crash_id=recording.record.crash_id,
            error=str(error),
        )


def say_what_is_there(recording: Recording) -> None:
    """Tell of each file that it is whole, before the backtrace, which may wait for its turn: of a
    recorder that is killed meanwhile, nothing but that is missing.
    """
    told = {"files": recording.files, "notes": tuple(recording.notes)}
    recording.record = recording.record.model_copy(update=told)
    keep_record(recording)


def write_file(recording: Recording, kind: Kind, content: bytes) -> None:
    """Write one small file; what is missing is told in the record."""
    name = crash_file_name(kind, recording.epoch)
    try:
        descriptor = crash_directory.create_file(recording.directory, kind, recording.epoch)
    except OSError as error:
        recording.notes.append(f"{name} could not be made: {error.strerror}")
        return
    fault, size = None, 0
    try:
        while size < len(content):
            size += os.pwrite(descriptor, content[size:], size)
    except OSError as error:
        fault = f"cut short: {error.strerror}"
    finally:
        os.close(descriptor)
    recording.files[name] = CapturedFile(size=size, truncated=fault is not None, note=fault)


def write_early(recording: Recording, on: Conditions) -> None:
    """Write the files that are known already, before a core can fill the disk."""
    process = recording.record.process
    text = crash_files.info(on.version, recording.epoch, process.pid, process.comm)
    write_file(recording, Kind.INFO, text)
    write_file(recording, Kind.CFG, crash_files.cfg(on.configuration))


def add_container(recording: Recording) -> None:
    """Add what the runtime says of the container, if it answers."""
    found = containers.answered(recording.container)
    if found is not None:
        process = recording.record.process.model_copy(update={"container": found})
        recording.record = recording.record.model_copy(update={"process": process})
        assert recording.facts is not None
        recording.facts = replace(recording.facts, process=process)
