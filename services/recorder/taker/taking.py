"""A small process, read whole at once, so that it is let go before anything is written.

To make a record, a directory and files takes longer than to read all of a small process. So that
comes later, from what was read. Whatever is not small, or cannot be read for sure without
waiting, stays held.

What is done meanwhile is counted in microseconds, so the reading itself is C, `taker/`, in three
calls that wait for no interpreter lock; Python decides before and after.
"""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from mmap import MADV_HUGEPAGE, mmap

import structlog

from crashbus import identity
from services.common import process as processes
from services.common import unrecorded
from services.common.mounts import Mounts
from services.common.unrecorded import Unrecorded
from services.recorder.core.core_memory import PAGE, Kept
from services.recorder.errors import CaptureFailed
from services.recorder.handover.hold import Hold
from services.recorder.taker.taken import Taken, Told
from services.recorder.taker.taker_library import Crash, Greeted, address_of

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LARGEST = 16 * 1024 * 1024  # bytes of touched memory
AT_ONCE = LARGEST + 4 * 1024 * 1024  # bytes read and not written yet, /proc and heads too
_RESIDENT = 4 * LARGEST  # bytes, shared pages too; of more it is not asked what is touched
_LARGEST_CORE = 1024**3  # bytes, untouched memory too
_MOST_THREADS = 256
_SPARE = 4 * 1024 * 1024  # bytes of room that is used again: new memory costs as much as to read
_CRASHES = 2  # of what a crash is read to are kept; more are made when crashes come in bursts
_PLACE = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class Taker:
    """Reads small processes; used by several threads.

    Args:
        taker: what `load` returned.
        unrecorded: told of each until its record is made.
        largest_core: bytes; larger ones are not for us.
        labels_needed: a container's crash must wait for what its runtime says.
    """

    def __init__(
        self, taker: ctypes.CDLL, unrecorded: Unrecorded, largest_core: int, *, labels_needed: bool
    ) -> None:
        self._taker = taker
        self._unrecorded = unrecorded
        self._largest_core = min(largest_core or _LARGEST_CORE, _LARGEST_CORE)
        self._labels_needed = labels_needed
        self._boot_id = identity.boot_id().encode()
        self._lock = threading.Lock()
        self._bytes = 0
        self._mounts = Mounts()
        self._spare = [_new_room(_SPARE)]
        self._crashes = [self._new_crash()]

    def take(self, pid: int, hold: Hold, mark: int, module_files: int) -> Taken:
        """Read a held process and let it go, or leave it held, with nothing in what was taken.

        Args:
            mark: bytes before its core.

        Returns:
            What is to be closed when its record is made.
        """
        taken = Taken()
        if self._labels_needed and processes.container_of(processes.cgroup(pid, taken.proc)):
            return taken
        try:
            place = os.open(f"/proc/{pid}", _PLACE)
        except OSError:
            return taken
        try:
            with self._crash(hold) as crash:
                crash.pid, crash.place = pid, place
                crash.mark, crash.modules = mark, module_files
                if self._take_or_name(crash, hold, taken):
                    return taken
        except CaptureFailed:
            taken.close()
            raise
        except Exception:
            # There is the longer way, which needs less memory.
            log.error("a small process could not be read at once: it stays held", exc_info=True)
        finally:
            os.close(place)
        taken.close()
        return Taken()

    def greet(self, hold: Hold) -> None:
        """Learn who crashes, and acknowledge the kernel's request, if that comes at once."""
        greeted = Greeted(core=hold.descriptor)
        self._taker.greet(greeted)
        _learn(hold, greeted)

    def accept(self, listening: int, patience: float) -> Hold:
        """Wait until a crash comes, and do the same.

        Args:
            listening: a socket.
            patience: seconds that it may stand still, for `Hold`.

        Raises:
            OSError: none can be accepted.
        """
        greeted = Greeted()
        code = self._taker.accept_crash(listening, greeted)
        if code:
            raise OSError(code, os.strerror(code))
        try:
            hold = Hold(greeted.core, patience, greeted.at / 1e9)
            _learn(hold, greeted)
        except BaseException:  # no memory: it is let go; its event tells of it
            os.close(greeted.core)
            if greeted.pid:
                os.close(greeted.pidfd)
            raise
        return hold

    @contextmanager
    def _crash(self, hold: Hold) -> Iterator[Crash]:
        """Give what a crash is read to; what is left of the core's head is put back."""
        with self._lock:
            crash = self._crashes.pop() if self._crashes else None
        crash = crash or self._new_crash()
        crash.core, crash.patience = hold.descriptor, int(hold.patience * 1000)
        crash.head_size = 0
        try:
            yield crash
        finally:
            hold.unread(ctypes.string_at(crash.head, crash.head_size))
            with self._lock:
                if len(self._crashes) < _CRASHES:
                    self._crashes.append(crash)

    def _new_crash(self) -> Crash:
        crash = Crash.new(self._taker)
        crash.resident, crash.touched, crash.threads = _RESIDENT, LARGEST, _MOST_THREADS
        crash.largest = self._largest_core
        crash.namespace, crash.root = self._mounts.view
        crash.boot_id = self._boot_id
        return crash

    def _take_or_name(self, crash: Crash, hold: Hold, taken: Taken) -> bool:
        try:
            return self._take(crash, hold, taken)
        except Exception as error:
            if taken.note is None:
                raise
            crash.head_size = 0  # it is gone: nobody reads its core again
            failure = _not_understood(error)
            failure.crash_id = unrecorded.name_of(unrecorded.unpacked(bytes(crash.noted())))
            raise failure from error

    def _take(self, crash: Crash, hold: Hold, taken: Taken) -> bool:
        crash.mounts = mounts = self._mounts.now()
        crash.arrived = int(hold.arrived_at)
        if self._taker.look(ctypes.addressof(crash)):
            return False
        try:
            room = self._room(crash, taken)
            if room is None:
                return False
            if self._taker.read_memory(ctypes.addressof(crash), address_of(room)):
                return False
            told = self._asked(crash, mounts)
            # What was read by its PID could be another's.
            if not hold.has_its_pid or not self._unrecorded.begin(crash.pid, crash.noted()):
                return False
            taken.note = partial(self._unrecorded.end, crash.pid)
            hold.let_go()
        finally:
            taken.files = crash.opened()
        hold.memory_was_read = True
        # What takes its time comes now, when nobody waits.
        (told or Told(crash, mounts)).understand(crash, taken)
        taken.proc.seal()
        crash.head_size = 0  # it is taken
        taken.memory = Kept(crash.content(room))
        return True

    def _asked(self, crash: Crash, mounts: bytes) -> Told | None:
        """Return what was read, if that leads to questions that only the process answers."""
        if not crash.sockets:
            return None
        told = Told(crash, mounts)
        told.ask_sockets(crash.pid)
        return told

    def _room(self, crash: Crash, taken: Taken) -> mmap | None:
        """Return room for its memory, until what was taken is closed; None: there is too much."""
        with self._lock:
            is_spare = bool(self._spare) and crash.memory <= _SPARE
            size = _SPARE if is_spare else max(crash.memory, PAGE)
            counted = size + crash.used + crash.head_size
            if self._bytes + counted > AT_ONCE:
                return None
            self._bytes += counted
            spare = self._spare.pop() if is_spare else None
        taken.give_back.append(partial(self._give_back, counted, spare))
        return spare or _new_room(size)

    def _give_back(self, counted: int, spare: mmap | None) -> None:
        with self._lock:
            self._bytes -= counted
            if spare is not None:
                self._spare.append(spare)


def _learn(hold: Hold, greeted: Greeted) -> None:
    hold.greeted = True
    if greeted.pid:
        hold.belongs_to(greeted.pidfd, greeted.pid)
    else:
        hold.unread(bytes(greeted.request[: greeted.took]))


def _not_understood(error: Exception) -> CaptureFailed:
    log.error("what was read of a small process is lost", exc_info=error)
    return CaptureFailed(
        "capture_failed",
        f"what was read of it could not be kept: {type(error).__name__}: {error}",
        "see that the recorder has memory, and report this",
    )


def _new_room(size: int) -> mmap:
    """Return memory that is there already, in large pages: reading to it is faster."""
    room = mmap(-1, size)
    with suppress(OSError):  # a kernel without
        room.madvise(MADV_HUGEPAGE)
    for page in range(0, size, PAGE):
        room[page] = 1
    return room
