"""Backtraces, each made by a worker process that can be killed and holds no rights."""

import os
import signal
import time
from pathlib import Path

from pydantic import ValidationError

from services.recorder import metrics
from services.recorder.core import core_threads
from services.recorder.core.core_head import Head
from services.recorder.modules import Module
from services.recorder.unwinding import unwind_process
from services.recorder.unwinding.backtrace import Backtrace, ModuleFile, Request
from services.recorder.unwinding.unwind_process import Server, Started, Worker, receive, send

_COMMAND = unwind_process.WORKER
_MAX_ANSWER = 16 * 1024 * 1024  # bytes; 20,000 frames take about 6 MB
_NO_TIME = 0.2  # seconds; less is not worth a process


def unwind(
    core: int,
    modules: tuple[Module, ...],
    within: float,
    head: Head | None = None,
    code: bytes | None = None,
    debug_directories: tuple[Path, ...] = (Path("/usr/lib/debug"),),
    server: Server | None = None,
) -> Backtrace:
    """Return the backtrace of a core; what goes wrong is told in it, never raised.

    Args:
        core: descriptor of the core file.
        within: seconds after which the worker is killed.
        head: of the core, for its registers.
        debug_directories: of separate debug information.
        code: what the crashing thread's program counter pointed at, if it faulted there.
        server: forks the worker; without one it is started, which takes longer.
    """
    if within < _NO_TIME:
        return _failed("there was no time for it", "skipped")
    try:
        # Ours can write: a worker that was taken over would change the evidence.
        readable = os.open(f"/proc/self/fd/{core}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return _failed(f"the core cannot be opened: {error.strerror}", "failed")
    try:
        request = _request(readable, modules, within, head, code)
        places = tuple(str(place) for place in debug_directories)
        request = request.model_copy(update={"debug_directories": places})
        return _unwind(request, within, server)
    finally:
        os.close(readable)


def _request(
    core: int, modules: tuple[Module, ...], within: float, head: Head | None, code: bytes | None
) -> Request:
    return Request(
        core=core,
        modules=tuple(
            ModuleFile(path=m.path, start=m.start, end=m.end, file=m.file)
            for m in modules
            if m.file >= 0
        ),
        cpu_seconds=max(1, round(within)),
        machine=head.machine if head else 0,
        registers=head.registers if head else {},
        stacks=tuple(core_threads.stacks(head, core)) if head else (),
        code=None if code is None else code.hex(),
    )


def _unwind(request: Request, within: float, server: Server | None) -> Backtrace:
    began = time.monotonic()
    try:
        files = (module.file for module in request.modules)
        answer, status = _run(request, (request.core, *files), within, server)
    except OSError as error:
        return _failed(f"no worker could be started: {error}", "failed")
    metrics.BACKTRACE_SECONDS.observe(time.monotonic() - began)
    return _read(answer, status, within)


def _run(
    request: Request, descriptors: tuple[int, ...], within: float, server: Server | None
) -> tuple[bytes, int | None]:
    """Return what the worker wrote and its exit status; None when it had to be killed."""
    end = time.monotonic() + within
    worker: Worker | None = server.fork(descriptors, within) if server else None
    if worker is None:
        worker = Started(_COMMAND, descriptors)
    try:
        send(worker.requests, request.model_dump_json().encode(), end)
        worker.no_more_requests()
        answer = receive(worker.answers, end, _MAX_ANSWER)
        status = worker.wait(max(0.0, end - time.monotonic())) if answer is not None else None
        return answer or b"", status
    finally:
        worker.end()


def _read(answer: bytes, status: int | None, within: float) -> Backtrace:
    if status is None:
        return _failed(f"not done within {within:.0f} s", "killed")
    if status != 0:
        return _failed(f"the worker died: {_status(status)}", "failed")
    try:
        trace = Backtrace.model_validate_json(answer)
    except ValidationError as error:
        return _failed(f"the worker's answer has {error.error_count()} faults", "failed")
    metrics.BACKTRACES.labels("failed" if trace.fault else "made").inc()
    return trace


def _status(status: int) -> str:
    return signal.Signals(-status).name if -64 <= status < 0 else f"exit status {status}"


def _failed(why: str, result: str) -> Backtrace:
    metrics.BACKTRACES.labels(result).inc()
    return Backtrace(fault=why)
