"""The socket that crashes arrive on. Nothing may keep it from accepting the next one."""

import ctypes
import errno
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from services.recorder.errors import RecorderError
from services.recorder.handover.arrivals import Arrivals
from services.recorder.handover.hold import Hold

log: structlog.stdlib.BoundLogger = structlog.get_logger()

BACKLOG = 4096  # a crash that finds it full is lost; somaxconn caps it
_ACCEPT_AGAIN = 0.1  # seconds

_libc = ctypes.CDLL(None, use_errno=True)


class Listener:
    """Accepts crashes in a thread of its own, while nobody else does, and puts them into a queue.

    When the queue is full, crashes wait, held, in the socket's backlog.

    Args:
        path: of the socket. The kernel follows no symbolic links in it.
        patience: seconds that a crash may stand still, for `Hold`.
        greeting: sent to who connects: the pipe helper waits for it, the kernel wants none.
    """

    def __init__(
        self,
        path: Path,
        arrivals: Arrivals,
        patience: float,
        greeting: bytes = b"",
    ) -> None:
        self._greeting = greeting
        self._path = _canonical(path)
        self._arrivals = arrivals
        self._patience = patience
        self._socket = _bind(self._path)
        self._ready = select.poll()
        self._ready.register(self._socket, select.POLLIN)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._accept_all, name="accept", daemon=True)

    @property
    def path(self) -> Path:
        """Where it listens, without symbolic links."""
        return self._path

    def accept_with(self, accept: Callable[[int, float], Hold]) -> None:
        """Have who captures accept as well; before it starts.

        Args:
            accept: waits at a socket for a crash, and gives it the patience.
        """
        self._arrivals.accept_with(partial(accept, self._socket.fileno(), self._patience))

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def stop(self, within: float) -> None:
        """Accept what is waiting, then close the socket."""
        os.write(self._wake_write, b"x")
        self._arrivals.stop_accepting()
        if self._thread.is_alive():  # a recorder that could not start stops, too
            self._thread.join(within)

    def _accept_all(self) -> None:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        waiting.register(self._wake_read, select.POLLIN)
        self._arrivals.wait_until_all_are_busy()
        while not any(fd == self._wake_read for fd, _ in waiting.poll()):
            self._accept_waiting()
            self._arrivals.wait_until_all_are_busy()
        # Wakes who waits for a crash; what is there still comes.
        self._socket.shutdown(socket.SHUT_RD)
        self._arrivals.wait_until_nobody_waits()
        self._accept_waiting()
        self._path.unlink(missing_ok=True)
        self._socket.close()

    def _accept_waiting(self) -> None:
        try:
            while self._arrivals.add(self._accept):
                pass
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                return  # it is shut down, and nothing is left
            # Out of descriptors or memory: those in work give theirs back, so try again.
            log.error("cannot accept a crash", error=str(error) or "no memory")
            time.sleep(_ACCEPT_AGAIN)

    def _accept(self) -> Hold | None:
        """Accept one that is there: nobody else takes it meanwhile."""
        while self._ready.poll(0):
            # Without the system calls for which socket.accept() takes as long again.
            connection = int(_libc.accept4(self._socket.fileno(), None, None, socket.SOCK_CLOEXEC))
            if connection < 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))
            if self._is_there(connection):
                return self._hold(connection)
        return None

    def _hold(self, connection: int) -> Hold:
        try:
            return Hold(connection, self._patience)
        except MemoryError:
            os.close(connection)  # it is let go; its event tells of it
            raise

    def _is_there(self, connection: int) -> bool:
        """Greet a helper; False when it has waited too long and keeps its crash by itself."""
        if not self._greeting:
            return True
        try:
            os.write(connection, self._greeting)
        except OSError as error:
            log.warning("a pipe helper gave up waiting", error=error.strerror)
            os.close(connection)
            return False
        return True


def _canonical(path: Path) -> Path:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RecorderError(f"CRASHBUS_RECORDER_SOCKET: {error}") from error
    parent = path.parent.resolve()
    status = parent.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise RecorderError(
            f"others may write to {parent}: set CRASHBUS_RECORDER_SOCKET to a path in a directory "
            "that belongs to root, mode 0700"
        )
    return parent / path.name


def _bind(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise RecorderError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listening
