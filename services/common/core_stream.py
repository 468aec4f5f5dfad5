"""How the recorder hands a core to the collector that shall have no copy on disk.

A socket in the spool, in a directory that root alone can enter: both services have the spool, also
in containers. The collector greets when it is this connection's turn, and tells until then that it
is still to come. Then come frames: a kind
and a length, of bytes that follow or of zeros. The first tells what comes, the last that it was
all. The collector answers when everything is on the bus, or as soon as it cannot be, with one
`Answer`, and closes. A connection that ends without either is one that failed.
"""

import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, Field

from crashbus import layout
from crashbus.fields import CrashId, FileName
from crashbus.parts import CrashFile
from services.common import crash_directory

FRAME = struct.Struct("!cQ")  # kind, length in bytes
ANNOUNCED, DATA, ZEROS, END = b"A", b"D", b"Z", b"E"
GREETING, QUEUED = b".", b"q"
MAX_DATA = 1024 * 1024  # bytes in one frame
MAX_TEXT = 64 * 1024  # bytes of what is announced, and of an answer
_SOCKET, _NEW = "socket", "socket.new"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Announced(BaseModel):
    """What comes: a core, by the name that it would have in the spool."""

    crash_id: CrashId
    directory: str = Field(pattern=r"^[0-9]{1,10}$")
    name: FileName


class Answer(BaseModel):
    """What became of it.

    Attributes:
        file: what is on the bus.
        fault: why there is nothing.
        is_blocked: another core would fare no better now.
    """

    file: CrashFile | None = None
    fault: str = ""
    is_blocked: bool = False


def listen(spool: Path) -> socket.socket:
    """Return the collector's socket, in the place of a former one.

    Raises:
        OSError, SpoolUnusable: it cannot be had.
    """
    directory = crash_directory.private_directory(spool, layout.CORES)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=directory)
        listening.bind(_path(directory, _NEW))
        listening.listen(64)
        # In one step: who finds no socket does not wait for a collector.
        os.rename(_NEW, _SOCKET, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(directory)
    return listening


def identity(spool: Path) -> tuple[int, int] | None:
    """Return which socket is there now; None: there is none."""
    try:
        status = (spool / layout.CORES / _SOCKET).lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def connect(spool: Path, within: float) -> socket.socket:
    """Return a connection to the collector that waits so many seconds for each step.

    Raises:
        OSError: there is none, or it does not listen.
    """
    directory = os.open(spool / layout.CORES, _DIRECTORY)
    try:
        status = os.fstat(directory)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
            raise PermissionError(None, "its directory is not root's alone")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(within)
            connection.connect(_path(directory, _SOCKET))
        except OSError:
            connection.close()
            raise
    finally:
        os.close(directory)
    return connection


def _path(directory: int, name: str) -> str:
    """Return a path that is short enough for a socket, wherever the spool lies; unix(7)."""
    return f"/proc/self/fd/{directory}/{name}"
