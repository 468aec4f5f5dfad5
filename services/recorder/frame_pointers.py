"""Frames by the chain of frame pointers, where nothing better is known: 32-bit x86.

Functions that keep no frame pointer are missing, and their callers may be. All memory is the
process's to forge, so the chain must go up the stack and end.
"""

import struct
from collections.abc import Iterator, Mapping

import drgn

from services.recorder.backtrace import MAX_FRAMES
from services.recorder.registers import I386

NOTE = "by frame pointers: functions without one are left out"
_PAIR = struct.Struct("<II")  # what a frame pointer points at: the caller's, and the way back
_HIGHEST = 1 << 32


def addresses(program: drgn.Program, machine: int, registers: Mapping[str, int]) -> tuple[int, ...]:
    """Return the program counters, innermost first; none for other machines."""
    if machine != I386 or not registers:
        return ()
    return tuple(_walk(program, registers["eip"], registers["ebp"]))


def _walk(program: drgn.Program, counter: int, frame: int) -> Iterator[int]:
    yield counter
    for _ in range(MAX_FRAMES - 1):
        try:
            above, back = _PAIR.unpack(program.read(frame, _PAIR.size))
        except (drgn.FaultError, ValueError):
            return
        if not back:
            return
        yield back
        if not frame < above < _HIGHEST:
            return
        frame = above
