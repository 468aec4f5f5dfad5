"""The pages of a held process, read from the process itself instead of the kernel's stream.

The kernel writes a core page by page, some 300 MB/s; proc_pid_mem(5) gives a megabyte at a
time, to several threads at once. The result is the same, byte for byte. What the kernel writes
(fs/coredump.c, dump_user_range()) and how it is got here:

- A private page that was never touched is zeros. proc_pid_pagemap(5) tells which these are,
  and they are not read: that would make page tables for terabytes, and wait for whoever
  handles the faults of a userfaultfd(2).
- A page of a mapped file or of shared memory is read if it was touched or the file has data
  there: to read a hole of a tmpfs would fill it, terabytes of it.
- What cannot be read is zeros: guard pages, pages behind the end of a mapped file.
- A mapping without read permission is read all the same, as by a debugger. A kernel can be
  told to refuse that (proc_mem.force_override), and then only its stream has the content.
"""

import errno
import fcntl
import heapq
import os
import struct
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

from crashbus import unfinished
from services.recorder import facts, sparse
from services.recorder.core_head import Head, Load
from services.recorder.core_memory import (
    BLOCK,
    PAGE,
    Found,
    Kept,
    LiveMemory,
    Memory,
    PagesUnreadable,
    Piece,
    Runs,
    in_blocks,
)
from services.recorder.hold import Hold

_ENTRY = 8  # bytes of one page in pagemap
_SCANNED = 16 * 1024  # pages looked up at once
_MAX_OFFSET = (1 << 63) - 1  # of a file; only x86-64's vsyscall page lies beyond
_THREADS = min(4, len(os.sched_getaffinity(0)))
_SMALL = 64 * 1024  # bytes of a mapped file
_ALONE = 16 * 1024 * 1024  # bytes of a core for which a second thread does not pay

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
        for line in maps.splitlines():
            parts = line.split(maxsplit=5)
            if len(parts) < 5:
                continue
            start, _, end = parts[0].partition(b"-")
            self._starts.append(int(start, 16))
            self._ends.append(int(end, 16))
            self._offsets.append(int(parts[2], 16))
            self._kinds.append(
                _PRIVATE * _is_private_memory(parts)
                | _READABLE * parts[1].startswith(b"r")
                | _FILE * (parts[4] != b"0")
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


def _is_private_memory(parts: list[bytes]) -> bool:
    """Tell whether a line of maps is memory that is nowhere but in this process."""
    path = parts[5].strip() if len(parts) > 5 else b""
    named = path in (b"", b"[heap]", b"[stack]") or path.startswith(b"[anon:")
    return parts[4] == b"0" and parts[1].endswith(b"p") and named


@dataclass(frozen=True)
class Pages:
    """What is needed to read the memory of a process.

    Attributes:
        task: a living thread of it, as a name in /proc.
        maps: proc_pid_maps(5), whole.
        kept: all of it, if it was read already.
    """

    task: int
    head: Head
    maps: bytes
    kept: Kept | None = None

    @property
    def start(self) -> int:
        """Where memory begins in the core file; before, there are headers and notes."""
        return self.head.data

    @contextmanager
    def opened(self) -> Iterator[tuple[Memory, Found]]:
        """Give the memory, and what of it must be read.

        Raises:
            PagesUnreadable: it is gone, or the kernel refuses.
        """
        if self.kept is not None:
            yield self.kept, self.kept
            return
        with opened(self.task) as (memory, pagemap):
            yield memory, Touched(self.task, self.maps, pagemap)


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
        self._all: list[tuple[int, int]] = []

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

    def look_at_all(self, loads: list[Load]) -> None:
        """Find at once what of all pieces was touched, where the kernel can tell."""
        ends = [load.address + load.size for load in loads]
        ends = [end for end in ends if end <= _MAX_OFFSET]
        if ends and self._look is _scan:
            self._all = list(_scan(self._pagemap, min(load.address for load in loads), max(ends)))
            self._look = self._looked_up

    def _looked_up(self, _: int, start: int, end: int) -> Runs:
        first = bisect_right(self._all, (start, 0)) - 1
        for one in range(max(0, first), len(self._all)):
            low, high = self._all[one]
            if low >= end:
                return
            if high > start:
                yield max(low, start), min(high, end)

    def _touched(self, load: Load) -> Runs:
        return self._look(self._pagemap, load.address, load.address + load.size)

    def _with_data(self, load: Load) -> Runs:
        """Give start and end address of each run of pages for which the mapped file has data."""
        name, offset = self._mappings.file(load)
        file = facts.open_mapping(self._task, name)
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
            kind = self._mappings.kind(run)
            sure = kind & (_PRIVATE | _READABLE | _FILE) == _PRIVATE | _READABLE
            yield from in_blocks(run, readable=bool(kind & _READABLE), sure=sure)


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


@contextmanager
def opened(task: int) -> Iterator[tuple[LiveMemory, int]]:
    """Open memory and pagemap of a process.

    Raises:
        PagesUnreadable: it is gone, or the kernel refuses.
    """
    files: list[int] = []
    try:
        files.append(os.open(f"/proc/{task}/mem", os.O_RDONLY | os.O_CLOEXEC))
        files.append(os.open(f"/proc/{task}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        _close(files)
        raise PagesUnreadable(f"{error.filename}: {error.strerror}") from error
    try:
        yield LiveMemory(files[0]), files[1]
    finally:
        _close(files)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def copy(hold: Hold, memory: Memory, found: Iterator[Piece], core: int, size: int) -> int:
    """Copy a held process's pages to their places in its core file.

    Args:
        found: what to copy, in the order of the file.
        size: of the whole core in bytes; the file gets it.

    Returns:
        Up to where the file is complete: less than `size` when the process was killed or let
        go meanwhile.

    Raises:
        PagesUnreadable: the kernel's stream is needed.
        OSError: the file cannot be written; it was cut to where it is complete.
    """
    _resize(core, size)
    if size > _ALONE:
        with suppress(OSError):  # a file system without locks: the core is sent when it is whole
            unfinished.begin(core)
    return _Work(hold, memory, core, found, size).done(_THREADS if size > _ALONE else 1)


def _resize(core: int, size: int) -> None:
    try:
        os.ftruncate(core, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise PagesUnreadable(f"no file can have {size} bytes here") from error


class _Work:
    """The pieces of one core, and the threads that share them."""

    def __init__(
        self, hold: Hold, memory: Memory, core: int, found: Iterator[Piece], size: int
    ) -> None:
        self._hold = hold
        self._memory = memory
        self._core = core
        self._pieces = found
        self._lock = threading.Lock()
        self._end = size  # up to where nothing is missing
        self._given = 0  # up to where pieces were given out
        self._in_work: set[int] = set()  # where the pieces begin that were given out
        self._told = 0 if size > _ALONE else size  # up to where it was said to be final
        self._error: Exception | None = None

    def done(self, threads: int) -> int:
        """Copy all pieces; return up to where the file is complete."""
        others = [threading.Thread(target=self._run, daemon=True) for _ in range(threads - 1)]
        for thread in others:
            try:
                thread.start()
            except RuntimeError:  # there may be no more threads: then it takes longer
                others = [one for one in others if one.is_alive()]
                break
        self._run()
        for thread in others:
            thread.join()
        if isinstance(self._error, OSError):
            os.ftruncate(self._core, self._end)
        if self._error is not None:
            raise self._error
        self._tell(self._end)
        return self._end

    def _tell(self, end: int) -> None:
        """Say up to where the file is final."""
        if end > self._told:
            self._told = end
            with suppress(OSError):
                unfinished.finished(self._core, end)

    def _run(self) -> None:
        buffer, piece = bytearray(BLOCK), None
        try:
            while (piece := self._next()) is not None:
                if self._copy(piece, buffer):
                    self._done(piece)
                else:
                    self._stop_at(piece.offset)
        except Exception as error:  # noqa: BLE001 - raised again where all threads are joined
            self._stop_at(piece.offset if piece else 0)
            self._error = error

    def _next(self) -> Piece | None:
        with self._lock:
            if self._error is not None:
                return None
            try:
                piece = next(self._pieces, None)
            except PagesUnreadable:
                if not self._memory.is_gone():
                    raise
                self._end = min(self._end, self._given)
                return None
            if piece is None or piece.offset >= self._end:
                return None
            if not self._hold.has_memory:
                self._end = piece.offset
                return None
            self._given = piece.offset + piece.size
            self._in_work.add(piece.offset)
            return piece

    def _done(self, piece: Piece) -> None:
        """Tell what is final: all that lies before every piece that is not done."""
        with self._lock:
            is_first = piece.offset == min(self._in_work)
            self._in_work.remove(piece.offset)
            if is_first and self._given - self._told >= BLOCK:
                self._tell(min(self._in_work, default=self._given))

    def _stop_at(self, offset: int) -> None:
        with self._lock:
            self._end = min(self._end, offset)

    def _copy(self, piece: Piece, buffer: bytearray) -> bool:
        """Copy a piece; False when the process's memory is gone."""
        done = 0
        while done < piece.size:
            into = memoryview(buffer)[: piece.size - done]
            try:
                got = self._memory.read(into, piece.address + done)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise PagesUnreadable(f"memory: {error.strerror}") from error
                if not piece.readable:
                    raise PagesUnreadable("memory without read permission is refused") from error
                done += PAGE
                continue
            if not got:
                return False
            data = buffer if got == len(buffer) else bytes(into[:got])
            sparse.write(self._core, data, piece.offset + done)
            done += got
        self._hold.last_progress = time.monotonic()
        return True
