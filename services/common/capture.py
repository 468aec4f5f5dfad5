"""The capture record: the recorder's word to the collector about one set of crash files.

``capture_<epoch>`` lies beside the files it speaks of, is owned by root and never shipped.
The recorder creates it while the crashing process is still held, or lets a small process go and
holds a lock at its PID until then (`services.common.unrecorded`), and keeps it locked (flock(2),
exclusive) until the set is whole. So a reader can always tell:

- no record and no such lock when the process is gone: nothing was captured, and nothing will come;
- locked: being written;
- not locked, state ``complete``: whole;
- not locked, anything else: the recorder died; the next one finishes what it left a draft of
  (`services.common.drafts`), and all else is cut short.
"""

import fcntl
import os
import secrets
from contextlib import suppress
from typing import Literal

from pydantic import Field, ValidationError

from crashbus import layout
from crashbus.errors import CrashbusError
from crashbus.fields import CrashId, FileName, Fingerprint, Host, Time
from crashbus.parts import CrashFile, Module, Part, Process

GROWTH = 8 * 1024  # bytes kept free in a record for what it is still to tell, on a full disk too
MAX_SIZE = 4 * 1024 * 1024  # a record lists few files, but arguments may be long


class CapturedFile(Part):
    """A file of the set: its size once it is whole, and what is wrong with it if anything.

    Attributes:
        expected: bytes that a truncated file would have whole, where that is known.
        in_order: nothing changed that was final once, `services.common.unfinished`.
        sent: what is on the bus already of a file that has no copy here.
    """

    size: int = Field(ge=0)
    truncated: bool = False
    expected: int | None = Field(None, ge=0)
    in_order: bool = False
    sent: CrashFile | None = None
    note: str | None = None


class CaptureRecord(Part):
    """What the recorder knows of a crash and of the files it made."""

    state: Literal["writing", "complete"]
    crash_id: CrashId
    host: Host
    crashed_at: Time
    process: Process
    signal: int = Field(ge=0, le=64)
    signal_name: str
    code: int | None = None
    code_meaning: str | None = None
    fault_address: int | None = None
    fingerprint: Fingerprint | None = None
    build_fingerprint: Fingerprint | None = None
    files: dict[FileName, CapturedFile] = Field(default_factory=dict)
    modules: tuple[Module, ...] = ()
    notes: tuple[str, ...] = ()


class UnreadableRecord(CrashbusError):
    """A capture record that is no record: its writer died, or it is not ours."""


def create(directory: int, epoch: int, record: CaptureRecord) -> int:
    """Make a record that is locked from the first moment it can be seen.

    Args:
        directory: descriptor of ``/tmp/appscope/<pid>``.
        epoch: Unix seconds in the names of the set's files.

    Returns:
        The record's descriptor; the set counts as being written until it is closed.

    Raises:
        FileExistsError: something that cannot be replaced has its name.
        OSError: it cannot be written.
    """
    name = layout.crash_file_name(layout.Kind.CAPTURE, epoch)
    hidden = f".{name}.{secrets.token_hex(4)}"  # anybody can guess the epoch
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(hidden, flags, 0o600, dir_fd=directory)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write(descriptor, record)
        _reserve(descriptor)
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException as error:
        os.close(descriptor)
        os.unlink(hidden, dir_fd=directory)
        if isinstance(error, IsADirectoryError):
            raise FileExistsError(error.errno, error.strerror) from error
        raise
    return descriptor


def write(descriptor: int, record: CaptureRecord) -> None:
    """Replace the record's content in place; the descriptor's lock is what protects it.

    Raises:
        OSError: it cannot be written; the former content is there as it was.
    """
    data = record.model_dump_json(indent=1).encode()
    former = os.pread(descriptor, MAX_SIZE, 0)
    try:
        # Blanks over the rest of the former record: what is there can be read at any moment.
        _write_at(descriptor, data.ljust(len(former)), 0)
    except OSError:
        _write_at(descriptor, former, 0)  # into room that it has already
        os.ftruncate(descriptor, len(former))
        raise
    if record.state == "complete":
        os.ftruncate(descriptor, len(data))


def _reserve(descriptor: int) -> None:
    """Make room for a record to grow, in blanks, which JSON allows after it (RFC 8259, 2)."""
    with suppress(OSError):  # a record without that room is better than none
        _write_at(descriptor, b" " * GROWTH, os.fstat(descriptor).st_size)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def is_being_written(descriptor: int) -> bool:
    """Tell whether a recorder still works on the set: it holds the record's lock, flock(2)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def lock(descriptor: int) -> bool:
    """Lock a record that a recorder left, until the descriptor is closed; False: another has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read(descriptor: int) -> CaptureRecord:
    """Read a record.

    Raises:
        UnreadableRecord: empty, cut short, or not a record.
    """
    try:
        return CaptureRecord.model_validate_json(os.pread(descriptor, MAX_SIZE, 0))
    except ValidationError as error:
        raise UnreadableRecord(f"{error.error_count()} faults in the capture record") from None
