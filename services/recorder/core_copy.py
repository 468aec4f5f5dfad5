"""Copying a core from the kernel to its file, in constant memory, as far as it goes.

Memory that was never touched comes as zeros; in the file it becomes holes.
"""

import errno
import os
from dataclasses import dataclass

from services.recorder.hold import Hold, Stalled

BLOCK = 1024 * 1024  # bytes read before anything is written
_GRAIN = 64 * 1024  # bytes; zeros of this size and alignment become a hole
_ZEROS = bytes(_GRAIN)
# What a core gives back on a full disk, so that the small files find room.
GIVEN_BACK = 4 * 1024 * 1024
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Copied:
    """How far a copy got.

    Attributes:
        size: of the file in bytes.
        fault: why it is cut short; None when it is whole.
        disk_full: there was no room for more.
    """

    size: int
    fault: str | None = None
    disk_full: bool = False


def copy(hold: Hold, head: bytes, announced: int | None, core: int, limit: int) -> Copied:
    """Write head and the rest of the stream to an empty file.

    Args:
        announced: the size that the head tells, in bytes.
        core: the file's descriptor.
        limit: bytes at which to stop; 0: none.
    """
    block = bytearray(BLOCK)
    size, fault = 0, None
    try:
        size = _write(core, head[: limit or None], 0)
        while not (limit and size >= limit):
            wanted = min(BLOCK, limit - size) if limit else BLOCK
            got, fault = _fill(hold, memoryview(block)[:wanted])
            size += _write(core, block if got == BLOCK else block[:got], size)
            if got < wanted:
                break
        os.ftruncate(core, size)
    except OSError as error:
        return _cut_back(core, error)
    if limit and size >= limit and (announced is None or announced > limit):
        return Copied(size, f"cut at the limit of {limit} bytes")
    if announced is not None and size < announced:
        missing = f"{announced - size} of {announced} bytes are missing"
        return Copied(size, f"{missing}: {fault or _ended(hold)}")
    return Copied(size, fault or _let_go(hold))


def _ended(hold: Hold) -> str:
    return _let_go(hold) or "the process was killed while it dumped"


def _let_go(hold: Hold) -> str | None:
    if hold.is_held:
        return None
    return f"the recorder let it go: {hold.let_go_because or 'before the end'}"


def _fill(hold: Hold, block: memoryview) -> tuple[int, str | None]:
    """Fill a block from the stream; less comes only at its end, with the fault if it is one."""
    got = 0
    try:
        while got < len(block) and (more := hold.read_into(block[got:])):
            got += more
    except (Stalled, OSError) as error:
        return got, str(error)
    return got, None


def _write(core: int, data: bytes | bytearray, offset: int) -> int:
    """Write a block, leaving out zeros; return its size."""
    view, start = memoryview(data), 0
    for place in range(0, len(data), _GRAIN):
        # A bytes-like slice compares with memcmp(3); a memoryview compares item by item.
        if data[place : place + _GRAIN] == _ZEROS:
            _write_all(core, view[start:place], offset + start)
            start = place + _GRAIN
    _write_all(core, view[start:], offset + start)
    return len(data)


def _write_all(core: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(core, view, offset)
        view, offset = view[written:], offset + written


def _cut_back(core: int, error: OSError) -> Copied:
    full = error.errno in _FULL
    size = os.fstat(core).st_size
    if full:
        size = max(0, size - GIVEN_BACK) // 4096 * 4096
        os.ftruncate(core, size)
    why = "no room on disk" if full else f"the file could not be written: {error.strerror}"
    return Copied(size, why, disk_full=full)
