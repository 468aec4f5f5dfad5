"""Processes that unwind, as the recorder sees them: started for one request, or forked ready."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger()

WORKER = (sys.executable, "-I", "-m", "services.recorder.unwinding.unwind_worker")
_SERVER = (sys.executable, "-I", "-m", "services.recorder.unwinding.unwind_server")
_FORKED_WITHIN = 5.0  # seconds; the server may only just be starting, on a busy host
_START_AGAIN = 10.0  # seconds between starts of a server that ended
_KILLED_WITHIN = 2.0  # seconds from SIGKILL to its end
# Nothing of our own environment: it may hold secrets, and drgn reads some of it.
# One thread, because RLIMIT_NPROC forbids a second.
_ENVIRONMENT = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


class Worker(Protocol):
    """A process that makes one backtrace.

    Attributes:
        requests: descriptor that it reads from.
        answers: descriptor that it writes to.
    """

    requests: int
    answers: int

    def no_more_requests(self) -> None:
        """Let it see the end of its request."""

    def wait(self, within: float) -> int | None:
        """Return its exit status; None when it did not end in so many seconds."""

    def end(self) -> None:
        """Kill it if it still runs, and close all descriptors."""


class Started:
    """A worker that was started for itself.

    Raises:
        OSError: no process can be had.
    """

    def __init__(self, command: Sequence[str], descriptors: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            cwd="/",
            env=_ENVIRONMENT,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests = os.dup(self._process.stdin.fileno())
        self.answers = os.dup(self._process.stdout.fileno())
        self._process.stdin.close()
        self._process.stdout.close()

    def no_more_requests(self) -> None:
        os.close(self.requests)
        self.requests = -1

    def wait(self, within: float) -> int | None:
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # it reads from a dead disk; leave it there
            self._process.wait(_KILLED_WITHIN)
        _close(self.requests, self.answers)


class Forked:
    """A worker that `Server` forked."""

    def __init__(self, requests: int, answers: int, process: int, told: socket.socket) -> None:
        self.requests = requests
        self.answers = answers
        self._process = process
        self._told = told

    def no_more_requests(self) -> None:
        os.close(self.requests)
        self.requests = -1

    def wait(self, within: float) -> int | None:
        self._told.settimeout(max(0.001, within))
        try:
            status = self._told.recv(4)
        except OSError:
            return None
        return int.from_bytes(status, sys.byteorder, signed=True) if len(status) == 4 else None

    def end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        self._told.close()
        _close(self.requests, self.answers, self._process)


class Server:
    """The process that forks workers; should it fail, they are started one by one.

    Safe in any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started = -_START_AGAIN

    def start(self) -> None:
        """Start it, so that it is ready when it is needed."""
        with self._lock, suppress(OSError):
            self._running()

    def stop(self) -> None:
        """End it; workers that are at work go on."""
        with self._lock:
            self._stop()

    def fork(self, descriptors: Sequence[int], within: float) -> Forked | None:
        """Return a new worker; None when there is none to be had in this way.

        Args:
            descriptors: of the core, then of each module.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        requests, answers = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        given = [requests[0], answers[1], *descriptors]
        process = self._ask(given, ours, theirs, min(within / 2, _FORKED_WITHIN))
        _close(requests[0], answers[1])
        if process is None:
            ours.close()
            _close(requests[1], answers[0])
            return None
        return Forked(requests[1], answers[0], process, ours)

    def _ask(
        self, given: list[int], told: socket.socket, theirs: socket.socket, within: float
    ) -> int | None:
        """Have a worker forked; return its pidfd."""
        try:
            with self._lock, theirs:  # closed here, so that we see the server's end
                control = self._running()
                socket.send_fds(control, [b"unwind"], [theirs.fileno(), *given])
            told.settimeout(within)
            _, process, _, _ = socket.recv_fds(told, 16, 1)
        except OSError as error:
            log.warning("no worker was forked, starting one", error=str(error) or repr(error))
            with self._lock:
                self._stop()
            return None
        return process[0] if process else None

    def _running(self) -> socket.socket:
        if self._control is not None and self._process and self._process.poll() is None:
            return self._control
        if time.monotonic() - self._started < _START_AGAIN:
            raise OSError("it ended a moment ago")
        self._stop()
        self._started = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                (*_SERVER, str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env=_ENVIRONMENT,
                start_new_session=True,  # a signal to the recorder's group is not for it
            )
        ours.setblocking(False)
        self._control = ours
        return ours

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILLED_WITHIN)
            self._process = None


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def ready(pipe: int, event: int, end: float) -> bool:
    """Wait for an event of a pipe until a monotonic time; False if it did not come."""
    waiting = select.poll()
    waiting.register(pipe, event)
    return bool(waiting.poll(max(0.0, end - time.monotonic()) * 1000))


def send(pipe: int, data: bytes, end: float) -> None:
    """Write all to a process, or what it takes until a monotonic time."""
    os.set_blocking(pipe, False)
    view = memoryview(data)
    while view and ready(pipe, select.POLLOUT, end):
        try:
            view = view[os.write(pipe, view) :]
        except BrokenPipeError:
            return  # it died; its status says of what


def receive(pipe: int, end: float, most: int) -> bytes | None:
    """Read what a process writes to its end; None when that does not come in time or is more."""
    answer = bytearray()
    while ready(pipe, select.POLLIN, end):
        part = os.read(pipe, 1 << 20)
        if not part:
            return bytes(answer)
        answer += part
        if len(answer) > most:
            return None
    return None
