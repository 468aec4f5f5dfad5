"""The memory of a crashed process: of one that is held, or read while it was.

Whoever makes a core of it need not know which.
"""

import errno
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from services.recorder.core.core_head import Load

PAGE = os.sysconf("SC_PAGE_SIZE")
BLOCK = 1024 * 1024  # bytes read at once

Runs = Iterator[tuple[int, int]]  # start and end address


class PagesUnreadable(Exception):
    """The process's memory cannot be had in this way; nothing of the stream was taken."""


class Piece(NamedTuple):
    """A range of memory to copy.

    Attributes:
        readable: zeros are the right content of what cannot be read.
    """

    address: int
    offset: int
    size: int
    readable: bool


def in_blocks(run: Load, *, readable: bool) -> Iterator[Piece]:
    """Cut a run of memory into pieces to copy at once."""
    for place in range(0, run.size, BLOCK):
        size = min(BLOCK, run.size - place)
        yield Piece(run.address + place, run.offset + place, size, readable)


class Memory(Protocol):
    """The memory of a process."""

    def read(self, into: memoryview, address: int) -> int:
        """Read what lies from an address on; 0 when the memory is gone.

        Raises:
            OSError: EIO or EFAULT where there is none.
        """

    def is_gone(self) -> bool:
        """Tell whether the process is."""


class Found(Protocol):
    """What of a process's memory is other than zeros."""

    def runs(self, loads: Iterator[Load]) -> Iterator[Load]:
        """Give these parts of a core's pieces, in their order.

        Raises:
            PagesUnreadable: it cannot be told.
        """

    def pieces(self, loads: Iterator[Load]) -> Iterator[Piece]:
        """Give the same in pieces to read at once."""

    def is_readable(self, run: Load) -> bool:
        """Tell whether zeros are the right content of what of a run cannot be read."""


def read_piece(memory: Memory, piece: Piece, into: memoryview) -> bool:
    """Read a piece whole; what is not there of it is zeros. False: the memory is gone.

    Raises:
        OSError: it cannot be read, and zeros would not be right.
    """
    done = 0
    while done < piece.size:
        try:
            got = memory.read(into[done:], piece.address + done)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT) or not piece.readable:
                raise
            into[done : done + PAGE] = bytes(PAGE)  # the room may have been used before
            got = PAGE
        if not got:
            return False
        done += got
    return True


class LiveMemory:
    """The memory of a process that is held.

    Args:
        file: its proc_pid_mem(5), open.
    """

    def __init__(self, file: int) -> None:
        self._file = file

    def read(self, into: memoryview, address: int) -> int:
        """Read from an address on."""
        return os.preadv(self._file, [into], address)

    def is_gone(self) -> bool:
        """Tell whether nothing can be read any more, anywhere."""
        try:
            return not os.pread(self._file, 1, PAGE)
        except OSError:  # nothing is mapped there, but it lives
            return False


class Kept:
    """Memory that was read while its process was held; all else is zeros.

    Args:
        content: runs of pages, each with its address, that do not overlap.
    """

    def __init__(self, content: Iterable[tuple[int, memoryview]]) -> None:
        ordered = sorted(content, key=lambda run: run[0])
        self._starts = [address for address, _ in ordered]
        self._content = [run for _, run in ordered]

    def read(self, into: memoryview, address: int) -> int:
        """Copy from an address on; nothing can fail or be gone here."""
        into[:] = bytes(len(into))
        for start, stop in self._within(address, address + len(into)):
            place = bisect_right(self._starts, start) - 1
            offset = start - self._starts[place]
            into[start - address : stop - address] = self._content[place][
                offset : offset + stop - start
            ]
        return len(into)

    def is_gone(self) -> bool:
        """It is not."""
        return False

    def runs(self, loads: Iterator[Load]) -> Iterator[Load]:
        """Give what was read of a core's pieces."""
        for load in loads:
            for start, stop in self._within(load.address, load.address + load.size):
                yield Load(start, load.offset + start - load.address, stop - start)

    def pieces(self, loads: Iterator[Load]) -> Iterator[Piece]:
        """Give the same in pieces to copy at once."""
        for run in self.runs(loads):
            yield from in_blocks(run, readable=self.is_readable(run))

    def is_readable(self, _run: Load) -> bool:
        """It is, for it was read."""
        return True

    def _within(self, start: int, end: int) -> Runs:
        place = max(0, bisect_right(self._starts, start) - 1)
        while place < len(self._starts) and self._starts[place] < end:
            first = max(start, self._starts[place])
            last = min(end, self._starts[place] + len(self._content[place]))
            if first < last:
                yield first, last
            place += 1
