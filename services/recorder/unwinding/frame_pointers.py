"""Frames by the chain of frame pointers, where nothing better is known: of 32-bit x86, and where
Go left a stack for another.

Functions that keep no frame pointer are missing, and their callers may be. All memory is the
process's to forge, so the chain must go up the stack and end, or have no link twice.
"""

import struct
from collections.abc import Iterator

import drgn

from services.recorder.unwinding.backtrace import MAX_FRAMES, Stack

NOTE = "by frame pointers: functions without one are left out"
# What a frame pointer points at: the caller's, and the way back.
_PAIR, _WIDE_PAIR = struct.Struct("<II"), struct.Struct("<QQ")
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


def across_stacks(program: drgn.Program, frame: int) -> Iterator[int]:
    """Give the return addresses from a frame pointer on, from one stack to another, of 64 bits."""
    seen: set[int] = set()
    while frame not in seen and len(seen) < MAX_FRAMES:
        seen.add(frame)
        try:
            frame, back = _WIDE_PAIR.unpack(program.read(frame, _WIDE_PAIR.size))
        except (drgn.FaultError, ValueError):
            return
        if back < _LOWEST:
            return
        yield back
