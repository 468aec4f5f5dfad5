"""What of a held process's memory is other than zeros.

proc_pid_pagemap(5) tells which pages were touched, proc_pid_maps(5) what is mapped where; see
`core_pages` for what follows from that.
"""

import errno
import fcntl
import heapq
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache

from services.common.proc import Mapping, mappings
from services.recorder import modules
from services.recorder.core.core_head import Load
from services.recorder.core.core_memory import PAGE, PagesUnreadable, Piece, Runs, in_blocks

_ENTRY = 8  # bytes of one page in pagemap
_SCANNED = 16 * 1024  # pages looked up at once
_MAX_OFFSET = (1 << 63) - 1  # of a file; only x86-64's vsyscall page lies beyond
_SMALL = 64 * 1024  # bytes of a mapped file

# In the last byte of an entry: present (bit 63), swapped (62).
_TOUCHED = bytes(1 if byte & 0xC0 else 0 for byte in range(256))

# struct pm_scan_arg and its ioctl, linux/fs.h
_SCAN_ARG = struct.Struct("=12Q")
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 3, 1 << 4
_REGIONS = 1024  # runs told at once

_PRIVATE, _READABLE, _FILE = 1, 2, 4


class _Mappings:
    """The mappings of a process by their start, small: there may be 65,530 and more."""

    def __init__(self, maps: bytes) -> None:
        self._starts = array("Q")
        self._ends = array("Q")
        self._offsets = array("Q")
        self._kinds = bytearray()
        for one in mappings(maps):
            self._starts.append(one.start)
            self._ends.append(one.end)
            self._offsets.append(one.offset)
            self._kinds.append(
                _PRIVATE * _is_private_memory(one)
                | _READABLE * one.access.startswith(b"r")
                | _FILE * (one.inode != b"0")
            )

    def kind(self, load: Load) -> int:
        return self._kinds[self._find(load)]

    def file(self, load: Load) -> tuple[str, int]:
        """Return a mapping's name in map_files, and where in its file the load begins."""
        place = self._find(load)
        start = self._starts[place]
        name = f"{start:x}-{self._ends[place]:x}"
        return name, self._offsets[place] + load.address - start

    def _find(self, load: Load) -> int:
        place = bisect_right(self._starts, load.address) - 1
        if place < 0 or self._ends[place] < load.address + load.size:
            raise PagesUnreadable(f"no mapping is seen at {load.address:#x}")
        return place


def _is_private_memory(one: Mapping) -> bool:
    """Tell whether a mapping is memory that is nowhere but in this process."""
    path = one.path.strip()
    named = path in (b"", b"[heap]", b"[stack]") or path.startswith(b"[anon:")
    return one.inode == b"0" and one.access.endswith(b"p") and named


class Touched:
    """Finds what must be read of a process.

    Args:
        task: a living thread of it, as a name in /proc.
        pagemap: its proc_pid_pagemap(5), open.
    """

    def __init__(self, task: int, maps: bytes, pagemap: int) -> None:
        self._task = task
        self._mappings = _Mappings(maps)
        self._pagemap = pagemap
        self._look: Callable[[int, int, int], Runs] = _scan if _kernel_scans() else _look_up

    def runs(self, loads: Iterator[Load]) -> Iterator[Load]:
        """Give the parts of a core's pieces that may be other than zeros, in their order.

        Raises:
            PagesUnreadable: it cannot be told.
        """
        for load in loads:
            kind = self._mappings.kind(load)
            if load.address + load.size > _MAX_OFFSET:
                if kind & _READABLE:
                    raise PagesUnreadable("its vsyscall page can be read, but not from here")
            elif kind & (_PRIVATE | _FILE):
                for start, stop in self._to_read(load, kind):
                    yield Load(start, load.offset + start - load.address, stop - start)
            else:
                yield load

    def _to_read(self, load: Load, kind: int) -> Runs:
        if not kind & _FILE:
            return self._touched(load)
        if load.size <= _SMALL:  # what would be spared costs less than to find it
            return iter([(load.address, load.address + load.size)])
        return _united(self._touched(load), self._with_data(load))

    def _touched(self, load: Load) -> Runs:
        return self._look(self._pagemap, load.address, load.address + load.size)

    def _with_data(self, load: Load) -> Runs:
        """Give start and end address of each run of pages for which the mapped file has data."""
        name, offset = self._mappings.file(load)
        file = modules.open_mapping(self._task, name)
        if file < 0:
            yield load.address, load.address + load.size
            return
        try:
            for start, end in _data(file, offset, offset + load.size):
                yield load.address + start - offset, load.address + end - offset
        finally:
            os.close(file)

    def pieces(self, loads: Iterator[Load]) -> Iterator[Piece]:
        """Give the same in pieces to read at once."""
        for run in self.runs(loads):
            yield from in_blocks(run, readable=self.is_readable(run))

    def is_readable(self, run: Load) -> bool:
        """Tell whether the process itself may read a run."""
        return bool(self._mappings.kind(run) & _READABLE)


def _data(file: int, start: int, end: int) -> Runs:
    """Give the ranges of a file, in whole pages, that are no holes, lseek(2)."""
    while start < end:
        try:
            found = os.lseek(file, start, os.SEEK_DATA)
            stop = os.lseek(file, found, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # behind its end, or all holes from here on
                return
            found = stop = start
        if not start <= found < stop:  # its filesystem cannot tell, or lies
            found, stop = start, end
        if found >= end:
            return
        yield found // PAGE * PAGE, min(-(-stop // PAGE) * PAGE, end)
        start = -(-stop // PAGE) * PAGE


def _united(one: Runs, other: Runs) -> Runs:
    """Give the ranges that are in either of two, each of which is in order."""
    last: tuple[int, int] | None = None
    for run in heapq.merge(one, other):
        if last is not None and run[0] <= last[1]:
            last = last[0], max(last[1], run[1])
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


@cache
def _kernel_scans() -> bool:
    """Tell whether the kernel finds touched pages for us (Linux >= 6.7)."""
    with open("/proc/self/pagemap", "rb") as own:  # noqa: PTH123
        try:
            next(_scan(own.fileno(), 0, PAGE), None)
        except PagesUnreadable:
            return False
    return True


def _scan(pagemap: int, start: int, end: int) -> Runs:
    """As `_look_up`, in no time for terabytes: Documentation/admin-guide/mm/pagemap.rst."""
    found = array("Q", bytes(3 * _ENTRY * _REGIONS))
    place, _ = found.buffer_info()
    touched = _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED
    while start < end:
        request = bytearray(
            _SCAN_ARG.pack(
                _SCAN_ARG.size, 0, start, end, 0, place, _REGIONS, 0, 0, 0, touched, touched
            )
        )
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request)
        except OSError as error:
            raise PagesUnreadable(f"pagemap: {error.strerror}") from error
        for first in range(0, 3 * count, 3):
            yield found[first], found[first + 1]
        start = _SCAN_ARG.unpack(request)[4]  # walk_end


def _look_up(pagemap: int, start: int, end: int) -> Runs:
    """Give start and end address of each run of pages that were touched."""
    for place in range(start, end, _SCANNED * PAGE):
        wanted = min(_SCANNED, (end - place) // PAGE)
        raw = os.pread(pagemap, wanted * _ENTRY, place // PAGE * _ENTRY)
        if len(raw) != wanted * _ENTRY:
            raise PagesUnreadable("pagemap ends early")
        flags = raw[_ENTRY - 1 :: _ENTRY].translate(_TOUCHED)
        last = 0
        while (first := flags.find(1, last)) >= 0:
            last = flags.find(0, first)
            last = wanted if last < 0 else last
            yield place + first * PAGE, place + last * PAGE
