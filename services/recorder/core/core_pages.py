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
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from services.common import unfinished
from services.recorder.core import sparse, write_back
from services.recorder.core.core_head import Head
from services.recorder.core.core_memory import (
    BLOCK,
    PAGE,
    Found,
    Kept,
    LiveMemory,
    Memory,
    PagesUnreadable,
    Piece,
)
from services.recorder.core.touched import Touched
from services.recorder.handover.hold import Hold

TellFinal = Callable[[int], None]  # of bytes from the beginning

_THREADS = min(4, len(os.sched_getaffinity(0)))
_ALONE = 16 * 1024 * 1024  # bytes of a core for which a second thread does not pay


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


def copy(
    hold: Hold,
    memory: Memory,
    found: Iterator[Piece],
    core: int,
    size: int,
    tell_final: TellFinal = lambda _: None,
    first: Iterable[Piece] = (),
    check_room: Callable[[int], None] = lambda _: None,
) -> int:
    """Copy a held process's pages to their places in its core file.

    Args:
        found: what to copy, in the order of the file.
        size: of the whole core in bytes; the file gets it.
        tell_final: told from time to time up to where the file is complete.
        first: pieces that are copied before all others, and with them again.
        check_room: told the same while there is more to copy, and raises an OSError where there
            shall be no more.

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
    with write_back.following(core, size) as follow:
        work = _Work(hold, memory, core, found, size, (follow, tell_final), check_room)
        work.prefer(first)
        return work.done(_THREADS if size > _ALONE else 1)


def _resize(core: int, size: int) -> None:
    try:
        os.ftruncate(core, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise PagesUnreadable(f"no file can have {size} bytes here") from error


class _Work:
    """The pieces of one core, and the threads that share them.

    Args:
        follow: told up to where the file is final.
    """

    def __init__(
        self,
        hold: Hold,
        memory: Memory,
        core: int,
        found: Iterator[Piece],
        size: int,
        followers: tuple[TellFinal, ...],
        check_room: Callable[[int], None],
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
        self._followers = followers
        self._check_room = check_room

    def prefer(self, pieces: Iterable[Piece]) -> None:
        """Copy pieces before all others; what fails here comes again."""
        buffer = bytearray(BLOCK)
        with suppress(PagesUnreadable, OSError):
            for piece in pieces:
                self._copy(piece, buffer)

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
            for follow in self._followers:
                follow(end)

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
                if self._told < self._end:
                    self._check_room(self._told)

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
