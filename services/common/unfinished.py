"""How much of a file that is still being written is final: told by a lock on the rest.

The recorder locks a core from its first byte on, and gives up range after range of the lock as
they are done, in the order of the file. So the collector can send the beginning of a large core
while its end is still being copied. The lock goes with the recorder, whatever ends it. These are
open file description locks, fcntl_locking(2): neither a second descriptor nor a fork drops them.
"""

import fcntl
import struct

# struct flock: l_type, l_whence (0: from the beginning), l_start, l_len (0: to the end), l_pid
_FLOCK = struct.Struct("hhqqi4x")


def begin(file: int) -> None:
    """Say that nothing of a file is final yet.

    Args:
        file: a descriptor for writing.

    Raises:
        OSError: somebody else has locked it.
    """
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))


def finished(file: int, end: int) -> None:
    """Say that nothing before `end` (bytes) changes any more."""
    if end:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, 0, end, 0))


def final_bytes(file: int) -> int | None:
    """Return how many bytes of a file are final; None when its writer says nothing of it.

    Args:
        file: another descriptor than the writer's.
    """
    asked = _FLOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0)
    kind, _, start, _, _ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else start
