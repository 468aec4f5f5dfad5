"""A hold on a crashing process: while its descriptor is open, the kernel keeps the process."""

import os
import re
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

# Opened once: letting go must not fail for want of a descriptor.
_NULL = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
_END_WITHIN = 5.0  # seconds for a process that was let go to end by itself
_LOOK_EVERY = 0.02  # seconds between two looks whether all have ended
# Pidfds of those, each with when it was let go.
_let_go: list[tuple[int, float]] = []
_let_go_lock = threading.Lock()
_PID = re.compile(rb"^Pid:\t(\d+)$", re.MULTILINE)


def end_those_let_go(within: float | None = None) -> None:
    """Break off the dumps of processes that were let go and do not end; call it now and then.

    Over memory that was never touched the kernel writes nothing, so that it does not notice
    for hours that nobody reads any more (fs/coredump.c, dump_user_range()). Only then, because
    a parent sees SIGKILL where its child had another signal.

    Args:
        within: seconds that they have to end by themselves; None: as usual.
    """
    patience = _END_WITHIN if within is None else within
    with _let_go_lock:
        _let_go[:] = [one for one in _let_go if not _is_over(*one, patience)]


def end_all_let_go(within: float) -> None:
    """The same before the recorder ends: after it there is nobody who would."""
    end = time.monotonic() + within
    while _let_go and time.monotonic() < end:
        end_those_let_go()
        time.sleep(_LOOK_EVERY)
    end_those_let_go(0)


def _see_it_end(pidfd: int) -> None:
    """Have it broken off if need be; the descriptor is closed when it has ended."""
    end_those_let_go()  # who has ended by now needs no descriptor any more
    with _let_go_lock:
        _let_go.append((pidfd, time.monotonic()))


def _is_over(pidfd: int, since: float, patience: float) -> bool:
    """Tell whether a process needs nobody any more, and close its pidfd then."""
    if not _has_ended(pidfd):
        if time.monotonic() - since < patience:
            return False
        try:
            if _is_dumping(pidfd):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError as error:
            log.error("a dump without an end cannot be broken off", error=error.strerror)
    os.close(pidfd)
    return True


def _is_dumping(pidfd: int) -> bool:
    """Tell whether it dumps core, proc_pid_status(5): it may be none that crashed, or be ending."""
    pid = _PID.search(Path(f"/proc/self/fdinfo/{pidfd}").read_bytes())
    with suppress(OSError):  # a thread ends, or all do
        for task in Path(f"/proc/{int(pid[1]) if pid else 0}/task").iterdir():
            status = (task / "status").read_bytes()
            if b"\nCoreDumping:" in status:  # a thread that has ended does not tell
                return b"\nCoreDumping:\t1\n" in status
    return False


def _has_ended(pidfd: int) -> bool:
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)  # pidfd_open(2)
    return bool(waiting.poll(0))


class Stalled(Exception):
    """Nothing came for as long as we are ready to wait."""


class Hold:
    """The descriptor that a core is read from, and that holds the process while it is open.

    It can be let go from another thread at any time, even while its reader is stuck in a
    write to a dead disk: the descriptor's number stays ours and reads as an end of file.

    Args:
        descriptor: becomes this object's own.
        patience: seconds without a byte until a read gives up.
        arrived: monotonic seconds; None: now.
    """

    def __init__(self, descriptor: int, patience: float, arrived: float | None = None) -> None:
        self.descriptor = descriptor
        self._arrived = time.monotonic() if arrived is None else arrived
        self.arrived_at = time.time() - self.age  # Unix seconds
        self.patience = patience
        self._lock = threading.Lock()
        self._held = True
        self._closed = False
        self._process = -1  # pidfd
        self.greeted = False  # who crashes was asked; more of its request may be to be read
        self.acknowledged = 0  # the PID, if the kernel's request was
        self.held_for: float | None = None  # seconds, once it was let go
        self.let_go_because: str | None = None  # where that was before the end
        self.memory_was_read = False
        self.waits = False  # for the turn of its core, `core.turns`
        self.helper: socket.socket | None = None  # the pipe helper that brought it, if there is one
        self.last_progress = self._arrived  # monotonic seconds
        self._unread = b""

    @property
    def is_held(self) -> bool:
        """Whether the process still is held by us."""
        return self._held

    @property
    def has_memory(self) -> bool:
        """Whether the process's memory can be read: it is held, or all of it was."""
        return self._held or self.memory_was_read

    @property
    def age(self) -> float:
        """Seconds since the crash arrived."""
        return time.monotonic() - self._arrived

    @property
    def has_its_pid(self) -> bool:
        """Whether the process is held, and its PID can be nobody else's."""
        with self._lock:
            if not self._held or self._process < 0:
                return False
            try:
                signal.pidfd_send_signal(self._process, 0)
            except ProcessLookupError:
                return False
            return True

    def belongs_to(self, pidfd: int, pid: int = 0) -> None:
        """Say whose hold it is, so that the process can be made to end as well.

        Args:
            pidfd: becomes this object's own.
            pid: of a process whose request was acknowledged already.
        """
        self._process = pidfd
        self.acknowledged = pid

    def continue_with(self, descriptor: int) -> None:
        """Read from, and hold by, another descriptor from now on; the first one is closed."""
        with self._lock:
            if self._held:
                os.dup2(descriptor, self.descriptor, inheritable=False)
        os.close(descriptor)

    def read_into(self, buffer: memoryview) -> int:
        """Read what is there, waiting for the first byte; 0 at the end.

        Raises:
            Stalled: no byte came in time.
            OSError: the other side broke off.
        """
        if self._unread:
            size = min(len(buffer), len(self._unread))
            buffer[:size], self._unread = self._unread[:size], self._unread[size:]
            return size
        waiting = select.poll()
        waiting.register(self.descriptor, select.POLLIN)
        if not waiting.poll(self.patience * 1000):
            raise Stalled(f"nothing came for {self.patience:.0f} s")
        size = os.readv(self.descriptor, [buffer])
        self.last_progress = time.monotonic()
        return size

    def unread(self, data: bytes) -> None:
        """Give back what was read, so that it comes first when it is read again."""
        self._unread = data + self._unread

    def read_exactly(self, size: int) -> bytes:
        """Read `size` bytes; fewer only at the end."""
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size and (more := self.read_into(view[got:])):
            got += more
        return bytes(view[:got])

    def write(self, data: bytes) -> None:
        """Send a few bytes to the kernel."""
        os.write(self.descriptor, data)

    def let_go(self, because: str | None = None) -> None:
        """Let the process go, if it still is held.

        Whether the kernel notices is for `end_those_let_go` to see.

        Args:
            because: why before the end of its core.
        """
        with self._lock:
            if not self._held:
                return
            self.let_go_because = because
            self._held = False
            self.held_for = time.monotonic() - self._arrived
            os.dup2(_NULL, self.descriptor, inheritable=False)
            process, self._process = self._process, -1
        if process >= 0:
            _see_it_end(process)

    def hand_on(self) -> "Hold":
        """Return another hold that keeps the process from here on; this one has let it go."""
        with self._lock:
            other = Hold(os.dup(self.descriptor), self.patience)
            other._process, self._process = self._process, -1
            other.helper, self.helper = self.helper, None
        self.let_go()
        return other

    def close(self) -> None:
        """Let the process go and give the descriptors back."""
        self.let_go()
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.descriptor)
                if self._process >= 0:
                    os.close(self._process)
                if self.helper is not None:
                    self.helper.close()
