"""AppScope's files inside a container: brought out while the process still lives.

Its library writes to ``/tmp/appscope/<pid>`` below the process's own root, where nobody
outside looks and which is gone with the container. After the core it sleeps for two seconds;
in that time the files are copied to the spool, with a capture record, and are from then on
like any other set. Nothing is written inside the container.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import structlog

from crashbus import capture, layout
from crashbus.capture import CapturedFile, CaptureRecord
from crashbus.layout import Kind
from crashbus.messages import SignalEvent
from services.collector import judge, metrics, processes, spool
from services.collector.judge import Verdict
from services.collector.spool import Entry, Refused
from services.common import crash_directory

log: structlog.stdlib.BoundLogger = structlog.get_logger()

LOOK_AGAIN = 0.05  # seconds; the library leaves two
GIVE_UP = 60.0  # seconds after which a process that writes no set is left alone
_BLOCK = 1024 * 1024
_INSIDE = ("tmp", "appscope")


async def bring_out(root: Path, host: str, event: SignalEvent) -> None:
    """Copy the set that a process in a container is about to write, once it is whole.

    Returns at once for a process that shares the host's root.

    Args:
        root: the spool.

    Raises:
        OSError: the spool has no room.
    """
    if not await asyncio.to_thread(_has_own_root, event.process.pid):
        return
    with ExitStack() as stack:
        watched = _Watched(event, stack)
        end = time.monotonic() + GIVE_UP
        while (verdict := await asyncio.to_thread(watched.look)) is Verdict.WAIT:
            if time.monotonic() > end:
                log.warning("AppScope wrote no whole set", crash_id=event.crash_id)
                verdict = Verdict.CUT_SHORT
                break
            await asyncio.sleep(LOOK_AGAIN)
        if watched.files:
            await asyncio.to_thread(watched.copy_to, root, host, verdict)


def _has_own_root(pid: int) -> bool:
    """Tell whether a process has another root than the host's first process.

    Where that may not be looked at, we are no container ourselves and our root is the host's.
    """
    try:
        own = Path(f"/proc/{pid}/root/.").stat()
    except OSError:
        return False
    try:
        host = Path("/proc/1/root/.").stat()
    except OSError:
        host = Path("/").stat()
    return (own.st_dev, own.st_ino) != (host.st_dev, host.st_ino)


class _Watched:
    """The newest set of one process, its files held open from the moment they are seen."""

    def __init__(self, event: SignalEvent, stack: ExitStack) -> None:
        self._event = event
        self._stack = stack
        self._entries: dict[Kind, Entry] = {}
        self._epoch: int | None = None
        self.files: dict[Kind, int] = {}

    def look(self) -> Verdict:
        """Open what is new and judge the set."""
        process = self._event.process
        with suppress(OSError), _directory_inside(process.pid, process.ns_pid) as directory:
            self._open_new(directory)
        alive = processes.is_alive(process.pid, process.start_ticks)
        held = spool.open_by_process(process.pid) if alive else set()
        cfg = self.files.get(Kind.CFG)
        return judge.judge_appscope(
            present=self.files.keys(),
            held_open={k for k, entry in self._entries.items() if entry.identity in held},
            promised=judge.promised_kinds(os.pread(cfg, _BLOCK, 0)) if cfg is not None else None,
            process_alive=alive,
        )

    def _open_new(self, directory: int) -> None:
        sets = spool.list_directory(directory).sets
        # Earlier sets of a process that recovers were brought out with their own events.
        recent = [epoch for epoch in sets if epoch >= int(self._event.time) - 1]
        if self._epoch is None and recent:
            self._epoch = min(recent)
        for kind, entry in sets.get(self._epoch or -1, {}).items():
            if kind in self.files or kind is Kind.CAPTURE:
                continue
            try:
                descriptor = self._open(entry, directory)
            except (Refused, FileNotFoundError) as error:
                metrics.REFUSED.labels("in_container").inc()
                log.warning("refused", crash_id=self._event.crash_id, error=str(error))
                continue
            self._stack.callback(os.close, descriptor)
            self.files[kind], self._entries[kind] = descriptor, entry

    def _open(self, entry: Entry, directory: int) -> int:
        if entry.uid != self._event.process.uid:
            raise Refused("foreign_owner", f"{entry.name!r} belongs to UID {entry.uid}")
        return spool.open_file(entry.name, directory)

    def copy_to(self, root: Path, host: str, verdict: Verdict) -> None:
        """Copy the set to the spool under a capture record."""
        event, wanted = self._event, self._epoch or int(self._event.time)
        directory, epoch = crash_directory.open_crash(root, event.process.pid, wanted)
        note = None if verdict is Verdict.WHOLE else "its writer ended before it was whole"
        captured: dict[str, CapturedFile] = {}
        try:
            descriptor = capture.create(directory, epoch, self._record(host, "writing", {}))
            try:
                for kind, source in self.files.items():
                    size = _copy(source, directory, kind, epoch)
                    captured[layout.crash_file_name(kind, epoch)] = CapturedFile(
                        size=size, truncated=note is not None, note=note
                    )
                capture.write(descriptor, self._record(host, "complete", captured))
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)
        log.info("brought out of a container", crash_id=event.crash_id, files=len(captured))

    def _record(self, host: str, state: str, files: dict[str, CapturedFile]) -> CaptureRecord:
        event = self._event
        return CaptureRecord.model_validate(
            {
                "state": state,
                "crash_id": event.crash_id,
                "host": host,
                "crashed_at": event.time,
                "process": event.process,
                "signal": event.signal,
                "signal_name": event.signal_name,
                "code": event.code,
                "code_meaning": event.code_meaning,
                "fault_address": event.fault_address,
                "files": files,
                "notes": ("written by AppScope's library inside its container",),
            }
        )


@contextmanager
def _directory_inside(pid: int, ns_pid: int) -> Iterator[int]:
    """Open ``/tmp/appscope/<pid>`` below a process's root, component by component."""
    with ExitStack() as stack:
        # The magic link leads to the process's root; below it no link is followed.
        current = os.open(f"/proc/{pid}/root/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, current)
        for name in (*_INSIDE, str(ns_pid)):
            current = stack.enter_context(spool.open_directory(name, current))
        yield current


def _copy(source: int, directory: int, kind: Kind, epoch: int) -> int:
    target = crash_directory.create_file(directory, kind, epoch)
    with os.fdopen(target, "wb") as file:
        size = os.fstat(source).st_size
        done = 0
        while done < size and (block := os.pread(source, min(_BLOCK, size - done), done)):
            file.write(block)
            done += len(block)
    return done
