"""The threads of a core, by its NT_PRSTATUS notes: struct elf_prstatus, include/linux/elfcore.h."""

import os
import struct
from collections.abc import Iterator

from services.recorder.core import registers
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import PagesUnreadable
from services.recorder.unwinding.backtrace import Stack

_NT_PRSTATUS = 1
_OWNER = 5  # bytes of "CORE" and its end
_MAX_THREADS = 4096
_MAX_NOTE = 4096  # bytes; the largest, AArch64's, has 392
_PID_I386 = 24  # offset of pr_pid


def prstatuses(head: Head, core: int) -> Iterator[bytes]:
    """Give the note of each thread, the crashing one's first.

    Args:
        core: its file, with the kernel's notes.

    Raises:
        PagesUnreadable: the notes end early.
    """
    place, end = head.notes.offset, head.notes.offset + head.notes.size
    found = 0
    while place + 12 <= end and found < _MAX_THREADS:
        name, size, kind = struct.unpack(head.order + "III", _exactly(core, 12, place))
        body = place + 12 + (name + 3) // 4 * 4
        if kind == _NT_PRSTATUS and name == _OWNER:
            yield _exactly(core, min(size, _MAX_NOTE), body)
            found += 1
        place = body + (size + 3) // 4 * 4


def stacks(head: Head, core: int) -> Iterator[Stack]:
    """Give the stacks to be walked by frame pointers: of 32-bit x86, where nothing else can.

    Notes that end early, and one that is too short, end it.
    """
    if head.machine != registers.I386:
        return
    try:
        for note in prstatuses(head, core):
            found = registers.parse(head.machine, head.order, note)
            if not found:
                return
            (tid,) = struct.unpack_from(head.order + "I", note, _PID_I386)
            yield Stack(tid=tid, counter=found["eip"], frame=found["ebp"])
    except PagesUnreadable:
        return


def _exactly(core: int, size: int, offset: int) -> bytes:
    data = os.pread(core, size, offset)
    if len(data) != size:
        raise PagesUnreadable("its notes end early")
    return data
