"""Makes unwinding workers: ``python -I -m …unwind_server SOCKET``.

To start Python with drgn takes longer than most backtraces. This process has started already, and
forks a worker for each request. What comes from a crash passes through it unread: it gets
descriptors and hands them on. It ends when the recorder does.
"""

import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

from services.recorder import hardening
from services.recorder.unwinding import unwind_worker
from services.recorder.unwinding.backtrace import Request

FORKED = b"forked"  # comes with a pidfd of the worker
STATUS = struct.Struct("i")  # comes when it has ended; as os.waitstatus_to_exitcode has it
MOST_DESCRIPTORS = 253  # SCM_MAX_FD, unix(7)


def main() -> None:
    """Serve the recorder until it hangs up."""
    hardening.never_dump_core()
    with socket.socket(fileno=int(sys.argv[1])) as recorder:
        Server(recorder).run()


class Server:
    """The workers that it has, by their pidfds, and where to tell how they ended."""

    def __init__(self, recorder: socket.socket) -> None:
        self._recorder = recorder
        self._workers: dict[int, tuple[int, socket.socket]] = {}

    def run(self) -> None:
        """Fork and reap."""
        while True:
            watched = select.poll()
            for descriptor in (self._recorder.fileno(), *self._workers):
                watched.register(descriptor, select.POLLIN)
            for descriptor, _ in watched.poll():
                if descriptor in self._workers:
                    self._reap(descriptor)
                elif not self._take():
                    return

    def _take(self) -> bool:
        """Take a request; False when the recorder is gone."""
        data, descriptors, _, _ = socket.recv_fds(self._recorder, 16, MOST_DESCRIPTORS)
        if not data:
            return False
        asker, rest = socket.socket(fileno=descriptors[0]), descriptors[1:]
        with suppress(OSError):  # no process can be had: the recorder sees that nobody answers
            pid = os.fork()
            if pid == 0:
                self._become_worker(asker, rest)
            self._forked(pid, asker)
        for descriptor in rest:
            os.close(descriptor)
        return True

    def _forked(self, pid: int, asker: socket.socket) -> None:
        worker = os.pidfd_open(pid)
        self._workers[worker] = pid, asker
        try:
            socket.send_fds(asker, [FORKED], [worker])
        except OSError:  # the recorder waits for it no more
            signal.pidfd_send_signal(worker, signal.SIGKILL)

    def _reap(self, worker: int) -> None:
        pid, asker = self._workers.pop(worker)
        _, status = os.waitpid(pid, 0)
        os.close(worker)
        with asker, suppress(OSError):
            asker.send(STATUS.pack(os.waitstatus_to_exitcode(status)))

    def _become_worker(self, asker: socket.socket, descriptors: Sequence[int]) -> None:
        """Do one request and end; nothing of what belongs to others is kept."""
        status = 1
        try:
            for worker, (_, other) in self._workers.items():
                os.close(worker)
                other.close()
            asker.close()
            self._recorder.close()
            reading, writing, *files = descriptors
            os.dup2(reading, 0)
            os.dup2(writing, 1)
            os.close(reading)
            os.close(writing)
            request = Request.model_validate_json(sys.stdin.buffer.read())
            unwind_worker.answer(_with_descriptors(request, files))
            status = 0
        finally:
            os._exit(status)


def _with_descriptors(request: Request, files: Sequence[int]) -> Request:
    """Return a request with our numbers for its core and its modules, which came in that order."""
    core, *rest = files
    modules = tuple(
        module.model_copy(update={"file": file})
        for module, file in zip(request.modules, rest, strict=True)
    )
    return request.model_copy(update={"core": core, "modules": modules})


if __name__ == "__main__":
    main()
