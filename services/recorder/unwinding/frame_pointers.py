"""Frames by the chain of frame pointers, where nothing better is known: 32-bit x86.

Functions that keep no frame pointer are missing, and their callers may be. All memory is the
process's to forge, so the chain must go up the stack and end.
"""

import struct
from collections.abc import Iterator

import drgn

from services.recorder.unwinding.backtrace import MAX_FRAMES, Stack

NOTE = "by frame pointers: functions without one are left out"
_PAIR = struct.Struct("<II")  # what a frame pointer points at: the caller's, and the way back
_HIGHEST = 1 << 32
_LOWEST = 4096  # no code lies below; the outermost "caller" is the number of arguments


def addresses(program: drgn.Program, stack: Stack) -> Iterator[int]:
    """Give the program counters of a stack, innermost first."""
    yield stack.counter
    frame = stack.frame
    for _ in range(MAX_FRAMES - 1):
        try:
            above, back = _PAIR.unpack(program.read(frame, _PAIR.size))
        except (drgn.FaultError, ValueError):
            return
        if back < _LOWEST:
            return
        yield back
        if not frame < above < _HIGHEST:
            return
        frame = above
